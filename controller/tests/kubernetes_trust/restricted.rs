//! The controller as it is to run in a pod: of no user that may do anything, without any capability, unable to gain one,
//! and with a root that cannot be written to.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use weft_apiserver::Store;

use crate::stage::{DEADLINE, Stage};

/// Replaces itself by a program, restricted: what the `restricted` Pod Security Standard and
/// `readOnlyRootFilesystem` ask for, as far as it is a process's.
const RESTRICTED: &str = "mount -o remount,bind,ro / && ! touch /weft-can-write 2> /dev/null && \
    exec setpriv --reuid 65532 --regid 65532 --clear-groups --no-new-privs --inh-caps=-all \
    --ambient-caps=-all --bounding-set=-all \"$@\"";

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// A field of its `/proc/PID/status`.
    fn status(&self, field: &str) -> String {
        let path = format!("/proc/{}/status", self.0.id());
        let text = std::fs::read_to_string(path).expect("it runs");
        let line = text.lines().find_map(|it| it.strip_prefix(field));
        let words = line.expect("there").split_whitespace();
        words.collect::<Vec<_>>().join(" ")
    }
}

async fn ready(admin: &str) -> bool {
    let Ok(mut stream) = tokio::net::TcpStream::connect(admin).await else {
        return false;
    };
    let mut answer = String::new();
    let request = b"GET /ready HTTP/1.0\r\n\r\n";
    let sent = stream.write_all(request).await;
    sent.is_ok()
        && stream.read_to_string(&mut answer).await.is_ok()
        && answer.starts_with("HTTP/1.0 200 ")
}

#[tokio::test(flavor = "multi_thread")]
async fn it_needs_no_right_of_a_process() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: nothing can be taken away");
        return;
    }
    let stage = Stage::with(Store::of_mesh(), &[]).await;
    let (folder, kubeconfig) = (stage.folder.path(), stage.folder.path().join("kubeconfig"));
    for (path, mode) in [(folder, 0o755), (kubeconfig.as_path(), 0o644)] {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, permissions).expect("its own");
    }
    // Where everybody may read and run it.
    let program = folder.join("weft-controller");
    std::fs::copy(env!("CARGO_BIN_EXE_weft-controller"), &program).expect("copied");
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-ec", RESTRICTED, "sh"])
        .arg(&program)
        .args(["run", "--source", "kubernetes", "--kubeconfig"])
        .arg(&kubeconfig)
        .args(["--namespace", "weft-system", "--log-format", "json"])
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .args(["--webhook", "127.0.0.1:0"])
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map(Running)
        .expect("started");
    let stdout = BufReader::new(child.0.stdout.take().expect("piped"));
    let stderr = BufReader::new(child.0.stderr.take().expect("piped"));
    let (sender, mut lines) = tokio::sync::mpsc::unbounded_channel();
    let errors = sender.clone();
    std::thread::spawn(move || {
        stdout
            .lines()
            .map_while(Result::ok)
            .all(|it| sender.send(it).is_ok())
    });
    std::thread::spawn(move || {
        stderr
            .lines()
            .map_while(Result::ok)
            .all(|it| errors.send(it).is_ok())
    });
    let mut said = vec![];
    let starting = async {
        while let Some(line) = lines.recv().await {
            let found = line.split_once("\"admin\":\"").map(|(_, it)| it.to_owned());
            said.push(line);
            if let Some((admin, _)) = found.as_deref().and_then(|it| it.split_once('"')) {
                return Some(admin.to_owned());
            }
        }
        None
    };
    let admin = tokio::time::timeout(DEADLINE, starting).await;
    let admin = admin.ok().flatten();
    let admin = admin.unwrap_or_else(|| panic!("it did not start: {said:#?}"));
    let becoming = async {
        while !ready(&admin).await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let became = tokio::time::timeout(DEADLINE, becoming).await;
    assert!(became.is_ok(), "not ready: {said:#?}");
    assert_eq!(child.status("Uid:"), "65532 65532 65532 65532");
    assert_eq!(child.status("NoNewPrivs:"), "1");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(child.status(set), "0000000000000000", "{set}");
    }
}

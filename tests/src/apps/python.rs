//! Python's own HTTP server.

use anyhow::Result;

use crate::command::Process;
use crate::pod::Pod;

/// Starts `python3 -m http.server` on all IPv4 addresses; `GET /` answers `hello from <pod>`.
pub fn python_http_server(pod: &Pod, port: u16) -> Result<Process> {
    let root = pod.dir().join("python-root");
    std::fs::create_dir_all(&root)?;
    let page = format!("hello from {}\n", pod.name());
    std::fs::write(root.join("index.html"), page)?;
    let mut process = pod
        .command("python3")?
        .args(["-u", "-m", "http.server", &port.to_string()])
        .args(["--protocol", "HTTP/1.1", "--bind", "0.0.0.0"])
        .arg("--directory")
        .arg(&root)
        .spawn()?;
    process.wait_listening(port)?;
    Ok(process)
}

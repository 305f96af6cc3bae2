//! nginx, with a configuration and an access log of its own.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use super::bracketed;
use crate::command::Process;
use crate::pod::Pod;
use crate::wait::wait_for;

/// A running nginx.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
    root: PathBuf,
    access_log: PathBuf,
    /// While it is there, all requests to one that is breakable fail.
    broken: PathBuf,
}

/// What nginx saw of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLine {
    /// The client, as `accept` and `getpeername` show it.
    pub client: SocketAddr,
    /// The address the connection came to.
    pub server: SocketAddr,
    /// The request's path.
    pub path: String,
}

impl Nginx {
    /// Listens on all addresses, IPv4 and IPv6.
    pub fn start(pod: &Pod, port: u16) -> Result<Nginx> {
        let addresses = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        Nginx::start_on(pod, &addresses, port)
    }

    /// Listens on all addresses, and on `http2_port` for HTTP/2 with prior knowledge.
    pub fn start_with_http2(pod: &Pod, port: u16, http2_port: u16) -> Result<Nginx> {
        let addresses = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let further = format!("listen 0.0.0.0:{http2_port} http2;");
        Nginx::start_with(pod, &addresses, port, &further)
    }

    /// Listens on all addresses, and answers 503 while it is to [break down](Self::break_down).
    pub fn start_breakable(pod: &Pod, port: u16) -> Result<Nginx> {
        let addresses = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let further = "if (-f $document_root/../broken) { return 503; }";
        Nginx::start_with(pod, &addresses, port, further)
    }

    /// Lets one that is breakable fail, or not any more.
    pub fn break_down(&self, is_broken: bool) -> Result<()> {
        match is_broken {
            true => fs::write(&self.broken, "")?,
            false => fs::remove_file(&self.broken)?,
        }
        Ok(())
    }

    /// Listens on these addresses. `GET /` answers `hello from <pod>`.
    pub fn start_on(pod: &Pod, addresses: &[IpAddr], port: u16) -> Result<Nginx> {
        Nginx::start_with(pod, addresses, port, "")
    }

    fn start_with(pod: &Pod, addresses: &[IpAddr], port: u16, further: &str) -> Result<Nginx> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = pod
            .dir()
            .join(format!("nginx-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        let root = dir.join("root");
        fs::create_dir_all(&root)?;
        fs::write(
            root.join("index.html"),
            format!("hello from {}\n", pod.name()),
        )?;
        let listen: Vec<String> = addresses
            .iter()
            .map(|address| match address {
                IpAddr::V4(_) => format!("listen {}:{port};", bracketed(*address)),
                IpAddr::V6(_) => format!("listen {}:{port} ipv6only=on;", bracketed(*address)),
            })
            .collect();
        let config = dir.join("nginx.conf");
        fs::write(
            &config,
            configuration(&dir, &listen.join("\n    "), further),
        )?;
        let mut process = pod
            .command("nginx")?
            .args([
                "-p",
                &dir.display().to_string(),
                "-c",
                &config.display().to_string(),
            ])
            .args(["-e", &dir.join("error.log").display().to_string()])
            .spawn()?;
        process.wait_listening(port)?;
        Ok(Nginx {
            process,
            root,
            access_log: dir.join("access.log"),
            broken: dir.join("broken"),
        })
    }

    /// Puts a file where `GET /<name>` finds it.
    pub fn add_file(&self, name: &str, content: &str) -> Result<()> {
        Ok(fs::write(self.root.join(name), content)?)
    }

    /// All requests so far.
    pub fn access_log(&self) -> Result<Vec<AccessLine>> {
        let text = fs::read_to_string(&self.access_log).unwrap_or_default();
        text.lines()
            .map(|line| parse_line(line).with_context(|| format!("reading {line}")))
            .collect()
    }

    /// Waits for the line of a request for this path (without its slash).
    pub fn wait_for_request(&self, path: &str) -> Result<AccessLine> {
        let wanted = format!("/{path}");
        wait_for(
            &format!("nginx to log {wanted}"),
            Duration::from_secs(5),
            || {
                Ok(self
                    .access_log()?
                    .into_iter()
                    .find(|line| line.path == wanted))
            },
        )
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ends it in order.
    pub fn stop(mut self) -> Result<()> {
        self.process.stop(Duration::from_secs(5)).map(drop)
    }
}

fn configuration(dir: &Path, listen: &str, further: &str) -> String {
    let dir = dir.display();
    format!(
        "daemon off;
user root;
master_process off;
pid {dir}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
  log_format weft '$remote_addr|$remote_port|$server_addr|$server_port|$uri';
  access_log {dir}/access.log weft;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  default_type text/plain;
  server {{
    {listen}
    root {dir}/root;
    {further}
  }}
}}
"
    )
}

fn parse_line(line: &str) -> Result<AccessLine> {
    let fields: Vec<&str> = line.split('|').collect();
    let [client, client_port, server, server_port, path] = fields.as_slice() else {
        anyhow::bail!("five fields expected");
    };
    Ok(AccessLine {
        client: SocketAddr::new(client.parse()?, client_port.parse()?),
        server: SocketAddr::new(server.parse()?, server_port.parse()?),
        path: (*path).to_owned(),
    })
}

//! The API server as a program: serves the manifests of a folder, and the EndpointSlices that follow
//! from them, until it is killed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use weft_apiserver::folder::Folder;
use weft_apiserver::{Options, Server, Store, Tls};

/// A small Kubernetes API server for tests.
#[derive(Debug, Parser)]
#[command(name = "weft-apiserver")]
struct Arguments {
    /// Folder of manifests; followed.
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
    /// Where to listen (TLS).
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:6443")]
    listen: SocketAddr,
    /// Where to listen in plaintext too, for everybody: for tests that look, and those that are kubelets.
    #[arg(long, value_name = "ADDR:PORT")]
    plain: Option<SocketAddr>,
    /// Where to keep what clients make, for the next one, as etcd does.
    #[arg(long, value_name = "FILE")]
    kept: Option<PathBuf>,
    /// Where to write a kubeconfig, once the folder was read and the port is open. The server's certificate is kept
    /// beside it, for the next one.
    #[arg(long, value_name = "FILE")]
    kubeconfig: PathBuf,
    /// A user who may do what roles in the folder say, and where to write their kubeconfig.
    #[arg(long, value_name = "NAME=FILE", value_parser = user)]
    user: Vec<(String, PathBuf)>,
}

fn user(text: &str) -> Result<(String, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or("NAME=FILE is needed")?;
    Ok((name.to_owned(), file.into()))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let store = Store::of_mesh();
    let mut folder = Folder::new(arguments.folder);
    folder.look(&store)?;
    if let Some(file) = arguments.kept {
        store.keep_in(file)?;
    }
    let address = arguments.listen.ip().to_string();
    let names = [address.as_str()];
    let options = Options {
        token: Some("token-of-the-controller".to_owned()),
        tls: Some(Tls::kept_in(
            &arguments.kubeconfig.with_extension("pem"),
            &names,
        )?),
        users: arguments
            .user
            .iter()
            .map(|(it, _)| (token_of(it), it.clone()))
            .collect(),
        ..Options::default()
    };
    let server = Server::start(store.clone(), arguments.listen, options).await?;
    let _plain = match arguments.plain {
        Some(address) => Some(Server::start(store.clone(), address, Options::default()).await?),
        None => None,
    };
    for (name, file) in &arguments.user {
        write(file, &server.kubeconfig_of(&token_of(name)))?;
    }
    write(&arguments.kubeconfig, &server.kubeconfig())?;
    println!("listening on {}", server.address());
    folder.follow(&store).await;
    Ok(())
}

fn token_of(user: &str) -> String {
    format!("token-of-{user}")
}

fn write(file: &Path, kubeconfig: &str) -> anyhow::Result<()> {
    // At once: who reads it may be starting.
    let temporary = file.with_extension("new");
    std::fs::write(&temporary, kubeconfig)
        .and_then(|()| std::fs::rename(&temporary, file))
        .with_context(|| format!("writing {}", file.display()))
}

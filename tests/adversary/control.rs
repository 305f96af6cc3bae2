//! Somebody has a node's join token, and speaks to the controller by it.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rcgen::{CertificateParams, KeyPair, SanType};
use tokio_stream::StreamExt;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};
use weft_proto::v1::agent_message::Message as FromAgent;
use weft_proto::v1::control_client::ControlClient;
use weft_proto::v1::controller_message::Message as FromController;
use weft_proto::v1::{self, Kind, SignRequest};
use weft_proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION};
use weft_tests::pki::spiffe_id;

use crate::stage::Stage;

/// Asks for certificates of workloads on other nodes, by every way of writing their names. It gets those of
/// its own node's meshed pods, as the node's agent would, and no others.
pub(crate) fn certificates(stage: &Stage) -> Result<()> {
    // The control: what runs on the node.
    let chain = stage_sign(stage, "default", "friend", None)?;
    ensure!(named(chain)? == stage.friend.identity());
    let denied = |namespace: &str, account: &str| -> Result<()> {
        let refused = stage_sign(stage, namespace, account, None);
        let Err(status) = refused else {
            anyhow::bail!("{namespace}/{account} was signed");
        };
        let codes = [Code::PermissionDenied, Code::InvalidArgument];
        ensure!(
            codes.contains(&status.code()),
            "{namespace}/{account}: {status:?}"
        );
        Ok(())
    };
    for account in ["target", "outside", "default", "weft-agent", "nobody"] {
        denied("default", account)?;
    }
    let odd = [
        ("default", "Friend"),
        ("default", "friend "),
        ("default", "friend\0"),
        ("default", ""),
        ("", "friend"),
        ("kube-system", "friend"),
        ("default/sa/friend", "x"),
        ("default", "../../default/sa/target"),
        ("default", "friend/../target"),
        ("*", "*"),
        ("default", "ｆriend"),
        ("default", "friend%2ftarget"),
    ];
    odd.into_iter()
        .try_for_each(|(namespace, account)| denied(namespace, account))?;
    denied("default", &"x".repeat(60_000))
}

/// Puts another identity into the request that is signed: subject, alternative names, a wish to be an
/// authority. What comes back names the account that was asked for and nothing else.
pub(crate) fn requests(stage: &Stage) -> Result<()> {
    let mut params = CertificateParams::new(vec!["weft-controller".to_owned()])?;
    let target = stage.target.identity();
    params
        .subject_alt_names
        .push(SanType::URI(target.as_str().try_into()?));
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate()?;
    match params.serialize_request(&key) {
        Ok(request) => match stage_sign(stage, "default", "friend", Some(request.der().to_vec())) {
            Ok(chain) => {
                let leaf = chain.first().context("no leaf")?;
                ensure!(!contains(leaf, target.as_bytes()), "it names the target");
                ensure!(
                    !contains(leaf, b"weft-controller"),
                    "it names the controller"
                );
                let (_, parsed) = x509_parser::parse_x509_certificate(leaf)?;
                ensure!(!parsed.is_ca(), "it is an authority");
                ensure!(named(chain)? == stage.friend.identity());
            }
            Err(status) => ensure!(status.code() == Code::InvalidArgument, "{status:?}"),
        },
        // Some of it cannot be asked for with this library: then without.
        Err(error) => ensure!(!error.to_string().is_empty()),
    }
    for garbage in [
        vec![],
        vec![0x30; 100],
        vec![0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
        vec![7; 9000],
    ] {
        let refused = stage_sign(stage, "default", "friend", Some(garbage));
        ensure!(refused.is_err_and(|it| it.code() == Code::InvalidArgument));
    }
    // A good request of which a bit was changed: its signature is not by its key any more.
    let mut request = plain_request(&key)?;
    let last = request.len() - 1;
    request[last] ^= 1;
    let refused = stage_sign(stage, "default", "friend", Some(request));
    ensure!(refused.is_err_and(|it| it.code() == Code::InvalidArgument));
    Ok(())
}

/// Says hello as the other node, with a hello as its agent would send it. It is denied, and the other node's
/// agent keeps its stream.
pub(crate) fn hello(stage: &Stage) -> Result<()> {
    let connects = || -> Result<f64> {
        Ok(stage
            .cluster
            .node(1)
            .metrics()?
            .sum("weft_control_connects_total", &[]))
    };
    let before = connects()?;
    let told = subscribe(stage, stage.cluster.node(0).join_token(), hello_of("n1"), 1)?;
    ensure!(told.is_err_and(|it| it.code() == Code::PermissionDenied));
    for bad in [
        v1::Hello {
            protocol: PROTOCOL_VERSION + 1,
            ..hello_of("n0")
        },
        hello_of(""),
        hello_of("N0"),
        hello_of("n0\0"),
    ] {
        let told = subscribe(stage, stage.cluster.node(0).join_token(), bad.clone(), 1)?;
        ensure!(told.is_err(), "{bad:?} was accepted");
    }
    ensure!(connects()? == before, "the other node's stream was ended");
    Ok(())
}

/// Subscribes as the node whose token it has, and reads everything. It is told what every agent is told, and
/// of policies and pods' details its own node's only.
pub(crate) fn secrets(stage: &Stage) -> Result<()> {
    let told = subscribe(
        stage,
        stage.cluster.node(0).join_token(),
        hello_of("n0"),
        usize::MAX,
    )?;
    let told = told.map_err(|status| anyhow::anyhow!("{status:?}"))?;
    let names = |kind: Kind| -> Vec<&str> {
        let of_kind = told.iter().filter_map(|it| it.key.as_ref());
        of_kind
            .filter(|it| it.kind == kind as i32)
            .map(|it| it.name.as_str())
            .collect()
    };
    // The control: it is told of its own.
    ensure!(
        names(Kind::NodePod).iter().any(|it| it.contains("friend")),
        "{:?}",
        names(Kind::NodePod)
    );
    for kind in [Kind::NodePod, Kind::WorkloadPolicy, Kind::Server] {
        for name in names(kind) {
            let others = ["target", "near", "guarded"];
            ensure!(
                !others.iter().any(|it| name.contains(it)),
                "{kind:?} {name} is another node's"
            );
        }
    }
    for resource in &told {
        let bytes = format!("{resource:?}");
        ensure!(
            !bytes.contains("PRIVATE KEY") && !bytes.contains(stage.cluster.node(1).join_token())
        );
    }
    Ok(())
}

/// Calls without a token, with wrong ones and with odd ones.
pub(crate) fn no_token(stage: &Stage) -> Result<()> {
    let good = stage.cluster.node(0).join_token().to_owned();
    let cut = &good[..good.len() - 1];
    let longer = format!("{good}0");
    for token in [
        "",
        "x",
        cut,
        &longer,
        &good.to_uppercase(),
        &format!(" {good}"),
        &"x".repeat(4000),
    ] {
        let refused = sign(stage, token, "default", "friend", None)?;
        ensure!(
            refused.is_err_and(|it| it.code() == Code::Unauthenticated),
            "the token {token:?} was accepted"
        );
    }
    ensure!(
        sign(stage, &good, "default", "friend", None)?.is_ok(),
        "and the good one was not"
    );
    Ok(())
}

/// Opens connection after connection with the token and holds them. They are limited per node, so that other
/// nodes' agents and this one's renewals go on.
pub(crate) fn connections(stage: &Stage) -> Result<()> {
    let token = stage.cluster.node(0).join_token().to_owned();
    let (opened, refused) = run(stage, async move |stage| {
        let mut held = Vec::new();
        let mut refused = 0;
        for _ in 0..40 {
            let mut client = client(stage).await?;
            match client
                .sign(request(&token, "default", "friend", csr()?)?)
                .await
            {
                Ok(_) => held.push(client),
                Err(_) => refused += 1,
            }
        }
        // While they are held, the other node is served.
        let other = stage.cluster.node(1).join_token().to_owned();
        let mut third = client(stage).await?;
        let signed = third
            .sign(request(&other, "default", "target", csr()?)?)
            .await;
        ensure!(signed.is_ok(), "the other node is not served: {signed:?}");
        Ok((held.len(), refused))
    })?;
    ensure!(
        opened > 0 && refused > 0,
        "{opened} were opened, {refused} refused"
    );
    Ok(())
}

fn stage_sign(
    stage: &Stage,
    namespace: &str,
    account: &str,
    csr: Option<Vec<u8>>,
) -> Result<Vec<Vec<u8>>, Status> {
    let token = stage.cluster.node(0).join_token();
    let signed = sign(stage, token, namespace, account, csr);
    signed.unwrap_or_else(|error| Err(Status::unknown(format!("{error:#}"))))
}

/// The outer error: nobody could be asked.
fn sign(
    stage: &Stage,
    token: &str,
    namespace: &str,
    account: &str,
    request_bytes: Option<Vec<u8>>,
) -> Result<Result<Vec<Vec<u8>>, Status>> {
    let bytes = match request_bytes {
        Some(bytes) => bytes,
        None => csr()?,
    };
    let asked = request(token, namespace, account, bytes)?;
    run(stage, async move |stage| {
        let signed = client(stage).await?.sign(asked).await;
        Ok(signed.map(|it| it.into_inner().chain))
    })
}

/// What the controller tells to this hello: so many resources at least, or all until it is complete.
fn subscribe(
    stage: &Stage,
    token: &str,
    hello: v1::Hello,
    least: usize,
) -> Result<Result<Vec<v1::Resource>, Status>> {
    let first = v1::AgentMessage {
        message: Some(FromAgent::Hello(hello)),
    };
    let outgoing = tokio_stream::iter([first]).chain(tokio_stream::pending());
    let asked = with_token(Request::new(outgoing), token)?;
    run(stage, async move |stage| {
        let mut client = client(stage).await?;
        let mut incoming = match client.subscribe(asked).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => return Ok(Err(status)),
        };
        let mut told = Vec::new();
        loop {
            match incoming.message().await {
                Err(status) => return Ok(Err(status)),
                Ok(None) => return Ok(Ok(told)),
                Ok(Some(message)) => {
                    let Some(FromController::Push(push)) = message.message else {
                        continue;
                    };
                    told.extend(push.changed);
                    if push.complete || told.len() >= least {
                        return Ok(Ok(told));
                    }
                }
            }
        }
    })
}

fn hello_of(node: &str) -> v1::Hello {
    v1::Hello {
        node: node.to_owned(),
        agent_version: "stolen".to_owned(),
        protocol: PROTOCOL_VERSION,
        held: vec![],
        incarnation: 0x5701_e700,
        ..v1::Hello::default()
    }
}

/// From the network of the node whose token was stolen.
fn run<'a, T: Send, F: Future<Output = Result<T>>>(
    stage: &'a Stage,
    work: impl FnOnce(&'a Stage) -> F + Send,
) -> Result<T> {
    stage.cluster.node(0).netns().run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let limit = Duration::from_secs(20);
            tokio::time::timeout(limit, work(stage))
                .await
                .context("no answer")?
        })
    })?
}

async fn client(stage: &Stage) -> Result<ControlClient<Channel>> {
    let controller = stage.cluster.controller()?;
    let roots = std::fs::read(controller.ca_dir().join("ca.crt"))?;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(roots))
        .domain_name("weft-controller");
    let endpoint = Endpoint::from_shared(format!("https://{}", controller.address()))?;
    let channel = endpoint.tls_config(tls)?.connect().await?;
    Ok(ControlClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

fn request(
    token: &str,
    namespace: &str,
    account: &str,
    csr: Vec<u8>,
) -> Result<Request<SignRequest>> {
    let request = SignRequest {
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
        csr,
    };
    with_token(Request::new(request), token)
}

fn with_token<T>(mut request: Request<T>, token: &str) -> Result<Request<T>> {
    let header = format!("Bearer {token}").parse()?;
    request.metadata_mut().insert("authorization", header);
    Ok(request)
}

fn csr() -> Result<Vec<u8>> {
    plain_request(&KeyPair::generate()?)
}

fn plain_request(key: &KeyPair) -> Result<Vec<u8>> {
    let params = CertificateParams::new(Vec::<String>::new())?;
    Ok(params.serialize_request(key)?.der().to_vec())
}

fn named(chain: Vec<Vec<u8>>) -> Result<String> {
    let leaf = chain.into_iter().next().context("no leaf")?;
    spiffe_id(&leaf.into())
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|it| it == needle)
}

//! A controller that serves, and somebody with a token: what tests of the whole controller share.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use rcgen::{CertificateParams, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status, Streaming};
use weft_controller::config::{Cli, Command};
use weft_controller::run::Controller;
use weft_proto::v1::agent_message;
use weft_proto::v1::control_client::ControlClient;
use weft_proto::{CONTROLLER_NAME, PROTOCOL_VERSION, v1};

/// A controller that serves; ended when it is dropped.
pub(crate) struct Served {
    pub(crate) address: SocketAddr,
    admin: SocketAddr,
    /// Where it looks at objects, if it does.
    pub(crate) webhook: Option<SocketAddr>,
    /// Where people ask, if they can.
    #[allow(dead_code, reason = "not all ask there")]
    pub(crate) inspection: Option<SocketAddr>,
    /// Nothing may take longer.
    deadline: Duration,
    pub(crate) stop: CancellationToken,
    /// None once somebody waits for its end.
    pub(crate) serving: Option<JoinHandle<anyhow::Result<()>>>,
}

/// Both directions of an agent's stream.
pub(crate) type Both = (
    mpsc::Sender<v1::AgentMessage>,
    Streaming<v1::ControllerMessage>,
);

impl Served {
    /// Starts one with these flags besides those that all have.
    pub(crate) async fn start(further: &[&str], deadline: Duration) -> Self {
        let mut arguments = vec!["weft-controller", "run"];
        arguments.extend(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        arguments.extend(["--pod-range", "10.1.0.0/16"]);
        arguments.extend(["--service-range", "10.2.0.0/16"]);
        arguments.extend(further);
        let Command::Run(config) = Cli::parse_from(arguments).command else {
            panic!("not run");
        };
        let stop = CancellationToken::new();
        let controller = Controller::open(*config, stop.clone()).await;
        let controller = controller.expect("opened");
        Self {
            address: controller.address().expect("bound"),
            admin: controller.admin_address().expect("bound"),
            webhook: controller.webhook_address(),
            inspection: controller.inspection_address(),
            deadline,
            serving: Some(tokio::spawn(controller.serve())),
            stop,
        }
    }

    /// A client that knows it by these roots.
    pub(crate) async fn client(&self, roots: &str) -> ControlClient<Channel> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(roots))
            .domain_name(CONTROLLER_NAME);
        let channel = Endpoint::from_shared(format!("https://{}", self.address))
            .expect("an address")
            .tls_config(tls)
            .expect("a configuration")
            .connect()
            .await;
        ControlClient::new(channel.expect("connected"))
    }

    /// What the administrative port answers, head included.
    pub(crate) async fn get(&self, path: &str) -> String {
        let stream = tokio::net::TcpStream::connect(self.admin).await;
        let mut stream = stream.expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut response = String::new();
        stream.read_to_string(&mut response).await.expect("read");
        response
    }

    /// Waits until the administrative port says something.
    pub(crate) async fn until(&self, path: &str, says: &str) {
        let waiting = async {
            while !self.get(path).await.contains(says) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(self.deadline, waiting).await.is_err() {
            panic!("{path} never said {says:?}:\n{}", self.get(path).await);
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
    }
}

/// What an agent says first.
pub(crate) fn hello(node: &str, held: Vec<v1::Held>) -> v1::Hello {
    v1::Hello {
        node: node.to_owned(),
        agent_version: "test".to_owned(),
        protocol: PROTOCOL_VERSION,
        held,
        incarnation: rand::random(),
        ..v1::Hello::default()
    }
}

/// Opens an agent's stream.
pub(crate) async fn subscribe(
    client: &mut ControlClient<Channel>,
    token: &str,
    hello: v1::Hello,
) -> Result<Both, Status> {
    let (sender, receiver) = mpsc::channel(16);
    let message = Some(agent_message::Message::Hello(hello));
    let message = v1::AgentMessage { message };
    sender.send(message).await.expect("open");
    let request = with_token(ReceiverStream::new(receiver), token);
    let response = client.subscribe(request).await?;
    Ok((sender, response.into_inner()))
}

/// Asks for a certificate of a service account.
pub(crate) async fn sign(
    client: &mut ControlClient<Channel>,
    token: &str,
    (namespace, account): (&str, &str),
) -> Result<Vec<Vec<u8>>, Status> {
    let key = KeyPair::generate().expect("made");
    let csr = CertificateParams::default().serialize_request(&key);
    let request = v1::SignRequest {
        csr: csr.expect("made").der().to_vec(),
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
    };
    let signed = client.sign(with_token(request, token)).await?;
    Ok(signed.into_inner().chain)
}

/// A request with a token.
pub(crate) fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::<Ascii>::try_from(format!("Bearer {token}"));
    let metadata = request.metadata_mut();
    metadata.insert("authorization", value.expect("what a header may have"));
    request
}

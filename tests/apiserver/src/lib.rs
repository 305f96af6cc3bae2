//! A small Kubernetes API server for tests: what a controller that lists and watches sees of a real one,
//! over objects that a test or a folder of manifests gives it, and with its failures on request.
//!
//! No maintained library of this kind was found for Rust; what there is answers single requests from a
//! script, and the point here is what happens between requests.
//!
//! | asked | answered as by the real one | not as the real one |
//! |---|---|---|
//! | `/readyz`, `/livez`, `/healthz`, `/version` | text, 500 while not ready | no list of single checks |
//! | `/api`, `/api/v1`, `/apis`, `/apis/G`, `/apis/G/V` | the lists of discovery; kinds can come and go at any time | no aggregated discovery; the hash and order of versions are not computed |
//! | GET of a collection, of a namespace or of all | pages by `limit` and `continue`, all of one `resourceVersion`; 410 `Expired` for a page of before a compaction; items of built-in kinds without `apiVersion` and `kind`; `fieldSelector=metadata.name=` | other fields are refused with 400; Secrets are listed and watched by name only |
//! | GET of a collection with `labelSelector` | what has all of these labels | only equality |
//! | GET of an object | the object, or 404 | |
//! | `watch=true` | changes after `resourceVersion`, whole objects, one per line; without one, first all that is there; `BOOKMARK`s, and one before `timeoutSeconds` end it; `ERROR` with code 410 for a version of before a compaction; nothing at all until a version that is yet to come, as after a restore | bookmarks as often as a test wants; no `sendInitialEvents` |
//! | several versions of a kind | one object, shown in the version that is asked for | nothing is converted but `apiVersion` |
//! | without a token that it knows | 401 with a `Status` | no other way to say who one is; of users with tokens, the roles in the store are asked |
//! | kinds a test forbids | 403 with the real one's message | |
//! | what roles do not allow, where there are some | the same; lists and watches of one name count as of that name | roles of one account, as manifests give them; no groups, no wildcards |
//! | `/openapi/v3` | which kinds can be patched, and that fields are checked here: as much as kubectl looks for | no schemas, no `/openapi/v2` |
//! | POST, PUT, PATCH of an object | a `resourceVersion` that is not the last is a 409, as is a name that is taken; a write that changes nothing is none; of kinds with a status, that stays and `generation` counts; Events are checked; `dryRun=All` | merge patches, and strategic ones of built-in kinds; nothing is applied by the server itself (`--server-side`) |
//! | the same | `fieldValidation`: fields that the kind does not have are refused, or go with a warning; so is what lacks what it needs, or is of another type; of custom kinds with a definition in the store, all that its schema and rules say | of built-in kinds no values are looked at; no defaults |
//! | the same, of a CustomResourceDefinition | its kind is served from then on, and its status says so; a schema that is not structural is refused, and rules that are none, or may cost more than a real one lets them | nothing else of it is looked at; one version is as good as another |
//! | DELETE of an object | it is gone; a Namespace a moment later, with all that is in it, and nothing new gets into it meanwhile; with a definition its objects | no finalizers and owners, no collections |
//! | the same, where ValidatingWebhookConfigurations are for it | each webhook is asked, by `rules`, `matchPolicy`, `namespaceSelector` and `objectSelector`: at a ready endpoint of its Service, under that one's name, verified by `caBundle`, within `timeoutSeconds`; what it denies, and what `failurePolicy` then says, with the real one's status and message; its warnings in the answer's `Warning` | no `url`, no `matchConditions`, no answer from the system's roots; a connection for each call; all writers have one name; neither what tests and folders write nor a deletion is asked about |
//! | PATCH of `/status` | changes the status and nothing else: `generation` stays, watches are told; 404 for a kind without | nothing is checked by a schema |
//! | POST of a TokenReview | whether a token of [`tokens`] is signed, not expired, for one of the audiences, and its pod is there | nobody else's tokens |
//! | POST of a TokenRequest | a token for the audiences and the time that are asked for, bound to a pod that is there, of the service account, with that uid; and to its node; or bound to nothing, of an account that is there | may last less than ten minutes |
//! | POST of a SubjectAccessReview | whether the roles that are in the store, and bound there to the user, allow it | no groups, aggregated roles and wildcards; paths that are no resource's are not known |
//! | GET of `/portforward` of a pod | a WebSocket (`v4.channel.k8s.io`) to a port of the pod's loopback | that loopback is the server's own; one port at a time; no SPDY |
//!
//! No defaults are filled in, and what tests and folders write is taken as it is; `uid`, `resourceVersion` and `creationTimestamp`
//! are. [`slices`] writes EndpointSlices as the controller manager's does. Only a real cluster proves
//! the rest: other admission, defaults, roles, priority and fairness, caches of several API servers that are not
//! equally fresh, and load.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod admission;
mod answer;
pub mod cost;
mod definitions;
mod deleting;
mod faults;
mod fields;
pub mod folder;
mod forwarding;
mod kinds;
mod openapi;
mod rights;
mod schema;
pub mod slices;
mod store;
mod strategic;
pub mod structural;
mod tls;
pub mod tokens;
mod watching;
mod writing;

pub use faults::{Asked, Fault};
pub use kinds::Kind;
pub use rights::{Access, Right, Rights};
pub use schema::Schema;
pub use store::Store;
pub use tls::Tls;

/// A running API server. Its objects outlive it: they are the store's.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
    shared: Arc<Shared>,
}

/// How a server is set up.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The bearer token that requests must carry; none: everybody may read.
    pub token: Option<String>,
    /// Serve over TLS.
    pub tls: Option<Tls>,
    /// What may be done with that token; none: everything.
    pub rights: Option<Rights>,
    /// Tokens of further users, by name. What they may do is said by roles and bindings in the store.
    pub users: BTreeMap<String, String>,
}

/// What a server does beside what it should, and other things that tests choose.
#[derive(Debug)]
pub struct Behaviour {
    /// Whether `/readyz` says so.
    pub ready: bool,
    /// Collections, by their plural name, that are refused with this status.
    pub refused: HashMap<String, u16>,
    /// Collections, by their plural name, whose next writes are answered with these statuses, the last one first.
    pub failed_writes: HashMap<String, Vec<u16>>,
    /// What happens to the next events of watches, by the plural name of their collection.
    pub cuts: HashMap<String, Vec<Cut>>,
    /// Requests for objects that fail; the first that is like a request answers it.
    pub faults: Vec<Fault>,
    /// Collections, by their plural name, of whose lists no page but the first is answered yet.
    pub held_pages: HashSet<String>,
    /// How many of the next changes of a collection, by its plural name, watches do not say.
    pub swallowed: HashMap<String, usize>,
    /// API groups whose discovery fails with 503.
    pub undiscoverable: Vec<String>,
    /// With which status that is not said.
    pub undiscoverable_as: u16,
    /// API groups whose versions are named, and then not known, with 404.
    pub named_only: HashSet<String>,
    /// API groups that nothing is said of, and whose objects are served.
    pub hidden: HashSet<String>,
    /// No page is longer than this, whatever is asked for.
    pub longest_page: usize,
    /// How often watches get a bookmark.
    pub bookmark_every: Duration,
    /// Watches end after this, whatever is asked for.
    pub longest_watch: Duration,
    /// Whether TokenReviews are answered without looking at audiences, as by a server that does not know them.
    pub ignores_audiences: bool,
    /// Whether a watch from a forgotten version is refused with 410, as by what stands before some servers, rather than
    /// begun with an event that says so.
    pub expired_is_refused: bool,
}

/// How a watch ends in the middle of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The connection breaks after half of the line.
    Break,
    /// The answer ends properly after half of the line.
    End,
    /// The connection breaks before the line.
    BreakBefore,
}

/// What all connections of a server share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Arc<Store>,
    pub(crate) options: Options,
    behaviour: Mutex<Behaviour>,
    requests: Mutex<Vec<(Instant, String)>>,
    accesses: Mutex<BTreeSet<Access>>,
    /// Ends all connections when it is cancelled, and is replaced then.
    connections: Mutex<CancellationToken>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            ready: true,
            refused: HashMap::new(),
            failed_writes: HashMap::new(),
            cuts: HashMap::new(),
            faults: vec![],
            held_pages: HashSet::new(),
            swallowed: HashMap::new(),
            undiscoverable: vec![],
            undiscoverable_as: 503,
            named_only: HashSet::new(),
            hidden: HashSet::new(),
            longest_page: usize::MAX,
            bookmark_every: Duration::from_secs(60),
            longest_watch: Duration::from_secs(3600),
            ignores_audiences: false,
            expired_is_refused: false,
        }
    }
}

impl Server {
    /// Starts to serve a store.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn start(
        store: Arc<Store>,
        address: SocketAddr,
        options: Options,
    ) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("listening on {address}"))?;
        let server = Self {
            address: listener.local_addr()?,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            shared: Arc::new(Shared {
                store,
                options,
                behaviour: Mutex::default(),
                requests: Mutex::default(),
                accesses: Mutex::default(),
                connections: Mutex::default(),
            }),
        };
        let (shared, stop) = (server.shared.clone(), server.stop.clone());
        let tasks = server.tasks.clone();
        server.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                        let connection = stop.child_token();
                        tasks.spawn(serve(shared.clone(), stream, connection));
                    }
                }
            }
        });
        Ok(server)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its address as clients write it.
    pub fn url(&self) -> String {
        let scheme = if self.shared.options.tls.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}", self.address)
    }

    /// A kubeconfig for it.
    pub fn kubeconfig(&self) -> String {
        let options = &self.shared.options;
        tls::kubeconfig(&self.url(), options.tls.as_ref(), options.token.as_deref())
    }

    /// The same for one of its users, by their token.
    pub fn kubeconfig_of(&self, token: &str) -> String {
        tls::kubeconfig(&self.url(), self.shared.options.tls.as_ref(), Some(token))
    }

    /// Changes what it does.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.behaviour());
    }

    /// Breaks all connections, as a load balancer does that forgets them.
    pub fn disconnect(&self) {
        let mut connections = locked(&self.shared.connections);
        std::mem::take(&mut *connections).cancel();
    }

    /// The requests so far: path and query; of those that write, method and path.
    pub fn requests(&self) -> Vec<String> {
        let requests = locked(&self.shared.requests);
        requests.iter().map(|(_, it)| it.clone()).collect()
    }

    /// The same, with when each arrived.
    pub fn request_times(&self) -> Vec<(Instant, String)> {
        locked(&self.shared.requests).clone()
    }

    /// What was asked for so far, whether or not it may be done.
    pub fn accesses(&self) -> BTreeSet<Access> {
        locked(&self.shared.accesses).clone()
    }

    /// Ends it: nobody listens any more, and all connections break.
    pub async fn stop(self) {
        self.stop.cancel();
        self.disconnect();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
        self.disconnect();
    }
}

impl Shared {
    pub(crate) fn behaviour(&self) -> MutexGuard<'_, Behaviour> {
        locked(&self.behaviour)
    }

    /// Cancelled when connections are broken.
    pub(crate) fn connections(&self) -> CancellationToken {
        locked(&self.connections).clone()
    }

    pub(crate) fn asks(&self, access: Access) {
        locked(&self.accesses).insert(access);
    }

    pub(crate) fn note(&self, request: String) {
        locked(&self.requests).push((Instant::now(), request));
    }
}

async fn serve(shared: Arc<Shared>, stream: TcpStream, stop: CancellationToken) {
    let broken = shared.connections();
    let tls = shared.options.tls.clone();
    let serving = async {
        match tls {
            None => serve_http(shared, stream).await,
            Some(tls) => {
                if let Ok(stream) = TlsAcceptor::from(tls.server).accept(stream).await {
                    serve_http(shared, stream).await;
                }
            }
        }
    };
    tokio::select! { () = stop.cancelled() => {}, () = broken.cancelled() => {}, () = serving => {} }
}

async fn serve_http(
    shared: Arc<Shared>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) {
    let answer = service_fn(|request| answer::answer(shared.clone(), request));
    let connection = hyper::server::conn::http1::Builder::new();
    // Who is served sees what fails.
    let _ = connection
        .serve_connection(TokioIo::new(stream), answer)
        .with_upgrades()
        .await;
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

use std::sync::atomic::AtomicBool;

use futures::future::BoxFuture;
use rustls_pki_types::CertificateDer;
use tokio::time::Instant;
use weft_proto::Resource;

use super::super::SignError;
use super::super::testing::{Authority, WEB};
use super::*;
use crate::discovery::CallError;
use crate::discovery::testing::cluster;

const ORDER: &str = "spiffe://cluster.local/ns/shop/sa/order";

/// A signer whose behaviour tests change.
struct TestSigner {
    authority: Mutex<Arc<Authority>>,
    /// Certificates end this long from now.
    life: Mutex<Duration>,
    fails: AtomicBool,
    /// Signs for this one instead.
    mixes_up: Mutex<Option<Identity>>,
    asked: Mutex<Vec<Identity>>,
    busy: AtomicUsize,
    most_busy: AtomicUsize,
}

impl Signer for TestSigner {
    fn sign(
        &self,
        identity: Identity,
        request: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, SignError>> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(identity.clone());
            let busy = self.busy.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_busy.fetch_max(busy, Ordering::SeqCst);
            sleep(Duration::from_millis(20)).await;
            self.busy.fetch_sub(1, Ordering::SeqCst);
            if self.fails.load(Ordering::SeqCst) {
                let status = tonic::Status::permission_denied("no such workload");
                return Err(CallError::Refused(status).into());
            }
            let mixed_up = self.mixes_up.lock().unwrap().clone();
            let uri = mixed_up.unwrap_or(identity).to_string();
            let until = SystemTime::now() + *self.life.lock().unwrap();
            let authority = Arc::clone(&self.authority.lock().unwrap());
            Ok(authority.sign(&request, &uri, |it| it.not_after = until.into()))
        })
    }
}

struct World {
    signer: Arc<TestSigner>,
    store: Arc<Store>,
    identities: Arc<Identities>,
    stop: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl World {
    fn new() -> Self {
        let authority = Authority::new();
        let store = Store::new();
        store.apply(vec![cluster(), trust(&[&authority])], vec![]);
        let signer = Arc::new(TestSigner {
            authority: Mutex::new(Arc::new(authority)),
            life: Mutex::new(Duration::from_secs(86400)),
            fails: AtomicBool::new(false),
            mixes_up: Mutex::default(),
            asked: Mutex::default(),
            busy: AtomicUsize::new(0),
            most_busy: AtomicUsize::new(0),
        });
        let as_signer: Arc<dyn Signer> = signer.clone();
        let identities = Identities::new(as_signer, Arc::clone(&store));
        let stop = CancellationToken::new();
        tokio::spawn(Arc::clone(&identities).run(stop.clone()));
        Self {
            signer,
            store,
            identities,
            stop,
        }
    }

    fn want(&self, uris: &[&str]) {
        self.identities
            .want(&uris.iter().map(|it| identity(it)).collect());
    }

    fn serial(&self, uri: &str) -> Option<String> {
        let all = self.identities.status();
        let it = all.into_iter().find(|it| it.identity == identity(uri))?;
        it.serial
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !holds(self) {
            assert!(
                Instant::now() < deadline,
                "{what}: {:?}",
                self.identities.status()
            );
            sleep(Duration::from_millis(10)).await;
        }
    }
}

fn identity(uri: &str) -> Identity {
    uri.parse().expect("valid")
}

fn trust(authorities: &[&Authority]) -> Resource {
    let mut bundle = authorities[0].bundle();
    bundle.roots = authorities
        .iter()
        .flat_map(|it| it.bundle().roots)
        .collect();
    Resource::TrustBundle(bundle)
}

#[tokio::test]
async fn a_client_waits_for_the_first_certificate() {
    let world = World::new();
    let web = identity(WEB);
    let not_ours = world.identities.client(&web, Alpn::WeftH2).await;
    assert!(matches!(not_ours, Err(IdentityError::NotOurs(_))));
    let mut changed = world.identities.changed();
    world.want(&[WEB]);
    assert!(matches!(
        world.identities.server(&web),
        Err(IdentityError::NotYet { .. })
    ));
    let first = world
        .identities
        .client(&web, Alpn::WeftH2)
        .await
        .expect("one");
    let again = world
        .identities
        .client(&web, Alpn::WeftH2)
        .await
        .expect("one");
    assert!(Arc::ptr_eq(&first, &again));
    assert_eq!(first.alpn_protocols, [b"weft-h2/1"]);
    let hbone = world
        .identities
        .client(&web, Alpn::Hbone)
        .await
        .expect("one");
    assert_eq!(hbone.alpn_protocols, [b"h2"]);
    assert!(world.identities.server(&web).is_ok());
    changed.changed().await.expect("told");
    let status = world.identities.status();
    assert_eq!(status[0].state, CertificateState::Held);
    assert!(status[0].serial.is_some() && status[0].last_error.is_none());
    world.want(&[]);
    assert!(matches!(
        world.identities.server(&web),
        Err(IdentityError::NotOurs(_))
    ));
}

#[tokio::test]
async fn what_is_signed_wrongly_is_not_used() {
    let world = World::new();
    let good = Arc::clone(&world.signer.authority.lock().unwrap());
    *world.signer.authority.lock().unwrap() = Arc::new(Authority::new());
    world.want(&[WEB]);
    let error = |world: &World| world.identities.status()[0].last_error.clone();
    world
        .until("foreign", |it| {
            error(it).is_some_and(|it| it.contains("believe"))
        })
        .await;
    *world.signer.authority.lock().unwrap() = good;
    *world.signer.mixes_up.lock().unwrap() = Some(identity(ORDER));
    world
        .until("mixed up", |it| {
            error(it).is_some_and(|it| it.contains(ORDER))
        })
        .await;
    *world.signer.mixes_up.lock().unwrap() = None;
    *world.signer.life.lock().unwrap() = Duration::ZERO;
    world
        .until("expired", |it| {
            error(it).is_some_and(|it| it.contains("expired"))
        })
        .await;
    assert_eq!(
        world.identities.status()[0].state,
        CertificateState::Missing
    );
    assert!(world.identities.status()[0].failures >= 3);
    assert!(world.identities.server(&identity(WEB)).is_err());
    *world.signer.life.lock().unwrap() = Duration::from_secs(3600);
    world.until("recovers", |it| it.serial(WEB).is_some()).await;
    assert_eq!(world.identities.status()[0].failures, 0);
}

#[tokio::test]
async fn certificates_are_renewed_and_the_old_one_stays_until_then() {
    let world = World::new();
    *world.signer.life.lock().unwrap() = Duration::from_secs(6);
    world.want(&[WEB]);
    let web = identity(WEB);
    let before = world
        .identities
        .client(&web, Alpn::WeftH2)
        .await
        .expect("one");
    let first = world.serial(WEB);
    world.signer.fails.store(true, Ordering::SeqCst);
    world
        .until("a renewal fails", |it| {
            it.identities.status()[0].failures > 0
        })
        .await;
    assert_eq!(world.serial(WEB), first);
    assert!(world.identities.server(&web).is_ok());
    world.signer.fails.store(false, Ordering::SeqCst);
    world.until("renewed", |it| it.serial(WEB) != first).await;
    let after = world
        .identities
        .client(&web, Alpn::WeftH2)
        .await
        .expect("one");
    assert!(!Arc::ptr_eq(&before, &after));
}

#[tokio::test]
async fn an_expired_certificate_is_not_used() {
    let world = World::new();
    *world.signer.life.lock().unwrap() = Duration::from_secs(2);
    world.want(&[WEB]);
    let web = identity(WEB);
    world
        .identities
        .client(&web, Alpn::WeftH2)
        .await
        .expect("one");
    world.signer.fails.store(true, Ordering::SeqCst);
    world
        .until("expired", |it| it.identities.server(&web).is_err())
        .await;
    let client = world.identities.client(&web, Alpn::WeftH2).await;
    assert!(matches!(client, Err(IdentityError::Expired { .. })));
    assert_eq!(
        world.identities.status()[0].state,
        CertificateState::Expired
    );
}

#[tokio::test]
async fn a_changed_trust_bundle_rebuilds_and_renews_what_it_does_not_cover() {
    let world = World::new();
    world.want(&[WEB]);
    let web = identity(WEB);
    let first = world
        .identities
        .client(&web, Alpn::WeftH2)
        .await
        .expect("one");
    let serial = world.serial(WEB);
    let old = Arc::clone(&world.signer.authority.lock().unwrap());
    let new = Arc::new(Authority::new());
    // Both are trusted: another verifier, the same certificate.
    let mut changed = world.identities.changed();
    changed.mark_unchanged();
    world.store.apply(vec![trust(&[&old, &new])], vec![]);
    changed.changed().await.expect("told");
    let second = world
        .identities
        .client(&web, Alpn::WeftH2)
        .await
        .expect("one");
    assert!(!Arc::ptr_eq(&first, &second));
    assert_eq!(world.serial(WEB), serial);
    // Only the new one is trusted: renewed at once.
    *world.signer.authority.lock().unwrap() = Arc::clone(&new);
    world.store.apply(vec![trust(&[&new])], vec![]);
    world.until("renewed", |it| it.serial(WEB) != serial).await;
    // Nobody is trusted.
    let domain = weft_proto::Key {
        kind: weft_proto::Kind::TrustBundle,
        name: "cluster.local".to_owned(),
    };
    world.store.apply(vec![], vec![domain]);
    world
        .until("closed", |it| it.identities.server(&web).is_err())
        .await;
}

#[tokio::test]
async fn requests_are_bounded_and_renewals_go_first() {
    let world = World::new();
    let uris: Vec<String> = (0..30)
        .map(|it| format!("spiffe://cluster.local/ns/shop/sa/a{it}"))
        .collect();
    let uris: Vec<&str> = uris.iter().map(String::as_str).collect();
    world.want(&uris);
    world
        .until("all", |it| {
            let all = it.identities.status();
            all.iter().all(|it| it.state == CertificateState::Held)
        })
        .await;
    assert_eq!(world.signer.most_busy.load(Ordering::SeqCst), MAX_ASKING);
    assert_eq!(world.signer.asked.lock().unwrap().len(), uris.len());
}

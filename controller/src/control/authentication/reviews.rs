//! TokenReviews: asks the API server whose a token is. What cannot be a token is not asked about, the same token not
//! twice at a time, and of each address and in all only some are.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::{Semaphore, watch};
use weft_core::{Counts, Name};

use super::Refusal;
use super::pods::AgentPods;
pub use super::proof::Expected;
use super::proof::Proof;
use super::remembered::{DURING_AN_OUTAGE, Fingerprint, Remembered, fingerprint};
use crate::objects::Fault;
use crate::pause::about;
use crate::problems::{Problem, Problems, Scope};
use crate::source::kubernetes::explain;

/// Reviews tokens.
pub struct Reviews {
    api: Api<TokenReview>,
    expected: Expected,
    pods: Arc<AgentPods>,
    problems: Problems,
    remembered: Mutex<Remembered>,
    /// What is being asked.
    asking: Mutex<HashMap<Fingerprint, watch::Receiver<Option<Answer>>>>,
    at_a_time: Semaphore,
    /// Reviews that run or wait, by whose they are.
    of_address: Mutex<Counts<IpAddr>>,
}

type Answer = Result<Proof, Refusal>;

/// Longer than any token of a service account.
const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// Less than a stranger has to show who it is.
const TIMEOUT: Duration = Duration::from_secs(4);
/// Requests to the API server at a time.
const AT_A_TIME: usize = 16;
/// Tokens of one address that are being reviewed, or wait for it.
const OF_AN_ADDRESS: usize = 32;
/// How old an answer may be where the token of an open stream is looked at again,
const OF_A_STREAM: Duration = Duration::from_secs(30);
/// which is about this often.
const LOOK: Duration = Duration::from_secs(60);

impl Reviews {
    /// Asks this API server, for tokens of agents in these pods.
    pub fn new(
        client: Client,
        expected: Expected,
        pods: Arc<AgentPods>,
        problems: Problems,
    ) -> Self {
        Self {
            api: Api::all(client),
            expected,
            pods,
            problems,
            remembered: Mutex::default(),
            asking: Mutex::default(),
            at_a_time: Semaphore::new(AT_A_TIME),
            of_address: Mutex::default(),
        }
    }

    /// What a token proves, by an answer that is no older than this; or, while nobody can be asked, by one of not long
    /// ago.
    pub(super) async fn review(
        self: &Arc<Self>,
        token: &[u8],
        from: IpAddr,
        age: Duration,
    ) -> Result<Proof, Refusal> {
        let text = shape(token).ok_or(Refusal::Malformed)?;
        let fingerprint = fingerprint(token);
        if let Some(answer) = self.remembered(&fingerprint, age) {
            return answer;
        }
        let mut answered = self.ask(fingerprint, text, from)?;
        let answer = match answered.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone(),
            Err(_) => None,
        };
        let unanswered = || Err(Refusal::Unavailable("the review ended".to_owned()));
        match answer.unwrap_or_else(unanswered) {
            Err(refusal) if refusal.is_unclear() => {
                let earlier = self.remembered(&fingerprint, DURING_AN_OUTAGE);
                earlier.unwrap_or(Err(refusal))
            }
            answer => answer,
        }
    }

    /// The node that a proof is of now.
    pub(super) fn node_by(&self, proof: &Proof) -> Result<Name, Refusal> {
        proof.node(&self.pods)
    }

    /// Waits until a token does not prove any more that somebody is on a node, or until nobody can be asked.
    pub(super) async fn stays(
        self: &Arc<Self>,
        token: &[u8],
        node: &Name,
        from: IpAddr,
    ) -> Result<std::convert::Infallible, Refusal> {
        let mut changes = self.pods.changes();
        loop {
            let proof = self.review(token, from, OF_A_STREAM).await?;
            let due = tokio::time::sleep(about(LOOK));
            tokio::pin!(due);
            loop {
                if self.node_by(&proof)? != *node {
                    return Err(Refusal::Disagrees);
                }
                tokio::select! {
                    () = &mut due => break,
                    // The sender lives as long as the reviews do.
                    _ = changes.changed() => {}
                }
            }
        }
    }

    fn remembered(&self, token: &Fingerprint, age: Duration) -> Option<Answer> {
        locked(&self.remembered).answer(token, age, Instant::now())
    }

    /// Asks, or waits with those who asked.
    fn ask(
        self: &Arc<Self>,
        token: Fingerprint,
        text: String,
        from: IpAddr,
    ) -> Result<watch::Receiver<Option<Answer>>, Refusal> {
        let mut asking = locked(&self.asking);
        if let Some(answered) = asking.get(&token) {
            return Ok(answered.clone());
        }
        let place = Place::take(self, from).ok_or(Refusal::Busy)?;
        let (sender, answered) = watch::channel(None);
        asking.insert(token, answered.clone());
        let asked = Asked {
            reviews: self.clone(),
            token,
        };
        // It goes on when whoever asked is gone: others may wait by now.
        tokio::spawn(async move {
            let answer = asked.reviews.answer(&text).await;
            let mut remembered = locked(&asked.reviews.remembered);
            remembered.put(token, text.as_bytes(), &answer, Instant::now());
            drop(remembered);
            drop((asked, place));
            sender.send_replace(Some(answer));
        });
        Ok(answered)
    }

    async fn answer(&self, token: &str) -> Answer {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![self.expected.audience.clone()]),
                token: Some(token.to_owned()),
            },
            ..TokenReview::default()
        };
        let parameters = PostParams::default();
        let asked = async {
            // Never closed.
            let _permit = self.at_a_time.acquire().await;
            self.api.create(&parameters, &review).await
        };
        let reviewed = match tokio::time::timeout(TIMEOUT, asked).await {
            Ok(Ok(reviewed)) => reviewed,
            Ok(Err(error)) => return Err(self.unavailable(explain(&error))),
            Err(_) => {
                let reason = format!("no answer for {} s", TIMEOUT.as_secs());
                return Err(self.unavailable(reason));
            }
        };
        self.problems.replace(Scope::Tokens, vec![]);
        let status = reviewed.status.ok_or(Refusal::NotAuthenticated)?;
        if let Some(error) = status.error.as_deref().filter(|it| !it.is_empty()) {
            // Says nothing of the token itself.
            tracing::debug!(error, "the API server does not accept a token");
        }
        self.expected.proof(&status)
    }

    fn unavailable(&self, reason: String) -> Refusal {
        let fault = Fault::new("", format!("tokens of agents cannot be reviewed: {reason}"));
        let effect =
            "agents that are connected stay so; others cannot connect until it works again";
        let problem = Problem::of_file("kubernetes", None, fault, effect);
        self.problems.replace(Scope::Tokens, vec![problem]);
        Refusal::Unavailable(reason)
    }
}

impl fmt::Debug for Reviews {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Reviews");
        shown
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}

/// A token that is being asked about.
struct Asked {
    reviews: Arc<Reviews>,
    token: Fingerprint,
}

impl Drop for Asked {
    fn drop(&mut self) {
        locked(&self.reviews.asking).remove(&self.token);
    }
}

/// One of the places of an address.
struct Place {
    reviews: Arc<Reviews>,
    address: IpAddr,
}

impl Place {
    fn take(reviews: &Arc<Reviews>, address: IpAddr) -> Option<Self> {
        let mut taken = locked(&reviews.of_address);
        if taken.of(&address) >= OF_AN_ADDRESS {
            return None;
        }
        taken.add(address);
        Some(Self {
            reviews: reviews.clone(),
            address,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        locked(&self.reviews.of_address).remove(&self.address);
    }
}

/// The text of what may be a token of a service account: three parts in base64's letters for URLs (RFC 7515, section
/// 7.1). What is not never reaches the API server.
pub(crate) fn shape(token: &[u8]) -> Option<String> {
    let letter = |it: &u8| it.is_ascii_alphanumeric() || matches!(it, b'-' | b'_');
    let mut parts = token.split(|it| *it == b'.');
    let good = token.len() <= MAX_TOKEN_BYTES
        && parts.clone().count() == 3
        && parts.all(|it| !it.is_empty() && it.iter().all(letter));
    let text = good.then(|| std::str::from_utf8(token).ok()).flatten()?;
    Some(text.to_owned())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Single inserts and removes only: a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

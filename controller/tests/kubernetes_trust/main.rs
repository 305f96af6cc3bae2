//! What trust rests on in a cluster, over a real API server's protocol and real gRPC: agents that prove by tokens where
//! they are, people who stole one, and one of several controllers that leads.

mod admission;
mod behind;
mod inspection;
mod issuer;
mod leader;
mod restored;
mod restricted;
mod rights;
#[path = "../served/mod.rs"]
mod served;
mod stage;
mod stolen;
mod tokens;
mod webhook;

//! What trust rests on in a cluster, over a real API server's protocol and real gRPC: agents that prove by tokens where
//! they are, and people who stole one.

mod issuer;
#[path = "../served/mod.rs"]
mod served;
mod stage;
mod stolen;
mod tokens;

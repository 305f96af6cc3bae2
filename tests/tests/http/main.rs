//! HTTP and gRPC through the mesh: what applications see of each other, which endpoint and which
//! route a request goes to, who may ask, and what the metrics say.
//!
//! A file is a concern, and a test in it has a cluster of its own. Where an application must see what
//! it would see without the mesh, the same client asks a pair of pods outside of the mesh too, and
//! the two are compared.

mod balancing;
mod bodies;
mod breaking;
mod excess;
mod excess_connections;
mod flows;
mod forged;
mod grpc;
mod half_closed;
mod identity;
mod idle;
mod interim;
mod late_streams;
mod left_alone;
mod limits;
mod metrics;
mod mirrors;
mod outcomes;
mod policy;
mod refused;
mod requests;
mod retiring;
mod retried;
mod retries;
mod rollout;
mod routes;
mod server_first;
mod smuggling;
mod splits;
mod stage;
mod timeouts;
mod topology;
mod transparency;
mod upgrades;
mod versions;
mod waiting;

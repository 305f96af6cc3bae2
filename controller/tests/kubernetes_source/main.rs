//! The Kubernetes source against a small API server in the same process, which fails on request in the ways in which
//! real ones do.

mod balancer;
mod chaos;
mod hard;
mod kinds;
mod lists;
mod objects;
mod stage;

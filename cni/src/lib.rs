//! `weft-cni`: the chained CNI plugin of the mesh, and what installs it on a node.
//!
//! A container runtime runs the plugin when it sets up the network of a pod, before the first container
//! starts, and again when it takes it down. The plugin changes nothing in the network. It asks the node's
//! agent, over a Unix socket, to enroll the pod, and lets the runtime go on when that is done: so not one
//! connection of a meshed pod escapes, those of init containers included.
//!
//! It is a small program without a runtime of its own, and knows no Kubernetes API: who is meshed, the agent knows.
//! What it does while there is no agent is decided in [`plugin`], by a list that the agent leaves on disk ([`listed`]).

#![forbid(unsafe_code)]

pub mod ask;
pub mod call;
pub mod failure;
pub mod files;
pub mod install;
pub mod listed;
pub mod plugin;
pub mod result;

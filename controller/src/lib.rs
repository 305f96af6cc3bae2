//! Weft's controller: reads what describes the cluster from a source, keeps every agent's state up
//! to date, and is the certificate authority of the mesh.
//!
//! Objects flow one way: a [`source`] yields [`objects`], the [`index`] turns them into the state
//! of agents ([`views`]), and the [`control`] service streams that to them. What goes wrong on the
//! way is collected in [`problems`].

pub mod admin;
pub mod admission;
pub mod authority;
pub mod config;
pub mod control;
pub mod index;
pub mod leader;
pub mod objects;
mod pause;
pub mod problems;
pub mod progress;
pub mod questions;
pub mod run;
pub mod source;
pub mod statuses;
pub mod telemetry;
pub mod views;

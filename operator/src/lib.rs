//! What the operator is made of, in the order that data flows: a manifest becomes an
//! [`api::OverlayNode`] ([`admit`] where there is no API server to do it), [`build`] turns
//! that into configuration and objects, [`trust`] makes the credentials that go with them,
//! and [`reconcile`] or [`local`] bring them about. [`token`] mints capabilities for either.

pub mod admit;
pub mod api;
pub mod build;
mod daemon;
pub mod local;
pub mod reconcile;
pub mod token;
pub mod trust;

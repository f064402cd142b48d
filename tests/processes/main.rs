//! Whole programs over loopback: what a person without a cluster does, and what happens when
//! processes die.

mod authorities;
mod local;
mod reload;
mod sessions;
mod tokens;

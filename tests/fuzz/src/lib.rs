//! What is fuzzed (G-1), as plain functions of bytes: each asserts what must hold whatever the
//! bytes are. The fuzzer calls them from `targets/`; an ordinary test replays what it found worth
//! keeping, `corpus/TARGET`. They decide nothing about how the product works.

mod codec;
mod configuration;
mod inflate;
mod payloads;
mod streams;
mod token;

pub use codec::codec;
pub use configuration::configuration;
pub use inflate::inflate;
pub use payloads::payloads;
pub use streams::streams;
pub use token::token;

/// One of them, by the name of its corpus.
type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 6] = [
    ("codec", codec),
    ("streams", streams),
    ("configuration", configuration),
    ("token", token),
    ("payloads", payloads),
    ("inflate", inflate),
];

/// The first byte, which chooses, and the rest; 0 where there is none.
fn chosen(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(first, rest)| (*first, rest))
}

#[cfg(test)]
mod tests;

//! K6: capabilities made to be expensive.

use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::config::Profile;
use overlay_core::control::Open;
use overlay_core::frame::{Flags, MAX_CAP};
use overlay_core::grant::{Claims, LOCAL_HOLDER};
use overlay_tests::oap::{Wire, request};
use overlay_tests::trust::Authority;
use serde_json::{Map, Value, json};

use crate::probe::{self, Probe};
use crate::target::{Target, scale};

probe::rows!(k6_expensive_capabilities_are_refused_cheaply);

/// A token of its own for each attempt: none is found in what is remembered.
type Mint<'a> = Box<dyn Fn(u64) -> Result<Bytes> + 'a>;

/// Seconds of processor time that each START takes, by tokens that differ, one of each of `numbers`.
fn cost(target: &Target, numbers: Range<u64>, code: u16, mint: &Mint<'_>) -> Result<f64> {
    let count = numbers.end - numbers.start;
    let tokens = numbers.map(mint).collect::<Result<Vec<_>>>()?;
    let mut wire: Wire<UnixStream> = Wire::local(&target.socket())?;
    let open = Open::Publish { topic: "t".parse()? };
    let before = target.processor_time()?;
    for (corr_id, token) in (3..).step_by(2).zip(tokens) {
        let got = wire.start(corr_id, &open, token)?;
        ensure!(got == code, "{got}, not {code}");
        if got == 200 {
            wire.send(&request(corr_id, Flags::END, Bytes::new()))?;
            ensure!(wire.receive()?.context("it closed")?.code == 200);
        }
    }
    Ok((target.processor_time()? - before).as_secs_f64() / count as f64)
}

/// K6, P-2: tokens of 64 KiB, of claims without number, nested without end, wide as they may be,
/// signed by the root itself or by nobody: refused at a few times what an honest one costs that
/// the daemon sees for the first time; the session goes on.
fn k6_expensive_capabilities_are_refused_cheaply() -> Result<()> {
    // Fewer than a session may be refused at once.
    let count = scale(300, 700) as u64;
    let mut target = Target::start(Profile::Macronode, |config| {
        config.overlay.rps = 1_000_000;
        config.overlay.per_peer_rps = 1_000_000;
    })?;
    let probe = Probe::start(&target)?;
    let authority = Arc::clone(&target.authority);
    let header = json!({"alg": "EdDSA", "typ": "JWT", "kid": authority.kid()});
    let claims = |n: u64| -> Result<Claims> {
        let mut claims = Authority::claims(LOCAL_HOLDER)?;
        claims.nbf -= n;
        Ok(claims)
    };
    let signed = |claims: &Value| authority.sign(&header, claims);
    let nested = |depth: usize, n: u64| {
        let text = format!("{{\"n\":{n},\"aud\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        // A depth that this program's own parser would refuse.
        authority.sign_text(&header.to_string(), &text)
    };
    let honest: Mint<'_> = Box::new(|n| authority.token(&claims(n)?));
    let attacks: [(&str, Mint<'_>); 6] = [
        ("64 KiB of nothing", Box::new(|n| Ok(format!("{n:065535}").into()))),
        (
            "claims without number",
            Box::new(|n| {
                let many: Map<String, Value> = (0..4_000).map(|c| (format!("{c:x}"), json!(n % 10))).collect();
                signed(&Value::Object(many))
            }),
        ),
        ("nested past the bound", Box::new(|n| nested(20_000, n))),
        ("nested within the bound", Box::new(|n| nested(650, n))),
        (
            "wide within the bound",
            Box::new(|n| {
                let mut claims = serde_json::to_value(claims(n)?)?;
                claims["topics"] = json!(vec!["a"; 200]);
                signed(&claims)
            }),
        ),
        (
            "a signature that does not hold",
            Box::new(|n| {
                let mut token = authority.token(&claims(n)?)?.to_vec();
                let middle = token.len() - 43;
                token[middle] = if token[middle] == b'A' { b'B' } else { b'A' };
                Ok(token.into())
            }),
        ),
    ];
    let first = cost(&target, 0..count, 200, &honest)?;
    println!("k6: an honest token that is new, with its END: {:.3} ms of processor time", first * 1e3);
    let mut numbers = 0..count;
    probe.beside(|| {
        for (what, mint) in &attacks {
            let size = mint(0)?.len();
            ensure!(what.contains("within") || what.contains("signature") || size > MAX_CAP, "{what}: {size} bytes");
            let each = cost(&target, numbers.clone(), 401, mint).with_context(|| (*what).to_owned())?;
            println!("k6: {what} ({size} bytes): {:.3} ms, {:.2} times", each * 1e3, each / first);
            ensure!(each <= 5.0 * first, "{what} costs {:.1} honest tokens", each / first);
        }
        numbers = numbers.end..numbers.end + count;
        Ok(())
    })?;
    target.survived(&probe.finish("k6")?)
}

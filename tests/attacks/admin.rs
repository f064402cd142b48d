//! A1, A3: admin HTTP of a daemon that is attacked, and what it shows of the attack.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::config::Profile;
use overlay_core::control::Open;
use overlay_core::frame::{Flags, Frame};
use overlay_core::identity::TenantId;
use overlay_core::record::Publish;
use overlay_tests::oap::{Wire, request, start};
use overlay_tests::on_both_profiles;
use overlay_tests::{http, wait};

use crate::probe::{self, Probe};
use crate::target::{Target, is_closed, scale};

on_both_profiles!(by crate::probe::run: a3_as_many_series_as_before_whoever_came);

probe::rows!(a1_a_thousand_partial_heads_keep_no_probe_out);

const LIMIT: Duration = Duration::from_secs(60);
/// Requests that a session may have under way in A3.
const INFLIGHT: u32 = 4;

/// A1: a thousand heads that never end, some of them dripped: each is closed, by one deadline for
/// the whole of it or to make room; probes and scrapes beside them are answered all the time.
fn a1_a_thousand_partial_heads_keep_no_probe_out() -> Result<()> {
    let mut target = Target::start(Profile::Macronode, |_| {})?;
    let probe = Probe::start(&target)?;
    let began = wait::now();
    let mut heads = Vec::new();
    for _ in 0..scale(1_000, 10_000) {
        let mut head = TcpStream::connect(target.admin)?;
        head.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n")?;
        heads.push(head);
    }
    let mut probes = 0;
    wait::until_true("each head to be closed", LIMIT, || {
        for path in ["/healthz", "/readyz", "/metrics"] {
            let status = http::get(target.admin, path).with_context(|| format!("{path} after {probes} probes"))?.status;
            ensure!(status == 200, "{path}: {status}");
            probes += 1;
        }
        let mut open = false;
        for head in &mut heads {
            // One more byte for each: a deadline a read would never come.
            open |= !is_closed(head)? && head.write_all(b"x").is_ok();
        }
        Ok(!open)
    })?;
    println!("a1: {} heads closed within {:.1?}, {probes} probes answered meanwhile", heads.len(), began.elapsed());
    target.survived(&probe.finish("a1")?)
}

/// An admin request of any method and path; whatever is answered is no server error.
fn odd_request(admin: SocketAddr, line: &str) -> Result<()> {
    let mut stream = TcpStream::connect(admin)?;
    write!(stream, "{line} HTTP/1.1\r\nhost: a\r\n\r\n")?;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer); // may be reset with our bytes unread
    ensure!(!answer.starts_with(b"HTTP/1.1 5"), "{line}: {}", String::from_utf8_lossy(&answer));
    Ok(())
}

/// Has one client cause a refusal of each code that one can, and looks that each was counted.
fn every_refusal(target: &Target) -> Result<()> {
    let reasons = ["protocol", "auth", "size", "quota"];
    let counted = || reasons.iter().map(|reason| target.rejected(reason)).collect::<Result<Vec<_>>>();
    let (before, token) = (counted()?, target.local_token()?);
    let mut wire = Wire::local(&target.socket())?;
    for (corr_id, flags) in [(3, Flags::default()), (0, Flags::START), (5, Flags::EVENT), (7, Flags::COMP)] {
        wire.send(&request(corr_id, flags, Bytes::from_static(b"odd")))?;
        ensure!(wire.receive()?.context("it closed")?.code == 400);
    }
    let publish = Open::Publish { topic: "topic".parse()? };
    ensure!(wire.start(9, &publish, Bytes::new())? == 401, "no token");
    wire.send(&Frame { tenant: TenantId(7), ..start(11, &publish, token.clone()) })?;
    ensure!(wire.receive()?.context("it closed")?.code == 403, "a tenant that is not carried");
    ensure!(wire.start(13, &publish, token.clone())? == 200);
    wire.send(&request(13, Flags::default(), Publish::Begin { size: 2 << 20, hash: [0; 32] }.encode()))?;
    ensure!(wire.receive()?.context("it closed")?.code == 413, "2 MiB");
    // An upload that is begun is in flight: these are all that a session may have here.
    for corr_id in (15..).step_by(2).take(INFLIGHT as usize) {
        ensure!(wire.start(corr_id, &publish, token.clone())? == 200);
        wire.send(&request(corr_id, Flags::default(), Publish::Begin { size: 1 << 20, hash: [0; 32] }.encode()))?;
    }
    wire.send(&request(13, Flags::default(), Publish::Message(Bytes::from_static(b"one more")).encode()))?;
    ensure!(wire.receive()?.context("it closed")?.code == 429, "one more request in flight");
    let after = counted()?;
    ensure!(after.iter().zip(&before).all(|(after, before)| after > before), "{reasons:?}: {before:?}, then {after:?}");
    Ok(())
}

/// A3, C-5: whoever came, whatever they called themselves, asked for and were refused for: as many
/// series as there were before anybody did.
fn a3_as_many_series_as_before_whoever_came(profile: Profile) -> Result<()> {
    let peers = scale(150, 100_000);
    let mut target = Target::start(profile, |config| {
        config.overlay.rps = 1_000_000;
        config.overlay.per_peer_rps = 1_000_000;
        config.overlay.per_peer_inflight = INFLIGHT;
    })?;
    let probe = Probe::start(&target)?;
    let before = target.series()?;
    let opened = target.metric("session_open_total")?;
    let mut n = 0;
    while n < peers || probe.needs_more() {
        let id = format!("spiffe://overlay.test/ns/test-{n}/client/client-{n}");
        let (mut wire, _) = target.offer(&id)?.greet(target.address)?;
        let open = Open::Publish { topic: format!("topic-{n}").parse()? };
        ensure!(wire.start(3, &open, target.token(&id)?)? == 200);
        ensure!(wire.start(5, &open, Bytes::new())? == 401);
        n += 1;
    }
    let peers = n;
    ensure!(target.metric("session_open_total")? == opened + peers as f64);
    for n in 0..peers {
        odd_request(target.admin, &format!("METHOD{n} /metrics"))?;
        odd_request(target.admin, &format!("GET /path-{n}?query={n}"))?;
    }
    every_refusal(&target)?;
    let began = wait::now();
    let after = target.series()?;
    println!("a3: {after} series after {peers} peers, methods and paths; a scrape takes {:.1?}", began.elapsed());
    ensure!(after == before, "{after} series, {before} before");
    target.survived(&probe.finish("a3")?)
}

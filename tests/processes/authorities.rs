//! Certificates that change while two daemons hold a session: a session ends when the authority
//! that its certificate chains to leaves the bundle, and its successor is there before a
//! certificate ends.

use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use overlay_tests::files::replace;
use overlay_tests::http;
use overlay_tests::status::report;
use overlay_tests::wait::{self, Look};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, PKCS_ED25519, SanType,
};

use crate::local::mesh::{Daemon, LIMIT, Mesh};

const TWO: &str = "apiVersion: overlay.rustyonions.io/v1alpha1
kind: OverlayNode
metadata: {name: two}
spec: {replicas: 2, readiness: {minPeers: 1}, drain: {delay: 0s, timeout: 1s}}
";
const NODE: &str = "spiffe://overlay.local/ns/default/overlaynode/two";

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// A leaf of the mesh's identity, and its key.
    fn leaf(&self, lifetime: Duration) -> Result<[String; 2]> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = CertificateParams::default();
        params.not_after = (SystemTime::now() + lifetime).into();
        params.subject_alt_names = vec![SanType::URI(NODE.try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok([params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem()])
    }
}

struct Target {
    mesh: Mesh,
    daemons: Vec<Daemon>,
}

impl Target {
    fn start() -> Result<Self> {
        let mesh = Mesh::start(TWO, &[])?;
        let daemons = mesh.ready()?;
        Ok(Self { mesh, daemons })
    }

    /// Writes files of both daemons, and waits until both have taken them up.
    fn write(&self, files: &[(&str, &str)]) -> Result<()> {
        let before = self.reloads()?;
        for daemon in &self.daemons {
            for (name, text) in files {
                let path = daemon.socket.with_file_name("trust").join(name);
                replace(&path, text)?;
            }
        }
        wait::until_true("the files to be taken up", LIMIT, || {
            Ok(self.reloads()?.iter().zip(&before).all(|(now, before)| now > before))
        })
    }

    fn reloads(&self) -> Result<Vec<f64>> {
        let count = |daemon: &Daemon| {
            let metrics = http::get(daemon.admin, "/metrics")?.body;
            http::sample(&metrics, "overlay_key_reloads_total", "result=\"ok\"")
        };
        self.daemons.iter().map(count).collect()
    }

    /// The numbers of the sessions that the first daemon has with its peer.
    fn sessions(&self) -> Result<Vec<u64>> {
        let status = report(&self.daemons[0].socket, None)?;
        let sessions = status["sessions"].as_array().context("no sessions")?;
        Ok(sessions.iter().filter(|s| s["kind"] == "peer").filter_map(|s| s["id"].as_u64()).collect())
    }

    /// Waits until another session with the peer has taken the place of these.
    fn succeeded(&self, old: &[u64]) -> Result<Vec<u64>> {
        wait::until("another session with the peer", LIMIT, || {
            let now = self.sessions()?;
            let is_other = !now.is_empty() && now.iter().all(|id| !old.contains(id));
            Ok(if is_other { Look::Holds(now) } else { Look::NotYet(format!("{now:?}")) })
        })
    }

    fn carries(&self, text: &str) -> Result<()> {
        let [near, far] = &self.daemons[..] else { anyhow::bail!("two daemons") };
        let reader = self.mesh.subscribe(far, "news", 1)?;
        self.mesh.publish(near, "news", &[text])?;
        ensure!(reader.finish(LIMIT)? == text.as_bytes());
        Ok(())
    }
}

/// The authority is exchanged under a mesh that runs: both in the bundle, leaves of the next
/// one, the old one out. The session that was shaken hands on with the old one's leaf ends then,
/// and not before.
#[test]
fn a_session_ends_when_its_authority_leaves_the_bundle() -> Result<()> {
    let target = Target::start()?;
    let next = Authority::new()?;
    let [certificate, key] = next.leaf(Duration::from_secs(3_600))?;
    let old_bundle = fs::read_to_string(target.daemons[0].socket.with_file_name("trust").join("ca.crt"))?;
    let first = target.sessions()?;
    target.write(&[("ca.crt", &format!("{old_bundle}{}", next.pem))])?;
    target.write(&[("tls.crt", &certificate), ("tls.key", &key)])?;
    ensure!(target.sessions()? == first, "the session is the one that it was");
    target.write(&[("ca.crt", &next.pem)])?;
    target.succeeded(&first)?;
    target.carries("by the next authority")
}

/// A session whose certificate ends soon is succeeded before it does: there is always one.
#[test]
fn a_successor_is_there_before_a_certificate_ends() -> Result<()> {
    let target = Target::start()?;
    let authority = Authority::new()?;
    let ends = SystemTime::now() + Duration::from_secs(20);
    let [certificate, key] = authority.leaf(Duration::from_secs(20))?;
    let first = target.sessions()?;
    let old_bundle = fs::read_to_string(target.daemons[0].socket.with_file_name("trust").join("ca.crt"))?;
    target.write(&[("ca.crt", &format!("{old_bundle}{}", authority.pem))])?;
    target.write(&[("tls.crt", &certificate), ("tls.key", &key)])?;
    target.write(&[("ca.crt", &authority.pem)])?; // ends the session of the run's own authority
    let short = target.succeeded(&first)?;
    let [certificate, key] = authority.leaf(Duration::from_secs(3_600))?;
    target.write(&[("tls.crt", &certificate), ("tls.key", &key)])?;
    ensure!(target.sessions()? == short, "leaves that are renewed end no session");
    wait::until_true("the short leaf's end", LIMIT, || {
        ensure!(!target.sessions()?.is_empty(), "for a moment there was no session");
        Ok(SystemTime::now() > ends)
    })?;
    ensure!(target.sessions()?.iter().all(|id| !short.contains(id)), "succeeded before its end");
    target.carries("by a successor")
}

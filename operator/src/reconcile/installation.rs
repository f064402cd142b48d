//! The installation's CA and token root: read from the operator's namespace, made once.
//! Decides whether they may be made: not while an OverlayNode has a certificate of theirs,
//! since a new authority would cut every mesh in two without a word.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::ObjectMeta;
use tokio::time::Instant;

use super::apply;
use super::credentials::Installation;
use super::dereference::{self, Caches};
use super::metrics::Metrics;
use super::status::{Problem, Reason};
use crate::build::{TLS_CERTIFICATE, TLS_KEY, TOKEN_KEYS, TOKEN_ROOT_KEY, labels, names};
use crate::trust::{Ca, TokenRoot, TrustError};

/// How old the keys may be when a standing certificate is compared with them.
pub(super) const TO_COMPARE: Duration = Duration::from_secs(30);
/// How old they may be when something is issued with them.
pub(super) const TO_ISSUE: Duration = Duration::from_secs(2);
/// Two reconciliations may both want to make them: the loser reads again.
const ATTEMPTS: usize = 3;

/// Where the keys are kept.
pub(super) struct Store {
    client: Client,
    namespace: String,
    metrics: Arc<Metrics>,
    loaded: Mutex<Option<(Instant, Arc<Installation>)>>,
}

impl Store {
    /// In the Secrets of `namespace`.
    #[must_use]
    pub(super) fn new(client: Client, namespace: String, metrics: Arc<Metrics>) -> Self {
        Self { client, namespace, metrics, loaded: Mutex::new(None) }
    }

    /// The keys, read no longer ago than `max_age`.
    ///
    /// # Errors
    /// They are missing though in use, are damaged, or the API server cannot be asked.
    pub(super) async fn load(&self, caches: &Caches, max_age: Duration) -> Result<Arc<Installation>, Problem> {
        if let Some(loaded) = self.recent(max_age) {
            return Ok(loaded);
        }
        for _ in 0..ATTEMPTS {
            // Asked before the Secrets are read: a certificate issued in between proves nothing.
            let in_use = caches.any_has_certificate();
            let ca = self.read(names::CA_SECRET).await?;
            let root = self.read(names::TOKEN_ROOT_SECRET).await?;
            match (ca, root) {
                (Some(ca), Some(root)) => {
                    let installation = Arc::new(self.parse(&ca, &root)?);
                    *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some((Instant::now(), installation.clone()));
                    return Ok(installation);
                }
                (None, _) if in_use => return Err(self.missing(names::CA_SECRET)),
                (_, None) if in_use => return Err(self.missing(names::TOKEN_ROOT_SECRET)),
                (ca, root) => self.make(ca.is_none(), root.is_none()).await?,
            }
        }
        let message = format!(
            "Secrets {} and {} come and go in namespace {}",
            names::CA_SECRET,
            names::TOKEN_ROOT_SECRET,
            self.namespace
        );
        Err(Problem { reason: Reason::ApplyFailed, message })
    }

    /// The keys as [`Self::load`] gives them, but none are made.
    ///
    /// # Errors
    /// They are missing or damaged, or the API server cannot be asked.
    pub(super) async fn existing(&self, max_age: Duration) -> Result<Arc<Installation>, Problem> {
        if let Some(loaded) = self.recent(max_age) {
            return Ok(loaded);
        }
        let ca = self.read(names::CA_SECRET).await?.ok_or_else(|| self.missing(names::CA_SECRET))?;
        let root = self.read(names::TOKEN_ROOT_SECRET).await?.ok_or_else(|| self.missing(names::TOKEN_ROOT_SECRET))?;
        let installation = Arc::new(self.parse(&ca, &root)?);
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), installation.clone()));
        Ok(installation)
    }

    fn recent(&self, max_age: Duration) -> Option<Arc<Installation>> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.as_ref().filter(|(at, _)| at.elapsed() < max_age).map(|(_, installation)| installation.clone())
    }

    async fn read(&self, name: &str) -> Result<Option<Secret>, Problem> {
        dereference::get(&self.client, &self.namespace, name).await.map_err(|error| self.refused("read", name, &error))
    }

    async fn make(&self, ca: bool, root: bool) -> Result<(), Problem> {
        let mut secrets = Vec::new();
        if ca {
            let pem = Ca::generate(SystemTime::now()).map_err(|e| self.damaged(names::CA_SECRET, &e))?.to_pem();
            let data = [(TLS_CERTIFICATE, pem.cert.as_bytes()), (TLS_KEY, pem.key.as_bytes())];
            secrets.push(secret(names::CA_SECRET, "kubernetes.io/tls", data));
        }
        if root {
            let root = TokenRoot::generate().map_err(|e| self.damaged(names::TOKEN_ROOT_SECRET, &e))?;
            let data = [(TOKEN_ROOT_KEY, root.to_pem().as_bytes()), (TOKEN_KEYS, root.jwks().as_bytes())]
                .map(|(key, bytes)| (key, bytes.to_vec()));
            secrets.push(secret(names::TOKEN_ROOT_SECRET, "Opaque", data.iter().map(|(k, b)| (*k, b.as_slice()))));
        }
        for secret in secrets {
            let name = secret.metadata.name.as_deref().unwrap_or_default();
            let created = apply::create_secret(&self.client, &self.metrics, &self.namespace, &secret)
                .await
                .map_err(|error| self.refused("create", name, &error))?;
            if created {
                tracing::info!(namespace = self.namespace, secret = name, "made a key of the installation: back it up");
            }
        }
        Ok(())
    }

    fn parse(&self, ca: &Secret, root: &Secret) -> Result<Installation, Problem> {
        let text = |secret: &Secret, key: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(key));
            bytes.and_then(|b| String::from_utf8(b.0.clone()).ok()).unwrap_or_default()
        };
        let key = crate::trust::Zeroizing::new(text(ca, TLS_KEY));
        let ca = Ca::from_pem(&text(ca, TLS_CERTIFICATE), &key).map_err(|e| self.damaged(names::CA_SECRET, &e))?;
        let key = crate::trust::Zeroizing::new(text(root, TOKEN_ROOT_KEY));
        let tokens = TokenRoot::from_pem(&key).map_err(|e| self.damaged(names::TOKEN_ROOT_SECRET, &e))?;
        Ok(Installation { ca, tokens })
    }

    fn missing(&self, name: &str) -> Problem {
        let message = format!(
            "Secret {name} is missing from namespace {}, and OverlayNodes have certificates of it: restore it from a backup, or copy it from the namespace of the release that made it; without either, delete every OverlayNode and apply them again: only then is another made",
            self.namespace
        );
        Problem { reason: Reason::CaMissing, message }
    }

    fn damaged(&self, name: &str, error: &TrustError) -> Problem {
        let message = format!("Secret {name} in namespace {}: {error}", self.namespace);
        Problem { reason: Reason::CaInvalid, message }
    }

    fn refused(&self, verb: &str, name: &str, error: &kube::Error) -> Problem {
        let message =
            format!("cannot {verb} Secret {name} in namespace {}: {}", self.namespace, super::node::explain(error));
        Problem { reason: Reason::ApplyFailed, message }
    }
}

fn secret<'a>(name: &str, kind: &str, data: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Secret {
    let labels = BTreeMap::from([
        (labels::MANAGED_BY.to_owned(), labels::OPERATOR.to_owned()),
        ("app.kubernetes.io/part-of".to_owned(), "overlay".to_owned()),
    ]);
    Secret {
        metadata: ObjectMeta { name: Some(name.to_owned()), labels: Some(labels), ..Default::default() },
        type_: Some(kind.to_owned()),
        data: Some(data.into_iter().map(|(key, bytes)| (key.to_owned(), ByteString(bytes.to_vec()))).collect()),
        ..Default::default()
    }
}

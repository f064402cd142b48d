//! Where the pods' certificates come from: `spec.tls.source` with what the cluster can do.
//! Decides when to ask the cluster at all and what its answer comes to; never asks itself. What
//! runs is not rolled over a better choice: it is made when the pods are rolled anyway.

use super::status::{Problem, Reason};
use crate::api::{CertificateSource, TlsSource};
use crate::build::names::SIGNER;

/// The oldest kubelet that asks for pod certificates by the API's first stable version.
const OLDEST_KUBELET: (u32, u32) = (1, 37);

/// What the cluster can do, as it was last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cluster {
    /// The API server serves PodCertificateRequests.
    pub served: bool,
    /// The operator may sign for [`SIGNER`].
    pub may_sign: bool,
    /// Whether every node's kubelet can ask.
    pub kubelets: Kubelets,
}

/// The versions of the kubelets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kubelets {
    /// No node is known, which proves nothing.
    None,
    /// At least one cannot ask: its pods would never start.
    SomeTooOld,
    /// All of them can.
    AllNew,
}

impl Kubelets {
    /// From the `kubeletVersion` of every node.
    #[must_use]
    pub(super) fn of<'a>(versions: impl IntoIterator<Item = &'a str>) -> Self {
        versions.into_iter().fold(Self::None, |so_far, version| match so_far {
            Self::None | Self::AllNew if new_enough(version) => Self::AllNew,
            _ => Self::SomeTooOld,
        })
    }
}

/// A version that cannot be read is one that nothing is known of.
fn new_enough(version: &str) -> bool {
    let mut numbers = version.strip_prefix('v').unwrap_or(version).split('.').map(|part| part.parse::<u32>().ok());
    matches!((numbers.next().flatten(), numbers.next().flatten()), (Some(major), Some(minor)) if (major, minor) >= OLDEST_KUBELET)
}

/// What can be said without the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// This one.
    Take(TlsSource),
    /// It depends on the cluster: see [`decide`].
    Ask,
}

/// Chooses by the spec and by what the StatefulSet has, if there is one; `rolls` says whether
/// its pods are rolled even if the choice stays.
#[must_use]
pub(super) fn choose(wanted: CertificateSource, standing: Option<TlsSource>, rolls: impl FnOnce() -> bool) -> Choice {
    match (wanted, standing) {
        (CertificateSource::SelfManaged, _) => Choice::Take(TlsSource::SelfManaged),
        (CertificateSource::PodCertificate, Some(TlsSource::PodCertificate)) => Choice::Take(TlsSource::PodCertificate),
        (CertificateSource::Auto, Some(standing)) if !rolls() => Choice::Take(standing),
        (CertificateSource::PodCertificate | CertificateSource::Auto, _) => Choice::Ask,
    }
}

/// Chooses by what the cluster can do. Kubelets are asked after for `Auto` alone: who wants
/// `PodCertificate` may have picked the nodes by a selector.
///
/// # Errors
/// `PodCertificate` is asked for, and the cluster lacks it.
pub(super) fn decide(wanted: CertificateSource, cluster: &Cluster) -> Result<TlsSource, Problem> {
    let able = cluster.served && cluster.may_sign;
    match wanted {
        CertificateSource::SelfManaged => Ok(TlsSource::SelfManaged),
        CertificateSource::Auto if able && cluster.kubelets == Kubelets::AllNew => Ok(TlsSource::PodCertificate),
        CertificateSource::Auto => Ok(TlsSource::SelfManaged),
        CertificateSource::PodCertificate if able => Ok(TlsSource::PodCertificate),
        CertificateSource::PodCertificate => {
            let lacks = if cluster.served {
                format!("the operator may not sign: its ClusterRole needs the verb sign on signers {SIGNER}")
            } else {
                "the API server does not serve podcertificaterequests of certificates.k8s.io/v1, which Kubernetes 1.37 and newer do"
                    .to_owned()
            };
            let message = format!("spec.tls.source: PodCertificate cannot be had: {lacks}; or use SelfManaged or Auto");
            Err(Problem { reason: Reason::UnsupportedCluster, message })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use CertificateSource::{Auto, PodCertificate, SelfManaged};

    const PER_POD: TlsSource = TlsSource::PodCertificate;
    const SHARED: TlsSource = TlsSource::SelfManaged;

    #[test]
    fn what_runs_is_not_rolled_over_a_choice() {
        for (wanted, standing, rolls, want) in [
            (SelfManaged, None, false, Choice::Take(SHARED)),
            (SelfManaged, Some(PER_POD), false, Choice::Take(SHARED)),
            (PodCertificate, None, false, Choice::Ask),
            (PodCertificate, Some(SHARED), false, Choice::Ask),
            (PodCertificate, Some(PER_POD), true, Choice::Take(PER_POD)),
            (Auto, None, false, Choice::Ask),
            (Auto, Some(SHARED), false, Choice::Take(SHARED)),
            (Auto, Some(PER_POD), false, Choice::Take(PER_POD)),
            (Auto, Some(SHARED), true, Choice::Ask),
            (Auto, Some(PER_POD), true, Choice::Ask),
        ] {
            assert_eq!(choose(wanted, standing, || rolls), want, "{wanted:?} {standing:?} {rolls}");
        }
    }

    #[test]
    fn what_the_cluster_allows() {
        use Kubelets::{AllNew, None, SomeTooOld};
        let lacks = |part| Err::<TlsSource, &str>(part);
        for (wanted, served, may_sign, kubelets, want) in [
            (Auto, true, true, AllNew, Ok(PER_POD)),
            (Auto, true, true, SomeTooOld, Ok(SHARED)),
            (Auto, true, true, None, Ok(SHARED)),
            (Auto, true, false, AllNew, Ok(SHARED)),
            (Auto, false, true, AllNew, Ok(SHARED)),
            (PodCertificate, true, true, SomeTooOld, Ok(PER_POD)),
            (PodCertificate, true, true, None, Ok(PER_POD)),
            (PodCertificate, false, true, AllNew, lacks("does not serve podcertificaterequests")),
            (PodCertificate, true, false, AllNew, lacks("needs the verb sign")),
            (SelfManaged, true, true, AllNew, Ok(SHARED)),
        ] {
            let cluster = Cluster { served, may_sign, kubelets };
            match (decide(wanted, &cluster), want) {
                (Err(problem), Err(part)) => {
                    assert_eq!(problem.reason, Reason::UnsupportedCluster);
                    assert!(problem.message.starts_with("spec.tls.source: ") && problem.message.contains(part));
                }
                (got, want) => assert_eq!(got.ok(), want.ok(), "{wanted:?} {cluster:?}"),
            }
        }
    }

    #[test]
    fn kubelet_versions() {
        for (versions, want) in [
            (&[][..], Kubelets::None),
            (&["v1.37.0"], Kubelets::AllNew),
            (&["v1.37.2-gke.1+abc", "v1.38.0", "v2.0.0"], Kubelets::AllNew),
            (&["v1.37.2", "v1.36.3"], Kubelets::SomeTooOld),
            (&["v1.36.3", "v1.37.2"], Kubelets::SomeTooOld),
            (&["v1.9.9"], Kubelets::SomeTooOld),
            (&["v1.37.2", "unknown"], Kubelets::SomeTooOld),
            (&[""], Kubelets::SomeTooOld),
        ] {
            assert_eq!(Kubelets::of(versions.iter().copied()), want, "{versions:?}");
        }
    }
}

//! What `--output json` prints, one object a line. Decides on the shape only; `output` prints.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// One line. The first of a run is `ready`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(super) enum Event<'a> {
    /// Every daemon is ready for the first time.
    Ready {
        /// In the order of the manifests, then by ordinal.
        daemons: Vec<ReadyDaemon<'a>>,
    },
    /// A daemon's program ended without having been told to.
    Exited {
        namespace: &'a str,
        name: &'a str,
        reason: &'a str,
        #[serde(rename = "restart_in_ms", serialize_with = "milliseconds")]
        restart_in: Duration,
    },
    /// A daemon's program was started again.
    Started { namespace: &'a str, name: &'a str },
    /// Nothing runs any more; the last line.
    Stopped,
}

/// Where a daemon is reached.
#[derive(Debug, Serialize)]
pub(super) struct ReadyDaemon<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    pub(super) socket: &'a Path,
    pub(super) address: SocketAddr,
    pub(super) admin: SocketAddr,
}

impl Event<'_> {
    /// The line, without its end.
    pub(super) fn to_line(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }
}

fn milliseconds<S: Serializer>(wait: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs read these lines: their shape does not change.
    #[test]
    fn each_event_has_its_shape() {
        let (namespace, name) = ("default", "mesh-0");
        let daemon = ReadyDaemon {
            namespace,
            name,
            socket: Path::new("/run/user/1000/overlay/default.mesh-0/overlay.sock"),
            address: "127.0.0.1:21001".parse().unwrap(),
            admin: "127.0.0.1:21002".parse().unwrap(),
        };
        let table = [
            (
                Event::Ready { daemons: vec![daemon] },
                r#"{"event":"ready","daemons":[{"namespace":"default","name":"mesh-0","socket":"/run/user/1000/overlay/default.mesh-0/overlay.sock","address":"127.0.0.1:21001","admin":"127.0.0.1:21002"}]}"#,
            ),
            (
                Event::Exited {
                    namespace,
                    name,
                    reason: "killed by \"SIGKILL\"\nline",
                    restart_in: Duration::from_millis(1_500),
                },
                r#"{"event":"exited","namespace":"default","name":"mesh-0","reason":"killed by \"SIGKILL\"\nline","restart_in_ms":1500}"#,
            ),
            (Event::Started { namespace, name }, r#"{"event":"started","namespace":"default","name":"mesh-0"}"#),
            (Event::Stopped, r#"{"event":"stopped"}"#),
        ];
        for (event, want) in table {
            let line = event.to_line().unwrap();
            assert_eq!(line, want);
            assert!(!line.contains('\n'), "one line");
        }
    }
}

//! `status`: a daemon's own account of itself, as a table or as the JSON that it answers.

use std::fmt::Write;

use bytes::{Bytes, BytesMut};
use overlay_core::control::Open;
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::identity::TenantId;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::args::{StatusArgs, StatusFormat};
use super::connection::{ANSWER_TIMEOUT, Connection, ConnectionError, Refused, printable};
use super::{ClientError, dial};

/// Bytes of an answer, all its frames together.
const MAX_REPORT: usize = 64 << 20;

/// What `sessions` answers. Members that this version does not know are passed over.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Report {
    /// Which daemon it is.
    pub daemon: DaemonReport,
    /// Whether `/readyz` says so.
    pub ready: bool,
    /// What that depends on.
    #[serde(default)]
    pub conditions: Vec<ConditionReport>,
    /// Every session, this one included.
    #[serde(default)]
    pub sessions: Vec<SessionReport>,
    /// What is held for repair.
    pub messages: MessagesReport,
}

/// A daemon's names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DaemonReport {
    /// As its peers call it.
    pub name: String,
    /// Its certificate's SPIFFE id.
    pub identity: String,
    /// Which start of it this is: 16 hexadecimal digits.
    pub incarnation: String,
    /// Of its program.
    pub version: String,
}

/// A readiness condition.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ConditionReport {
    /// Which one.
    pub name: String,
    /// Whether it is met.
    pub ok: bool,
    /// Where it stands, in words.
    #[serde(default)]
    pub reason: Option<String>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct SessionReport {
    /// Its number in this daemon, from 1.
    pub id: u64,
    /// `peer`, `client` or `local`.
    pub kind: String,
    /// A peer's name.
    pub peer: Option<String>,
    /// The certificate's SPIFFE id, or `local`.
    pub identity: String,
    /// Of the session machine.
    pub state: String,
    /// Whether the daemon dialled: `in` or `out`.
    pub direction: String,
    /// What carries it: `tcp+tls` or `unix`.
    #[serde(default)]
    pub transport: String,
    /// The key exchange: `hybrid`, `classical`, or `none` on the Unix socket.
    pub group: String,
    /// Milliseconds since it was opened.
    pub age_ms: u64,
    /// Milliseconds since a frame went either way.
    pub idle_ms: u64,
    /// Frames that wait to be sent.
    pub queued_frames: u64,
    /// Streams that are open.
    pub streams: u64,
}

/// The messages that are held.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MessagesReport {
    /// Messages.
    pub held: u64,
    /// Their payloads' bytes.
    pub bytes: u64,
}

pub(super) async fn run(args: StatusArgs) -> Result<(), ClientError> {
    let mut session = dial::local(&args.local).await?;
    let (answer, report) = ask(&mut session.connection, &session.token).await?;
    session.connection.close().await;
    let text = match args.output {
        StatusFormat::Table => table(&report).into(),
        StatusFormat::Json => answer,
    };
    let mut out = tokio::io::stdout();
    out.write_all(&text).await.map_err(ClientError::output)?;
    if text.last() != Some(&b'\n') {
        out.write_all(b"\n").await.map_err(ClientError::output)?;
    }
    out.flush().await.map_err(ClientError::output)
}

/// Asks for the state: as it was answered, and as it is understood.
async fn ask<S: AsyncRead + AsyncWrite>(
    connection: &mut Connection<S>,
    token: &Bytes,
) -> Result<(Bytes, Report), ClientError> {
    const NOT_A_REPORT: ConnectionError = ConnectionError::Protocol("the daemon's state is not understood");
    let (stream, first) = connection.open(AppProto::ADMIN, TenantId(0), token, &Open::Sessions {}).await?;
    let mut answer = BytesMut::from(&first.payload[..]);
    let mut last = first;
    while !last.flags.has(Flags::END) {
        let late = Err(ConnectionError::Timeout("with its state", ANSWER_TIMEOUT));
        last = timeout(ANSWER_TIMEOUT, connection.next()).await.unwrap_or(late)?;
        stream.expect(&last)?;
        append(&mut answer, &last)?;
    }
    let report = serde_json::from_slice(&answer).map_err(|_| NOT_A_REPORT)?;
    Ok((answer.freeze(), report))
}

fn append(answer: &mut BytesMut, frame: &Frame) -> Result<(), ConnectionError> {
    if frame.code >= 400 {
        return Err(ConnectionError::Refused(Refused::of(frame)));
    }
    if answer.len() + frame.payload.len() > MAX_REPORT {
        return Err(ConnectionError::Protocol("the daemon's state is over 64 MiB"));
    }
    answer.extend_from_slice(&frame.payload);
    Ok(())
}

fn table(report: &Report) -> String {
    let mut out = String::new();
    let Report { daemon, messages, .. } = report;
    let ready = if report.ready { "ready" } else { "not ready" };
    // Writing to a String does not fail.
    let _ = writeln!(out, "{}: {ready}", printable(&daemon.name));
    let _ = writeln!(out, "  identity     {}", printable(&daemon.identity));
    let _ = writeln!(out, "  incarnation  {}", printable(&daemon.incarnation));
    let _ = writeln!(out, "  version      {}", printable(&daemon.version));
    let _ = writeln!(out, "  messages     {} held, {}", messages.held, bytes(messages.bytes));

    let conditions = report.conditions.iter().map(|condition| {
        let ok = if condition.ok { "yes" } else { "no" };
        vec![condition.name.clone(), ok.to_owned(), condition.reason.clone().unwrap_or_default()]
    });
    columns(&mut out, &["CONDITION", "OK", "REASON"], conditions.collect());

    let sessions = report.sessions.iter().map(|session| {
        vec![
            session.id.to_string(),
            session.kind.clone(),
            session.peer.clone().unwrap_or_else(|| "-".to_owned()),
            session.state.clone(),
            session.direction.clone(),
            session.transport.clone(),
            session.group.clone(),
            age(session.age_ms),
            age(session.idle_ms),
            session.queued_frames.to_string(),
            session.streams.to_string(),
            session.identity.clone(),
        ]
    });
    let names = [
        "SESSION",
        "KIND",
        "PEER",
        "STATE",
        "DIR",
        "TRANSPORT",
        "GROUP",
        "AGE",
        "IDLE",
        "QUEUED",
        "STREAMS",
        "IDENTITY",
    ];
    columns(&mut out, &names, sessions.collect());
    out
}

/// Rows under names, each column as wide as its widest cell.
fn columns(out: &mut String, names: &[&str], rows: Vec<Vec<String>>) {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    let rows: Vec<Vec<String>> =
        std::iter::once(names).chain(rows).map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let count = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..count)
        .map(|n| rows.iter().map(|row| row.get(n).map_or(0, |cell| cell.chars().count())).max().unwrap_or(0))
        .collect();
    out.push('\n');
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
}

/// Milliseconds as the largest unit that leaves a whole number, and the next where it says
/// something.
fn age(ms: u64) -> String {
    let seconds = ms / 1_000;
    match seconds {
        0 => format!("{ms}ms"),
        1..=59 => format!("{seconds}s"),
        60..=3_599 => format!("{}m{}s", seconds / 60, seconds % 60),
        3_600..=86_399 => format!("{}h{}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let Some(unit) = (0..UNITS.len()).rev().find(|unit| count >= 1 << (10 * (unit + 1))) else {
        return format!("{count} B");
    };
    let tenths = count.saturating_mul(10) >> (10 * (unit + 1));
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

#[cfg(test)]
mod tests {
    use overlay_core::status::{Refusal, Status};

    use super::super::testing::greeted;
    use super::*;

    const ANSWER: &str = r#"{"daemon":{"name":"mesh-0","identity":"spiffe://overlay.local/ns/default/overlaynode/mesh",
        "incarnation":"0000000000000007","version":"0.1.0","later":1},"ready":false,
        "conditions":[{"name":"listeners","ok":true,"reason":""},{"name":"peers","ok":false,"reason":"1 of 2"}],
        "sessions":[{"id":4,"kind":"peer","peer":"mesh-1","identity":"spiffe://overlay.local/ns/default/overlaynode/mesh",
        "state":"active","direction":"out","transport":"tcp+tls","group":"hybrid","age_ms":61000,"idle_ms":900,"queued_frames":0,"streams":2},
        {"id":9,"kind":"local","peer":null,"identity":"local","state":"active","direction":"in","transport":"unix","group":"none",
        "age_ms":7,"idle_ms":0,"queued_frames":1,"streams":0}],"messages":{"held":3,"bytes":1536}}"#;

    #[test]
    fn a_report_is_a_table() {
        let report: Report = serde_json::from_str(ANSWER).unwrap();
        let want = "\
mesh-0: not ready
  identity     spiffe://overlay.local/ns/default/overlaynode/mesh
  incarnation  0000000000000007
  version      0.1.0
  messages     3 held, 1.5 KiB

CONDITION  OK   REASON
listeners  yes
peers      no   1 of 2

SESSION  KIND   PEER    STATE   DIR  TRANSPORT  GROUP   AGE   IDLE   QUEUED  STREAMS  IDENTITY
4        peer   mesh-1  active  out  tcp+tls    hybrid  1m1s  900ms  0       2        spiffe://overlay.local/ns/default/overlaynode/mesh
9        local  -       active  in   unix       none    7ms   0ms    1       0        local
";
        assert_eq!(table(&report), want);
    }

    #[test]
    fn quantities_are_short() {
        for (ms, want) in
            [(999, "999ms"), (59_999, "59s"), (3_599_000, "59m59s"), (90_000_000, "1d1h"), (7_260_000, "2h1m")]
        {
            assert_eq!(age(ms), want);
        }
        for (count, want) in
            [(1_023, "1023 B"), (1_024, "1.0 KiB"), (33_554_432, "32.0 MiB"), (u64::MAX, "1677721.5 TiB")]
        {
            assert_eq!(bytes(count), want);
        }
    }

    /// One frame or several: the last has END.
    #[tokio::test]
    async fn the_state_is_asked_for() {
        for cut in [ANSWER.len(), 1, 40] {
            let (mut connection, mut daemon) = greeted(4).await;
            let token = Bytes::from_static(b"a.b.c");
            let (asked, ()) = tokio::join!(ask(&mut connection, &token), async {
                let (start, open) = daemon.start().await;
                assert_eq!((open, start.app), (Open::Sessions {}, AppProto::ADMIN));
                let parts: Vec<_> = ANSWER.as_bytes().chunks(cut).collect();
                for (n, part) in parts.iter().enumerate() {
                    daemon
                        .send(&Frame::response(&start, 200, n + 1 == parts.len(), Bytes::copy_from_slice(part)))
                        .await;
                }
            });
            let (answer, report) = asked.unwrap();
            assert_eq!((&answer[..], report.sessions.len()), (ANSWER.as_bytes(), 2));
        }
    }

    #[tokio::test]
    async fn a_refusal_and_nonsense_are_errors() {
        let (mut connection, mut daemon) = greeted(4).await;
        let token = Bytes::from_static(b"a.b.c");
        let (asked, ()) = tokio::join!(ask(&mut connection, &token), async {
            let (start, _) = daemon.start().await;
            daemon.refuse(&start, &Refusal::new(Status::Forbidden, "only on the Unix socket"), true).await;
        });
        assert!(asked.unwrap_err().to_string().contains("403 forbidden: only on the Unix socket"));
        let (asked, ()) = tokio::join!(ask(&mut connection, &token), async {
            let (start, _) = daemon.start().await;
            daemon.send(&Frame::response(&start, 200, true, Bytes::from_static(b"[]"))).await;
        });
        assert!(asked.unwrap_err().to_string().contains("not understood"));
    }
}

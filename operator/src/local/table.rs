//! The table of daemons and the two commands below it, as text. Decides on the layout; it
//! never prints.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::supervise::{Life, Phase};

const HEADINGS: [&str; 7] = ["NAME", "STATUS", "SESSIONS", "RESTARTS", "ADDRESS", "ADMIN", "SOCKET"];
const GAP: &str = "   ";

/// A daemon, as the table shows it.
#[derive(Debug)]
pub(super) struct Row<'a> {
    pub(super) name: &'a str,
    pub(super) life: &'a Life,
    pub(super) address: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) socket: &'a Path,
}

/// The headings and a line for each of `rows`; without `width`, lines are as long as they get.
pub(super) fn render(rows: &[Row<'_>], now: Duration, width: Option<usize>) -> Vec<String> {
    let cells = rows.iter().map(|row| {
        let sessions = match row.life.phase() {
            Phase::Running { sessions: Some(sessions), .. } => sessions.to_string(),
            _ => "-".to_owned(),
        };
        let (address, admin) = (row.address.to_string(), row.admin.to_string());
        let restarts = row.life.restarts().to_string();
        [
            row.name.to_owned(),
            status(row.life, now),
            sessions,
            restarts,
            address,
            admin,
            row.socket.display().to_string(),
        ]
    });
    let lines: Vec<[String; 7]> = std::iter::once(HEADINGS.map(str::to_owned)).chain(cells).collect();
    let mut widths = [0; 7];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    lines.iter().map(|line| fit(&join(line, &widths), width)).collect()
}

fn join(line: &[String; 7], widths: &[usize; 7]) -> String {
    let cells: Vec<_> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
    cells.join(GAP).trim_end().to_owned()
}

/// A line that wraps would take two rows of the terminal, and the table could not be redrawn
/// in place.
pub(super) fn fit(line: &str, width: Option<usize>) -> String {
    match width {
        Some(width) if line.chars().count() > width => {
            line.chars().take(width.saturating_sub(1)).chain(std::iter::once('…')).collect()
        }
        _ => line.to_owned(),
    }
}

fn status(life: &Life, now: Duration) -> String {
    match life.phase() {
        Phase::Running { ready_since: Some(_), .. } => "Ready".to_owned(),
        Phase::Running { missing, .. } if missing.is_empty() => "Starting".to_owned(),
        Phase::Running { missing, .. } => {
            let names: Vec<_> = missing.iter().map(|missing| missing.name.as_str()).collect();
            format!("NotReady: {}", names.join(","))
        }
        Phase::Waiting { until } => {
            let wait = until.saturating_sub(now);
            format!("BackOff {}s", wait.as_secs() + u64::from(wait.subsec_nanos() > 0))
        }
        Phase::Stopping => "Stopping".to_owned(),
        Phase::Stopped => "Stopped".to_owned(),
    }
}

/// Two commands to paste: subscribe at one daemon, publish at another.
pub(super) fn hints(program: &Path, subscribe_at: &Path, publish_at: &Path) -> [String; 2] {
    let program = shell_word(program);
    [
        format!("{program} sub news --socket {}", shell_word(subscribe_at)),
        format!("{program} pub news hello --socket {}", shell_word(publish_at)),
    ]
}

/// As a POSIX shell reads it back.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c));
    if plain { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::super::supervise::{Missing, Probe};
    use super::*;

    fn lives() -> [Life; 6] {
        let running = || {
            let mut life = Life::new();
            assert!(life.poll_start(Duration::ZERO));
            life
        };
        let mut ready = running();
        ready.handle_probe(Duration::ZERO, Probe::Ready { sessions: Some(2) });
        let mut missing = running();
        missing.handle_probe(
            Duration::ZERO,
            Probe::NotReady {
                missing: ["peers", "kms"].map(|name| Missing { name: name.into(), reason: "none".into() }).into(),
                sessions: Some(0),
            },
        );
        let mut dead = running();
        dead.handle_exit(Duration::from_millis(500), "killed".into());
        let mut stopping = running();
        stopping.handle_stop();
        let mut stopped = Life::new();
        stopped.handle_stop();
        [running(), ready, missing, dead, stopping, stopped]
    }

    #[test]
    fn a_row_a_daemon() {
        let lives = lives();
        let rows: Vec<_> = lives
            .iter()
            .map(|life| Row {
                name: "mesh-0",
                life,
                address: "127.0.0.1:20000".parse().unwrap(),
                admin: "127.0.0.1:20001".parse().unwrap(),
                socket: Path::new("/run/o.sock"),
            })
            .collect();
        let table = render(&rows, Duration::from_millis(600), None);
        let want = [
            "NAME     STATUS                SESSIONS   RESTARTS   ADDRESS           ADMIN             SOCKET",
            "mesh-0   Starting              -          0          127.0.0.1:20000   127.0.0.1:20001   /run/o.sock",
            "mesh-0   Ready                 2          0          127.0.0.1:20000   127.0.0.1:20001   /run/o.sock",
            "mesh-0   NotReady: peers,kms   0          0          127.0.0.1:20000   127.0.0.1:20001   /run/o.sock",
            "mesh-0   BackOff 1s            -          1          127.0.0.1:20000   127.0.0.1:20001   /run/o.sock",
            "mesh-0   Stopping              -          0          127.0.0.1:20000   127.0.0.1:20001   /run/o.sock",
            "mesh-0   Stopped               -          0          127.0.0.1:20000   127.0.0.1:20001   /run/o.sock",
        ];
        assert_eq!(table, want);
        let narrow = render(&rows, Duration::ZERO, Some(20));
        assert!(narrow.iter().all(|line| line.chars().count() <= 20), "{narrow:?}");
        assert_eq!(narrow[1], "mesh-0   Starting  …");
    }

    #[test]
    fn commands_paste_into_a_shell() {
        let table = [
            ("/opt/overlay-daemon", "/opt/overlay-daemon sub news --socket /run/a.sock"),
            ("/my tools/overlay-daemon", "'/my tools/overlay-daemon' sub news --socket /run/a.sock"),
            ("/it's/overlay-daemon", r"'/it'\''s/overlay-daemon' sub news --socket /run/a.sock"),
        ];
        for (program, want) in table {
            let [sub, publish] = hints(Path::new(program), Path::new("/run/a.sock"), Path::new("/run/b.sock"));
            assert_eq!(sub, want);
            assert!(publish.ends_with(" pub news hello --socket /run/b.sock"));
        }
    }
}

//! One HTTP GET, for probes and metrics on loopback. No client library: what is under test is the
//! server.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

/// Longest time for connecting, and for each read and write.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// GETs `path`.
pub fn get(address: SocketAddr, path: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // HTTP/1.0: the server closes after the answer, and never sends chunks.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").context("an answer without an end of headers")?;
    let status = head.split_whitespace().nth(1).context("an answer without a status")?.parse()?;
    Ok(Answer { status, body: body.to_owned() })
}

/// The sum of all samples of one metric in an exposition, over all its labels.
pub fn metric_sum(exposition: &str, name: &str) -> Option<f64> {
    let samples: Vec<f64> = exposition
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
        .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
        .collect();
    (!samples.is_empty()).then(|| samples.iter().sum())
}

/// The one sample of a metric that has this label, written `name="value"`.
///
/// # Errors
/// There is none.
pub fn sample(exposition: &str, name: &str, label: &str) -> Result<f64> {
    let series = format!("{name}{{");
    let line = exposition.lines().find(|line| line.starts_with(&series) && line.contains(label));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).with_context(|| format!("no {name} with {label}"))
}

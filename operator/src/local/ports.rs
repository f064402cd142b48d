//! Ports for daemons on loopback. Chosen outside the range from which the kernel gives ports
//! to outgoing connections: a daemon that is restarted finds its port still free.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;

/// The lowest that is chosen: below it are the ports of well-known services.
const LOWEST: u16 = 10_000;
/// Linux's own range for outgoing connections, where `/proc` does not tell.
const DEFAULT_EPHEMERAL: RangeInclusive<u16> = 32_768..=60_999;

/// `count` ports that are free on 127.0.0.1 now, for TCP and for UDP.
///
/// # Errors
/// There are not so many.
pub(super) fn free(count: usize) -> io::Result<Vec<u16>> {
    let ephemeral = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok();
    let ephemeral = ephemeral.and_then(|text| parse_range(&text)).unwrap_or(DEFAULT_EPHEMERAL);
    // Two runs that start at once begin at different places.
    let seed = RandomState::new().hash_one(std::process::id());
    // Held until all are chosen, so that none is chosen twice.
    let mut held = Vec::new();
    for port in candidates(&ephemeral, seed) {
        if held.len() == count {
            break;
        }
        held.extend(hold(port));
    }
    while held.len() < count {
        held.push(hold(0)?);
    }
    held.iter().map(|(listener, _)| Ok(listener.local_addr()?.port())).collect()
}

/// One port, as long as it is not dropped.
fn hold(port: u16) -> io::Result<(TcpListener, UdpSocket)> {
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let udp = UdpSocket::bind(tcp.local_addr()?)?;
    Ok((tcp, udp))
}

/// Every port from [`LOWEST`] on that is not in `ephemeral`, once, from a place that `seed`
/// chooses.
fn candidates(ephemeral: &RangeInclusive<u16>, seed: u64) -> impl Iterator<Item = u16> {
    let ports: Vec<u16> = (LOWEST..=u16::MAX).filter(|port| !ephemeral.contains(port)).collect();
    let first = usize::try_from(seed % (ports.len().max(1) as u64)).unwrap_or(0);
    (0..ports.len()).map(move |n| ports[(first + n) % ports.len()])
}

fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut ends = text.split_ascii_whitespace().map(str::parse);
    Some(ends.next()?.ok()?..=ends.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn candidates_are_distinct_and_never_ephemeral() {
        for (range, count) in
            [("32768\t60999\n", 27_304), ("10000 65535", 0), ("1024 65535", 0), ("65535 65535", 55_535)]
        {
            let range = parse_range(range).unwrap();
            for seed in [0, 1, u64::MAX] {
                let all: Vec<_> = candidates(&range, seed).collect();
                assert_eq!(all.len(), count);
                assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), count);
                assert!(all.iter().all(|port| *port >= LOWEST && !range.contains(port)));
            }
        }
        assert_eq!(parse_range("x 1"), None);
        assert_eq!(parse_range("1"), None);
    }

    #[test]
    fn free_ports_are_free_and_distinct() {
        let ports = free(12).unwrap();
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 12);
        for port in ports {
            hold(port).unwrap();
        }
    }
}

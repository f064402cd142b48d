//! A Tor network of its own on loopback: three directory authorities, three relays, onion
//! services and a client, all of them real `tor` processes in one folder. Nothing of it leaves the
//! machine, and it is gone with its value.
//!
//! Intervals and exceptions are those of a test network (tor(1), TESTING NETWORK OPTIONS): relays
//! on one address, votes every 20 seconds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, DirBuilder};
use std::io::{BufRead, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::control_plane::free_ports;
use crate::process::Process;
use crate::wait::{self, Look};

/// For a process to know the network, and for a service to be found in it.
pub const LIMIT: Duration = Duration::from_secs(300);
/// A port that was free when it was looked for may be any connection's when tor asks for it: so
/// often others are looked for.
const TRIES: usize = 3;
/// The port of every onion service.
pub const ONION_PORT: u16 = 9500;

const AUTHORITIES: usize = 3;
const RELAYS: usize = 3;

/// A network that knows itself, with one client of its own.
pub struct Network {
    // Before the folder: stopped before their files go.
    client: Client,
    services: Option<Process>,
    relays: Vec<Process>,
    folder: TempDir,
    common: String,
}

/// A `tor` that applications dial through.
pub struct Client {
    process: Process,
    /// Its SOCKS port.
    pub socks: SocketAddr,
    control: SocketAddr,
}

/// A connection that a client carries.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stream {
    /// Where to.
    pub target: String,
    /// By which circuit.
    pub circuit: String,
    /// The SOCKS name and password that the circuit is for.
    pub isolation: (String, String),
}

impl Network {
    /// Starts one, with an onion service for each of `forwards`: `HOST:PORT` that it forwards to.
    ///
    /// # Errors
    /// A process does not start or does not come to know the network, with its log.
    pub fn start(forwards: &[SocketAddr]) -> Result<Self> {
        for _ in 1..TRIES {
            match Self::start_once(forwards) {
                Err(error) if format!("{error:#}").contains("Address already in use") => {}
                result => return result,
            }
        }
        Self::start_once(forwards)
    }

    fn start_once(forwards: &[SocketAddr]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("overlay-tor-").tempdir()?;
        let root = folder.path();
        let authorities = (0..AUTHORITIES).map(|n| Authority::make(root, n)).collect::<Result<Vec<_>>>()?;
        let mut common = "TestingTorNetwork 1\nAssumeReachable 1\nShutdownWaitLength 0\n".to_owned();
        for authority in &authorities {
            writeln!(common, "{}", authority.line())?;
        }
        let mut relays = Vec::new();
        for authority in &authorities {
            relays.push(start(root, &authority.name, &format!("{common}{RELAY}{}", authority.torrc()))?);
        }
        for n in 0..RELAYS {
            let ([or], name) = (free_ports()?, format!("relay{n}"));
            let own = format!("Nickname {name}\nOrPort 127.0.0.1:{or}\n");
            relays.push(start(root, &name, &format!("{common}{RELAY}{own}"))?);
        }
        let mut onions = "SocksPort 0\n".to_owned();
        for (n, forward) in forwards.iter().enumerate() {
            let service = private(&root.join(format!("onion{n}")))?;
            writeln!(onions, "HiddenServiceDir {}", service.display())?;
            writeln!(onions, "HiddenServicePort {ONION_PORT} {forward}")?;
        }
        let services = (!forwards.is_empty()).then(|| start(root, "services", &format!("{common}{onions}")));
        let [socks] = free_ports()?;
        let client = Client::start(root, &common, "client", loopback(socks))?;
        let mut network = Self { client, services: services.transpose()?, relays, folder, common };
        let (services, client) = (network.services.as_mut(), &mut network.client.process);
        for process in network.relays.iter_mut().chain(services).chain([client]) {
            bootstrapped(process)?;
        }
        Ok(network)
    }

    /// Its client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Another client, whose SOCKS port is `socks`. It knows the network.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn another_client(&self, name: &str, socks: SocketAddr) -> Result<Client> {
        let mut client = Client::start(self.folder.path(), &self.common, name, socks)?;
        bootstrapped(&mut client.process)?;
        Ok(client)
    }

    /// The address of the onion service that forwards to the `index`th address.
    ///
    /// # Errors
    /// There is none.
    pub fn onion(&self, index: usize) -> Result<String> {
        let file = self.folder.path().join(format!("onion{index}/hostname"));
        let name = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        Ok(format!("{}:{ONION_PORT}", name.trim()))
    }
}

impl Client {
    fn start(root: &Path, common: &str, name: &str, socks: SocketAddr) -> Result<Self> {
        let [control] = free_ports()?;
        let control = loopback(control);
        let own = format!("SocksPort {socks}\nControlPort {control}\nCookieAuthentication 0\n");
        Ok(Self { process: start(root, name, &format!("{common}{own}"))?, socks, control })
    }

    /// Stops it.
    ///
    /// # Errors
    /// It cannot be told to.
    pub fn stop(mut self) -> Result<()> {
        self.process.stop().map(|_| ())
    }

    /// The connections that it carries to onion services now.
    ///
    /// # Errors
    /// Its control port does not answer as control-spec has it.
    pub fn streams(&self) -> Result<Vec<Stream>> {
        let mut control = Control::open(self.control)?;
        let circuits: BTreeMap<String, (String, String)> =
            control.info("circuit-status")?.iter().filter_map(|line| circuit(line)).collect();
        let streams = control.info("stream-status")?;
        // ID SP STATUS SP CIRCUIT SP TARGET
        let fields = streams.iter().map(|line| line.split(' ').collect::<Vec<_>>());
        let open = fields.filter(|fields| fields.get(1) == Some(&"SUCCEEDED") && fields.len() >= 4);
        open.map(|fields| {
            let circuit = fields[2].to_owned();
            let isolation = circuits.get(&circuit).with_context(|| format!("circuit {circuit} is for nobody"))?;
            Ok(Stream { target: fields[3].to_owned(), circuit, isolation: isolation.clone() })
        })
        .collect()
    }
}

/// ID SP STATUS SP PATH, then `NAME=VALUE` and `NAME="VALUE"`.
fn circuit(line: &str) -> Option<(String, (String, String))> {
    let value = |name: &str| {
        let (_, rest) = line.split_once(&format!(" {name}=\""))?;
        Some(rest.split('"').next()?.to_owned())
    };
    let id = line.split(' ').next()?;
    Some((id.to_owned(), (value("SOCKS_USERNAME")?, value("SOCKS_PASSWORD")?)))
}

/// The control protocol, as much of it as `GETINFO` takes.
struct Control(BufReader<TcpStream>);

impl Control {
    fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut control = Self(BufReader::new(stream));
        control.say("AUTHENTICATE \"\"")?;
        let answer = control.line()?;
        ensure!(answer == "250 OK", "AUTHENTICATE: {answer}");
        Ok(control)
    }

    fn say(&mut self, command: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(format!("{command}\r\n").as_bytes())?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "the control port closed");
        Ok(line.trim_end().to_owned())
    }

    /// The lines of one value.
    fn info(&mut self, key: &str) -> Result<Vec<String>> {
        self.say(&format!("GETINFO {key}"))?;
        let first = self.line()?;
        let mut lines = Vec::new();
        if let Some(value) = first.strip_prefix(&format!("250-{key}=")) {
            lines.extend((!value.is_empty()).then(|| value.to_owned()));
        } else if first == format!("250+{key}=") {
            loop {
                match self.line()? {
                    end if end == "." => break,
                    line => lines.push(line),
                }
            }
        } else {
            bail!("GETINFO {key}: {first}");
        }
        ensure!(self.line()? == "250 OK");
        Ok(lines)
    }
}

/// What relays and authorities share: they may be beside one another, on addresses of no network.
const RELAY: &str = "SocksPort 0
Address 127.0.0.1
ExtendAllowPrivateAddresses 1
EnforceDistinctSubnets 0
ExitRelay 1
ExitPolicy accept 127.0.0.0/8:*
ExitPolicyRejectPrivate 0
ContactInfo overlay-tests
";

/// A directory authority before it runs.
struct Authority {
    name: String,
    or: u16,
    dir: u16,
    v3_identity: String,
    fingerprint: String,
}

impl Authority {
    fn make(root: &Path, n: usize) -> Result<Self> {
        let ([or, dir], name) = (free_ports()?, format!("authority{n}"));
        let data = private(&root.join(&name))?;
        let keys = private(&data.join("keys"))?;
        let certificate = keys.join("authority_certificate");
        let mut gencert = Command::new("tor-gencert");
        gencert
            .args(["--create-identity-key", "--passphrase-fd", "0", "-m", "12", "-a"])
            .arg(format!("127.0.0.1:{dir}"));
        gencert.arg("-i").arg(keys.join("authority_identity_key"));
        gencert.arg("-s").arg(keys.join("authority_signing_key")).arg("-c").arg(&certificate);
        output(gencert, "passphrase\n")?;
        let certificate = fs::read_to_string(certificate)?;
        let v3_identity =
            certificate.lines().find_map(|line| line.strip_prefix("fingerprint ")).context("no fingerprint")?;
        let mut authority = Self { name, or, dir, v3_identity: v3_identity.to_owned(), fingerprint: "A".repeat(40) };
        let mut list = Command::new("tor");
        list.args(["--ignore-missing-torrc", "-f"]).arg(data.join("none")).arg("--list-fingerprint");
        list.arg("--DataDirectory").arg(&data).arg("--ORPort").arg(or.to_string());
        list.args(["--Nickname", &authority.name, "--DirAuthority"]);
        list.arg(authority.line().trim_start_matches("DirAuthority "));
        let said = output(list, "")?;
        let prefix = format!("{} ", authority.name);
        let fingerprint = said.lines().find_map(|line| line.strip_prefix(&prefix)).context("no fingerprint")?;
        authority.fingerprint = fingerprint.replace(' ', "");
        Ok(authority)
    }

    fn line(&self) -> String {
        let Self { name, or, dir, v3_identity, fingerprint } = self;
        format!("DirAuthority {name} orport={or} no-v2 v3ident={v3_identity} 127.0.0.1:{dir} {fingerprint}")
    }

    fn torrc(&self) -> String {
        let Self { name, or, dir, .. } = self;
        format!(
            "Nickname {name}
OrPort 127.0.0.1:{or}
DirPort 127.0.0.1:{dir}
AuthoritativeDirectory 1
V3AuthoritativeDirectory 1
TestingV3AuthInitialVotingInterval 20
TestingV3AuthInitialVoteDelay 4
TestingV3AuthInitialDistDelay 4
V3AuthVotingInterval 20
V3AuthVoteDelay 4
V3AuthDistDelay 4
TestingDirAuthVoteExit *
TestingDirAuthVoteHSDir *
TestingDirAuthVoteGuard *
TestingMinExitFlagThreshold 0
"
        )
    }
}

/// Runs a command to its end; what it wrote.
fn output(mut command: Command, input: &str) -> Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {command:?} (Debian: apt-get install tor)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    Ok(said)
}

fn start(root: &Path, name: &str, torrc: &str) -> Result<Process> {
    let data = private(&root.join(name))?;
    let file = root.join(format!("{name}.torrc"));
    fs::write(&file, format!("DataDirectory {}\n{torrc}", data.display()))?;
    Process::start(name, Path::new("tor"), &root.join(format!("{name}.log")), |command| {
        command.arg("-f").arg(&file);
    })
}

/// A folder that is its owner's, as tor insists.
fn private(path: &Path) -> Result<PathBuf> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    Ok(path.to_owned())
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn bootstrapped(process: &mut Process) -> Result<()> {
    wait::until("a tor to know its network", LIMIT, || {
        process.check()?;
        let log = process.log();
        Ok(if log.contains("Bootstrapped 100%") { Look::Holds(()) } else { Look::NotYet(process.log_tail()) })
    })
}

//! `overlay-daemon check`: what is wrong with configuration files, or what they come to.
//! Starts nothing.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use overlay_core::config::{self, ConfigError, DaemonConfig, PeersConfig};

use crate::kms::Keys;

/// Bytes of a configuration file.
const MAX_FILE: u64 = 1 << 20;

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It says something wrong; each of them on its own line.
    #[error("{}", errors.iter().map(|error| format!("{}: {error}", path.display())).collect::<Vec<_>>().join("\n"))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong with it.
        errors: Vec<ConfigError>,
    },
}

/// Reads `overlay.toml` at `path`.
///
/// # Errors
/// It cannot be read, or everything that is wrong with it.
pub fn read_daemon(path: &Path) -> Result<DaemonConfig, FileError> {
    config::daemon(&read(path)?).map_err(|errors| FileError::Invalid { path: path.to_owned(), errors })
}

/// Reads the peers file at `path`, by the rules across both files where the other one is good.
///
/// # Errors
/// As [`read_daemon`].
pub fn read_peers(path: &Path, daemon: Option<&DaemonConfig>) -> Result<PeersConfig, FileError> {
    config::peers_beside(&read(path)?, daemon).map_err(|errors| FileError::Invalid { path: path.to_owned(), errors })
}

fn read(path: &Path) -> Result<String, FileError> {
    let read = || {
        let mut text = String::new();
        File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_FILE} bytes")));
        }
        Ok(text)
    };
    read().map_err(|source| FileError::Read { path: path.to_owned(), source })
}

/// What `check` was asked to look at.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// `overlay.toml`.
    pub config: &'a Path,
    /// The peers file.
    pub peers: Option<&'a Path>,
    /// The time, milliseconds since 1970, if the files that the configuration names are to be
    /// read and checked too.
    pub files_at_ms: Option<u64>,
}

/// Checks the files. All is well: their effective text goes to `out`, true is returned.
/// Otherwise every error goes to `err`, one a line, and false is returned.
///
/// # Errors
/// Writing failed.
pub fn check(request: Request<'_>, out: &mut impl Write, err: &mut impl Write) -> io::Result<bool> {
    let daemon = read_daemon(request.config);
    let peers = request.peers.map(|path| (path, read_peers(path, daemon.as_ref().ok())));
    let mut good = true;
    if let Err(error) = &daemon {
        writeln!(err, "{error}")?;
        good = false;
    }
    if let Some((_, Err(error))) = &peers {
        writeln!(err, "{error}")?;
        good = false;
    }
    if let (Ok(daemon), Some(unix_ms)) = (&daemon, request.files_at_ms)
        && let Err(errors) = Keys::load(&daemon.tls, &daemon.token, unix_ms)
    {
        for error in errors {
            writeln!(err, "{}: {error}", request.config.display())?;
        }
        good = false;
    }
    let (true, Ok(daemon)) = (good, daemon) else { return Ok(false) };
    match peers {
        Some((path, Ok(peers))) => {
            writeln!(out, "# {}\n{}", request.config.display(), daemon.to_toml().map_err(io::Error::other)?)?;
            write!(out, "# {}\n{}", path.display(), peers.to_toml().map_err(io::Error::other)?)?;
        }
        _ => write!(out, "{}", daemon.to_toml().map_err(io::Error::other)?)?,
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[overlay]\nlisten = \"127.0.0.1:9500\"\n[tls]\ncertificate = \"c\"\nkey = \"k\"\nca = \"a\"\n[token]\nkeys = \"t\"\nfile = \"p\"\n[unix]\nsocket = \"s\"\n";
    const PEERS: &str = "name = \"mesh-0\"\n";

    /// Runs `check` on files with these texts; their folder's name is taken out of the output.
    fn run(daemon: &str, peers: Option<&str>, files: bool) -> (bool, String, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("overlay.toml"), daemon).unwrap();
        if let Some(peers) = peers {
            std::fs::write(path("peers.toml"), peers).unwrap();
        }
        let (config, peers) = (path("overlay.toml"), peers.map(|_| path("peers.toml")));
        let request = Request { config: &config, peers: peers.as_deref(), files_at_ms: files.then_some(0) };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let good = check(request, &mut out, &mut err).unwrap();
        let clean = |bytes| String::from_utf8(bytes).unwrap().replace(&format!("{}/", folder.path().display()), "");
        (good, clean(out), clean(err))
    }

    #[test]
    fn what_is_good_is_printed_and_reads_back() {
        let (good, out, err) = run(GOOD, None, false);
        assert!(good && err.is_empty(), "{err}");
        assert_eq!(config::daemon(&out), config::daemon(GOOD));
        let (good, both, _) = run(GOOD, Some(PEERS), false);
        assert!(good);
        assert_eq!(both, format!("# overlay.toml\n{out}\n# peers.toml\nformat = 1\nname = \"mesh-0\"\n"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_file() {
        let bad = GOOD.replace("127.0.0.1:9500", "127.0.0.1:70000");
        let (good, out, err) = run(&bad, Some("nam = \"x\""), false);
        assert!(!good && out.is_empty());
        assert_eq!(
            err,
            "overlay.toml: line 2: overlay.listen: must be IP:PORT, is \"127.0.0.1:70000\"\n\
             peers.toml: line 1: name: is required\n\
             peers.toml: line 1: nam: is not a known field; did you mean name?\n"
        );
        let (good, out, err) = run(GOOD, None, true);
        assert!(!good && out.is_empty());
        let named = ["tls.certificate: cannot read c", "tls.key", "tls.ca", "token.keys", "token.file"];
        assert!(named.iter().all(|field| err.contains(&format!("overlay.toml: {field}"))), "{err}");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let request = Request { config: Path::new("/nowhere/overlay.toml"), peers: None, files_at_ms: None };
        let mut err = Vec::new();
        assert!(!check(request, &mut Vec::new(), &mut err).unwrap());
        let err = String::from_utf8(err).unwrap();
        assert!(err.starts_with("/nowhere/overlay.toml: cannot be read: No such file"), "{err}");
    }
}

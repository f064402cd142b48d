//! Where a daemon's socket and the token for it are, when the command line does not say.
//! Decides between candidates; never connects to two, never guesses.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::args::SocketArgs;
use crate::kms::{self, KmsError};

/// The socket in a pod.
const IN_POD: &str = "/run/overlay/overlay.sock";
/// The socket in a local daemon's folder.
const SOCKET: &str = "overlay.sock";
/// The token beside it.
const TOKEN: &str = "token";
/// What names that file in an error.
const BESIDE: &str = "token beside the socket";
/// `f_type` of tmpfs and ramfs, statfs(2): what lives in memory.
const MEMORY_BACKED: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// Entries of a runtime folder that are looked at.
const MAX_ENTRIES: usize = 4_096;

/// Why there is no socket, or no token.
#[derive(Debug, thiserror::Error)]
pub(super) enum LocateError {
    /// Nobody listens where sockets are looked for.
    #[error("no daemon found on this machine: give --socket PATH or set OVERLAY_SOCKET (pub and sub: or --connect HOST:PORT); looked at:{}", list(.0))]
    NoneFound(Vec<String>),
    /// Several do.
    #[error("several daemons are running; choose one:{}", list(.0))]
    Several(Vec<String>),
    /// The token cannot be read.
    #[error(transparent)]
    Token(KmsError),
    /// There is no token where one is looked for.
    #[error("no token at {}: give --token-file PATH or set OVERLAY_TOKEN_FILE", .0.display())]
    NoTokenBeside(PathBuf),
    /// A daemon that is not local has no token beside it.
    #[error("--connect needs a token: give --token-file PATH or set OVERLAY_TOKEN_FILE")]
    NoTokenGiven,
}

fn list(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  {line}")).collect()
}

/// What the search depends on besides the command line.
pub(super) struct Surroundings {
    pub(super) socket: Option<OsString>,
    pub(super) token_file: Option<OsString>,
    pub(super) runtime_dir: Option<OsString>,
    pub(super) uid: u32,
    /// [`IN_POD`], or a test's.
    pub(super) in_pod: PathBuf,
    /// Where `overlay-UID` lies where there is no `XDG_RUNTIME_DIR`: `/dev/shm`, or a test's.
    pub(super) shared_memory: PathBuf,
}

impl Surroundings {
    pub(super) fn of_process() -> Self {
        let given = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Self {
            socket: given("OVERLAY_SOCKET"),
            token_file: given("OVERLAY_TOKEN_FILE"),
            runtime_dir: given("XDG_RUNTIME_DIR"),
            uid: rustix::process::geteuid().as_raw(),
            in_pod: IN_POD.into(),
            shared_memory: "/dev/shm".into(),
        }
    }

    /// The socket to connect to. One that was named is not tried first: connecting to it
    /// tells more.
    pub(super) fn socket(&self, args: &SocketArgs) -> Result<PathBuf, LocateError> {
        if let Some(path) = args.socket.clone().or_else(|| self.socket.clone().map(Into::into)) {
            return Ok(path);
        }
        if self.in_pod.exists() {
            return Ok(self.in_pod.clone());
        }
        let mut looked = vec![format!("{}: does not exist", self.in_pod.display())];
        let mut live = Vec::new();
        for folder in self.runtime_folders(&mut looked) {
            match sockets(&folder, self.uid) {
                Ok(sockets) if sockets.is_empty() => looked.push(format!("{}/*/{SOCKET}: none", folder.display())),
                Ok(sockets) => {
                    for socket in sockets {
                        match UnixStream::connect(&socket) {
                            Ok(_) => live.push(socket),
                            Err(error) => looked.push(format!("{}: {error}", socket.display())),
                        }
                    }
                }
                Err(why) => looked.push(format!("{}: {why}", folder.display())),
            }
        }
        live.sort();
        match live.len() {
            0 => Err(LocateError::NoneFound(looked)),
            1 => Ok(live.remove(0)),
            _ => Err(LocateError::Several(live.iter().map(|path| format!("--socket {}", path.display())).collect())),
        }
    }

    /// Where `overlay-operator local` may have put its daemons. It may have run with another
    /// `XDG_RUNTIME_DIR` than this shell, so both places count.
    fn runtime_folders(&self, looked: &mut Vec<String>) -> Vec<PathBuf> {
        let mut folders = Vec::new();
        match self.runtime_dir.as_deref().map(Path::new) {
            Some(dir) if dir.is_absolute() && is_memory_backed(dir) => folders.push(dir.join("overlay")),
            Some(dir) => looked.push(format!("XDG_RUNTIME_DIR={}: not on a tmpfs", dir.display())),
            None => {}
        }
        folders.push(self.shared_memory.join(format!("overlay-{}", self.uid)));
        folders
    }

    /// Where the token for the daemon behind `socket`, or for a remote one, stands.
    pub(super) fn token_file(&self, args: &SocketArgs, socket: Option<&Path>) -> Result<TokenFile, LocateError> {
        if let Some(path) = &args.token_file {
            return Ok(TokenFile { field: "--token-file", path: path.clone() });
        }
        if let Some(path) = &self.token_file {
            return Ok(TokenFile { field: "OVERLAY_TOKEN_FILE", path: path.into() });
        }
        let beside = socket.ok_or(LocateError::NoTokenGiven)?.with_file_name(TOKEN);
        Ok(TokenFile { field: BESIDE, path: beside })
    }
}

/// A file that holds a token, and what named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TokenFile {
    field: &'static str,
    path: PathBuf,
}

impl TokenFile {
    /// The token that it holds now.
    pub(super) fn read(&self) -> Result<Bytes, LocateError> {
        match kms::read_token(self.field, &self.path) {
            Err(KmsError::Read { source, .. }) if self.field == BESIDE && source.kind() == io::ErrorKind::NotFound => {
                Err(LocateError::NoTokenBeside(self.path.clone()))
            }
            read => read.map_err(LocateError::Token),
        }
    }
}

fn is_memory_backed(path: &Path) -> bool {
    // `f_type` is a word of either sign, by architecture; its lower 32 bits are the number.
    rustix::fs::statfs(path).is_ok_and(|s| MEMORY_BACKED.contains(&((s.f_type as u64) & 0xffff_ffff)))
}

/// The sockets in the folders of `folder`, which must be this user's alone: in a place that
/// everyone can write to, another's could stand there.
fn sockets(folder: &Path, uid: u32) -> Result<Vec<PathBuf>, String> {
    let found = match fs::symlink_metadata(folder) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err("does not exist".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o077 != 0 {
        return Err("passed over: not a folder that is this user's alone".to_owned());
    }
    let entries = fs::read_dir(folder).map_err(|error| error.to_string())?;
    let sockets = entries.take(MAX_ENTRIES).flatten().map(|entry| entry.path().join(OsStr::new(SOCKET)));
    Ok(sockets.filter(|socket| fs::symlink_metadata(socket).is_ok()).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A place of its own for each case, in memory as the real one is.
    struct Place {
        dir: tempfile::TempDir,
        live: Vec<UnixListener>,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            Self { dir, live: Vec::new() }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn folder(&self, name: &str, mode: u32) {
            fs::create_dir_all(self.path(name)).unwrap();
            fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
        }

        fn socket(&mut self, name: &str, live: bool) -> PathBuf {
            let path = self.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let listener = UnixListener::bind(&path).unwrap();
            self.live.extend(live.then_some(listener));
            path
        }

        fn surroundings(&self) -> Surroundings {
            Surroundings {
                socket: None,
                token_file: None,
                runtime_dir: None,
                uid: rustix::process::geteuid().as_raw(),
                in_pod: self.path("pod/overlay.sock"),
                shared_memory: self.dir.path().to_owned(),
            }
        }

        fn own(&self) -> String {
            format!("overlay-{}", rustix::process::geteuid().as_raw())
        }
    }

    fn find(place: &Place) -> Result<PathBuf, String> {
        place.surroundings().socket(&SocketArgs::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn named_sockets_win_in_order() {
        let mut place = Place::new();
        let pod = place.socket("pod/overlay.sock", false);
        assert_eq!(find(&place), Ok(pod), "in a pod, dead or alive");
        let by_env = Surroundings { socket: Some("/env".into()), ..place.surroundings() };
        assert_eq!(by_env.socket(&SocketArgs::default()).unwrap(), Path::new("/env"));
        let args = SocketArgs { socket: Some("/arg".into()), token_file: None };
        assert_eq!(by_env.socket(&args).unwrap(), Path::new("/arg"));
    }

    #[test]
    fn local_daemons_are_found_if_there_is_one() {
        let mut place = Place::new();
        let own = place.own();
        let error = find(&place).unwrap_err();
        assert!(
            error.contains("pod/overlay.sock: does not exist") && error.contains(&format!("{own}: does not exist")),
            "{error}"
        );

        place.folder(&own, 0o700);
        assert!(find(&place).unwrap_err().contains("overlay.sock: none"));

        place.socket(&format!("{own}/default.mesh-0/overlay.sock"), false);
        assert!(find(&place).unwrap_err().contains("refused"), "one that is dead");

        let live = place.socket(&format!("{own}/default.mesh-1/overlay.sock"), true);
        assert_eq!(find(&place), Ok(live.clone()), "the one that is live");

        let second = place.socket(&format!("{own}/default.mesh-2/overlay.sock"), true);
        let error = find(&place).unwrap_err();
        for socket in [live, second] {
            assert!(error.contains(&format!("\n  --socket {}", socket.display())), "{error}");
        }
    }

    /// In a folder that everyone can write to, nothing is trusted but what is ours alone.
    #[test]
    fn a_folder_open_to_others_is_passed_over() {
        let mut place = Place::new();
        let own = place.own();
        place.socket(&format!("{own}/default.mesh-0/overlay.sock"), true);
        place.folder(&own, 0o755);
        assert!(find(&place).unwrap_err().contains("not a folder that is this user's alone"));
        place.folder(&own, 0o700);
        let other = Surroundings { uid: place.surroundings().uid + 1, ..place.surroundings() };
        fs::rename(place.path(&own), place.path(&format!("overlay-{}", other.uid))).unwrap();
        assert!(other.socket(&SocketArgs::default()).unwrap_err().to_string().contains("this user's alone"));
    }

    #[test]
    fn a_runtime_folder_counts_if_it_is_in_memory() {
        let mut place = Place::new();
        if !is_memory_backed(place.dir.path()) {
            eprintln!("not tested: {} is not on a tmpfs", place.dir.path().display());
            return;
        }
        place.folder("xdg/overlay", 0o700);
        let live = place.socket("xdg/overlay/default.mesh-0/overlay.sock", true);
        let with = |dir: PathBuf| Surroundings { runtime_dir: Some(dir.into()), ..place.surroundings() };
        assert_eq!(with(place.path("xdg")).socket(&SocketArgs::default()).unwrap(), live);
        let error = with("/proc".into()).socket(&SocketArgs::default()).unwrap_err().to_string();
        assert!(error.contains("XDG_RUNTIME_DIR=/proc: not on a tmpfs"), "{error}");
    }

    #[test]
    fn tokens_are_found_in_order() {
        let place = Place::new();
        let read = |of: &Surroundings, args: &SocketArgs, socket: Option<&Path>| of.token_file(args, socket)?.read();
        let write = |name: &str, text: &str| fs::write(place.path(name), text).unwrap();
        let (socket, none) = (place.path("overlay.sock"), SocketArgs::default());
        let surroundings = place.surroundings();
        let missing = read(&surroundings, &none, Some(&socket)).unwrap_err().to_string();
        assert!(missing.contains("token") && missing.contains("--token-file"), "{missing}");
        assert!(matches!(read(&surroundings, &none, None), Err(LocateError::NoTokenGiven)));

        write("token", "be.si.de\n");
        write("env", "e.n.v");
        write("arg", "a.r.g");
        assert_eq!(read(&surroundings, &none, Some(&socket)).unwrap(), "be.si.de");
        let by_env = Surroundings { token_file: Some(place.path("env").into()), ..surroundings };
        assert_eq!(read(&by_env, &none, Some(&socket)).unwrap(), "e.n.v");
        let args = SocketArgs { token_file: Some(place.path("arg")), socket: None };
        assert_eq!(read(&by_env, &args, None).unwrap(), "a.r.g");
        write("arg", "no token");
        assert!(read(&by_env, &args, None).unwrap_err().to_string().starts_with("--token-file: "));
    }
}

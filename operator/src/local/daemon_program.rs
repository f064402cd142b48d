//! Finds `overlay-daemon`: beside this program, then in `OVERLAY_DAEMON`, then on PATH.
//! Decides on the place only; it never runs what it finds.

use std::env;
use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The program's file name.
pub(super) const PROGRAM: &str = "overlay-daemon";
/// The variable that names it.
pub(super) const VARIABLE: &str = "OVERLAY_DAEMON";

/// Not found; the text names all three places.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no overlay-daemon program: not beside this one ({beside}), not in OVERLAY_DAEMON ({variable}), not on PATH ({path}); \
     build it with `cargo build --release`, or set OVERLAY_DAEMON to its path"
)]
pub(super) struct NotFound {
    beside: String,
    variable: String,
    path: String,
}

/// Where a search looks.
pub(super) struct Places<'a> {
    /// The folder of this program.
    pub(super) beside: Option<&'a Path>,
    /// `OVERLAY_DAEMON`.
    pub(super) variable: Option<&'a OsStr>,
    /// `PATH`.
    pub(super) path: Option<&'a OsStr>,
}

/// Looks where this process stands.
pub(super) fn find() -> Result<PathBuf, NotFound> {
    let this = env::current_exe().ok();
    let (variable, path) = (env::var_os(VARIABLE), env::var_os("PATH"));
    let places =
        Places { beside: this.as_deref().and_then(Path::parent), variable: variable.as_deref(), path: path.as_deref() };
    let found = find_in(&places, is_program)?;
    // A relative PATH entry or variable has to go on working in the printed commands.
    Ok(std::path::absolute(&found).unwrap_or(found))
}

/// The first of `places` with the program. A variable that is set and wrong is an error, not
/// a reason to take another program than the one meant.
fn find_in(places: &Places<'_>, is_program: impl Fn(&Path) -> bool) -> Result<PathBuf, NotFound> {
    let beside = places.beside.map(|folder| folder.join(PROGRAM));
    if let Some(program) = beside.as_ref().filter(|p| is_program(p)) {
        return Ok(program.clone());
    }
    let variable = places.variable.filter(|v| !v.is_empty()).map(PathBuf::from);
    match &variable {
        Some(program) if is_program(program) => return Ok(program.clone()),
        Some(_) => {}
        None => {
            let on_path =
                places.path.into_iter().flat_map(env::split_paths).filter(|folder| !folder.as_os_str().is_empty());
            if let Some(program) = on_path.map(|folder| folder.join(PROGRAM)).find(|p| is_program(p)) {
                return Ok(program);
            }
        }
    }
    Err(NotFound {
        beside: beside.map_or_else(|| "this program's folder is unknown".to_owned(), |p| p.display().to_string()),
        variable: variable
            .map_or_else(|| "not set".to_owned(), |p| format!("{} is not an executable file", p.display())),
        path: match places.path {
            Some(path) => path.to_string_lossy().into_owned(),
            None => "not set".to_owned(),
        },
    })
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Case, folder of this program, variable, programs that are there, and what is found.
    type Row = (&'static str, Option<&'static str>, Option<&'static str>, &'static [&'static str], Found);
    type Found = Result<&'static str, &'static str>;

    #[test]
    fn the_first_place_that_has_it() {
        let beside = Some("/opt/overlay/bin");
        let table: [Row; 8] = [
            (
                "beside wins",
                beside,
                Some("/v/daemon"),
                &["/opt/overlay/bin/overlay-daemon", "/v/daemon", "/usr/bin/overlay-daemon"],
                Ok("/opt/overlay/bin/overlay-daemon"),
            ),
            (
                "then the variable",
                beside,
                Some("/v/daemon"),
                &["/v/daemon", "/usr/bin/overlay-daemon"],
                Ok("/v/daemon"),
            ),
            ("then PATH", beside, None, &["/usr/bin/overlay-daemon"], Ok("/usr/bin/overlay-daemon")),
            (
                "PATH in its order",
                beside,
                None,
                &["/usr/bin/overlay-daemon", "/usr/local/bin/overlay-daemon"],
                Ok("/usr/local/bin/overlay-daemon"),
            ),
            (
                "an empty variable is none",
                beside,
                Some(""),
                &["/usr/bin/overlay-daemon"],
                Ok("/usr/bin/overlay-daemon"),
            ),
            (
                "a wrong variable is said",
                beside,
                Some("/v/x"),
                &["/usr/bin/overlay-daemon"],
                Err("/v/x is not an executable file"),
            ),
            ("nothing", beside, None, &[], Err("not set")),
            ("no folder", None, None, &[], Err("this program's folder is unknown")),
        ];
        for (case, beside, variable, there, want) in table {
            let places = Places {
                beside: beside.map(Path::new),
                variable: variable.map(OsStr::new),
                path: Some(OsStr::new("/usr/local/bin::/usr/bin")),
            };
            let got = find_in(&places, |p| there.iter().any(|t| Path::new(t) == p));
            match want {
                Ok(path) => assert_eq!(got.as_deref(), Ok(Path::new(path)), "{case}"),
                Err(part) => {
                    let message = got.unwrap_err().to_string();
                    assert!(message.contains(part), "{case}: {message}");
                    for place in ["beside this one", "OVERLAY_DAEMON", "PATH (/usr/local/bin::/usr/bin)"] {
                        assert!(message.contains(place), "{case}: all three are named: {message}");
                    }
                }
            }
        }
    }
}

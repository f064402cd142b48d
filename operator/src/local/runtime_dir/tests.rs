use super::*;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

const XDG: &str = "/run/user/1000";

fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn nodes(names: &[&str]) -> Vec<(String, String)> {
    names.iter().map(|n| ("default".to_owned(), (*n).to_owned())).collect()
}

/// `XDG_RUNTIME_DIR`, what lies in memory, and the root.
type Row = (Option<&'static str>, &'static [&'static str], Result<&'static str, &'static str>);

/// I-8: keys are only ever in memory, or nothing starts.
#[test]
fn the_root_is_in_memory() {
    let table: [Row; 6] = [
        (Some(XDG), &[XDG, SHARED_MEMORY], Ok("/run/user/1000/overlay")),
        (Some(XDG), &[SHARED_MEMORY], Ok("/dev/shm/overlay-1000")),
        (None, &[XDG, SHARED_MEMORY], Ok("/dev/shm/overlay-1000")),
        (Some("run"), &["run", SHARED_MEMORY], Ok("/dev/shm/overlay-1000")),
        (Some(XDG), &[], Err("/run/user/1000, which is not on a tmpfs")),
        (Some(""), &[], Err("XDG_RUNTIME_DIR is not set")),
    ];
    for (xdg, memory, want) in table {
        let got = root_in(xdg.map(OsStr::new), 1000, |path| memory.iter().any(|m| Path::new(m) == path));
        match want {
            Ok(path) => assert_eq!(got.unwrap(), Path::new(path), "{xdg:?} {memory:?}"),
            Err(part) => assert!(got.unwrap_err().to_string().contains(part), "{xdg:?} {memory:?}"),
        }
    }
    assert!(!is_memory_backed(Path::new("/proc")));
}

#[test]
fn nothing_is_left_of_a_run() {
    let parent = tempfile::tempdir().unwrap();
    let root = parent.path().join("overlay");
    let mut dir = RuntimeDir::take(&root, &nodes(&["mesh", "other"]), uid()).unwrap();
    let folder = RuntimeDir::folder(&root, "default", "mesh-0");
    dir.make(&folder).unwrap();
    dir.make(&folder.join("trust")).unwrap();
    write_private(&folder.join("tls.key"), "key").unwrap();
    for (path, mode) in [(root.clone(), 0o700), (folder.clone(), 0o700), (folder.join("tls.key"), 0o600)] {
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, mode, "{}", path.display());
    }
    dir.remove().unwrap();
    assert!(!root.exists());
    drop(dir);
}

#[test]
fn a_name_is_held_once() {
    let parent = tempfile::tempdir().unwrap();
    let root = parent.path().join("overlay");
    let first = RuntimeDir::take(&root, &nodes(&["mesh"]), uid()).unwrap();
    let refused = RuntimeDir::take(&root, &nodes(&["other", "mesh"]), uid()).unwrap_err().to_string();
    assert!(refused.contains("default/mesh") && refused.contains(&std::process::id().to_string()), "{refused}");
    let beside = RuntimeDir::take(&root, &nodes(&["other"]), uid()).expect("the refused run holds nothing");
    drop(first);
    assert!(root.exists(), "the other run's");
    drop(beside);
    assert!(!root.exists());
}

/// A run that was killed leaves folders, daemons and a lock that nobody holds.
#[test]
fn a_killed_run_is_cleared() {
    let parent = tempfile::tempdir().unwrap();
    let root = parent.path().join("overlay");
    let running = RuntimeDir::take(&root, &nodes(&["live"]), uid()).unwrap();
    let mut orphan = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
    for folder in ["default.mesh-0", "default.mesh-11", "default.live-0", "default.mesh-x-0"] {
        fs::create_dir(root.join(folder)).unwrap();
    }
    record_process(&root.join("default.mesh-11"), orphan.id()).unwrap();
    fs::write(root.join("default.mesh.lock"), "1").unwrap();

    let next = RuntimeDir::take(&root, &nodes(&["another"]), uid()).unwrap();
    assert!(!orphan.wait().unwrap().success(), "the daemon is ended");
    assert_eq!(next.ended(), [root.join("default.mesh-11")]);
    let left = |name: &str| root.join(name).exists();
    assert!(!left("default.mesh-0") && !left("default.mesh-11") && !left("default.mesh.lock"));
    assert!(left("default.live-0") && left("default.live.lock"), "a run that lives is left alone");
    assert!(left("default.mesh-x-0"), "not a daemon of default/mesh");
    drop((next, running));
}

#[test]
fn a_folder_open_to_others_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let root = parent.path().join("overlay");
    fs::write(&root, "").unwrap();
    let refused = |uid| RuntimeDir::take(&root, &nodes(&["mesh"]), uid).unwrap_err().to_string();
    assert!(refused(uid()).contains("not a folder"));
    fs::remove_file(&root).unwrap();
    fs::create_dir(&root).unwrap();
    fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).unwrap();
    assert!(refused(uid()).contains("its mode is 0755"));
    fs::set_permissions(&root, PermissionsExt::from_mode(0o700)).unwrap();
    assert!(refused(uid() + 1).contains("it belongs to user"));
    let elsewhere = parent.path().join("elsewhere");
    fs::rename(&root, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &root).unwrap();
    assert!(refused(uid()).contains("not a folder"), "a link is not followed");
}

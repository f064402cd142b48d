//! One table of good and bad manifests, put to `overlay-operator local` and to the API server.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use overlay_tests::programs;

use crate::world::World;

/// Fewer rows than this means that the table was not found.
const FEWEST_ROWS: usize = 10;

/// Both give every row the verdict of its folder, and both name what the row's first line says
/// (`# names: FIELD`).
pub(crate) fn same_verdict(world: &World) -> Result<()> {
    let operator = programs::built("overlay-operator")?;
    let mut wrong = Vec::new();
    for (folder, good) in [("good", true), ("bad", false)] {
        for file in rows(folder)? {
            let row = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let text = fs::read_to_string(&file)?;
            let names = text.lines().next().and_then(|line| line.strip_prefix("# names: "));
            let by_operator = local(&operator, &file)?;
            let by_server = server(world, &file)?;
            for (who, (accepted, message)) in [("local", &by_operator), ("the API server", &by_server)] {
                if *accepted != good {
                    wrong.push(format!("{folder}/{row}: {who} says {accepted}: {message}"));
                } else if let (false, Some(name)) = (accepted, names)
                    && !message.contains(name)
                {
                    wrong.push(format!("{folder}/{row}: {who} does not name {name}: {message}"));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{} disagree:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

/// The rules that no schema can state, each with its own words.
pub(crate) fn rules_are_enforced(world: &World) -> Result<()> {
    for (row, words) in [
        ("micronode-without-amnesia", "must be true with profile Micronode"),
        ("shed-above-unready", "must be at most unreadyAtPercent"),
        ("recover-not-below-shed", "must be less than shedAtPercent"),
        ("peer-inflight-over-total", "must be at most inflight"),
        ("name-of-49", "must be at most 48 characters"),
        ("name-with-a-dot", "must be lowercase letters"),
    ] {
        let file = programs::repository().join(format!("tests/manifests/bad/{row}.yaml"));
        let (accepted, message) = server(world, &file)?;
        ensure!(!accepted && message.contains(words), "{row}: {message}");
    }
    Ok(())
}

fn rows(folder: &str) -> Result<Vec<PathBuf>> {
    let folder = programs::repository().join("tests/manifests").join(folder);
    let mut files: Vec<_> = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    ensure!(files.len() >= FEWEST_ROWS, "only {} rows in {}", files.len(), folder.display());
    Ok(files)
}

fn local(operator: &Path, file: &Path) -> Result<(bool, String)> {
    let output = Command::new(operator)
        .args(["local", "--dry-run"])
        .arg(file)
        .env_remove("KUBECONFIG")
        .output()
        .with_context(|| format!("starting {}", operator.display()))?;
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code().is_some(), "{}: ended by a signal: {message}", file.display());
    ensure!(!message.contains("panicked"), "{}: {message}", file.display());
    Ok((output.status.success(), message))
}

fn server(world: &World, file: &Path) -> Result<(bool, String)> {
    let arguments = ["apply", "--dry-run=server", "--validate=strict", "-f", &file.to_string_lossy()];
    let outcome = world.admin().try_run(&arguments, None)?;
    Ok((outcome.ok, outcome.stderr))
}

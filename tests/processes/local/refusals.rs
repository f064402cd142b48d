//! What `overlay-operator local` refuses: one clear message each, an exit code, and nothing
//! left running.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use overlay_tests::programs;

use super::mesh::runtime_folder;
use super::single;

const DRAIN: &str = "{delay: 0s, timeout: 1s}";

/// A manifest with this spec, in flow form.
fn manifest(spec: &str) -> String {
    format!("apiVersion: overlay.rustyonions.io/v1alpha1\nkind: OverlayNode\nmetadata: {{name: mesh}}\nspec: {spec}\n")
}

/// Manifests as files, in the order given.
fn files(texts: &[&str]) -> Result<(tempfile::TempDir, Vec<PathBuf>)> {
    let folder = tempfile::tempdir()?;
    let files: Vec<_> = (0..texts.len()).map(|n| folder.path().join(format!("{n}.yaml"))).collect();
    for (file, text) in files.iter().zip(texts) {
        fs::write(file, text)?;
    }
    Ok((folder, files))
}

/// Runs to the end, in an empty runtime folder that has to be empty afterwards.
fn local(program: &std::path::Path, prepare: impl FnOnce(&mut Command) -> Result<()>) -> Result<(Output, String)> {
    let folder = runtime_folder()?;
    let mut command = Command::new(program);
    command.arg("local").env("XDG_RUNTIME_DIR", folder.path()).env_remove("OVERLAY_DAEMON").stdin(Stdio::null());
    prepare(&mut command)?;
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!said.contains("panicked"), "{said}");
    ensure!(fs::read_dir(folder.path())?.next().is_none(), "something is left in the runtime folder: {said}");
    Ok((output, said))
}

/// Everything that a person gets wrong first: one line each, that names what to change.
#[test]
fn bad_input_is_one_clear_message() -> Result<()> {
    let operator = programs::built("overlay-operator")?;
    let tab = "apiVersion: overlay.rustyonions.io/v1alpha1\nkind: OverlayNode\nmetadata:\n\tname: mesh\nspec: {}\n";
    let table: [(&str, &str, &[&str]); 6] = [
        ("an unknown field", &manifest("{replica: 3}"), &["0.yaml", "document 1", "spec.replica", "unknown field"]),
        ("a port of 70000", &manifest("{transports: {tcp: {port: 70000}}}"), &["spec.transports.tcp.port", "65535"]),
        (
            "a Micronode without amnesia",
            &manifest("{profile: Micronode, amnesia: false}"),
            &["spec.amnesia", "Micronode"],
        ),
        ("a tab", tab, &["line 4", "tab"]),
        ("an empty file", "", &["0.yaml", "there is no document", "OverlayNode"]),
        (
            "another kind",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: mesh}\n",
            &["line 1", "apiVersion", "OverlayNode"],
        ),
    ];
    for (case, text, parts) in table {
        let (_folder, files) = files(&[text])?;
        let (output, said) = local(&operator, |command| {
            command.args(&files);
            Ok(())
        })?;
        ensure!(output.status.code() == Some(1), "{case}: {}: {said}", output.status);
        ensure!(said.lines().count() == 1 && said.starts_with("error: "), "{case}: one line: {said}");
        for part in parts {
            ensure!(said.contains(part), "{case}: {part} is not named: {said}");
        }
        ensure!(output.stdout.is_empty(), "{case}: {}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

/// Several things wrong in several places are told at once.
#[test]
fn every_error_is_told() -> Result<()> {
    let operator = programs::built("overlay-operator")?;
    let twice = manifest("{}");
    let (folder, files) = files(&[&manifest("{replicas: 65, gossip: {fanout: 0}}"), &twice, &twice])?;
    let (output, said) = local(&operator, |command| {
        command.args(&files[..1]).arg(folder.path().join("missing.yaml"));
        Ok(())
    })?;
    ensure!(output.status.code() == Some(1) && said.lines().count() == 1, "files come first: {said}");
    ensure!(said.contains("missing.yaml: no such file"), "{said}");
    let (output, said) = local(&operator, |command| {
        command.args(&files);
        Ok(())
    })?;
    ensure!(output.status.code() == Some(1) && said.lines().count() == 3, "{said}");
    for part in ["spec.replicas", "spec.gossip.fanout", "2.yaml: OverlayNode default/mesh: metadata.name: a second one"]
    {
        ensure!(said.contains(part), "{part} is not named: {said}");
    }
    Ok(())
}

/// The operator alone, as after copying one program of two: a folder of its own.
fn operator_alone() -> Result<(tempfile::TempDir, PathBuf)> {
    let operator = programs::built("overlay-operator")?;
    let folder = tempfile::tempdir_in(operator.parent().context("a folder")?)?;
    let alone = folder.path().join("overlay-operator");
    fs::hard_link(&operator, &alone)?;
    Ok((folder, alone))
}

#[test]
fn a_missing_daemon_program_is_named_in_all_three_places() -> Result<()> {
    let (folder, alone) = operator_alone()?;
    let (output, said) = local(&alone, |command| {
        let file = folder.path().join("mesh.yaml");
        fs::write(&file, single("mesh", DRAIN))?;
        command.arg(file).env("PATH", "/nowhere");
        Ok(())
    })?;
    ensure!(output.status.code() == Some(1) && said.lines().count() == 1, "{said}");
    for place in
        [folder.path().join("overlay-daemon").to_string_lossy().as_ref(), "OVERLAY_DAEMON (not set)", "PATH (/nowhere)"]
    {
        ensure!(said.contains(place), "{place} is not named: {said}");
    }
    Ok(())
}

/// A daemon that ends at once stays in back-off, as under a kubelet; a script learns why.
#[test]
fn a_daemon_that_never_gets_ready_fails_the_script() -> Result<()> {
    let (folder, alone) = operator_alone()?;
    let broken = folder.path().join("broken");
    fs::write(&broken, "#!/bin/sh\necho 'error: nothing works' >&2\nexit 3\n")?;
    fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let (output, said) = local(&alone, |command| {
        let file = folder.path().join("mesh.yaml");
        fs::write(&file, single("mesh", DRAIN))?;
        command.arg(file).args(["--exit-when-ready", "--ready-timeout", "2s"]).env("OVERLAY_DAEMON", &broken);
        Ok(())
    })?;
    ensure!(output.status.code() == Some(1), "{said}");
    ensure!(
        said.contains("not ready within 2 s") && said.contains("mesh-0: exited with status 3: error: nothing works"),
        "{said}"
    );
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(out.contains("mesh-0 exited with status 3: error: nothing works; restarts in 1 s"), "{out}");
    Ok(())
}

/// For scripts: 0 once all were ready, and nothing runs after it. Read from standard input.
#[test]
fn exit_when_ready() -> Result<()> {
    let operator = programs::built("overlay-operator")?;
    let folder = runtime_folder()?;
    let mut child = Command::new(&operator)
        .args(["local", "-", "--exit-when-ready", "--output", "json", "--quiet"])
        .env("XDG_RUNTIME_DIR", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("a pipe")?.write_all(single("mesh", DRAIN).as_bytes())?;
    let output = child.wait_with_output()?;
    let lines = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{lines}");
    let lines: Vec<_> = lines.lines().collect();
    ensure!(
        lines.len() == 2 && lines[0].contains(r#""event":"ready""#) && lines[1] == r#"{"event":"stopped"}"#,
        "{lines:?}"
    );
    ensure!(fs::read_dir(folder.path())?.next().is_none(), "something is left");
    Ok(())
}

#[test]
fn a_dry_run_starts_nothing() -> Result<()> {
    let operator = programs::built("overlay-operator")?;
    let other = single("other", DRAIN);
    let both = format!("{}---\n{other}", single("mesh", DRAIN));
    let (_folder, good) = files(&[&both, &single("third", DRAIN)])?;
    let (output, said) = local(&operator, |command| {
        command.args(&good).arg("--dry-run").env("PATH", "/nowhere");
        Ok(())
    })?;
    ensure!(output.status.success(), "{said}");
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(out.lines().count() == 3 && out.lines().all(|line| line.contains(" is valid")), "a line each: {out}");
    let (_folder, mixed) = files(&[&both, &manifest("{replica: 3}")])?;
    let (output, said) = local(&operator, |command| {
        command.args(&mixed).arg("--dry-run");
        Ok(())
    })?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{said}");
    Ok(())
}

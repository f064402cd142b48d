//! Keeps `ATTACKS.md` and `REQUIREMENTS.md` true: every row is there, and every test that one
//! names exists. Tests named by an attack's row (`f6_…`) must stand in that row; with
//! `OVERLAY_WRITE_TABLES` set they are written there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::programs::repository;

/// How many rows of the catalogue a letter has; T3 does not exist.
const ROWS: [(&str, u32); 8] = [("F", 10), ("Z", 4), ("T", 10), ("S", 6), ("K", 6), ("A", 3), ("M", 1), ("N", 2)];
/// The same of the specification.
const ITEMS: [(&str, u32); 5] = [("I-", 11), ("P-", 6), ("C-", 6), ("G-", 10), ("Anti-scope ", 6)];

fn numbered(letters: &[(&str, u32)]) -> BTreeSet<String> {
    let all = letters.iter().flat_map(|(letter, most)| (1..=*most).map(move |n| format!("{letter}{n}")));
    all.filter(|row| row != "T3").collect()
}

/// The rows of a document's first table: the first cell, and the last.
fn rows(text: &str) -> Vec<(&str, &str)> {
    let is_row = |line: &&str| line.starts_with('|');
    let lines = text.lines().skip_while(|line| !is_row(line)).take_while(is_row).skip(2);
    let cells = lines.map(|line| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
    cells.filter_map(|cells| Some((*cells.first()?, *cells.last()?))).collect()
}

/// What a cell names: `FILE::FUNCTION` between backticks.
fn references(cell: &str) -> BTreeSet<&str> {
    cell.split('`').skip(1).step_by(2).filter(|word| word.contains("::")).collect()
}

/// Whether a reference is to a test that is there, or to a function of a script.
fn exists(reference: &str) -> bool {
    let Some((file, name)) = reference.split_once("::") else { return false };
    let path = repository().join(file);
    let text = fs::read_to_string(&path).unwrap_or_default();
    if !file.ends_with(".rs") {
        return text.contains(&format!("\n{name}() {{"));
    }
    let module = path.file_stem().unwrap_or_default().to_string_lossy();
    let tier = fs::read_to_string(path.with_file_name("main.rs")).unwrap_or_default();
    let is_case = tier.contains(&format!("\", {module}::{name})"));
    text.match_indices(&format!("fn {name}("))
        .any(|(at, _)| is_case || has_attribute(&text[..at]) || is_given(&text, name))
}

/// Whether what comes before a function makes it a test.
fn has_attribute(before: &str) -> bool {
    let mut above = before.rsplit('\n').skip(1).map(str::trim).take_while(|line| line.starts_with(['#', '/']));
    above.any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"))
}

/// Whether a macro that makes tests of functions is given this one.
fn is_given(text: &str, name: &str) -> bool {
    let lists = ["on_both_profiles!(", "rows!(", "\ntable!("].into_iter().flat_map(|open| text.split(open).skip(1));
    let names = lists.filter_map(|rest| rest.split(')').next()).flat_map(|list| list.split([',', ':', ';']));
    names.map(str::trim).any(|given| given == name)
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// The rows that a function's name begins with: `z1_z3_a_payload` has two.
fn named_rows(function: &str) -> BTreeSet<String> {
    let known = numbered(&ROWS);
    function.split('_').map(str::to_uppercase).take_while(|word| known.contains(word)).collect()
}

/// Every test named by rows, by row.
fn tests_by_row() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut files = Vec::new();
    for folder in ["overlay-daemon/core/src", "overlay-daemon/src", "operator/src", "tests"] {
        sources(&repository().join(folder), &mut files)?;
    }
    let mut by_row: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in files {
        let text = fs::read_to_string(&file)?;
        let short = file.strip_prefix(repository())?.display().to_string();
        for line in text.lines().map(str::trim_start) {
            let function = line.strip_prefix("async fn ").or_else(|| line.strip_prefix("fn "));
            let Some((name, _)) = function.and_then(|rest| rest.split_once('(')) else { continue };
            for row in named_rows(name) {
                by_row.entry(row).or_default().insert(format!("{short}::{name}"));
            }
        }
    }
    Ok(by_row)
}

/// A document's rows are `want`, and each is shown by something, or says why not; whatever the
/// document names exists.
fn check(name: &str, text: &str, want: &BTreeSet<String>) -> Result<()> {
    let have: Vec<String> = rows(text).iter().map(|(row, _)| (*row).to_owned()).collect();
    let missing: Vec<_> = want.iter().filter(|row| !have.contains(row)).collect();
    ensure!(missing.is_empty(), "{name} has no row for {missing:?}");
    ensure!(have.len() == want.len(), "{name} has a row twice, or one that the list does not know");
    for (row, cell) in rows(text) {
        let named = references(cell);
        ensure!(!named.is_empty() || cell.starts_with('—'), "{name}: {row} names no test and does not say why");
    }
    let gone: Vec<_> = references(text).into_iter().filter(|reference| !exists(reference)).collect();
    ensure!(gone.is_empty(), "{name} names what does not exist: {gone:?}");
    Ok(())
}

/// The document with every test named by a row in its row, and without those that are gone.
fn filled(text: &str, by_row: &BTreeMap<String, BTreeSet<String>>) -> String {
    let line = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [row, about, cell] = cells[..] else { return line.to_owned() };
        let kept = references(cell).into_iter().filter(|reference| exists(reference)).map(str::to_owned);
        let all: BTreeSet<String> = kept.chain(by_row.get(row).into_iter().flatten().cloned()).collect();
        if all.is_empty() {
            return line.to_owned();
        }
        let all: Vec<String> = all.iter().map(|reference| format!("`{reference}`")).collect();
        format!("| {row} | {about} | {} |", all.join(", "))
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n") + "\n"
}

#[test]
fn the_attack_table_is_true() -> Result<()> {
    let path = repository().join("tests/ATTACKS.md");
    let mut text = fs::read_to_string(&path)?;
    let full = filled(&text, &tests_by_row()?);
    if full != text && std::env::var_os("OVERLAY_WRITE_TABLES").is_some() {
        fs::write(&path, &full)?;
        text = full.clone();
    }
    check("ATTACKS.md", &text, &numbered(&ROWS))?;
    if let Some((now, want)) = text.lines().zip(full.lines()).find(|(now, want)| now != want) {
        bail!("ATTACKS.md has\n{now}\nand should have\n{want}\n(OVERLAY_WRITE_TABLES=1 writes it)");
    }
    Ok(())
}

#[test]
fn the_requirements_table_is_true() -> Result<()> {
    let text = fs::read_to_string(repository().join("tests/REQUIREMENTS.md")).context("REQUIREMENTS.md")?;
    check("REQUIREMENTS.md", &text, &numbered(&ITEMS))
}

/// G-9: whatever file of the daemon has a lock or an atomic stands in the list of them.
#[test]
fn what_tasks_share_is_listed() -> Result<()> {
    let text = fs::read_to_string(repository().join("tests/REQUIREMENTS.md"))?;
    let mut files = Vec::new();
    sources(&repository().join("overlay-daemon"), &mut files)?;
    for file in files {
        let short = file.strip_prefix(repository())?.display().to_string();
        let code = fs::read_to_string(&file)?;
        // Imports, whether written out or among others in braces.
        let shares = code.lines().filter(|line| line.trim_start().starts_with("use std::sync::")).any(|line| {
            ["atomic", "Mutex", "RwLock", "Condvar", "Once", "LazyLock"].iter().any(|word| line.contains(word))
        });
        let is_test = short.contains("/tests");
        ensure!(
            !shares || is_test || text.contains(&short),
            "{short} shares something: REQUIREMENTS.md does not list it"
        );
    }
    Ok(())
}

/// The checks fail where they should.
#[test]
fn a_false_table_is_noticed() {
    let want = numbered(&[("M", 1)]);
    let table = |row: &str| format!("| row | about | tests |\n| --- | --- | --- |\n{row}\n");
    let cases = [
        ("| M1 | memory | `tests/run::tier_checks` |", true),
        ("| M1 | memory | `tests/src/tables.rs::a_false_table_is_noticed` |", true),
        ("| M1 | memory | `tests/src/wait.rs::until` |", false),
        ("| M1 | memory | `overlay-daemon/core/src/codec/tests.rs::edges` |", false),
        ("| M1 | memory | `tests/processes/tokens.rs::inspect` |", false),
        ("| M1 | memory | `tests/processes/tokens.rs::k1_a_token_that_dies_ends_its_stream` |", true),
        ("| M1 | memory | `tests/processes/parity.rs::silence_ends_a_session` |", true),
        ("| M1 | memory | `tests/kubelet/prometheus.rs::finds_and_queries_everything` |", true),
        ("| M1 | memory | — not yet |", true),
        ("| M1 | memory | |", false),
        ("| M1 | memory | `tests/src/tables.rs::no_such_test` |", false),
        ("| M1 | memory | `tests/src/no_such_file.rs::check` |", false),
        ("| M2 | memory | — not yet |", false),
        ("| M1 | memory | — not yet |\n| M1 | memory | — not yet |", false),
    ];
    for (row, good) in cases {
        assert_eq!(check("a table", &table(row), &want).is_ok(), good, "{row}");
    }
    assert_eq!(named_rows("z1_z3_a_payload"), ["Z1", "Z3"].map(str::to_owned).into());
    assert!(named_rows("a_message").is_empty() && named_rows("g1_gossip").is_empty());
}

//! The corpora, replayed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::TARGETS;

/// Bytes and files of a corpus at the most: it is read by people now and then, and runs in every
/// test run.
const MOST_BYTES: u64 = 128 * 1024;
const MOST_FILES: usize = 300;

/// G-1: what the fuzzer found worth keeping, and what once failed, holds.
#[test]
fn the_corpora_hold() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in TARGETS {
        let folder = corpora.join(name);
        let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let size: u64 = files.iter().map(|file| file.metadata().unwrap().len()).sum();
        assert!((1..=MOST_FILES).contains(&files.len()) && size <= MOST_BYTES, "{name}: {} files", files.len());
        for file in files {
            println!("{}", file.display()); // the last one is the culprit
            target(&fs::read(file).unwrap());
        }
    }
}

/// Each target has a corpus, and the fuzzer has each target.
#[test]
fn targets_are_those_of_the_fuzzer() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let in_folder = |folder: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(root.join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let names = TARGETS.map(|(name, _)| name.to_owned()).into();
    assert_eq!((in_folder("corpus"), in_folder("targets")), (names, TARGETS.map(|(name, _)| name.to_owned()).into()));
}

//! Reads manifests as kubectl does: a file, a folder's `.yaml`, `.yml` and `.json` files, or
//! `-` for standard input. Decides which texts there are and that a name appears once; what a
//! text may say is `admit`'s.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::admit::{self, Admitted};

/// Bytes of one file: more than an API server takes in one request.
pub(super) const MAX_FILE: u64 = 3 << 20;
/// Files of one folder.
const MAX_FILES: usize = 1_000;
/// What stands for standard input.
const STANDARD_INPUT: &str = "-";

/// A text and what to call it in messages.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) name: String,
    pub(super) text: String,
}

/// Reads and checks everything that was named.
///
/// # Errors
/// Every message, not the first alone.
pub(super) fn read(inputs: &[PathBuf]) -> Result<Vec<Admitted>, Vec<String>> {
    let sources = sources(inputs, io::stdin().lock())?;
    let mut admitted = Vec::new();
    let mut errors = Vec::new();
    let mut seen = BTreeMap::new();
    for source in &sources {
        match admit::documents(&source.text, &source.name) {
            Ok(nodes) => {
                for node in nodes {
                    match first_time(&mut seen, &node, &source.name) {
                        Ok(()) => admitted.push(node),
                        Err(error) => errors.push(error),
                    }
                }
            }
            Err(wrong) => errors.extend(wrong.iter().map(ToString::to_string)),
        }
    }
    if errors.is_empty() { Ok(admitted) } else { Err(errors) }
}

/// A cluster would take the second as a change of the first; here one of the two was meant.
fn first_time(seen: &mut BTreeMap<(String, String), String>, node: &Admitted, source: &str) -> Result<(), String> {
    let metadata = &node.node.metadata;
    let key = (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default());
    match seen.get(&key) {
        Some(first) => Err(format!(
            "{source}: OverlayNode {}/{}: metadata.name: a second one of this name (the first is in {first}); remove one or rename it",
            key.0, key.1
        )),
        None => {
            seen.insert(key, source.to_owned());
            Ok(())
        }
    }
}

/// The texts of `inputs`, in that order, a folder's in the order of their names.
fn sources(inputs: &[PathBuf], mut standard_input: impl Read) -> Result<Vec<Source>, Vec<String>> {
    let mut sources = Vec::new();
    let mut errors = Vec::new();
    let mut taken = false;
    for input in inputs {
        if input.as_os_str() == STANDARD_INPUT {
            if taken {
                errors.push("-: standard input can be named once".to_owned());
            } else {
                taken = true;
                push(&mut sources, &mut errors, "standard input".to_owned(), &mut standard_input);
            }
            continue;
        }
        match files(input) {
            Err(error) => errors.push(error),
            Ok(files) => {
                for file in files {
                    let name = file.display().to_string();
                    match File::open(&file) {
                        Ok(mut text) => push(&mut sources, &mut errors, name, &mut text),
                        Err(error) => errors.push(format!("{name}: cannot be read: {error}")),
                    }
                }
            }
        }
    }
    if errors.is_empty() { Ok(sources) } else { Err(errors) }
}

fn push(sources: &mut Vec<Source>, errors: &mut Vec<String>, name: String, from: &mut impl Read) {
    let mut bytes = Vec::new();
    match from.take(MAX_FILE + 1).read_to_end(&mut bytes) {
        Err(error) => errors.push(format!("{name}: cannot be read: {error}")),
        Ok(length) if length as u64 > MAX_FILE => errors.push(format!("{name}: larger than {MAX_FILE} bytes")),
        Ok(_) => match String::from_utf8(bytes) {
            Ok(text) => sources.push(Source { name, text }),
            Err(_) => errors.push(format!("{name}: not UTF-8 text")),
        },
    }
}

fn files(input: &Path) -> Result<Vec<PathBuf>, String> {
    let shown = input.display();
    let metadata = fs::metadata(input).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("{shown}: no such file or folder"),
        _ => format!("{shown}: cannot be read: {error}"),
    })?;
    if !metadata.is_dir() {
        return Ok(vec![input.to_owned()]);
    }
    let unreadable = |error: io::Error| format!("{shown}: cannot be read: {error}");
    let mut files = Vec::new();
    for entry in fs::read_dir(input).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let manifest = path.extension().is_some_and(|e| ["yaml", "yml", "json"].iter().any(|known| e == *known));
        if manifest && path.is_file() {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(format!("{shown}: more than {MAX_FILES} manifests; name fewer"));
        }
    }
    files.sort();
    if files.is_empty() { Err(format!("{shown}: no .yaml, .yml or .json file in this folder")) } else { Ok(files) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, text: &[u8]) {
        fs::write(folder.join(name), text).unwrap();
    }

    fn texts(inputs: &[PathBuf], input: &str) -> Result<Vec<String>, Vec<String>> {
        sources(inputs, input.as_bytes()).map(|all| all.into_iter().map(|s| s.text).collect())
    }

    #[test]
    fn what_is_read_and_in_which_order() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        for name in ["b.yaml", "a.yml", "c.json", "notes.txt"] {
            write(at, name, name.as_bytes());
        }
        fs::create_dir(at.join("d.yaml")).unwrap();
        let own = |all: &[&str]| Ok(all.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_eq!(texts(&[at.to_owned()], ""), own(&["a.yml", "b.yaml", "c.json"]), "a folder, not what lies deeper");
        assert_eq!(texts(&[at.join("notes.txt")], ""), own(&["notes.txt"]), "a file by any name");
        assert_eq!(texts(&["-".into(), at.join("b.yaml")], "piped"), own(&["piped", "b.yaml"]));
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        write(at, "latin1.yaml", &[b'a', 0xe9]);
        write(at, "large.yaml", &vec![b'#'; usize::try_from(MAX_FILE).unwrap() + 1]);
        fs::create_dir(at.join("empty")).unwrap();
        let table: [(&[&str], &[&str]); 5] = [
            (&["missing.yaml"], &["no such file or folder"]),
            (&["empty"], &["no .yaml, .yml or .json file"]),
            (&["latin1.yaml"], &["not UTF-8"]),
            (&["large.yaml"], &["larger than 3145728 bytes"]),
            (&["missing.yaml", "latin1.yaml"], &["no such file", "not UTF-8"]),
        ];
        for (inputs, want) in table {
            let inputs: Vec<_> = inputs.iter().map(|i| at.join(i)).collect();
            let errors = texts(&inputs, "").unwrap_err();
            assert_eq!(errors.len(), want.len(), "{inputs:?}: {errors:?}");
            for (error, part) in errors.iter().zip(want) {
                assert!(error.contains(part), "{error}");
            }
        }
        let twice = texts(&["-".into(), "-".into()], "x").unwrap_err();
        assert_eq!(twice, ["-: standard input can be named once"]);
    }
}

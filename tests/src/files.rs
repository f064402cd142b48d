//! Files as Kubernetes swaps them under a running daemon.

use std::fs;
use std::path::Path;

use anyhow::Result;

/// Replaces a file whole: whoever reads it finds the old text or the new one, never a part.
///
/// # Errors
/// It cannot be written.
pub fn replace(path: &Path, text: impl AsRef<[u8]>) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    Ok(fs::rename(new, path)?)
}

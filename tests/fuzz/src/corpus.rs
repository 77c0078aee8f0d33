//! The corpus: small files, one input each, below `tests/fuzz/corpus/TARGET/`.
//!
//! Hand-written edge cases, and every input that was ever a finding. All of them must pass, for ever.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use xsan_protocol::checksum::crc64;

/// Where the corpus of `target` is.
pub fn directory(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target)
}

/// Files of a target's corpus with their content, in the order of their names; none when there is no directory.
///
/// # Errors
/// A file can not be read.
pub fn read(target: &str) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let entries = match fs::read_dir(directory(target)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    paths.into_iter().map(|path| Ok((path.clone(), fs::read(path)?))).collect()
}

/// Keeps an input that was a finding. Returns the file, named by its content.
///
/// # Errors
/// It can not be written.
pub fn save(target: &str, input: &[u8]) -> io::Result<PathBuf> {
    let directory = directory(target);
    fs::create_dir_all(&directory)?;
    let file = directory.join(format!("found-{:016x}", crc64(input)));
    fs::write(&file, input)?;
    Ok(file)
}

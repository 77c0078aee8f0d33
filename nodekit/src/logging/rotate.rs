//! A log file with a bound: when it would grow past `bytes_max`, it becomes `….1`, that `….2`, and the oldest goes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub(super) struct RotatingFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
    files_max: u32,
}

impl RotatingFile {
    /// Appends to `path`, making its directory if need be.
    pub(super) fn open(path: &Path, bytes_max: u64, files_max: u32) -> io::Result<Self> {
        assert!(files_max > 0);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let file = append_to(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.into(), file, bytes, bytes_max, files_max })
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (1..self.files_max).rev() {
            let from = if number == 1 { self.path.clone() } else { numbered(&self.path, number - 1) };
            match fs::rename(&from, numbered(&self.path, number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if self.files_max == 1 {
            self.file.set_len(0)?;
        } else {
            self.file = append_to(&self.path)?;
        }
        self.bytes = 0;
        Ok(())
    }
}

impl Write for RotatingFile {
    /// Writes one whole line to one file.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.bytes_max {
            // Rather a file that is too long than lines that are lost: go on with the old one if rotation fails.
            if self.rotate().is_err() {
                self.bytes = 0;
            }
        }
        self.file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap_or_default()
    }

    #[test]
    fn files_rotate_by_size_and_the_oldest_goes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("new/node.log");
        let mut log = RotatingFile::open(&path, 10, 3).expect("it opens");
        for line in ["one 4\n", "2\n", "three\n", "four 4\n", "five 5\n"] {
            log.write_all(line.as_bytes()).expect("it writes");
        }
        assert_eq!(read(&path), "five 5\n");
        assert_eq!(read(&numbered(&path, 1)), "four 4\n");
        assert_eq!(read(&numbered(&path, 2)), "three\n");
        assert!(!numbered(&path, 3).exists());
    }

    #[test]
    fn an_old_file_is_continued_and_counted() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("node.log");
        fs::write(&path, "12345678\n").expect("it writes");
        let mut log = RotatingFile::open(&path, 10, 2).expect("it opens");
        log.write_all(b"next\n").expect("it writes");
        assert_eq!(read(&path), "next\n");
        assert_eq!(read(&numbered(&path, 1)), "12345678\n");
    }

    #[test]
    fn one_file_is_emptied_and_a_long_line_is_whole() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("node.log");
        let mut log = RotatingFile::open(&path, 10, 1).expect("it opens");
        log.write_all(b"short\n").expect("it writes");
        log.write_all(b"a line that is longer than the bound\n").expect("it writes");
        assert_eq!(read(&path), "a line that is longer than the bound\n");
    }
}

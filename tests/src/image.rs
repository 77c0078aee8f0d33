//! A disk image as a user has one: an ext4 file system full of real files, as qcow2.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::random::Random;
use crate::tools::run;

/// Where real files of all sizes are found on any system, in this order.
const SOURCES: &[&str] = &["/usr/bin", "/usr/lib", "/usr/share"];
/// mke2fs takes about a millisecond for each file.
const FILES_MAX: u64 = 8000;
const GENERATED_BYTES: u64 = 64 << 20;
const COMPARE_CHUNK: usize = 4 << 20;

#[derive(Clone, Debug)]
pub struct Image {
    pub raw: PathBuf,
    pub qcow2: PathBuf,
    pub size_bytes: u64,
    pub file_count: u64,
    pub content_bytes: u64,
}

impl Image {
    /// Copies files until there are `content_bytes` or `FILES_MAX` of them, adds generated ones, and makes the image of them.
    pub fn make(directory: &Path, size_bytes: u64, content_bytes: u64) -> Result<Self> {
        assert!(content_bytes + GENERATED_BYTES < size_bytes);
        let tree = directory.join("tree");
        fs::create_dir(&tree)?;
        let mut copy = Copy { left: content_bytes, file_count: 0 };
        for source in SOURCES {
            copy.directory(Path::new(source), &tree.join(source.trim_start_matches('/')))?;
        }
        ensure!(copy.file_count > 0, "none of {SOURCES:?} holds a file");
        let mut bytes = vec![0; GENERATED_BYTES as usize];
        Random::new(1).fill(&mut bytes);
        fs::write(tree.join("generated.bin"), &bytes)?;

        let (raw, qcow2) = (directory.join("image.raw"), directory.join("image.qcow2"));
        let (tree_name, raw_name, qcow2_name) = (name(&tree)?, name(&raw)?, name(&qcow2)?);
        let blocks = (size_bytes / 4096).to_string();
        run("mke2fs", ["-q", "-t", "ext4", "-b", "4096", "-d", tree_name, raw_name, &blocks])?;
        run("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", raw_name, qcow2_name])?;
        fs::remove_dir_all(&tree)?;
        Ok(Self {
            raw,
            qcow2,
            size_bytes,
            file_count: copy.file_count + 1,
            content_bytes: content_bytes - copy.left + GENERATED_BYTES,
        })
    }

    /// Compares a file with the image byte for byte; the number of bytes compared.
    pub fn compare(&self, other: &Path) -> Result<u64> {
        let (ours, theirs) = (fs::File::open(&self.raw)?, fs::File::open(other)?);
        ensure!(theirs.metadata()?.len() == self.size_bytes, "{} has another size", other.display());
        let (mut left, mut right) = (vec![0; COMPARE_CHUNK], vec![0; COMPARE_CHUNK]);
        for offset in (0..self.size_bytes).step_by(COMPARE_CHUNK) {
            let count = COMPARE_CHUNK.min((self.size_bytes - offset) as usize);
            ours.read_exact_at(&mut left[..count], offset)?;
            theirs.read_exact_at(&mut right[..count], offset)?;
            if let Some(index) = left[..count].iter().zip(&right[..count]).position(|(a, b)| a != b) {
                anyhow::bail!("{} differs from the image at byte {}", other.display(), offset + index as u64);
            }
        }
        Ok(self.size_bytes)
    }
}

fn name(path: &Path) -> Result<&str> {
    path.to_str().context("the work directory's name is not UTF-8")
}

/// A copy of regular files and directories, until enough of them are there.
struct Copy {
    left: u64,
    file_count: u64,
}

impl Copy {
    fn is_done(&self) -> bool {
        self.left == 0 || self.file_count >= FILES_MAX
    }

    fn directory(&mut self, from: &Path, to: &Path) -> Result<()> {
        if self.is_done() || !from.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
            let entry = entry?;
            let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
            if kind.is_dir() {
                self.directory(&entry.path(), &target)?;
            } else if kind.is_file() {
                let length = entry.metadata()?.len();
                // What only root may read is left out.
                if !self.is_done() && length <= self.left && fs::copy(entry.path(), &target).is_ok() {
                    self.left -= length;
                    self.file_count += 1;
                }
            }
        }
        Ok(())
    }
}

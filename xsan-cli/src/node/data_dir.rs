//! The data directory: made if need be, checked, and locked, so that one xsan-node has it at a time.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use xsan_nodekit::config::NodeConfig;
use xsan_nodekit::size::Amount;

use super::error::NodeError;
use super::sys;

const LOCK_FILE: &str = "node.lock";
/// What Raft's log, its snapshots and the applied state may need before anyone looks.
const STATE_BYTES_MIN: u64 = 64 << 20;

/// A data directory that nobody else uses. The lock ends with the process, however that ends.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// The topmost directory that was made here; removed again if the node does not come to be.
    made: Option<PathBuf>,
    lock_made: bool,
    _lock: File,
}

impl DataDir {
    /// Makes the directory of `config` if it is not there, locks it, and checks that it can be written and has the space.
    pub fn take(config: &NodeConfig) -> Result<Self, NodeError> {
        let path = config.cluster.data_dir.clone();
        let fails = |source| NodeError::DataDir { data_dir: path.clone(), source };
        let made = first_missing(&path);
        fs::create_dir_all(&path).map_err(fails)?;
        let lock_path = path.join(LOCK_FILE);
        let lock_made = !lock_path.exists();
        let lock = lock(&lock_path, &path).inspect_err(|_| remove_made(&path, made.as_deref()))?;
        let locked = Self { path: path.clone(), made, lock_made, _lock: lock };
        match locked.write_pid().map_err(fails).and_then(|()| locked.has_space(config)) {
            Ok(()) => Ok(locked),
            Err(error) => {
                locked.give_back();
                Err(error)
            }
        }
    }

    /// Shows that the directory can be written, and tells the next one who has it.
    fn write_pid(&self) -> io::Result<()> {
        let mut lock = &self._lock;
        lock.set_len(0)?;
        writeln!(lock, "{}", std::process::id())?;
        lock.sync_all()
    }

    fn has_space(&self, config: &NodeConfig) -> Result<(), NodeError> {
        let mut needed = STATE_BYTES_MIN;
        if config.storage.devices.is_empty() {
            let missing = (0..config.dataplane.stores)
                .filter(|store| !self.path.join(format!("data/store-{store}.img")).exists())
                .count() as u64;
            needed += missing * config.dataplane.file_size;
        }
        let free = sys::free_bytes(&self.path)
            .map_err(|source| NodeError::DataDir { data_dir: self.path.clone(), source })?;
        if free < needed {
            return Err(NodeError::DataDirFull {
                data_dir: self.path.clone(),
                free: Amount(free),
                needed: Amount(needed),
            });
        }
        Ok(())
    }

    /// Leaves the directory as it was found.
    pub fn give_back(self) {
        if self.lock_made {
            // What can not be removed is an empty lock file: it hinders nobody.
            let _ = fs::remove_file(self.path.join(LOCK_FILE));
        }
        remove_made(&self.path, self.made.as_deref());
    }
}

/// Opens and locks the lock file at `path`.
fn lock(path: &Path, data_dir: &Path) -> Result<File, NodeError> {
    let fails = |source| NodeError::DataDir { data_dir: data_dir.into(), source };
    loop {
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut lock = opened.map_err(fails)?;
        match lock.try_lock() {
            Ok(()) if is_at(&lock, path).map_err(fails)? => return Ok(lock),
            // Who had it gave it back and removed it, after this one had opened it: the next one has another file.
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                let pid = lock.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(NodeError::DataDirLocked { data_dir: data_dir.into(), pid });
            }
            Err(TryLockError::Error(source)) => return Err(fails(source)),
        }
    }
}

/// Is `file` still the one that `path` names?
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn first_missing(path: &Path) -> Option<PathBuf> {
    path.ancestors().take_while(|ancestor| !ancestor.exists()).last().map(Path::to_owned)
}

/// Removes the directories from `path` up to `made`, as far as they are empty.
fn remove_made(path: &Path, made: Option<&Path>) {
    let Some(made) = made else { return };
    for directory in path.ancestors().take_while(|ancestor| ancestor.starts_with(made)) {
        if fs::remove_dir(directory).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xsan_protocol::error::Code;

    fn config(path: &Path) -> NodeConfig {
        let mut config = NodeConfig::default();
        config.cluster.data_dir = path.into();
        config.dataplane.file_size = 256 << 20;
        config
    }

    #[test]
    fn what_was_made_is_removed_again() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("a/b/c");
        let taken = DataDir::take(&config(&path)).expect("it can be made");
        assert!(path.join(LOCK_FILE).exists());
        taken.give_back();
        assert!(!root.path().join("a").exists());
        assert!(root.path().exists());
    }

    #[test]
    fn a_directory_is_for_one_node_at_a_time() {
        let root = tempfile::tempdir().expect("a directory");
        let first = DataDir::take(&config(root.path())).expect("it is free");
        let error = DataDir::take(&config(root.path())).expect_err("it is taken");
        assert_eq!(error.code(), Code::DataDirUnusable);
        assert!(error.to_string().ends_with(&format!("(process {})", std::process::id())), "{error}");
        drop(first);
        DataDir::take(&config(root.path())).expect("it is free again");
    }

    /// Two nodes ran in one directory: each had locked a lock file, one of them a removed one.
    #[test]
    fn a_lock_on_a_removed_file_is_none() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join(LOCK_FILE);
        let file = File::create(&path).expect("it writes");
        assert!(is_at(&file, &path).expect("readable"));
        fs::remove_file(&path).expect("it is there");
        assert!(!is_at(&file, &path).expect("readable"));
        let _other = File::create(&path).expect("it writes");
        assert!(!is_at(&file, &path).expect("readable"));
    }

    #[test]
    fn a_directory_without_the_space_is_refused_and_left_alone() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("full");
        let mut config = config(&path);
        config.dataplane.file_size = 64 << 40;
        config.dataplane.stores = 64;
        let error = DataDir::take(&config).expect_err("nobody has 4 PiB");
        assert_eq!(error.code(), Code::DataDirUnusable);
        assert!(error.to_string().contains("and the node needs 4.00 PiB"), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn a_path_through_a_file_is_refused() {
        let root = tempfile::tempdir().expect("a directory");
        let file = root.path().join("file");
        fs::write(&file, "").expect("it writes");
        let error = DataDir::take(&config(&file.join("data"))).expect_err("a file is no directory");
        assert_eq!(error.code(), Code::DataDirUnusable);
    }
}

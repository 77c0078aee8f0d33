//! Stores that failed, kept in the data directory until the cluster knows.
//!
//! A flush that fails may take with it what it was to cover, and the next life of the process finds a store in which nothing looks
//! wrong. The control plane is told of a failure at once; but while it has no leader, the node may be restarted before it has heard.
//! So a failure is noted in a file, too, and the next life tells of it when it registers (`map::Store::failed_before`). So is what is found
//! when a store is opened: the data process may be killed before it has registered, and a later life would find nothing.
//!
//! A file is of one store and one life: noting a failure of this life never meets forgetting those of earlier ones.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use xsan_nodekit::config;
use xsan_protocol::ids::{Incarnation, StoreId};

/// What the names of the files begin with; the store and the life follow.
const PREFIX: &str = "failed-";
/// Stands for whatever life came before: the first has number 1.
const EARLIER: Incarnation = Incarnation(0);

#[derive(Clone)]
pub struct Failures {
    directory: PathBuf,
    incarnation: Incarnation,
}

impl Failures {
    /// Those of this life of the data process, and of earlier ones.
    pub fn new(directory: PathBuf, incarnation: Incarnation) -> Self {
        Self { directory, incarnation }
    }

    /// The store failed in this life. On stable media when it returns.
    pub fn note(&self, store: StoreId) -> io::Result<()> {
        self.note_of(store, self.incarnation)
    }

    /// The store lacks, or may lack, something that it had in an earlier life. On stable media when it returns.
    pub fn note_earlier(&self, store: StoreId) -> io::Result<()> {
        self.note_of(store, EARLIER)
    }

    fn note_of(&self, store: StoreId, life: Incarnation) -> io::Result<()> {
        config::replace(&self.directory.join(format!("{PREFIX}{store}-{}", life.0)), b"")
    }

    /// The files of earlier lives, with their stores.
    fn earlier(&self) -> io::Result<Vec<(StoreId, PathBuf)>> {
        let mut earlier = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let parts = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'));
            let Some((store, life)) = parts else { continue };
            let (store, life) = (u64::from_str_radix(store, 16), life.parse::<u64>());
            if let (Ok(store), Ok(life)) = (store, life)
                && life != self.incarnation.0
            {
                earlier.push((StoreId(store), entry.path()));
            }
        }
        Ok(earlier)
    }

    /// Stores that failed in earlier lives, which the cluster may not know.
    pub fn before(&self) -> io::Result<BTreeSet<StoreId>> {
        Ok(self.earlier()?.into_iter().map(|(store, _)| store).collect())
    }

    /// The cluster knows what of these stores failed in earlier lives. It was not told of others, whose devices this life does not have.
    pub fn forget_earlier(&self, told: &BTreeSet<StoreId>) -> io::Result<()> {
        let known = self.earlier()?.into_iter().filter(|(store, _)| told.contains(store));
        known.map(|(_, file)| file).try_for_each(std::fs::remove_file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_by_the_next_life_until_it_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let life = |number| Failures::new(directory.path().to_owned(), Incarnation(number));
        std::fs::write(directory.path().join("incarnation"), "1\n").unwrap();
        std::fs::write(directory.path().join("failed-x"), "").unwrap();
        let stores = |failures: &Failures| -> Vec<u64> {
            failures.before().unwrap().into_iter().map(|store| store.0).collect()
        };
        life(1).note(StoreId(0xab)).unwrap();
        assert!(stores(&life(1)).is_empty(), "this life tells of it itself");
        let second = life(2);
        assert_eq!(stores(&second), [0xab]);
        // It fails again before the cluster knows of the first time.
        second.note(StoreId(0xab)).unwrap();
        second.note(StoreId(0xcd)).unwrap();
        second.forget_earlier(&[StoreId(0xcd)].into()).unwrap();
        assert_eq!(stores(&second), [0xab], "its device was not there, so nobody was told");
        second.forget_earlier(&[StoreId(0xab)].into()).unwrap();
        assert!(stores(&second).is_empty());
        assert_eq!(stores(&life(3)), [0xab, 0xcd]);
        let third = life(3);
        third.forget_earlier(&[StoreId(0xab), StoreId(0xcd)].into()).unwrap();
        third.note_earlier(StoreId(0xef)).unwrap();
        assert_eq!(stores(&life(3)), [0xef], "its registration tells of it");
        third.forget_earlier(&[StoreId(0xef)].into()).unwrap();
        assert!(stores(&life(4)).is_empty());
    }
}

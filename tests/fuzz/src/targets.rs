//! Every target, one for each decoder of the system.

mod cluster;
mod config;
mod connection;
mod disk;
mod nbd;
mod records;
mod store;
mod wire;

use crate::target::Target;

/// All targets, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Target> {
    [wire::TARGETS, connection::TARGETS, disk::TARGETS, cluster::TARGETS, records::TARGETS, nbd::TARGETS]
        .into_iter()
        .chain([config::TARGETS, store::TARGETS])
        .flatten()
}

pub fn named(name: &str) -> Option<&'static Target> {
    all().find(|target| target.name == name)
}

//! Several clients of one volume, each through a gateway of its own, and one history of them all.
//!
//! Each client writes pages of its own and reads everybody's, all over the groups: a gateway, a primary or a
//! replica that lives in the past shows as a read that no order explains. Used by the tests of network faults and the soak.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::cluster::Cluster;
use crate::history::History;
use crate::writer::{Pages, Promises, Work, Writer};

/// Of the volume, so that pages far apart are in groups of their own.
const PAGES_PER_CLIENT: u64 = 16;
/// Issue: a client that reads as much as it writes sees a stale value soon.
const READ_PERCENT: u64 = 60;
/// In writes.
const FLUSH_INTERVAL: u64 = 25;
/// So many rounds that follow each other meet other groups; the next ones lie beside them, so that many rounds take little space.
const SPREAD: u64 = 8;

/// The pages of a round: others' rounds use others.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Of the volume, for all rounds.
    pub first: u64,
    pub pages: u64,
    pub round: u64,
}

impl Field {
    /// Rounds that a field of so many pages has room for.
    pub const fn rounds(&self, clients: u64) -> u64 {
        self.step(clients) / SPREAD * SPREAD
    }

    /// Between two pages of a client.
    const fn step(&self, clients: u64) -> u64 {
        self.pages / (clients * PAGES_PER_CLIENT)
    }

    const fn pages_of(&self, client: u64, clients: u64) -> Pages {
        let step = self.step(clients);
        let own = self.round % SPREAD * (step / SPREAD) + self.round / SPREAD;
        let first = self.first + client * PAGES_PER_CLIENT * step + own;
        Pages { first, step, count: PAGES_PER_CLIENT }
    }
}

pub struct Crowd {
    writers: Vec<Writer>,
    volume: String,
    seed: u64,
}

/// What came of it, when nothing was wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    pub operations: usize,
    pub reads: usize,
    /// Connections that broke, of all clients: each is the death of a gateway's process.
    pub losses: u64,
    /// The longest that any client waited for an answer.
    pub stall: Duration,
    /// The longest that the clients of gateways that were not touched waited.
    pub stall_elsewhere: Duration,
}

impl Crowd {
    /// One client for each node; client n begins at gateway n, and goes to others when it loses its connection.
    pub fn start(cluster: &Cluster, volume: &str, field: Field, seed: u64) -> Result<Self> {
        let count = cluster.nodes().len();
        assert!(field.round < field.rounds(count as u64), "the field has no room for round {}", field.round);
        let origin = Instant::now();
        let pages: Vec<Pages> =
            (0..count as u64).map(|client| field.pages_of(client, count as u64)).collect();
        let writers: Result<Vec<Writer>> = (0..count)
            .map(|index| {
                let gateways = (0..count).map(|step| cluster.node((index + step) % count).nbd).collect();
                let work = Work {
                    read_percent: READ_PERCENT,
                    read_pages: pages.clone(),
                    flush_interval: FLUSH_INTERVAL,
                    ..Work::new(gateways, volume, pages[index], seed)
                };
                Writer::start_at(work, origin)
            })
            .collect();
        Ok(Self { writers: writers?, volume: volume.to_owned(), seed })
    }

    /// Waits until every client but those of `but` has so many more answers.
    pub fn wait_operations(&self, more: u64, deadline: Duration, but: &[usize]) -> Result<()> {
        let waited = self.writers.iter().enumerate().filter(|(index, _)| !but.contains(index));
        waited.into_iter().try_for_each(|(_, writer)| writer.wait_operations(more, deadline))
    }

    /// The answers that one client has had.
    pub fn operations(&self, client: usize) -> u64 {
        self.writers[client].operations()
    }

    /// Stops, reads everything back through other gateways, and checks the history. `touched`: the nodes whose clients'
    /// stalls are not counted as elsewhere.
    ///
    /// # Errors
    /// A client saw an error or lost data, or the history is not linearizable.
    pub fn finish(self, cluster: &Cluster, touched: &[usize]) -> Result<Summary> {
        self.finish_keeping(cluster, touched, &mut Promises::new())
    }

    /// As `finish`; what the clients were promised is added to `kept`, to be looked at again later.
    pub fn finish_keeping(
        self,
        cluster: &Cluster,
        touched: &[usize],
        kept: &mut Promises,
    ) -> Result<Summary> {
        let (mut history, mut summary) = (History::default(), Summary::default());
        let count = self.writers.len();
        for (index, writer) in self.writers.into_iter().enumerate() {
            let report = writer.stop()?;
            ensure!(report.flushes > 0, "client {index} flushed nothing; let it run for longer");
            report.verify(&mut cluster.connect((index + 1) % count, &self.volume)?, self.seed)?;
            summary.losses += report.losses;
            summary.stall = summary.stall.max(report.stall);
            if !touched.contains(&index) {
                summary.stall_elsewhere = summary.stall_elsewhere.max(report.stall);
            }
            kept.extend(report.pages);
            history.merge(report.history);
        }
        summary.operations = history.operation_count();
        summary.reads = history.read_count();
        if let Err(violation) = history.check() {
            bail!("seed {}: {violation}", self.seed);
        }
        Ok(summary)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_clients_and_no_two_rounds_share_a_page() {
        let field = Field { first: 100, pages: 3 * PAGES_PER_CLIENT * 45, round: 0 };
        assert_eq!(field.rounds(3), 40);
        let mut seen = BTreeSet::new();
        for round in 0..field.rounds(3) {
            for client in 0..3 {
                let Pages { first, step, count } = Field { round, ..field }.pages_of(client, 3);
                for page in (0..count).map(|index| first + index * step) {
                    assert!((100..100 + field.pages).contains(&page) && seen.insert(page), "page {page}");
                }
            }
        }
        assert_eq!(seen.len() as u64, 40 * 3 * PAGES_PER_CLIENT);
    }
}

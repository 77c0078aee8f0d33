//! The NBD gateway over volumes in memory: what the gateway alone costs, and something to try a client on.
//!
//! `cargo run -p xsan-dataplane --example nbd-memory -- 127.0.0.1:10809`, then
//! `fio --name=t --ioengine=nbd --uri=nbd://127.0.0.1:10809/disk --rw=randwrite --bs=4k --iodepth=32`.

use std::sync::Arc;

use anyhow::Context;
use monoio::net::TcpListener;
use monoio::{IoUringDriver, RuntimeBuilder};
use xsan_dataplane::disk::buffers::BufferPool;
use xsan_dataplane::gateway::nbd::{Counters, Gateway, Options};

#[path = "../tests/nbd/memory.rs"]
mod memory;

const POOL_BYTES: usize = 512 << 20;

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_env_filter("info").init();
    let address = std::env::args().nth(1).context("usage: nbd-memory ADDRESS:PORT")?;
    let mut runtime = RuntimeBuilder::<IoUringDriver>::new().enable_timer().build()?;
    runtime.block_on(async move {
        let pool = BufferPool::anonymous(POOL_BYTES);
        let (volumes, _) = memory::MemoryVolumes::new(pool, &[("disk", 1 << 30), ("slow-disk", 1 << 30)]);
        let listener = TcpListener::bind(&address).with_context(|| format!("listening on {address}"))?;
        let gateway = Gateway::new(volumes, pool, Options::default(), Arc::new(Counters::default()));
        gateway.serve_tcp(listener).await;
        Ok(())
    })
}

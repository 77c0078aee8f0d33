//! Writes `docs/health.md` from the table of health checks.

fn main() -> std::io::Result<()> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/health.md");
    std::fs::write(path, xsan_protocol::health::document())
}

//! Writes `docs/errors/README.md` from the error table.

fn main() -> std::io::Result<()> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors/README.md");
    std::fs::write(path, xsan_protocol::error::document())
}

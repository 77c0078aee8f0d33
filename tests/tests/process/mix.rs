//! A minute of the soak: faults of all kinds one after the other, under fio and clients of all gateways, in an order of its own
//! each time. Needs root.

use std::process::Command;

#[test]
fn faults_in_any_order_break_no_promise() {
    let mut soak = Command::new(env!("CARGO_BIN_EXE_xsan-soak"));
    let outcome = soak.args(["--all", "--minutes", "1", "--interval", "0"]).output().unwrap();
    // Shown when it fails, with the seed and where the nodes' logs are.
    println!("{}", String::from_utf8_lossy(&outcome.stdout));
    eprintln!("{}", String::from_utf8_lossy(&outcome.stderr));
    assert!(outcome.status.success(), "the soak ended with {}", outcome.status);
}

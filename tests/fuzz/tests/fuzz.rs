//! The corpus, and a short random run of every target.

use xsan_fuzz::campaign::{self, Outcome, Until};
use xsan_fuzz::{corpus, targets};

/// Fixed: a test that fails must fail again.
const SEED: u64 = 2026;

#[test]
fn every_input_of_the_corpus_passes() {
    let mut findings = Vec::new();
    for target in targets::all() {
        for (path, input) in corpus::read(target.name).expect("the corpus is readable") {
            if let Outcome::Finding(what) = campaign::run_one(target, &input) {
                findings.push(format!("{}: {what}", path.display()));
            }
        }
    }
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

#[test]
fn the_corpus_belongs_to_targets() {
    let root = corpus::directory("");
    for entry in std::fs::read_dir(root).expect("the corpus is there") {
        let name = entry.expect("the corpus is readable").file_name();
        let name = name.to_string_lossy();
        assert!(targets::named(&name).is_some(), "corpus/{name} is of no target");
    }
}

#[test]
fn a_short_run_of_every_target_finds_nothing() {
    let mut findings = Vec::new();
    for target in targets::all() {
        let summary = campaign::run(target, SEED, 0, Until::Inputs(target.test_inputs), |_, _| {});
        if let Some((number, _, what)) = summary.finding {
            findings.push(format!("tools/fuzz {} --seed {SEED} --at {number}: {what}", target.name));
        }
        // A target that refuses everything looks at nothing but its first check.
        assert!(
            summary.accepted > summary.inputs / 50,
            "{} accepts {} of {}",
            target.name,
            summary.accepted,
            summary.inputs
        );
    }
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

#[test]
fn seeds_are_accepted_and_inputs_repeat() {
    for target in targets::all() {
        let seeds = (target.seeds)();
        assert_eq!(seeds, (target.seeds)(), "{} makes other seeds", target.name);
        for number in 0..50 {
            let input = || campaign::input(target, &seeds, 7, number);
            assert!(input() == input(), "{}: input {number} is not the same again", target.name);
        }
    }
}

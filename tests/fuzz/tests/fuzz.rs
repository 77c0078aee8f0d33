//! The corpus, and a short random run of every target.

use xsan_fuzz::campaign::{self, Outcome, Until};
use xsan_fuzz::target::Verdict;
use xsan_fuzz::{corpus, targets};

/// Fixed: a test that fails must fail again.
const SEED: u64 = 2026;

/// Targets with seeds that are to be refused: how many, and which. All others are accepted.
const REFUSED_SEEDS: &[(&str, u32, &str)] = &[
    ("connection", 1, "a hello alone brings no frame"),
    ("heartbeat", 1, "of another cluster"),
    ("nbd-option", 4, "export name, abort, list and structured replies have nothing to decode"),
    ("nbd-request", 1, "a disconnect is no request for a volume"),
    ("size", 1, "16384PiB are 2^64 bytes"),
];

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
        let mut refused = 0;
        for (index, seed) in seeds.iter().enumerate() {
            match campaign::run_one(target, seed) {
                Outcome::Passed(Verdict::Accepted) => {}
                Outcome::Passed(Verdict::Refused) => refused += 1,
                other => panic!("{}: seed {index}: {other:?}", target.name),
            }
        }
        let expected = REFUSED_SEEDS.iter().find(|(name, ..)| *name == target.name).map_or(0, |row| row.1);
        assert_eq!(refused, expected, "{} refuses {refused} of its {} seeds", target.name, seeds.len());
        for number in 0..50 {
            let input = || campaign::input(target, &seeds, 7, number);
            assert!(input() == input(), "{}: input {number} is not the same again", target.name);
        }
    }
}

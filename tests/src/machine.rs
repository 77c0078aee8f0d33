//! What a measurement was made on, for those who compare figures.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cluster::Answer;

/// Names and values, in the order to print; `directory` is where the devices are.
pub fn describe(directory: &Path) -> Result<Vec<(&'static str, String)>> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = value_of(&cpus, "model name").unwrap_or("unknown").to_owned();
    let core_count = std::thread::available_parallelism()?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    let memory_kib: u64 = value_of(&memory, "MemTotal")
        .and_then(|text| text.split_whitespace().next())
        .context("/proc/meminfo has no MemTotal")?
        .parse()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(vec![
        ("processor", format!("{model}, {core_count} cores")),
        ("memory", format!("{} GiB", memory_kib.div_ceil(1 << 20))),
        ("kernel", kernel.trim().to_owned()),
        ("file system", file_system_of(directory)?),
    ])
}

/// Names and versions of the programs that measure.
pub fn tools() -> Result<Vec<(&'static str, String)>> {
    Ok(vec![("fio", first_line("fio", "--version")?), ("qemu", first_line("qemu-img", "--version")?)])
}

fn value_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim())
}

/// Of the mount with the longest path that leads to `directory`.
fn file_system_of(directory: &Path) -> Result<String> {
    let directory = directory.canonicalize()?;
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mut best: Option<(&str, &str)> = None;
    for line in mounts.lines() {
        let mut fields = line.split_whitespace().skip(1);
        let (Some(point), Some(kind)) = (fields.next(), fields.next()) else { continue };
        if directory.starts_with(point) && best.is_none_or(|(longest, _)| point.len() >= longest.len()) {
            best = Some((point, kind));
        }
    }
    Ok(best.context("no mount leads to the work directory")?.1.to_owned())
}

fn first_line(program: &str, argument: &str) -> Result<String> {
    let answer = Answer::of(Command::new(program).arg(argument))?.succeeded()?;
    Ok(answer.stdout.lines().next().unwrap_or_default().to_owned())
}

//! fio: load with verification, and measurements.

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::Running;

const RUN_DEADLINE: Duration = Duration::from_secs(600);

/// What fio works on.
#[derive(Clone, Debug)]
pub enum Target<'a> {
    /// An NBD export.
    Nbd(&'a str),
    /// A file, with O_DIRECT through io_uring.
    File(&'a Path),
}

/// One job, in fio's own words.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    pub target: Target<'a>,
    /// `randwrite`, `randread`, `write`, `read`.
    pub pattern: &'a str,
    /// `4k`, or a range as `4k-128k`.
    pub block_size: &'a str,
    pub depth: u32,
    /// Where in the export, and how much of it.
    pub offset: u64,
    pub size: u64,
    /// `None`: until `size` bytes are done.
    pub runtime: Option<Duration>,
    /// Write, then read back and compare checksums.
    pub verify: bool,
    pub seed: u64,
}

impl<'a> Job<'a> {
    /// The verified load of the acceptance test: 4k–128k at depth 32.
    pub const fn verified(uri: &'a str, offset: u64, size: u64, seed: u64) -> Self {
        Self {
            target: Target::Nbd(uri),
            pattern: "randwrite",
            block_size: "4k-128k",
            depth: 32,
            offset,
            size,
            runtime: None,
            verify: true,
            seed,
        }
    }

    fn command(&self, output: &Path) -> Command {
        let mut command = Command::new("fio");
        command.args([
            "--name=job",
            "--thread",
            "--output-format=json",
            "--eta=never",
            "--verify_state_save=0",
        ]);
        command.arg(format!("--output={}", output.display()));
        match self.target {
            Target::Nbd(uri) => command.arg("--ioengine=nbd").arg(format!("--uri={uri}")),
            Target::File(path) => command
                .args(["--ioengine=io_uring", "--direct=1"])
                .arg(format!("--filename={}", path.display())),
        };
        let size_option = if self.block_size.contains('-') { "bsrange" } else { "bs" };
        command.arg(format!("--rw={}", self.pattern)).arg(format!("--{size_option}={}", self.block_size));
        // Without randrepeat=0 fio takes its places from a seed of its own, the same in each run and each pass.
        command.arg(format!("--iodepth={}", self.depth));
        command.arg("--randrepeat=0").arg(format!("--randseed={}", self.seed));
        command.arg(format!("--offset={}", self.offset)).arg(format!("--size={}", self.size));
        if let Some(runtime) = self.runtime {
            command.arg("--time_based").arg(format!("--runtime={}ms", runtime.as_millis()));
        }
        if self.verify {
            command.args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--serialize_overlap=1"]);
        }
        command
    }

    /// Runs the job until `bytes` are done, at random places all over its range.
    pub fn run_bytes(&self, bytes: u64, output: &Path) -> Result<Outcome> {
        let mut command = self.command(output);
        command.arg(format!("--io_size={bytes}"));
        Load::start_command(command, output)?.finish(RUN_DEADLINE)
    }

    /// Runs the job with at most so many operations a second in each direction.
    pub fn run_at_rate(&self, operations_per_second: u32, output: &Path) -> Result<Outcome> {
        let mut command = self.command(output);
        command.arg(format!("--rate_iops={operations_per_second},{operations_per_second}"));
        Load::start_command(command, output)?.finish(RUN_DEADLINE)
    }

    /// Runs the job to its end.
    pub fn run(&self, output: &Path) -> Result<Outcome> {
        Load::start(self, output)?.finish(RUN_DEADLINE)
    }
}

/// A job in progress.
#[derive(Debug)]
pub struct Load {
    running: Running,
    output: std::path::PathBuf,
}

impl Load {
    pub fn start(job: &Job<'_>, output: &Path) -> Result<Self> {
        Self::start_command(job.command(output), output)
    }

    fn start_command(mut command: Command, output: &Path) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let running = Running::start(&mut command).context("is fio installed? tools/setup installs it")?;
        Ok(Self { running, output: output.to_owned() })
    }

    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        self.running.exit_status()
    }

    pub fn finish(mut self, deadline: Duration) -> Result<Outcome> {
        let status = self.running.wait(deadline)?;
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        ensure!(status.success(), "fio ended with {status}:\n{text}");
        Outcome::parse(&text)
    }
}

/// What fio measured of one direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Direction {
    pub operations: u64,
    pub bytes: u64,
    pub operations_per_second: f64,
    pub bytes_per_second: f64,
    pub latency_us_p50: f64,
    pub latency_us_p99: f64,
    pub latency_us_max: f64,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    pub read: Direction,
    pub write: Direction,
}

impl Outcome {
    fn parse(text: &str) -> Result<Self> {
        // fio prints notes before the object.
        let start = text.find('{').context("fio wrote no JSON")?;
        let report: Value = serde_json::from_str(&text[start..]).context("fio's report")?;
        let job = &report["jobs"][0];
        ensure!(job["error"].as_i64() == Some(0), "fio reports error {}", job["error"]);
        Ok(Self { read: direction(&job["read"]), write: direction(&job["write"]) })
    }
}

fn direction(value: &Value) -> Direction {
    let number = |path: &Value| path.as_f64().unwrap_or(0.0);
    let latency = &value["clat_ns"];
    Direction {
        operations: value["total_ios"].as_u64().unwrap_or(0),
        bytes: value["io_bytes"].as_u64().unwrap_or(0),
        operations_per_second: number(&value["iops"]),
        bytes_per_second: number(&value["bw_bytes"]),
        latency_us_p50: number(&latency["percentile"]["50.000000"]) / 1000.0,
        latency_us_p99: number(&latency["percentile"]["99.000000"]) / 1000.0,
        latency_us_max: number(&latency["max"]) / 1000.0,
    }
}

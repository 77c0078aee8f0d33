//! The demonstration: three nodes keep a real disk image through the death of two of them, in turn.
//!
//! Started by `tools/demo`, which installs, builds and cleans up. Every figure of the summary is measured in
//! this run; any deviation from the story ends it with an error.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::control;
use xsan_tests::fio::{Job, Load};
use xsan_tests::image::Image;
use xsan_tests::node::NodeOptions;
use xsan_tests::tools::run;
use xsan_tests::wait::{Look, until};
use xsan_tests::writer::{Report, Work, Writer};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const VOLUME: &str = "vm-storage-001";
/// The image lies in the first half of the volume; fio and the writer work behind it.
const IMAGE_BYTES: u64 = GIB;
const IMAGE_CONTENT_BYTES: u64 = 400 * MIB;
const VOLUME_BYTES: u64 = 2 * GIB;
const FIO_BYTES: u64 = 256 * MIB;
const FIO_TIME: Duration = Duration::from_secs(15);
const WRITER_FIRST_PAGE: u64 = (IMAGE_BYTES + GIB / 2) / 4096;
const WRITER_PAGES: u64 = GIB / 2 / 4096;
const WRITER_SEED: u64 = 1;

/// Who does what: the client's gateway lives through the first death.
const GATEWAY: usize = 0;
const FIRST_VICTIM: usize = 2;
const SECOND_VICTIM: usize = 1;

fn main() -> ExitCode {
    let mut story = Story { started: Instant::now(), verified_bytes: 0 };
    match story.tell() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe demo failed after {:.1} s: {error:#}", story.started.elapsed().as_secs_f64());
            ExitCode::FAILURE
        }
    }
}

struct Story {
    started: Instant,
    verified_bytes: u64,
}

impl Story {
    fn say(&self, line: impl AsRef<str>) {
        println!("{:6.1} s  {}", self.started.elapsed().as_secs_f64(), line.as_ref());
    }

    fn tell(&mut self) -> Result<()> {
        self.say("three nodes start, each with a device of its own (a file of 6 GiB)");
        let options = NodeOptions { file_size: "6GiB".to_owned(), ..NodeOptions::default() };
        let mut cluster = Cluster::start_with(3, options)?;
        for node in cluster.nodes() {
            self.say(format!("  {} serves: control {}, NBD {}", node.name, node.control, node.nbd));
        }
        self.show(
            &cluster,
            &["volume", "create", "--name", VOLUME, "--size", "2GiB", "--replica-count", "3"],
        )?;

        self.say("an ext4 image of 1 GiB is made from files of this machine");
        let image = Image::make(cluster.directory(), IMAGE_BYTES, IMAGE_CONTENT_BYTES)?;
        self.say(format!("  {} files, {} MiB", image.file_count, image.content_bytes / MIB));
        let uri = cluster.uri(GATEWAY, VOLUME);
        self.say(format!("$ qemu-img convert -n -O raw image.qcow2 {uri}"));
        let qcow2 = image.qcow2.display().to_string();
        run("qemu-img", ["convert", "-n", "-O", "raw", &qcow2, &uri])?;

        let stall = self.first_death(&mut cluster, &image, &uri)?;
        let resynced_bytes = self.return_of_the_dead(&mut cluster)?;
        self.second_death(&mut cluster, &image)?;

        self.say("the remaining nodes stop (SIGTERM)");
        cluster.stop()?;
        println!();
        println!("nothing was lost");
        println!("  longest stall of a depth-1 writer when a node died   {} ms", stall.as_millis());
        println!("  bytes verified                                       {} MiB", self.verified_bytes / MIB);
        println!(
            "  bytes sent to the node that came back                {:.1} MiB of a volume of {} MiB",
            resynced_bytes as f64 / MIB as f64,
            VOLUME_BYTES / MIB
        );
        println!(
            "  time                                                 {:.0} s",
            self.started.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// A node dies under load; the writer's longest stall.
    fn first_death(&mut self, cluster: &mut Cluster, image: &Image, uri: &str) -> Result<Duration> {
        self.say("fio writes 4k-128k at depth 32 and verifies, behind the image; beside it a depth-1 writer");
        let job = Job { runtime: Some(FIO_TIME), ..Job::verified(uri, IMAGE_BYTES, FIO_BYTES, 1) };
        let load = Load::start(&job, &cluster.directory().join("fio.json"))?;
        let pages = WRITER_FIRST_PAGE..WRITER_FIRST_PAGE + WRITER_PAGES;
        let writer = Writer::start(Work::new(vec![cluster.node(GATEWAY).nbd], VOLUME, pages, WRITER_SEED))?;
        writer.wait_operations(500, SETTLE_DEADLINE)?;

        let victim = cluster.node(FIRST_VICTIM).name.clone();
        self.say(format!("{victim} is killed: SIGKILL to all of its processes"));
        cluster.kill_node(FIRST_VICTIM)?;
        cluster.wait_status("the groups to go on without it", SETTLE_DEADLINE, |status| {
            status.groups.is_some_and(|groups| groups.degraded == groups.total && groups.inactive == 0)
        })?;
        self.say("  every group goes on with two replicas");
        writer.wait_operations(500, SETTLE_DEADLINE)?;
        self.verify_image(cluster, image, SECOND_VICTIM)?;

        let outcome = load.finish(FIO_TIME * 8)?;
        ensure!(outcome.read.bytes > 0, "fio verified nothing");
        self.verified_bytes += outcome.read.bytes;
        let report = writer.stop()?;
        self.say(format!(
            "fio is through without an error: {} MiB written, {} MiB verified; the writer stalled {} ms at most",
            outcome.write.bytes / MIB,
            outcome.read.bytes / MIB,
            report.stall.as_millis()
        ));
        self.verify_writer(cluster, &report)?;
        Ok(report.stall)
    }

    /// The dead node returns and is sent the difference; how many bytes that was.
    fn return_of_the_dead(&self, cluster: &mut Cluster) -> Result<u64> {
        let victim = cluster.node(FIRST_VICTIM).name.clone();
        self.say(format!("{victim} returns: $ xsan-node --data-dir …/{victim}"));
        cluster.restart(FIRST_VICTIM)?;
        let mut shown = Instant::now();
        let status = until("the node to have everything", RESYNC_DEADLINE, || {
            let status = cluster.status()?;
            if control::is_healthy(&status, cluster.nodes().len()) {
                return Ok(Look::Done(status));
            }
            if shown.elapsed() > Duration::from_secs(1) {
                shown = Instant::now();
                let groups = status.groups.unwrap_or_default();
                let (moved, left) = (groups.resync_bytes_moved / MIB, groups.resync_bytes_left / MIB);
                self.say(format!(
                    "  {} groups to bring up to date; {moved} MiB sent, {left} left",
                    groups.resyncing
                ));
            }
            Ok(Look::NotYet(control::summary(&status)))
        })?;
        let moved = status.groups.context("the status has no groups")?.resync_bytes_moved;
        self.say(format!("  every replica acts again; {:.1} MiB were sent to it", moved as f64 / MIB as f64));
        self.show(cluster, &["cluster", "status"])?;
        Ok(moved)
    }

    /// Another node dies: what the first one was sent is needed now.
    fn second_death(&mut self, cluster: &mut Cluster, image: &Image) -> Result<()> {
        let victim = cluster.node(SECOND_VICTIM).name.clone();
        self.say(format!("{victim} is killed, too"));
        cluster.kill_node(SECOND_VICTIM)?;
        self.verify_image(cluster, image, FIRST_VICTIM)
    }

    /// Reads the image back through a gateway, compares it byte for byte, and has e2fsck look at it.
    fn verify_image(&mut self, cluster: &Cluster, image: &Image, gateway: usize) -> Result<()> {
        let back = cluster.directory().join("back.raw");
        read_back(cluster, gateway, &back)?;
        self.verified_bytes += image.compare(&back)?;
        run("e2fsck", ["-fn", &back.display().to_string()])?;
        std::fs::remove_file(&back)?;
        self.say(format!(
            "  the image read back through {} is the same in every byte; e2fsck -fn finds nothing",
            cluster.node(gateway).name
        ));
        Ok(())
    }

    fn verify_writer(&mut self, cluster: &Cluster, report: &Report) -> Result<()> {
        let bytes = report.verify(&mut cluster.connect(GATEWAY, VOLUME)?, WRITER_SEED)?;
        self.verified_bytes += bytes;
        self.say(format!("  every one of the writer's {} acknowledged writes is there", report.operations));
        Ok(())
    }

    /// Runs a command for the audience.
    fn show(&self, cluster: &Cluster, arguments: &[&str]) -> Result<()> {
        self.say(format!("$ xsan-cli {}", arguments.join(" ")));
        let answer = cluster.cli(arguments)?.succeeded()?;
        for line in answer.stdout.lines() {
            println!("          {line}");
        }
        Ok(())
    }
}

/// The first gigabyte of the volume, read by qemu-img.
fn read_back(cluster: &Cluster, gateway: usize, into: &Path) -> Result<()> {
    let address = cluster.node(gateway).nbd;
    let source = format!(
        "driver=raw,offset=0,size={IMAGE_BYTES},file.driver=nbd,file.server.type=inet,file.server.host={},\
         file.server.port={},file.export={VOLUME}",
        address.ip(),
        address.port()
    );
    let into = into.display().to_string();
    run("qemu-img", ["convert", "--image-opts", &source, "-O", "raw", &into])?;
    Ok(())
}

//! Keeps the two processes of a node running, and stops them in order.
//!
//! Used by `node::run`, on its main thread: the children die with the thread that started them.
//!
//! Invariants
//! - A process that ends is started again, after a wait that doubles from 100 ms to 5 s and starts anew once the process
//!   has run for 30 s; one that ends with exit code 78 is not, and ends the node.
//! - A clean stop asks the data process first and the control process when that has ended, so that the cluster
//!   hears from a live control process that the data process is gone.

use std::ffi::OsString;
use std::fs::File;
use std::future::Future;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use xsan_nodekit::exit::DO_NOT_RESTART;

use super::error::NodeError;
use super::sys;

/// A process to keep running.
#[derive(Clone, Debug)]
pub struct Program {
    pub name: &'static str,
    pub path: PathBuf,
    pub arguments: Vec<OsString>,
}

/// Times of the supervisor; tests have shorter ones.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// A process that has run this long starts its waits anew.
    pub stable_after: Duration,
    /// From SIGTERM to SIGKILL.
    pub stop_wait: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
            stable_after: Duration::from_secs(30),
            stop_wait: Duration::from_secs(10),
        }
    }
}

/// The wait before the next start of one process.
#[derive(Debug)]
struct Backoff {
    policy: Policy,
    next: Duration,
}

impl Backoff {
    fn new(policy: Policy) -> Self {
        Self { policy, next: policy.backoff_min }
    }

    /// The process ended after `up`.
    fn on_end(&mut self, up: Duration) -> Duration {
        if up >= self.policy.stable_after {
            self.next = self.policy.backoff_min;
        }
        let wait = self.next;
        self.next = (self.next * 2).min(self.policy.backoff_max);
        wait
    }
}

/// Runs both programs until `stop` is done (`Ok`), or one of them refuses to run.
pub async fn run(
    control: Program,
    data: Program,
    policy: Policy,
    stop: impl Future<Output = ()>,
) -> Result<(), NodeError> {
    let (stop_control, control_stops) = watch::channel(false);
    let (stop_data, data_stops) = watch::channel(false);
    let mut control = pin!(keep(control, policy, control_stops));
    let mut data = pin!(keep(data, policy, data_stops));
    let mut stop = pin!(stop);
    tokio::select! {
        () = &mut stop => {
            tracing::info!("stopping");
            stop_data.send_replace(true);
            // The control process is kept running meanwhile.
            let data_end = tokio::select! {
                end = &mut data => end,
                end = &mut control => { data.await?; return end; }
            };
            stop_control.send_replace(true);
            control.await?;
            data_end
        }
        end = &mut data => {
            stop_control.send_replace(true);
            control.await?;
            end
        }
        end = &mut control => {
            stop_data.send_replace(true);
            data.await?;
            end
        }
    }
}

/// Keeps one program running until it is to stop, or refuses to run.
async fn keep(program: Program, policy: Policy, mut stops: watch::Receiver<bool>) -> Result<(), NodeError> {
    let mut backoff = Backoff::new(policy);
    while !*stops.borrow() {
        let begin = Instant::now();
        let wait = match start(&program) {
            Err(error) => {
                let wait = backoff.on_end(Duration::ZERO);
                tracing::error!("{} does not start: {error}; next try in {wait:?}", program.name);
                wait
            }
            Ok(mut child) => {
                let pid = child.id().expect("it was not waited for");
                tracing::info!(pid, "{} started", program.name);
                let stderr = child.stderr.take().expect("it is piped");
                let words = pass_on(stderr).map_err(NodeError::System)?;
                let status = tokio::select! {
                    status = child.wait() => Some(status.map_err(NodeError::System)?),
                    _ = stops.wait_for(|stops| *stops) => None,
                };
                let Some(status) = status else {
                    return stop(&program, child, pid, policy.stop_wait).await;
                };
                // What the process said last is in the pipe; a grandchild may hold that open.
                let words = timeout(Duration::from_secs(1), words).await;
                if status.code() == Some(i32::from(DO_NOT_RESTART)) {
                    let said = words.ok().and_then(Result::ok).flatten();
                    let message = said.unwrap_or_else(|| "it gave no reason; see its log".into());
                    return Err(NodeError::ChildRefused { program: program.name, message });
                }
                let wait = backoff.on_end(begin.elapsed());
                let how = describe(status);
                tracing::warn!(pid, "{} ended ({how}); it starts again in {wait:?}", program.name);
                wait
            }
        };
        tokio::select! {
            () = sleep(wait) => {}
            _ = stops.wait_for(|stops| *stops) => {}
        }
    }
    Ok(())
}

fn start(program: &Program) -> std::io::Result<Child> {
    let mut command = Command::new(&program.path);
    command.args(&program.arguments).stdin(Stdio::null()).stderr(Stdio::piped());
    // An interrupt from the terminal is for xsan-node alone, which then stops its children in order.
    command.process_group(0);
    sys::kill_with_parent(&mut command);
    command.spawn()
}

async fn stop(program: &Program, mut child: Child, pid: u32, wait: Duration) -> Result<(), NodeError> {
    sys::terminate(pid);
    match timeout(wait, child.wait()).await {
        Ok(status) => {
            tracing::info!(
                pid,
                "{} stopped ({})",
                program.name,
                describe(status.map_err(NodeError::System)?)
            );
        }
        Err(_) => {
            tracing::warn!(pid, "{} has not stopped within {wait:?}; it is killed", program.name);
            child.kill().await.map_err(NodeError::System)?;
        }
    }
    Ok(())
}

/// Copies a child's stderr to ours, on a thread of its own: when nobody reads ours, that must not hold up
/// the supervision. Gives the last error that the child reported there, once it has closed its end.
fn pass_on(stderr: ChildStderr) -> std::io::Result<oneshot::Receiver<Option<String>>> {
    let stderr = File::from(stderr.into_owned_fd()?);
    let (sender, words) = oneshot::channel();
    std::thread::Builder::new().name("child stderr".into()).spawn(move || {
        // Nobody waits for the words of a process that is started again.
        let _ = sender.send(copy_lines(stderr, std::io::stderr()));
    })?;
    Ok(words)
}

/// Copies `from` to `to`; the last line that begins with `error ` is returned.
fn copy_lines(from: impl Read, mut to: impl Write) -> Option<String> {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    let mut words = None;
    loop {
        line.clear();
        match from.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return words,
            Ok(_) => {}
        }
        if line.starts_with(b"error ") {
            words = Some(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        // A closed stderr of ours is no reason to stop reading: the child would block on its full pipe.
        let _ = to.write_all(&line);
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests;

//! Logging of XSAN's processes: levels, plain or JSON lines, stderr or files that rotate by size.
//!
//! Called once by each `main`. Lines go through a bounded queue to one writer thread, so that a slow disk or pipe
//! never holds up the thread that logs: when the queue is full, lines are dropped and their number is logged.
//!
//! Invariant: each process writes a file of its own, so no rotation races with another process's.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use xsan_protocol::error::Code;

use crate::config::{Level, Logging};

mod queue;
mod rotate;

use queue::Queue;
use rotate::RotatingFile;

/// Lines waiting for the writer thread.
const QUEUE_LINES_MAX: usize = 4096;
/// How long the end of a process waits for its last lines to be written.
const FLUSH_WAIT: Duration = Duration::from_secs(1);
/// Overrides `logging.level` with a full filter, as `info,xsan_dataplane::store=trace`.
const FILTER_VARIABLE: &str = "XSAN_LOG";

static QUEUE: OnceLock<Queue> = OnceLock::new();
static TO_FILE: AtomicBool = AtomicBool::new(false);

/// Which process of the node this is; names its log file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    Node,
    Control,
    Data,
}

/// Why logging can not begin.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("logging.file: {}: {source}", file.display())]
    File { file: PathBuf, source: io::Error },
    #[error("the log's writer thread: {0}")]
    Thread(io::Error),
    #[error(
        "environment variable {FILTER_VARIABLE}: {text:?} is not a filter, as debug, or info,MODULE=trace"
    )]
    Filter { text: String },
    #[error("logging was set up before in this process")]
    Twice,
}

impl LoggingError {
    pub const fn code(&self) -> Code {
        match self {
            Self::File { .. } | Self::Filter { .. } => Code::ConfigInvalid,
            Self::Thread(_) => Code::MemoryShort,
            Self::Twice => Code::Internal,
        }
    }
}

/// Writes out what is queued when it is dropped; kept by `main` to its end.
#[must_use = "the last lines are lost unless main keeps this to its end"]
pub struct Guard(());

impl Drop for Guard {
    fn drop(&mut self) {
        flush();
    }
}

/// Starts logging for the whole process, and has panics logged too.
///
/// # Errors
/// The file can not be opened for writing, `XSAN_LOG` is no filter, or logging runs already.
pub fn init(logging: &Logging, process: Process) -> Result<Guard, LoggingError> {
    let filter = filter(logging.level, std::env::var_os(FILTER_VARIABLE).as_deref())?;
    let file = logging.file.as_deref().map(|file| file_of(file, process));
    let sink: Box<dyn io::Write + Send> = match &file {
        None => Box::new(io::stderr()),
        Some(path) => {
            let open = RotatingFile::open(path, logging.max_size, logging.max_files);
            Box::new(open.map_err(|source| LoggingError::File { file: path.clone(), source })?)
        }
    };
    let queue = Queue::start(sink, QUEUE_LINES_MAX).map_err(LoggingError::Thread)?;
    QUEUE.set(queue).map_err(|_| LoggingError::Twice)?;
    TO_FILE.store(file.is_some(), Ordering::Relaxed);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(|| QUEUE.get().expect("set just above, never taken away"));
    let started = if logging.json { builder.json().try_init() } else { builder.try_init() };
    started.map_err(|_| LoggingError::Twice)?;
    log_panics();
    Ok(Guard(()))
}

/// Waits until everything logged so far is written, for a second at most. For those who end a process without `main`.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_WAIT);
    }
}

/// Do log lines go to a file? If not they are on stderr, where what is said to the operator is seen anyway.
pub fn is_to_file() -> bool {
    TO_FILE.load(Ordering::Relaxed)
}

/// `node.log` for xsan-node, `node-control.log` and `node-data.log` for its children.
pub fn file_of(file: &Path, process: Process) -> PathBuf {
    let suffix = match process {
        Process::Node => return file.to_owned(),
        Process::Control => "-control",
        Process::Data => "-data",
    };
    let mut name = file.file_stem().unwrap_or_default().to_owned();
    name.push(suffix);
    if let Some(extension) = file.extension() {
        name.push(".");
        name.push(extension);
    }
    file.with_file_name(name)
}

fn filter(level: Level, from_environment: Option<&OsStr>) -> Result<EnvFilter, LoggingError> {
    let Some(text) = from_environment else { return Ok(EnvFilter::new(directives(level))) };
    let text = text.to_string_lossy();
    text.parse().map_err(|_| LoggingError::Filter { text: text.into() })
}

/// Our own crates at `level`; the libraries below them one step quieter than they like to be. openraft warns of each message that
/// does not reach its node, ten times a second while a node is down: that is an event of ours, told once.
fn directives(level: Level) -> String {
    let (libraries, openraft) = match level {
        Level::Error => (LevelFilter::ERROR, LevelFilter::ERROR),
        Level::Warn | Level::Info => (LevelFilter::WARN, LevelFilter::ERROR),
        Level::Debug => (LevelFilter::INFO, LevelFilter::INFO),
        Level::Trace => (LevelFilter::DEBUG, LevelFilter::DEBUG),
    };
    format!("{libraries},openraft={openraft},xsan={}", level.word())
}

fn log_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!(code = Code::Internal.number(), "{panic}");
        flush();
        before(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_has_a_file_of_its_own() {
        let file = Path::new("/var/log/xsan/node.log");
        assert_eq!(file_of(file, Process::Node), file);
        assert_eq!(file_of(file, Process::Control), Path::new("/var/log/xsan/node-control.log"));
        assert_eq!(file_of(file, Process::Data), Path::new("/var/log/xsan/node-data.log"));
        assert_eq!(file_of(Path::new("/log/xsan"), Process::Data), Path::new("/log/xsan-data"));
    }

    #[test]
    fn a_filter_of_the_environment_wins_and_must_be_one() {
        let level = |text| filter(Level::Info, Some(OsStr::new(text))).map(|filter| filter.max_level_hint());
        assert_eq!(level("warn,xsan_dataplane::store=trace").ok().flatten(), Some(LevelFilter::TRACE));
        let error = level("info,xsan=loud").expect_err("loud is no level");
        assert_eq!(error.code(), Code::ConfigInvalid);
        assert!(
            error.to_string().starts_with("environment variable XSAN_LOG: \"info,xsan=loud\" is not"),
            "{error}"
        );
    }

    #[test]
    fn our_crates_are_louder_than_the_libraries() {
        assert_eq!(directives(Level::Info), "warn,openraft=error,xsan=info");
        assert_eq!(directives(Level::Error), "error,openraft=error,xsan=error");
        assert_eq!(EnvFilter::new(directives(Level::Trace)).max_level_hint(), Some(LevelFilter::TRACE));
    }
}

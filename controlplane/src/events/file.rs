//! The file that this node's events outlive its process in.
//!
//! Eight bytes, the CRC-64 of the rest, little-endian; then a protobuf `ListEventsReply`. Read by `node` when it starts, replaced as a
//! whole by a thread of its own, moments after there is something new: a disk that hangs holds up nobody. Nothing rests on
//! it: what can not be read or written is told in the log. Knows nothing of what the events mean.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use prost::Message;
use tokio::sync::oneshot;
use xsan_nodekit::config::replace;
use xsan_protocol::checksum::crc64;
use xsan_protocol::proto;

use crate::controller::Leader;

/// Between two looks for new events: one burst of them is one flush, and behind that of what Raft wrote at the same moment.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);
/// A summary that grows is saved with what comes after it, or at the next of so many looks.
const LOOKS_PER_SUMMARY: u32 = 60;

#[derive(Clone, Debug)]
pub struct EventFile(PathBuf);

impl EventFile {
    /// `directory`: where the control process keeps its state.
    pub fn new(directory: &Path) -> Self {
        Self(directory.join("events"))
    }

    /// What was saved, oldest first; nothing of a file that can not be read, which is put aside.
    pub fn load(&self) -> Vec<proto::Event> {
        match fs::read(&self.0).and_then(|content| decode(&content)) {
            Ok(events) => events,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                let aside = self.0.with_extension("damaged");
                let put = fs::rename(&self.0, &aside);
                let (path, aside) = (self.0.display(), aside.display());
                tracing::warn!(%path, %aside, ?put, "earlier events are not listed, only the log has them: {error}");
                Vec::new()
            }
        }
    }

    fn save(&self, events: Vec<proto::Event>) -> io::Result<()> {
        replace(&self.0, &encode(events))
    }
}

pub fn encode(events: Vec<proto::Event>) -> Vec<u8> {
    let message = proto::ListEventsReply { events, ..Default::default() }.encode_to_vec();
    [&crc64(&message).to_le_bytes()[..], &message].concat()
}

/// # Errors
/// `UnexpectedEof`: too short; otherwise its checksum or what it covers is wrong.
pub fn decode(content: &[u8]) -> io::Result<Vec<proto::Event>> {
    let (checksum, message) = content.split_first_chunk().ok_or(ErrorKind::UnexpectedEof)?;
    if u64::from_le_bytes(*checksum) != crc64(message) {
        return Err(io::Error::other("its checksum is wrong"));
    }
    Ok(proto::ListEventsReply::decode(message).map_err(io::Error::other)?.events)
}

/// The thread that saves. Dropped, it saves no more, as when the process dies.
pub struct EventSaver {
    /// Told where to answer once the last events are saved.
    stop: mpsc::Sender<oneshot::Sender<()>>,
}

impl EventSaver {
    /// Saves the events of `leader` in `file` from now on.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(file: EventFile, leader: Arc<Leader>) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        thread::Builder::new().name("events".to_owned()).spawn(move || run(&file, &leader, &stopped))?;
        Ok(Self { stop })
    }

    /// Saves what is not saved yet, in `limit` at most.
    pub async fn stop(self, limit: Duration) {
        let (saved, done) = oneshot::channel();
        if self.stop.send(saved).is_err() || tokio::time::timeout(limit, done).await.is_err() {
            tracing::warn!("the last events are not saved: the disk takes too long");
        }
    }
}

fn run(file: &EventFile, leader: &Leader, stopped: &mpsc::Receiver<oneshot::Sender<()>>) {
    let mut fails = false;
    for look in 1u32.. {
        let stopping = match stopped.recv_timeout(SAVE_INTERVAL) {
            Ok(saved) => Some(saved),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        };
        if let Some(events) =
            leader.unsaved_events(stopping.is_some() || look.is_multiple_of(LOOKS_PER_SUMMARY))
        {
            let result = file.save(events);
            if let Err(error) = &result {
                leader.events_not_saved();
                if !fails {
                    let path = file.0.display();
                    tracing::warn!(%path, "events are not saved, a restart will forget them: {error}");
                }
            }
            fails = result.is_err();
        }
        if let Some(saved) = stopping {
            // Nobody waits any more: it took too long.
            let _ = saved.send(());
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_put_aside() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = EventFile::new(directory.path());
        assert_eq!(file.load(), [], "there is none yet");
        let event = |kind: &str| proto::Event { unix_ms: 7, kind: kind.into(), ..Default::default() };
        let events = vec![event("node-down"), event("node-up")];
        file.save(events.clone()).expect("it can be written");
        assert_eq!(file.load(), events);
        let content = encode(events);
        // Empty, without its checksum, between two events, in the middle of one.
        for length in [0, 7, 8, content.len() - 13, content.len() - 1] {
            fs::write(&file.0, &content[..length]).expect("it can be written");
            assert_eq!(file.load(), [], "{length} bytes");
            let aside = fs::read(directory.path().join("events.damaged")).expect("it was put there");
            assert_eq!((aside.len(), file.0.exists()), (length, false));
        }
    }
}

//! Bounded queue of log lines with one writer thread.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

enum Message {
    Line(Vec<u8>),
    /// Answered when every line before it is written.
    Flush(SyncSender<()>),
}

/// Hands lines to the writer thread; `&Queue` is the writer that `tracing_subscriber` makes for each event.
pub(super) struct Queue {
    sender: SyncSender<Message>,
    dropped: &'static AtomicU64,
}

impl Queue {
    /// The writer thread lives as long as the process.
    pub(super) fn start(sink: Box<dyn Write + Send>, lines_max: usize) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(lines_max);
        let dropped: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
        thread::Builder::new().name("log".into()).spawn(move || write_lines(sink, &receiver, dropped))?;
        Ok(Self { sender, dropped })
    }

    pub(super) fn flush(&self, wait: Duration) {
        let (done, written) = sync_channel(1);
        // Not `send`: a writer that hangs on its disk must not hang the end of the process too.
        let mut message = Message::Flush(done);
        let deadline = std::time::Instant::now() + wait;
        while let Err(TrySendError::Full(back)) = self.sender.try_send(message) {
            if std::time::Instant::now() >= deadline {
                return;
            }
            message = back;
            thread::sleep(Duration::from_millis(5));
        }
        // Late or dead: either way nothing more can be done for the lines.
        let _ = written.recv_timeout(wait);
    }
}

impl Write for &Queue {
    /// Takes one whole line: the subscriber formats an event completely before it writes.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.sender.try_send(Message::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_lines(mut sink: Box<dyn Write + Send>, receiver: &Receiver<Message>, dropped: &AtomicU64) {
    // A log that can not be written (full disk, closed pipe) must not stop the process; there is no one left to tell.
    while let Ok(message) = receiver.recv() {
        match message {
            Message::Line(line) => {
                let lost = dropped.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    let _ = writeln!(
                        sink,
                        "{{\"level\":\"WARN\",\"message\":\"{lost} log lines were dropped here\"}}"
                    );
                }
                let _ = sink.write_all(&line);
            }
            Message::Flush(done) => {
                let _ = sink.flush();
                let _ = done.try_send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// Collects what is written; while its lock is held, writing hangs.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no test panics with the lock").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_in_order_and_flush_waits_for_them() {
        let sink = Sink::default();
        let queue = Queue::start(Box::new(sink.clone()), 1000).expect("a thread");
        let mut expected = Vec::new();
        for number in 0..500 {
            writeln!(expected, "line {number}").expect("memory");
            (&queue).write_all(format!("line {number}\n").as_bytes()).expect("never fails");
        }
        queue.flush(Duration::from_secs(10));
        assert_eq!(*sink.0.lock().expect("lock"), expected);
    }

    #[test]
    fn a_sink_that_hangs_costs_lines_and_never_the_caller() {
        let sink = Sink::default();
        let queue = Queue::start(Box::new(sink.clone()), 4).expect("a thread");
        let held = sink.0.lock().expect("lock");
        for _ in 0..100 {
            (&queue).write_all(b"line\n").expect("never fails");
        }
        queue.flush(Duration::from_millis(20));
        drop(held);
        queue.flush(Duration::from_secs(10));
        (&queue).write_all(b"after\n").expect("never fails");
        queue.flush(Duration::from_secs(10));
        let text = String::from_utf8(sink.0.lock().expect("lock").clone()).expect("text");
        assert!(text.contains("log lines were dropped here"), "{text}");
        assert!(text.ends_with("after\n"), "{text}");
    }
}

//! Why a command of the tools fails, shown to people or programs, and its exit code.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use serde_json::json;
use xsan_client::ClientError;
use xsan_nodekit::exit;
use xsan_protocol::error::Code;

#[derive(Debug)]
pub enum Failure {
    Cluster(ClientError),
    /// Our own system, as for a runtime that does not start.
    System(io::Error),
    /// What the command has to show can not be written.
    Output(io::Error),
    /// The user answered no.
    NotConfirmed,
    /// The user can not be asked.
    NoTerminal,
    /// Somebody took the removal of a node back while we waited for it.
    TakenBack {
        node: String,
    },
    /// The cluster does not tell how far the removal of a node is.
    OutOfSight {
        node: String,
        source: ClientError,
    },
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Cluster(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster(error) => error.fmt(f),
            Self::System(error) => error.fmt(f),
            Self::Output(error) => {
                write!(f, "standard output: {error}; what was asked for is done, and not all of it is shown")
            }
            Self::NotConfirmed => f.write_str("not confirmed; nothing was changed"),
            Self::NoTerminal => {
                f.write_str("not confirmed, as standard input is no terminal; nothing was changed")
            }
            Self::TakenBack { node } => {
                write!(f, "node {node} stays in the cluster: its removal was taken back")
            }
            Self::OutOfSight { node, source } => write!(f, "{source}; the removal of node {node} goes on"),
        }
    }
}

impl Failure {
    fn code(&self) -> Code {
        match self {
            Self::Cluster(error) | Self::OutOfSight { source: error, .. } => error.code(),
            Self::System(_) | Self::Output(_) => Code::Internal,
            Self::NotConfirmed | Self::NoTerminal => Code::InvalidArgument,
            Self::TakenBack { .. } => Code::NotFound,
        }
    }

    fn of_cluster(&self) -> Option<&ClientError> {
        match self {
            Self::Cluster(error) | Self::OutOfSight { source: error, .. } => Some(error),
            _ => None,
        }
    }

    /// Number and name as shown; the cluster may know numbers that this program does not.
    fn number_and_name(&self) -> (u16, &'static str) {
        match self.of_cluster() {
            Some(ClientError::Refused(refusal)) if refusal.code().is_none() => {
                (refusal.number, "of a newer release")
            }
            _ => (self.code().number(), self.code().name()),
        }
    }

    fn remedy(&self) -> &'static str {
        match self {
            Self::Cluster(ClientError::Refused(refusal)) if refusal.code().is_none() => {
                "upgrade this program to the release of the cluster"
            }
            Self::Cluster(ClientError::NotXsan { .. }) => "correct --address or XSAN_ADDRESS",
            Self::Cluster(error) if error.is_uncertain() => {
                "look whether the change was made before trying again"
            }
            Self::Output(_) => "make room where the output goes",
            Self::NotConfirmed => "answer y, or give --yes",
            Self::NoTerminal => "give --yes",
            Self::TakenBack { .. } => "if that was not meant, begin it again with xsan-cli node remove",
            Self::OutOfSight { .. } => "xsan-cli node list shows the progress once the cluster answers",
            failure => failure.code().remedy(),
        }
    }

    pub fn exit_code(&self) -> u8 {
        match (self, self.of_cluster()) {
            (Self::NoTerminal, _) => exit::USAGE,
            (_, Some(ClientError::Unreachable { .. })) => exit::UNREACHABLE,
            (_, Some(ClientError::Broken { .. })) => exit::NO_ANSWER,
            _ => exit::of_command(self.code()),
        }
    }

    pub fn text(&self) -> String {
        let (number, name) = self.number_and_name();
        format!("error {number} {name}: {self}\n  what to do: {}", self.remedy())
    }

    pub fn json(&self) -> String {
        let (number, name) = self.number_and_name();
        let object = match self {
            Self::Cluster(ClientError::Refused(refusal)) => refusal.object.clone(),
            Self::TakenBack { node } | Self::OutOfSight { node, .. } => format!("node {node}"),
            _ => String::new(),
        };
        let error = json!({
            "number": number,
            "name": name,
            "object": object,
            "message": self.to_string(),
            "remedy": self.remedy(),
            "uncertain": self.of_cluster().is_some_and(ClientError::is_uncertain),
        });
        format!("{:#}", json!({ "error": error }))
    }
}

/// Prints what a command has to show, or why it failed.
pub fn finish(result: Result<String, Failure>, json: bool) -> ExitCode {
    finish_as(exit::DONE, result, json)
}

/// As `finish`, for a command whose success has an exit code of its own.
pub fn finish_as(done: u8, result: Result<String, Failure>, json: bool) -> ExitCode {
    match result.and_then(|text| print(&mut io::stdout(), &text)) {
        Ok(()) => ExitCode::from(done),
        Err(failure) => {
            eprintln!("{}", if json { failure.json() } else { failure.text() });
            ExitCode::from(failure.exit_code())
        }
    }
}

fn print(output: &mut impl Write, text: &str) -> Result<(), Failure> {
    match writeln!(output, "{}", text.trim_end()).and_then(|()| output.flush()) {
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

/// Runs `work` to its end on this thread.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::System)?;
    runtime.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;
    use xsan_client::Refusal;

    fn refused(number: u16, object: &str, message: &str, uncertain: bool) -> Failure {
        let refusal = Refusal { number, object: object.into(), message: message.into(), uncertain };
        Failure::Cluster(ClientError::Refused(refusal))
    }

    #[test]
    fn people_read_number_object_and_way_out() {
        let failure = refused(305, "volume vm-1", "volume vm-1 exists already", false);
        assert_eq!(
            failure.text(),
            "error 305 VolumeExists: volume vm-1 exists already\n  what to do: choose another name"
        );
        assert_eq!(failure.exit_code(), 1);
    }

    #[test]
    fn programs_read_the_same_as_fields() {
        let failure = refused(306, "volume vm-1", "attached to node-002", false);
        let value: serde_json::Value = serde_json::from_str(&failure.json()).expect("JSON");
        assert_eq!(value["error"]["number"], 306);
        assert_eq!(value["error"]["name"], "VolumeAttached");
        assert_eq!(value["error"]["object"], "volume vm-1");
        assert_eq!(value["error"]["message"], "volume vm-1: attached to node-002");
    }

    #[test]
    fn exit_codes_tell_refusal_silence_and_absence_apart() {
        let address = || "10.0.0.1".parse().expect("an address");
        let nobody =
            ClientError::Unreachable { addresses: vec![address()], reason: "connection refused".into() };
        let nobody = Failure::Cluster(nobody);
        assert_eq!(nobody.exit_code(), 3);
        assert_eq!(
            nobody.text(),
            "error 12 Unreachable: 10.0.0.1:8080: nothing answers (connection refused)\n  \
             what to do: check that the node runs and is reachable, or name another node with --address or XSAN_ADDRESS"
        );
        let after = std::time::Duration::from_secs(12);
        let silent = Failure::Cluster(ClientError::Timeout { address: address(), after, uncertain: true });
        assert_eq!(silent.exit_code(), 4);
        assert_eq!(
            silent.text(),
            "error 5 Timeout: 10.0.0.1:8080: no answer within 12 s; what was asked for may or may not have been done\n  \
             what to do: look whether the change was made before trying again"
        );
        assert_eq!(refused(104, "", "", false).exit_code(), 4);
    }

    /// An output that takes nothing.
    struct Full(ErrorKind);

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// `--json > file` on a full disk ended with half of the JSON and exit code 0.
    #[test]
    fn output_that_is_lost_is_a_failure_and_a_reader_that_left_is_none() {
        let failure = print(&mut Full(ErrorKind::StorageFull), "text").expect_err("nothing is taken");
        assert_eq!(failure.exit_code(), 1);
        assert!(failure.to_string().starts_with("standard output: no storage space"), "{failure}");
        print(&mut Full(ErrorKind::BrokenPipe), "text").expect("no failure");
        let mut shown = Vec::new();
        print(&mut shown, "text\n\n").expect("it is taken");
        assert_eq!(shown, b"text\n");
    }

    #[test]
    fn nobody_to_ask_is_wrong_usage() {
        assert_eq!(Failure::NoTerminal.exit_code(), exit::USAGE);
        assert_eq!(
            Failure::NoTerminal.text(),
            "error 2 InvalidArgument: not confirmed, as standard input is no terminal; nothing was changed\n  \
             what to do: give --yes"
        );
    }

    #[test]
    fn a_newer_cluster_is_still_understood() {
        let failure = refused(999, "thing", "words", false);
        assert!(
            failure.text().starts_with("error 999 of a newer release: thing: words\n"),
            "{}",
            failure.text()
        );
    }
}

//! How a command of the tools ends: what it shows, to people or programs, or why it fails, and its exit code.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use serde_json::json;
use xsan_client::ClientError;
use xsan_nodekit::exit;
use xsan_protocol::error::Code;

/// What a command that was carried out shows, and its exit code.
#[derive(Debug)]
pub struct Shown {
    pub text: String,
    pub exit_code: u8,
}

impl From<String> for Shown {
    fn from(text: String) -> Self {
        Self { text, exit_code: exit::DONE }
    }
}

#[derive(Debug)]
pub enum Failure {
    /// `object`: what was asked about, as `volume vm-1`; empty for the cluster as a whole.
    Cluster { object: String, source: ClientError },
    /// Our own system, as for a runtime that does not start.
    System(io::Error),
    /// What the command has to show can not be written.
    Output(io::Error),
    /// The user answered no.
    NotConfirmed,
    /// The user can not be asked.
    NoTerminal,
    /// Somebody took the removal of a node back while we waited for it.
    TakenBack { node: String },
    /// The cluster does not tell how far the removal of a node is.
    OutOfSight { node: String, source: ClientError },
}

impl From<ClientError> for Failure {
    fn from(source: ClientError) -> Self {
        Self::Cluster { object: String::new(), source }
    }
}

/// A call's error with the object that it was about: what got no answer can not name it.
pub trait About<T> {
    fn about(self, kind: &str, name: &str) -> Result<T, Failure>;
}

impl<T> About<T> for Result<T, ClientError> {
    fn about(self, kind: &str, name: &str) -> Result<T, Failure> {
        self.map_err(|source| Failure::Cluster { object: format!("{kind} {name}"), source })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster { object, source } if !object.is_empty() && source.is_silence() => {
                write!(f, "{object}: {source}")
            }
            Self::Cluster { source, .. } => source.fmt(f),
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
            Self::Cluster { source, .. } | Self::OutOfSight { source, .. } => source.code(),
            Self::System(_) | Self::Output(_) => Code::Internal,
            Self::NotConfirmed | Self::NoTerminal => Code::InvalidArgument,
            Self::TakenBack { .. } => Code::NotFound,
        }
    }

    fn of_cluster(&self) -> Option<&ClientError> {
        match self {
            Self::Cluster { source, .. } | Self::OutOfSight { source, .. } => Some(source),
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

    /// May something have been done, or be under way, of which the cluster does not tell how it ended?
    fn is_uncertain(&self) -> bool {
        match self {
            Self::Cluster { source, .. } => source.is_uncertain(),
            Self::OutOfSight { .. } => true,
            _ => false,
        }
    }

    fn remedy(&self) -> &'static str {
        match self {
            Self::Cluster { source: ClientError::Refused(refusal), .. } if refusal.code().is_none() => {
                "upgrade this program to the release of the cluster"
            }
            Self::Cluster { source: ClientError::NotXsan { .. }, .. } => "correct --address or XSAN_ADDRESS",
            Self::Cluster { .. } if self.is_uncertain() => {
                "look whether the change was made before trying again; as long as there is no quorum it may still be made"
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
        match self {
            Self::NoTerminal => exit::USAGE,
            Self::Output(_) => exit::NOT_SHOWN,
            Self::Cluster { source: ClientError::Broken { .. }, .. } => exit::NO_ANSWER,
            _ if self.is_uncertain() => exit::NO_ANSWER,
            Self::Cluster { source: ClientError::Unreachable { .. }, .. } => exit::UNREACHABLE,
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
            Self::Cluster { source: ClientError::Refused(refusal), .. } => refusal.object.clone(),
            Self::Cluster { object, .. } => object.clone(),
            Self::TakenBack { node } | Self::OutOfSight { node, .. } => format!("node {node}"),
            _ => String::new(),
        };
        let error = json!({
            "number": number,
            "name": name,
            "object": object,
            "message": self.to_string(),
            "remedy": self.remedy(),
            "uncertain": self.is_uncertain(),
        });
        format!("{:#}", json!({ "error": error }))
    }
}

/// Prints what a command has to show, or why it failed.
pub fn finish(result: Result<Shown, Failure>, json: bool) -> ExitCode {
    let shown = result.and_then(|shown| print(&mut io::stdout(), &shown.text).map(|()| shown.exit_code));
    match shown {
        Ok(exit_code) => ExitCode::from(exit_code),
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
        ClientError::Refused(refusal).into()
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
        let nobody = Failure::from(nobody);
        assert_eq!(nobody.exit_code(), 3);
        assert_eq!(
            nobody.text(),
            "error 12 Unreachable: 10.0.0.1:8080: nothing answers (connection refused)\n  \
             what to do: check that the node runs and is reachable, or name another node with --address or XSAN_ADDRESS"
        );
        let after = std::time::Duration::from_secs(12);
        let silent = Err::<(), _>(ClientError::Timeout { address: address(), after, uncertain: true });
        let silent = silent.about("volume", "vm-1").expect_err("no answer");
        assert_eq!(silent.exit_code(), 4);
        assert_eq!(
            silent.text(),
            "error 5 Timeout: volume vm-1: 10.0.0.1:8080: no answer within 12 s; what was asked for may or may not have been done\n  \
             what to do: look whether the change was made before trying again; as long as there is no quorum it may still be made"
        );
        let value: serde_json::Value = serde_json::from_str(&silent.json()).expect("JSON");
        assert_eq!(
            (&value["error"]["object"], &value["error"]["uncertain"]),
            (&"volume vm-1".into(), &true.into())
        );
        assert_eq!(refused(104, "", "", false).exit_code(), 4);
        // A script that took it for a plain refusal would take back what was done.
        assert_eq!(refused(305, "volume vm-1", "volume vm-1 exists already", true).exit_code(), 4);
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
        assert_eq!(failure.exit_code(), exit::NOT_SHOWN);
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

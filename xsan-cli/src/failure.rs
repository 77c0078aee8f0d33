//! Why a command of the tools fails, shown to people or programs, and its exit code.

use std::fmt;
use std::process::ExitCode;

use serde_json::json;
use xsan_client::ClientError;
use xsan_nodekit::exit;
use xsan_protocol::error::Code;

#[derive(Debug)]
pub enum Failure {
    Cluster(ClientError),
    /// Our own system, as for a runtime that does not start.
    System(std::io::Error),
    /// The user answered no.
    NotConfirmed,
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
            Self::NotConfirmed => f.write_str("not confirmed; nothing was changed"),
        }
    }
}

impl Failure {
    fn code(&self) -> Code {
        match self {
            Self::Cluster(error) => error.code(),
            Self::System(_) => Code::Internal,
            Self::NotConfirmed => Code::InvalidArgument,
        }
    }

    /// Number and name as shown; the cluster may know numbers that this program does not.
    fn number_and_name(&self) -> (u16, &'static str) {
        match self {
            Self::Cluster(ClientError::Refused(refusal)) if refusal.code().is_none() => {
                (refusal.number, "of a newer release")
            }
            failure => (failure.code().number(), failure.code().name()),
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
            failure => failure.code().remedy(),
        }
    }

    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Cluster(ClientError::Unreachable { .. }) => exit::UNREACHABLE,
            Self::Cluster(ClientError::Broken { .. }) => exit::NO_ANSWER,
            failure => exit::of_command(failure.code()),
        }
    }

    pub fn text(&self) -> String {
        let (number, name) = self.number_and_name();
        format!("error {number} {name}: {self}\n  what to do: {}", self.remedy())
    }

    pub fn json(&self) -> String {
        let (number, name) = self.number_and_name();
        let (object, uncertain) = match self {
            Self::Cluster(ClientError::Refused(refusal)) => (refusal.object.as_str(), refusal.uncertain),
            Self::Cluster(error) => ("", error.is_uncertain()),
            _ => ("", false),
        };
        let error = json!({
            "number": number,
            "name": name,
            "object": object,
            "message": self.to_string(),
            "remedy": self.remedy(),
            "uncertain": uncertain,
        });
        format!("{:#}", json!({ "error": error }))
    }
}

/// Prints what a command has to show, or why it failed.
pub fn finish(result: Result<String, Failure>, json: bool) -> ExitCode {
    use std::io::Write;
    match result {
        Ok(text) => {
            // A reader that has seen enough (`| head`) is no failure.
            let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("{}", if json { failure.json() } else { failure.text() });
            ExitCode::from(failure.exit_code())
        }
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

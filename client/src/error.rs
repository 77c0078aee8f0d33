//! What can go wrong between a program and the control plane, each with its number of the error table.

use std::fmt;
use std::time::Duration;

use prost::Message;
use xsan_protocol::error::{Code, Retry};
use xsan_protocol::proto::ErrorDetail;

use crate::control::Address;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection to any of the addresses: nothing was asked, so nothing was done.
    #[error("{}: nothing answers ({reason})", list(addresses))]
    Unreachable { addresses: Vec<Address>, reason: String },
    /// The cluster said no.
    #[error("{0}")]
    Refused(Refusal),
    /// Asked, and no answer came in time. A change may or may not have been made.
    #[error("{address}: no answer within {}{}", length(*after), uncertainty(*uncertain))]
    Timeout { address: Address, after: Duration, uncertain: bool },
    /// The connection broke before the answer. A change may or may not have been made.
    #[error("{address}: the connection broke before the answer{}", uncertainty(*uncertain))]
    Broken { address: Address, uncertain: bool },
    /// Something answers there, but not as XSAN's control plane does.
    #[error("{address}: does not answer as a control plane of XSAN ({reason})")]
    NotXsan { address: Address, reason: String },
}

/// A refusal as the cluster worded it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Number of the error table; not a `Code`, as the cluster may be newer than this program.
    pub number: u16,
    /// What it is about, as `volume vm-1`.
    pub object: String,
    pub message: String,
    /// An earlier try of the same call got no clear answer and may have been carried out.
    pub uncertain: bool,
}

impl Refusal {
    /// The refusal in a status, if it carries one.
    pub(crate) fn from_status(status: &tonic::Status) -> Option<Self> {
        if status.details().is_empty() {
            return None;
        }
        Self::from_detail(ErrorDetail::decode(status.details()).ok()?)
    }

    /// The refusal that a detail tells, if it has a number: also of what would be refused, in a plan.
    pub fn from_detail(detail: ErrorDetail) -> Option<Self> {
        let number = u16::try_from(detail.code).ok().filter(|number| *number != 0)?;
        // Whoever shows the refusal puts the number before it.
        let message = match detail.message.strip_prefix("error ").and_then(|rest| rest.split_once(": ")) {
            Some((_, sentence)) => sentence.to_owned(),
            None => detail.message,
        };
        Some(Self { number, object: detail.object, message, uncertain: false })
    }

    /// `None`: a number that this release does not know.
    pub fn code(&self) -> Option<Code> {
        Code::from_number(self.number)
    }

    pub(crate) fn retry(&self) -> Retry {
        self.code().map_or(Retry::Never, Code::retry)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = match (self.message.is_empty(), self.code()) {
            (false, _) => self.message.as_str(),
            (true, Some(code)) => code.what(),
            (true, None) => "an error of a newer release",
        };
        // A sentence that names the object already needs no second mention of it.
        if self.object.is_empty() || message.contains(self.object.as_str()) {
            f.write_str(message)?;
        } else {
            write!(f, "{}: {message}", self.object)?;
        }
        if self.uncertain {
            f.write_str(" (an earlier try of this request got no answer, and may be what made it so)")?;
        }
        Ok(())
    }
}

impl ClientError {
    /// The number of the error table; `Internal` for one that this release does not know.
    pub fn code(&self) -> Code {
        match self {
            Self::Unreachable { .. } | Self::Broken { .. } => Code::Unreachable,
            Self::Refused(refusal) => refusal.code().unwrap_or(Code::Internal),
            Self::Timeout { .. } => Code::Timeout,
            Self::NotXsan { .. } => Code::Unsupported,
        }
    }

    /// The error of a call of which `doubt` was asked before, and may have carried it out.
    pub(crate) fn after(self, doubt: Option<Address>) -> Self {
        match (self, doubt) {
            (Self::Unreachable { .. } | Self::NotXsan { .. }, Some(address)) => {
                Self::Broken { address, uncertain: true }
            }
            (Self::Timeout { address, after, .. }, Some(_)) => {
                Self::Timeout { address, after, uncertain: true }
            }
            (error, _) => error,
        }
    }

    /// Has nobody said anything about what was asked for?
    pub const fn is_silence(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Timeout { .. } | Self::Broken { .. })
    }

    /// Can it be that a change was made all the same?
    pub const fn is_uncertain(&self) -> bool {
        match self {
            Self::Timeout { uncertain, .. } | Self::Broken { uncertain, .. } => *uncertain,
            Self::Refused(refusal) => refusal.uncertain,
            Self::Unreachable { .. } | Self::NotXsan { .. } => false,
        }
    }
}

fn list(addresses: &[Address]) -> String {
    addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(", ")
}

/// As `12 s` or `330 ms`.
fn length(time: Duration) -> String {
    match time {
        time if time < Duration::from_secs(1) => format!("{} ms", time.as_millis()),
        time => format!("{} s", time.as_secs_f32().round()),
    }
}

const fn uncertainty(uncertain: bool) -> &'static str {
    if uncertain { "; what was asked for may or may not have been done" } else { "" }
}

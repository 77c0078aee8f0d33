//! Exit codes of XSAN's programs, and how a program says why it ends.
//!
//! | code | meaning |
//! | --- | --- |
//! | 0 | done; for a node: stopped cleanly |
//! | 1 | refused, with a numbered error |
//! | 2 | wrong usage: an option is missing, unknown or malformed |
//! | 3 | nothing answers at any of the addresses |
//! | 4 | no answer in time, or no quorum: a change that was asked for may or may not have been made |
//! | 5 | done, but what there was to show could not be written |
//! | 78 | starting again can not help: configuration, device or format; a supervisor does not restart |

use std::fmt;
use std::process::ExitCode;

use xsan_protocol::error::Code;

use crate::logging;

pub const DONE: u8 = 0;
pub const REFUSED: u8 = 1;
pub const USAGE: u8 = 2;
pub const UNREACHABLE: u8 = 3;
pub const NO_ANSWER: u8 = 4;
pub const NOT_SHOWN: u8 = 5;
/// `EX_CONFIG` of sysexits.h.
pub const DO_NOT_RESTART: u8 = 78;

/// The exit code of a control or data process that ends with `code`.
///
/// 78 where only the operator can help. A busy address or an unreadable device is tried again: the process before
/// this one may not be gone yet.
pub const fn of_daemon(code: Code) -> u8 {
    match code {
        Code::ConfigInvalid
        | Code::Unsupported
        | Code::MemoryShort
        | Code::ClusterIdMismatch
        | Code::NodeRemoved
        | Code::RaftLogLost
        | Code::StoreNotFormatted
        | Code::DeviceInUse
        | Code::DeviceTooSmall
        | Code::FormatUnsupported => DO_NOT_RESTART,
        _ => REFUSED,
    }
}

/// The exit code of a command that ends with `code`.
pub const fn of_command(code: Code) -> u8 {
    match code {
        Code::JoinAddressDead => UNREACHABLE,
        Code::Timeout | Code::NoQuorum => NO_ANSWER,
        _ => REFUSED,
    }
}

/// An error as the operator reads it: number and name, what happened to which object, and what to do.
///
/// The first line begins with `error NUMBER NAME:`; xsan-node finds the last words of a child by that.
pub struct Report<'a, M: fmt::Display> {
    pub code: Code,
    pub message: &'a M,
}

impl<M: fmt::Display> fmt::Display for Report<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, message } = self;
        write!(f, "error {} {}: {message}\n  what to do: {}", code.number(), code.name(), code.remedy())
    }
}

/// Says on stderr, and in the log file if there is one, why a daemon ends; gives the exit code for it.
pub fn daemon_fails(code: Code, message: &impl fmt::Display) -> ExitCode {
    if logging::is_to_file() {
        tracing::error!(code = code.number(), "{message}; {}", code.remedy());
    }
    logging::flush();
    eprintln!("{}", Report { code, message });
    ExitCode::from(of_daemon(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_number_object_and_way_out() {
        let report = Report { code: Code::ConfigInvalid, message: &"node.conf: logging.level: \"loud\"" };
        assert_eq!(
            report.to_string(),
            "error 8 ConfigInvalid: node.conf: logging.level: \"loud\"\n  \
             what to do: correct the field that the message names"
        );
    }

    #[test]
    fn only_what_the_operator_must_mend_stops_restarts() {
        assert_eq!(of_daemon(Code::DeviceInUse), DO_NOT_RESTART);
        assert_eq!(of_daemon(Code::AddressInUse), REFUSED);
        assert_eq!(of_daemon(Code::DeviceUnusable), REFUSED);
        assert_eq!(of_command(Code::NoQuorum), NO_ANSWER);
    }
}

//! Joining: what a new node asks of a member, before it starts Raft, as the command that the leader commits.
//!
//! Used by the internal service; xsan-node is the one that asks, and asks with the same `instance` until it is
//! answered, so that an answer lost on its way costs no id.

use xsan_protocol::error::Code;
use xsan_protocol::proto;
use xsan_protocol::wire::header::{VERSION, VERSION_MIN};

use crate::state::command::{Command, CommandError, NewNode};
use crate::state::error::Refusal;

/// The command that a join request asks for.
///
/// # Errors
/// 102 `VersionMismatch`, 2 `InvalidArgument`.
pub fn command(request: proto::JoinRequest) -> Result<Command, Refusal> {
    let object = format!("node {}", request.name);
    let (ours_min, ours_max) = (u32::from(VERSION_MIN), u32::from(VERSION));
    if request.version_max < ours_min || request.version_min > ours_max {
        let message = format!(
            "the node speaks protocol versions {} to {}, the cluster {ours_min} to {ours_max}",
            request.version_min, request.version_max
        );
        return Err(Refusal { code: Code::VersionMismatch, object, message });
    }
    // Commands take a name or a number: `node remove 2` was of the node with that name, and once that was gone of the one
    // with that number.
    if request.name.bytes().all(|byte| byte.is_ascii_digit()) {
        let message =
            format!("node id {:?} has only digits, and would be taken for a node's number", request.name);
        return Err(Refusal { code: Code::InvalidArgument, object, message });
    }
    let message = proto::command::AddNode {
        cluster_id: request.cluster_id,
        name: request.name,
        address: request.address,
        control_port: request.control_port,
        failure_domain: request.failure_domain,
        instance: request.instance,
        founder: false,
    };
    let new = NewNode::try_from(message).map_err(|error: CommandError| Refusal {
        code: Code::InvalidArgument,
        object,
        message: error.to_string(),
    })?;
    Ok(Command::AddNode(new))
}

//! Errors as the API answers them: a gRPC status, with an `ErrorDetail` in its details.
//!
//! The message reads `error 305 VolumeExists: volume vm-1 exists already; choose another name`.

use prost::Message;
use tonic::Status;
use xsan_protocol::error::Code;
use xsan_protocol::proto;

use crate::raft::handle::ProposeError;
use crate::state::error::Refusal;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    #[error("{0}; {remedy}", remedy = .0.code().remedy())]
    Raft(ProposeError),
    #[error("{}", .0.message)]
    Refused(Refusal),
    #[error("node {name} is not in the cluster; xsan-cli node list shows the nodes")]
    NodeNotFound { name: String },
    #[error("volume {name} does not exist; xsan-cli volume list shows the volumes")]
    VolumeNotFound { name: String },
    #[error("volume {volume} has {blocks} blocks, number {block} was asked for")]
    OutOfRange { volume: String, block: u64, blocks: u64 },
    #[error("{field} is out of range; correct it")]
    Invalid { field: &'static str, object: String },
    #[error("the command had a reply of another kind; report the bug")]
    Unexpected,
    #[error("the node is stopping; ask another one")]
    Stopping,
    #[error("the data process of this node does not answer")]
    NoDataProcess,
    #[error("another node was asked for than the one that has its address now")]
    OtherNode,
}

impl ApiError {
    pub const fn code(&self) -> Code {
        match self {
            Self::Raft(error) => error.code(),
            Self::Refused(refusal) => refusal.code,
            Self::NodeNotFound { .. } | Self::OtherNode => Code::NodeNotFound,
            Self::VolumeNotFound { .. } => Code::VolumeNotFound,
            Self::OutOfRange { .. } => Code::OutOfRange,
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::Unexpected => Code::Internal,
            Self::Stopping | Self::NoDataProcess => Code::Busy,
        }
    }

    fn object(&self) -> String {
        match self {
            Self::Refused(refusal) => refusal.object.clone(),
            Self::NodeNotFound { name } => format!("node {name}"),
            Self::VolumeNotFound { name } | Self::OutOfRange { volume: name, .. } => format!("volume {name}"),
            Self::Invalid { object, .. } => object.clone(),
            Self::Raft(_) | Self::Unexpected | Self::Stopping | Self::NoDataProcess | Self::OtherNode => {
                "cluster".to_owned()
            }
        }
    }
}

impl From<ProposeError> for ApiError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::Refused(refusal) => Self::Refused(refusal),
            error => Self::Raft(error),
        }
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        status(error.code(), error.object(), &error.to_string())
    }
}

/// The status of an error number.
pub fn status(code: Code, object: String, message: &str) -> Status {
    let detail = proto::ErrorDetail { code: u32::from(code.number()), object, message: message.to_owned() };
    let line = format!("error {} {}: {message}", code.number(), code.name());
    Status::with_details(grpc_code(code), line, detail.encode_to_vec().into())
}

/// The gRPC code nearest to an error number, for clients that know no better.
const fn grpc_code(code: Code) -> tonic::Code {
    match code {
        Code::InvalidArgument | Code::ConfigInvalid | Code::FrameInvalid => tonic::Code::InvalidArgument,
        Code::NotFound | Code::NodeNotFound | Code::VolumeNotFound => tonic::Code::NotFound,
        Code::AlreadyExists | Code::VolumeExists | Code::NodeIdTaken => tonic::Code::AlreadyExists,
        Code::Timeout => tonic::Code::DeadlineExceeded,
        Code::Busy | Code::NodeBusy | Code::NoQuorum | Code::JoinAddressDead => tonic::Code::Unavailable,
        Code::Unsupported => tonic::Code::Unimplemented,
        Code::OutOfRange => tonic::Code::OutOfRange,
        Code::StorageFull | Code::ClusterFull => tonic::Code::ResourceExhausted,
        Code::Internal => tonic::Code::Internal,
        _ => tonic::Code::FailedPrecondition,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::error::StateError;

    #[test]
    fn a_refusal_names_number_object_and_remedy() {
        let refusal = Refusal::from(StateError::VolumeExists { name: "vm-1".into() });
        let status = Status::from(ApiError::from(ProposeError::Refused(refusal)));
        assert_eq!(status.code(), tonic::Code::AlreadyExists);
        assert_eq!(
            status.message(),
            "error 305 VolumeExists: volume vm-1 exists already; choose another name"
        );
        let detail = proto::ErrorDetail::decode(status.details()).expect("details");
        assert_eq!((detail.code, detail.object.as_str()), (305, "volume vm-1"));
    }
}

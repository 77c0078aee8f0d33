//! Listening sockets: bound with a clear error, accepting whatever happens to single connections.
//!
//! Used by `shard` and by gateways.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use monoio::net::{ListenerOpts, TcpListener, TcpStream};
use xsan_protocol::error::Code;

/// How long to wait after a failed accept, as when the process has no file descriptor left; doubled with each that follows.
const WAIT_FIRST: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// A port that can not be listened on.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {source}")]
pub struct BindError {
    pub address: SocketAddr,
    pub source: io::Error,
}

impl BindError {
    pub fn code(&self) -> Code {
        match self.source.kind() {
            io::ErrorKind::AddrInUse => Code::AddressInUse,
            _ => Code::InvalidArgument,
        }
    }
}

/// Listens on `address`; `shared` lets every shard of the process listen on the same port.
///
/// # Errors
/// 10 `AddressInUse`, or 2 `InvalidArgument` for an address that this host does not have.
pub fn bind(address: SocketAddr, shared: bool) -> Result<TcpListener, BindError> {
    let options = ListenerOpts::new().reuse_addr(true).reuse_port(shared);
    TcpListener::bind_with_config(address, &options).map_err(|source| BindError { address, source })
}

/// Has the process, or the host, no file descriptor left?
pub fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// The next connection and whom it is from; a failed accept is logged and waited out.
pub async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let mut wait = WAIT_FIRST;
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                monoio::time::sleep(wait).await;
                wait = WAIT_MAX.min(wait * 2);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_open_files_is_no_fault_of_the_peer() {
        assert!(is_exhausted(&io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(is_exhausted(&io::Error::from_raw_os_error(libc::ENFILE)));
        assert!(!is_exhausted(&io::Error::from_raw_os_error(libc::ECONNREFUSED)));
    }
}

//! Can the node have its addresses? Found out by binding each of them for a moment, before anything is changed.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use xsan_nodekit::config::{FieldError, NodeConfig};

use super::error::NodeError;

/// How long a node that starts again waits for its addresses. The ports of a predecessor that was killed stay bound until its memory
/// and its I/O are taken down; and at the boot of a host the node may be there before its interface.
pub const RESTART_WAIT: Duration = Duration::from_secs(20);

/// Checks every address that `config` names, for up to `patience`; a first start has none.
pub async fn check(config: &NodeConfig, patience: Duration) -> Result<(), NodeError> {
    let deadline = Instant::now() + patience;
    let mut waits = false;
    loop {
        match check_once(config) {
            Err(error @ (NodeError::AddressInUse { .. } | NodeError::AddressMissing { .. }))
                if Instant::now() < deadline =>
            {
                if !waits {
                    tracing::info!("waits for up to {patience:?}: {error}");
                }
                waits = true;
                sleep(Duration::from_millis(50)).await;
            }
            // It never was: what was written is wrong, and no later start will find it right.
            Err(NodeError::AddressMissing { ip }) if patience.is_zero() => {
                let problem = format!("\"{ip}\" is not an address of this host");
                return Err(NodeError::Field {
                    source: FieldError { field: "cluster.bind_ip".into(), problem },
                });
            }
            result => return result,
        }
    }
}

fn check_once(config: &NodeConfig) -> Result<(), NodeError> {
    let ip = config.cluster.bind_ip;
    let control = config.cluster.control_address();
    let dataplane = &config.dataplane;
    let tcp = |what, field, port| {
        let address = SocketAddr::new(ip, port);
        TcpListener::bind(address).map(drop).map_err(|error| refused(what, field, address, &error))
    };
    tcp("control plane address", "cluster.bind_port", control.port())?;
    UdpSocket::bind(control)
        .map(drop)
        .map_err(|error| refused("heartbeat address (UDP)", "cluster.bind_port", control, &error))?;
    // With cores on `auto` only the data plane knows their number: it reports the others itself.
    for shard in 0..dataplane.core_count().unwrap_or(1) {
        tcp("data plane address", "dataplane.port", dataplane.port + shard as u16)?;
    }
    tcp("NBD address", "dataplane.nbd_port", dataplane.nbd_port)
}

fn refused(what: &'static str, field: &str, address: SocketAddr, error: &io::Error) -> NodeError {
    match error.kind() {
        io::ErrorKind::AddrInUse => NodeError::AddressInUse { what, address },
        io::ErrorKind::AddrNotAvailable => NodeError::AddressMissing { ip: address.ip() },
        _ => {
            let problem = format!("{address} can not be bound: {error}");
            NodeError::Field { source: FieldError { field: field.into(), problem } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xsan_nodekit::exit;
    use xsan_protocol::error::Code;

    /// A node on `ip` whose ports the test may take in turn.
    fn config(ip: &str) -> NodeConfig {
        let mut config = NodeConfig::default();
        config.cluster.bind_ip = ip.parse().expect("an address");
        config.cluster.bind_port = 18080;
        config.dataplane.cores = "0,1".into();
        config.dataplane.port = 19100;
        config.dataplane.nbd_port = 20809;
        config
    }

    #[tokio::test]
    async fn each_port_in_use_is_named() {
        let config = config("127.0.77.1");
        check(&config, Duration::ZERO).await.expect("all are free");
        for (port, name) in
            [(18080, "control plane"), (19100, "data plane"), (19101, "data plane"), (20809, "NBD")]
        {
            let taken = TcpListener::bind(("127.0.77.1", port)).expect("it is free");
            let error = check(&config, Duration::ZERO).await.expect_err(name);
            assert_eq!(error.code(), Code::AddressInUse);
            assert_eq!(error.to_string(), format!("{name} address 127.0.77.1:{port} is in use"));
            drop(taken);
        }
        let taken = UdpSocket::bind("127.0.77.1:18080").expect("it is free");
        let error = check(&config, Duration::ZERO).await.expect_err("UDP is taken");
        assert_eq!(error.to_string(), "heartbeat address (UDP) 127.0.77.1:18080 is in use");
        drop(taken);
    }

    #[tokio::test]
    async fn a_predecessor_may_take_a_moment() {
        let config = config("127.0.77.2");
        let taken = TcpListener::bind("127.0.77.2:19100").expect("it is free");
        let later = async {
            sleep(Duration::from_millis(200)).await;
            drop(taken);
        };
        let (result, ()) = tokio::join!(check(&config, RESTART_WAIT), later);
        result.expect("it is free after a moment");
    }

    #[tokio::test]
    async fn an_address_of_another_host_is_a_wrong_field() {
        let error = check(&config("192.0.2.1"), Duration::ZERO).await.expect_err("not ours");
        assert_eq!(error.code(), Code::ConfigInvalid);
        assert_eq!(error.exit_code(), exit::DO_NOT_RESTART);
        assert_eq!(
            error.to_string(),
            "cluster.bind_ip: \"192.0.2.1\" is not an address of this host (option --bind-ip)"
        );
    }
    /// A host booted, the node was there before the address, and its supervisor was told to leave it down for good.
    #[tokio::test]
    async fn an_address_that_a_later_start_lacks_is_waited_for_and_then_a_restart() {
        let (begin, patience) = (Instant::now(), Duration::from_millis(120));
        let error = check(&config("192.0.2.1"), patience).await.expect_err("not ours");
        assert!(begin.elapsed() >= patience);
        assert_eq!(error.exit_code(), exit::REFUSED);
        assert!(
            error.to_string().starts_with("cluster.bind_ip: \"192.0.2.1\" is not an address of this host"),
            "{error}"
        );
    }
}

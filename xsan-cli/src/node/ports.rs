//! Are the node's addresses free? Found out by binding each of them for a moment, before anything is changed.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use xsan_nodekit::config::{FieldError, NodeConfig};

use super::error::NodeError;

/// How long the ports of a predecessor that was killed stay bound: its memory and its I/O are taken down first.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(20);

/// How long to wait for a port that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    None,
    Predecessor,
}

/// Checks every port that `config` names.
pub async fn check(config: &NodeConfig, patience: Patience) -> Result<(), NodeError> {
    let deadline = Instant::now() + PREDECESSOR_WAIT;
    loop {
        match check_once(config) {
            Err(NodeError::AddressInUse { .. })
                if patience == Patience::Predecessor && Instant::now() < deadline =>
            {
                sleep(Duration::from_millis(50)).await;
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
    let (field, problem) = match error.kind() {
        io::ErrorKind::AddrInUse => return NodeError::AddressInUse { what, address },
        io::ErrorKind::AddrNotAvailable => {
            ("cluster.bind_ip", format!("\"{}\" is not an address of this host", address.ip()))
        }
        _ => (field, format!("{address} can not be bound: {error}")),
    };
    NodeError::Field { source: FieldError { field: field.into(), problem } }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        check(&config, Patience::None).await.expect("all are free");
        for (port, name) in
            [(18080, "control plane"), (19100, "data plane"), (19101, "data plane"), (20809, "NBD")]
        {
            let taken = TcpListener::bind(("127.0.77.1", port)).expect("it is free");
            let error = check(&config, Patience::None).await.expect_err(name);
            assert_eq!(error.code(), Code::AddressInUse);
            assert_eq!(error.to_string(), format!("{name} address 127.0.77.1:{port} is in use"));
            drop(taken);
        }
        let taken = UdpSocket::bind("127.0.77.1:18080").expect("it is free");
        let error = check(&config, Patience::None).await.expect_err("UDP is taken");
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
        let (result, ()) = tokio::join!(check(&config, Patience::Predecessor), later);
        result.expect("it is free after a moment");
    }

    #[tokio::test]
    async fn an_address_of_another_host_is_a_wrong_field() {
        let error = check(&config("192.0.2.1"), Patience::None).await.expect_err("not ours");
        assert_eq!(error.code(), Code::ConfigInvalid);
        assert_eq!(
            error.to_string(),
            "cluster.bind_ip: \"192.0.2.1\" is not an address of this host (option --bind-ip)"
        );
    }
}

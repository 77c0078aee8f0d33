//! Addresses for a cluster: a /24 of 127.0.0.0/8 that no other harness of this host uses.
//!
//! Each node gets an address of its own with the default ports, as nodes on hosts of their own have; nothing
//! else is likely to listen there, and clusters of two runs never meet. Nor do two clusters of one run: the ports
//! of a killed node stay bound until the kernel has taken down its rings, which may be seconds later.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

/// Nodes that one network has addresses for.
const NODES_MAX: usize = 250;
/// Networks that this process has tried, each once.
static TRIED: AtomicU32 = AtomicU32::new(0);

/// 127.`second`.`third`.0/24, held by a Unix socket of that name until it is dropped: the kernel lets go of the
/// name however the harness ends.
#[derive(Debug)]
pub struct Network {
    second: u8,
    third: u8,
    ports: Ports,
    _name: UnixListener,
}

/// The same on every node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    pub control: u16,
    pub data: u16,
    pub nbd: u16,
}

impl Network {
    /// Takes a free network, with ports that can be bound there.
    pub fn take() -> Result<Self> {
        // Where the search starts spreads the harnesses of a host; the name is what keeps them apart.
        let start = std::process::id().wrapping_mul(97);
        for _ in 0..20_000 {
            let step = TRIED.fetch_add(1, Ordering::Relaxed);
            let (second, third) = position(start.wrapping_add(step));
            let name = UnixAddress::from_abstract_name(format!("xsan-loopback-{second}-{third}"))?;
            let name = match UnixListener::bind_addr(&name) {
                Ok(name) => name,
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => continue,
                Err(error) => return Err(error).context("taking a loopback network"),
            };
            let address = Ipv4Addr::new(127, second, third, 1);
            if let Some(ports) = free_ports(address)? {
                return Ok(Self { second, third, ports, _name: name });
            }
        }
        bail!("no loopback network of 127.0.0.0/8 is free");
    }

    pub fn address(&self, index: usize) -> IpAddr {
        assert!(index < NODES_MAX);
        IpAddr::V4(Ipv4Addr::new(127, self.second, self.third, index as u8 + 1))
    }

    pub const fn ports(&self) -> Ports {
        self.ports
    }

    pub fn control(&self, index: usize) -> SocketAddr {
        SocketAddr::new(self.address(index), self.ports.control)
    }

    pub fn nbd(&self, index: usize) -> SocketAddr {
        SocketAddr::new(self.address(index), self.ports.nbd)
    }

    pub fn data(&self, index: usize) -> SocketAddr {
        SocketAddr::new(self.address(index), self.ports.data)
    }
}

/// Below 127.64.0.0 people use addresses by hand.
const fn position(number: u32) -> (u8, u8) {
    (64 + (number / 250 % 128) as u8, 1 + (number % 250) as u8)
}

/// The default ports, or others when something listens on them on every address.
fn free_ports(address: Ipv4Addr) -> Result<Option<Ports>> {
    for shift in (0..20_000).step_by(500) {
        let ports = Ports { control: 8080 + shift, data: 9100 + shift, nbd: 10_809 + shift };
        // A data process takes one port a shard from `data` on.
        let tcp = [ports.control, ports.nbd].into_iter().chain(ports.data..ports.data + 16);
        let bound: io::Result<Vec<TcpListener>> =
            tcp.map(|port| TcpListener::bind((address, port))).collect();
        match bound.and_then(|_| UdpSocket::bind((address, ports.control))) {
            Ok(_) => return Ok(Some(ports)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).with_context(|| format!("binding {address}")),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_networks_never_share_an_address() {
        let (first, second) = (Network::take().unwrap(), Network::take().unwrap());
        assert_ne!(first.address(0), second.address(0));
        assert_ne!(first.control(0), first.nbd(0));
    }

    #[test]
    fn a_network_is_not_used_again() {
        let before = Network::take().unwrap().address(0);
        assert_ne!(before, Network::take().unwrap().address(0));
    }

    #[test]
    fn a_port_that_is_taken_is_passed_over() {
        let address = Ipv4Addr::new(127, 63, 1, 1);
        let before = free_ports(address).unwrap().unwrap();
        let _taken = TcpListener::bind((address, before.control)).unwrap();
        let after = free_ports(address).unwrap().unwrap();
        assert_ne!(before, after);
    }
}

//! Addresses for a cluster: a /24 that no other harness of this host uses, on loopback or behind a switch.
//!
//! Each node gets an address of its own with the default ports, as nodes on hosts of their own have; nothing
//! else is likely to listen there, and clusters of two runs never meet. Nor do two clusters of one run: the ports
//! of a killed node stay bound until the kernel has taken down its rings, which may be seconds later.
//!
//! Most tests do with loopback, which needs no rights. Behind a switch every node has a network namespace of its own,
//! and what passes between them can be cut, slowed and lost: that needs root.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::namespace::Namespace;
use crate::switch::Switch;

/// Nodes that one network has addresses for.
const NODES_MAX: usize = 250;
/// Networks that this process has tried, each once.
static TRIED: AtomicU32 = AtomicU32::new(0);

/// x.y.z.0/24, held by a Unix socket of that name until it is dropped: the kernel lets go of the name however
/// the harness ends.
#[derive(Debug)]
pub struct Network {
    prefix: [u8; 3],
    ports: Ports,
    switch: Option<Switch>,
    _name: UnixListener,
}

/// The same on every node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    pub control: u16,
    pub data: u16,
    pub nbd: u16,
}

impl Ports {
    const DEFAULT: Self = Self { control: 8080, data: 9100, nbd: 10_809 };

    const fn shifted(self, shift: u16) -> Self {
        Self { control: self.control + shift, data: self.data + shift, nbd: self.nbd + shift }
    }
}

impl Network {
    /// Takes a free network of loopback, with ports that can be bound there.
    pub fn take() -> Result<Self> {
        let free = take(|number| {
            let prefix = loopback(number);
            let Some(name) = hold("loopback", prefix)? else { return Ok(None) };
            let ports = free_ports(Ipv4Addr::new(prefix[0], prefix[1], prefix[2], 1))?;
            Ok(ports.map(|ports| Self { prefix, ports, switch: None, _name: name }))
        })?;
        free.context("no loopback network of 127.0.0.0/8 is free")
    }

    /// Takes a free network and puts a switch between `node_count` namespaces; `seed` decides what lossy links lose.
    pub fn switched(node_count: usize, seed: u64) -> Result<Self> {
        let free = take(|number| {
            let prefix = benchmarking(number);
            Ok(hold("switch", prefix)?.map(|name| (prefix, name)))
        })?;
        let (prefix, name) = free.context("no network of 198.18.0.0/15 is free")?;
        let switch = Switch::start(prefix, node_count, seed)?;
        Ok(Self { prefix, ports: Ports::DEFAULT, switch: Some(switch), _name: name })
    }

    pub fn address(&self, index: usize) -> IpAddr {
        assert!(index < NODES_MAX);
        let [first, second, third] = self.prefix;
        IpAddr::V4(Ipv4Addr::new(first, second, third, index as u8 + 1))
    }

    /// Where a node's processes run; `None`: where the harness does.
    pub fn namespace(&self, index: usize) -> Option<Namespace> {
        self.switch.as_ref().map(|switch| switch.namespace(index).clone())
    }

    pub const fn switch(&self) -> Option<&Switch> {
        self.switch.as_ref()
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

/// The first network that `look` finds free; each is looked at once in this process's life.
fn take<T>(mut look: impl FnMut(u32) -> Result<Option<T>>) -> Result<Option<T>> {
    // Where the search starts spreads the harnesses of a host; the name is what keeps them apart.
    let start = std::process::id().wrapping_mul(97);
    for _ in 0..20_000 {
        let step = TRIED.fetch_add(1, Ordering::Relaxed);
        if let Some(found) = look(start.wrapping_add(step))? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Of 127.0.0.0/8. Below 127.64.0.0 people use addresses by hand.
const fn loopback(number: u32) -> [u8; 3] {
    [127, 64 + (number / 250 % 128) as u8, 1 + (number % 250) as u8]
}

/// Of 198.18.0.0/15, which no host has: it is for testing network devices (RFC 2544).
const fn benchmarking(number: u32) -> [u8; 3] {
    [198, 18 + (number / 256 % 2) as u8, (number % 256) as u8]
}

/// Takes the name of a network; `None` when another harness has it.
fn hold(kind: &str, [_, second, third]: [u8; 3]) -> Result<Option<UnixListener>> {
    let name = UnixAddress::from_abstract_name(format!("xsan-{kind}-{second}-{third}"))?;
    match UnixListener::bind_addr(&name) {
        Ok(name) => Ok(Some(name)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error).context("taking a network"),
    }
}

/// The default ports, or others when something listens on them on every address.
fn free_ports(address: Ipv4Addr) -> Result<Option<Ports>> {
    for shift in (0..20_000).step_by(500) {
        let ports = Ports::DEFAULT.shifted(shift);
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

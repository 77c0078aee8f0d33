//! A client that speaks the protocol byte by byte, and so can also break it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use xsan_dataplane::gateway::nbd::wire::{Errno, Request, command, option, reply};

use crate::server::Server;

pub const FIXED: u32 = 1;
pub const NO_ZEROES: u32 = 2;
pub const BOTH: u32 = FIXED | NO_ZEROES;

pub struct Raw {
    pub stream: TcpStream,
    cookie: u64,
}

/// One chunk of a structured reply.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    pub done: bool,
    pub kind: u16,
    pub cookie: u64,
    pub payload: Vec<u8>,
}

impl Raw {
    pub fn connect(server: &Server) -> Self {
        let stream = TcpStream::connect(server.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { stream, cookie: 0 }
    }

    /// Connects and answers the greeting.
    pub fn greet(server: &Server, flags: u32) -> Self {
        let mut raw = Self::connect(server);
        assert_eq!(raw.take(18), b"NBDMAGICIHAVEOPT\x00\x03");
        raw.send(&flags.to_be_bytes());
        raw
    }

    /// Opens an export with simple replies.
    pub fn open(server: &Server, export: &str) -> Self {
        let mut raw = Self::greet(server, BOTH);
        raw.go(export);
        raw
    }

    /// Opens an export with structured replies and block status.
    pub fn open_structured(server: &Server, export: &str) -> Self {
        let mut raw = Self::greet(server, BOTH);
        assert_eq!(raw.option(option::STRUCTURED_REPLY, &[]), [(reply::ACK, vec![])]);
        let replies = raw.option(option::SET_META_CONTEXT, &context_query(export, &["base:allocation"]));
        assert_eq!(replies.len(), 2);
        raw.go(export);
        raw
    }

    pub fn go(&mut self, export: &str) {
        let replies = self.option(option::GO, &export_query(export));
        assert_eq!(replies.last().unwrap().0, reply::ACK);
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// As `send`, where the server may have closed the connection.
    pub fn try_send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// The server closes the connection, whatever it sends before.
    pub fn assert_closed(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }

    /// All replies to an option, up to the acknowledgement or error.
    pub fn option(&mut self, option: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&option_bytes(option, payload));
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.take_u64(), 0x0003_e889_0455_65a9);
            assert_eq!(self.take_u32(), option);
            let kind = self.take_u32();
            let length = self.take_u32() as usize;
            replies.push((kind, self.take(length)));
            if kind == reply::ACK || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    /// Sends a request, with `data` if it is a write; returns its cookie.
    pub fn request(&mut self, command: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> u64 {
        self.cookie += 1;
        let request = Request { flags, command, cookie: self.cookie, offset, length };
        self.send(&[&request.encode(), data].concat());
        self.cookie
    }

    /// Cookie and error of a simple reply.
    pub fn simple(&mut self) -> (u64, u32) {
        assert_eq!(self.take_u32(), 0x6744_6698);
        let error = self.take_u32();
        (self.take_u64(), error)
    }

    pub fn chunk(&mut self) -> Chunk {
        assert_eq!(self.take_u32(), 0x668e_33ef);
        let flags = self.take_u16();
        let kind = self.take_u16();
        let cookie = self.take_u64();
        let length = self.take_u32() as usize;
        Chunk { done: flags == 1, kind, cookie, payload: self.take(length) }
    }

    /// Does a request without data in its reply; the error, 0 if none.
    pub fn done(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> u32 {
        let cookie = self.request(command, flags, offset, length, &[]);
        let (answered, error) = self.simple();
        assert_eq!(answered, cookie);
        error
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        let cookie = self.request(command::WRITE, 0, offset, data.len() as u32, data);
        let (answered, error) = self.simple();
        assert_eq!(answered, cookie);
        error
    }

    /// A read with a simple reply.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        let cookie = self.request(command::READ, 0, offset, length, &[]);
        let (answered, error) = self.simple();
        assert_eq!(answered, cookie);
        if error == 0 { Ok(self.take(length as usize)) } else { Err(error) }
    }

    pub fn disconnect(mut self) {
        self.request(command::DISCONNECT, 0, 0, 0, &[]);
        self.assert_closed();
    }

    pub fn half_close(&self) {
        // The server may have closed it by now.
        _ = self.stream.shutdown(Shutdown::Write);
    }
}

pub const INVAL: u32 = Errno::Inval as u32;
pub const NOSPC: u32 = Errno::NoSpc as u32;
pub const IO: u32 = Errno::Io as u32;

pub fn option_bytes(option: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&b"IHAVEOPT"[..], &option.to_be_bytes(), &length, payload].concat()
}

fn string(string: &str) -> Vec<u8> {
    [&(string.len() as u32).to_be_bytes(), string.as_bytes()].concat()
}

/// Payload of INFO and GO which asks for nothing.
pub fn export_query(name: &str) -> Vec<u8> {
    [string(name), vec![0, 0]].concat()
}

pub fn context_query(name: &str, queries: &[&str]) -> Vec<u8> {
    let count = (queries.len() as u32).to_be_bytes().to_vec();
    let queries: Vec<u8> = queries.iter().flat_map(|query| string(query)).collect();
    [string(name), count, queries].concat()
}

/// Bytes that differ from place to place.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let word = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(word).collect();
    bytes.truncate(length);
    bytes
}

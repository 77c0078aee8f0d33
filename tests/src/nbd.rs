//! A small NBD client of our own: depth 1, blocking, over TCP.
//!
//! The tests of compatibility use clients that nobody here wrote; this one is for what those can not do:
//! timing each request, surviving a lost connection, and sending what a sane client never would.
//! Simple replies only: structured ones are left to libnbd and QEMU.
//!
//! Source: the NBD project's `doc/proto.md`.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const INIT_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

const FIXED_NEWSTYLE: u16 = 1;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR_BIT: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
/// The longest answer to an option that this client takes.
const OPTION_REPLY_MAX: u32 = 64 * 1024;

pub const COMMAND_READ: u16 = 0;
pub const COMMAND_WRITE: u16 = 1;
pub const COMMAND_DISCONNECT: u16 = 2;
pub const COMMAND_FLUSH: u16 = 3;
pub const COMMAND_TRIM: u16 = 4;
pub const COMMAND_WRITE_ZEROES: u16 = 6;
pub const FLAG_FUA: u16 = 1;

#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error("the connection broke: {0}")]
    Connection(#[from] io::Error),
    #[error("the export was refused with option error {0:#x}")]
    Refused(u32),
    #[error("the request failed with errno {0}")]
    Request(u32),
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
}

/// One connection to one export.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    size_bytes: u64,
    cookie: u64,
}

impl Client {
    /// Connects and opens `export`; `timeout` bounds connecting and each read or write of the socket.
    pub fn connect(address: SocketAddr, export: &str, timeout: Duration) -> Result<Self, NbdError> {
        let mut stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;

        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if greeting[..8] != INIT_MAGIC.to_be_bytes() || greeting[8..16] != OPTION_MAGIC.to_be_bytes() {
            return Err(NbdError::Protocol("its greeting is not NBD newstyle"));
        }
        if u16::from_be_bytes([greeting[16], greeting[17]]) & FIXED_NEWSTYLE == 0 {
            return Err(NbdError::Protocol("it does not speak fixed newstyle"));
        }
        stream.write_all(&u32::from(FIXED_NEWSTYLE).to_be_bytes())?;
        stream.write_all(&go_option(export))?;
        let size_bytes = finish_go(&mut stream)?;
        Ok(Self { stream, size_bytes, cookie: 0 })
    }

    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), NbdError> {
        let length = u32::try_from(bytes.len()).expect("a read is at most 32 MiB");
        self.request(COMMAND_READ, 0, offset, length, &[])?;
        self.reply()?;
        self.stream.read_exact(bytes)?;
        Ok(())
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), NbdError> {
        self.write_with(0, offset, bytes)
    }

    pub fn write_fua(&mut self, offset: u64, bytes: &[u8]) -> Result<(), NbdError> {
        self.write_with(FLAG_FUA, offset, bytes)
    }

    fn write_with(&mut self, flags: u16, offset: u64, bytes: &[u8]) -> Result<(), NbdError> {
        let length = u32::try_from(bytes.len()).expect("a write is at most 32 MiB");
        self.request(COMMAND_WRITE, flags, offset, length, bytes)?;
        self.reply()
    }

    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.command(COMMAND_FLUSH, 0, 0)
    }

    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        self.command(COMMAND_TRIM, offset, length)
    }

    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        self.command(COMMAND_WRITE_ZEROES, offset, length)
    }

    /// A request without payload either way.
    pub fn command(&mut self, command: u16, offset: u64, length: u32) -> Result<(), NbdError> {
        self.request(command, 0, offset, length, &[])?;
        self.reply()
    }

    /// Sends bytes as they are, for tests of what a server does with them.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Whether the server has closed the connection; waits up to the timeout for it.
    pub fn is_closed_by_server(&mut self) -> bool {
        match self.stream.read(&mut [0; 1]) {
            Ok(count) => count == 0,
            Err(error) => matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
        }
    }

    fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<(), NbdError> {
        self.cookie += 1;
        let mut bytes = request_header(command, flags, self.cookie, offset, length).to_vec();
        bytes.extend_from_slice(data);
        Ok(self.stream.write_all(&bytes)?)
    }

    fn reply(&mut self) -> Result<(), NbdError> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        if reply[..4] != SIMPLE_REPLY_MAGIC.to_be_bytes() {
            return Err(NbdError::Protocol("a reply has no simple reply's magic"));
        }
        if reply[8..] != self.cookie.to_be_bytes() {
            return Err(NbdError::Protocol("a reply has another request's cookie"));
        }
        match u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]) {
            0 => Ok(()),
            errno => Err(NbdError::Request(errno)),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The server may be gone already, and then there is nothing to tell it.
        let _ = self.stream.write_all(&request_header(COMMAND_DISCONNECT, 0, 0, 0, 0));
    }
}

pub fn request_header(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// The GO option for an export, as it is sent; the start of what a fuzzer mutates.
pub fn go_option(export: &str) -> Vec<u8> {
    let name_length = export.len() as u32;
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&OPTION_GO.to_be_bytes());
    bytes.extend_from_slice(&(4 + name_length + 2).to_be_bytes());
    bytes.extend_from_slice(&name_length.to_be_bytes());
    bytes.extend_from_slice(export.as_bytes());
    // No information is asked for beyond what every server sends.
    bytes.extend_from_slice(&0_u16.to_be_bytes());
    bytes
}

/// Takes the answers to GO up to the last one; the export's size.
fn finish_go(stream: &mut TcpStream) -> Result<u64, NbdError> {
    let mut size_bytes = None;
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head)?;
        if head[..8] != OPTION_REPLY_MAGIC.to_be_bytes() || head[8..12] != OPTION_GO.to_be_bytes() {
            return Err(NbdError::Protocol("the answer to GO is not one"));
        }
        let kind = u32::from_be_bytes([head[12], head[13], head[14], head[15]]);
        let length = u32::from_be_bytes([head[16], head[17], head[18], head[19]]);
        if length > OPTION_REPLY_MAX {
            return Err(NbdError::Protocol("an option reply is longer than any real one"));
        }
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload)?;
        match kind {
            REPLY_ACK => return size_bytes.ok_or(NbdError::Protocol("GO ended without the export's size")),
            REPLY_INFO if payload.len() == 12 && payload[..2] == INFO_EXPORT.to_be_bytes() => {
                let mut size = [0; 8];
                size.copy_from_slice(&payload[2..10]);
                size_bytes = Some(u64::from_be_bytes(size));
            }
            REPLY_INFO => {}
            error if error & REPLY_ERROR_BIT != 0 => return Err(NbdError::Refused(error)),
            _ => return Err(NbdError::Protocol("an unknown kind of option reply")),
        }
    }
}

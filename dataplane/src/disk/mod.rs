//! Devices, their buffers, and the io_uring ring that carries out [`crate::io::DiskAction`]s.

pub mod buffers;
pub mod device;
pub mod eventfd;
pub mod monoio_buffers;
pub mod os;
pub mod ring;

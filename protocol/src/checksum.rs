//! CRC32C (Castagnoli), the one checksum of pages, frames and records; CRC-64/NVME for digests of lists.

use crate::units::PAGE_SIZE;

/// CRC32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// CRC-64/NVME of `bytes`.
pub fn crc64(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// CRC32C of each page of `data`, in order.
///
/// # Panics
/// `data` is not whole pages.
pub fn page_checksums(data: &[u8]) -> std::sync::Arc<[u32]> {
    assert!(data.len().is_multiple_of(PAGE_SIZE));
    data.chunks_exact(PAGE_SIZE).map(crc32c).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_castagnoli_and_not_the_zip_polynomial() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}

//! Random numbers from the kernel, for ids that must not repeat.

/// # Panics
/// The kernel has no random numbers: not after it has booted.
pub fn number() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: `bytes` is valid for writes of its length, for the length of the call.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    assert_eq!(count, 8, "getrandom gives up to 256 bytes whole once the kernel has booted");
    u64::from_le_bytes(bytes)
}

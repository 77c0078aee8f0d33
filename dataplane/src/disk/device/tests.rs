use super::*;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_created_file_is_preallocated_and_reads_as_zeroes() {
    let directory = directory();
    let path = directory.path().join("store.img");
    let device = FileDevice::open(&DeviceOptions::new(&path).create(1 << 20)).unwrap();
    assert!(device.is_created());
    assert_eq!(device.size_bytes(), 1 << 20);
    use std::os::unix::fs::MetadataExt;
    assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= 1 << 20, "no space was reserved");
    let mut page = vec![1; PAGE_SIZE];
    device.read_at(0, &mut page).unwrap();
    assert_eq!(page, vec![0; PAGE_SIZE]);
    drop(device);
    let again = FileDevice::open(&DeviceOptions::new(&path).create(2 << 20)).unwrap();
    assert!(!again.is_created());
    assert_eq!(again.size_bytes(), 1 << 20, "an existing device keeps its size");
}

#[test]
fn unaligned_slices_go_through_a_bounce() {
    let directory = directory();
    let path = directory.path().join("store.img");
    let device = FileDevice::open(&DeviceOptions::new(path).create(2 << 20)).unwrap();
    let length = BOUNCE_BYTES + 3 * PAGE_SIZE;
    let data: Vec<u8> = (0..length + 1).map(|index| (index / 7) as u8).collect();
    for skew in 0..2 {
        device.write_at(PAGE_SIZE as u64, &data[skew..skew + length]).unwrap();
        device.flush().unwrap();
        let mut read = vec![0; length + 1];
        device.read_at(PAGE_SIZE as u64, &mut read[1 - skew..1 - skew + length]).unwrap();
        assert!(read[1 - skew..1 - skew + length] == data[skew..skew + length]);
    }
}

#[test]
fn a_held_device_is_refused_after_the_wait() {
    let directory = directory();
    let path = directory.path().join("store.img");
    let _held = FileDevice::open(&DeviceOptions::new(&path).create(1 << 20)).unwrap();
    let mut options = DeviceOptions::new(&path);
    options.lock_wait = Duration::from_millis(50);
    let error = FileDevice::open(&options).unwrap_err();
    assert!(matches!(error, DeviceError::Locked { .. }), "{error}");
    assert_eq!(error.code(), Code::DeviceUnusable);
}

#[test]
fn a_successor_gets_the_device_when_its_predecessor_lets_go() {
    let directory = directory();
    let path = directory.path().join("store.img");
    let held = FileDevice::open(&DeviceOptions::new(&path).create(1 << 20)).unwrap();
    let successor = std::thread::spawn(move || FileDevice::open(&DeviceOptions::new(&path)));
    std::thread::sleep(Duration::from_millis(60));
    assert!(!successor.is_finished(), "it took a device that is held");
    drop(held);
    successor.join().unwrap().unwrap();
}

#[test]
fn a_half_made_file_of_a_crash_is_made_anew() {
    let directory = directory();
    let path = directory.path().join("store.img");
    std::fs::write(directory.path().join("store.img.new"), b"left by a crash").unwrap();
    let device = FileDevice::open(&DeviceOptions::new(&path).create(1 << 20)).unwrap();
    let mut page = vec![1; PAGE_SIZE];
    device.read_at(0, &mut page).unwrap();
    assert_eq!(page, vec![0; PAGE_SIZE]);
}

#[test]
fn what_is_no_device_is_refused_with_its_number() {
    let directory = directory();
    let missing = FileDevice::open(&DeviceOptions::new(directory.path().join("none"))).unwrap_err();
    assert_eq!(missing.code(), Code::DeviceUnusable);
    let is_directory = FileDevice::open(&DeviceOptions::new(directory.path())).unwrap_err();
    assert!(matches!(is_directory, DeviceError::NotADevice { .. }));
    let path = directory.path().join("small");
    let small = FileDevice::open(&DeviceOptions::new(&path).create(8192).minimum(1 << 20)).unwrap_err();
    assert!(matches!(small, DeviceError::TooSmall { bytes: 8192, minimum: 1_048_576, .. }), "{small}");
    assert_eq!(small.code(), Code::DeviceTooSmall);
    let huge =
        FileDevice::open(&DeviceOptions::new(directory.path().join("huge")).create(1 << 60)).unwrap_err();
    assert!(matches!(huge, DeviceError::Allocate { .. }), "{huge}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "a failed file was left behind");
}

//! The supervisor over shell scripts in place of the two processes.

use std::path::Path;

use super::*;

const QUICK: Policy = Policy {
    backoff_min: Duration::from_millis(20),
    backoff_max: Duration::from_millis(80),
    stable_after: Duration::from_secs(30),
    stop_wait: Duration::from_millis(500),
};

/// A child that runs `script`, with `$0` a file that it can leave lines in.
fn script(name: &'static str, script: &str, notes: &Path) -> Program {
    let arguments = vec!["-c".into(), script.into(), notes.into()];
    Program { name, path: "/bin/sh".into(), arguments }
}

fn read(notes: &Path) -> String {
    std::fs::read_to_string(notes).unwrap_or_default()
}

/// Waits until `notes` holds what `is_there` looks for.
async fn until(notes: &Path, is_there: impl Fn(&str) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_there(&read(notes)) {
        assert!(Instant::now() < deadline, "never in {:?}", read(notes));
        sleep(Duration::from_millis(5)).await;
    }
}

/// Stops on SIGTERM and notes it.
fn obedient(name: &'static str, notes: &Path) -> Program {
    let text = format!(
        "trap 'echo {name} stops >> $0; exit 0' TERM; echo {name} runs >> $0; while :; do sleep 0.05; done"
    );
    script(name, &text, notes)
}

#[test]
fn waits_double_to_a_bound_and_start_anew_after_a_long_life() {
    let mut backoff = Backoff::new(Policy::default());
    let waits: Vec<u64> = (0..8).map(|_| backoff.on_end(Duration::from_secs(1)).as_millis() as u64).collect();
    assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    assert_eq!(backoff.on_end(Duration::from_secs(30)), Duration::from_millis(100));
}

#[tokio::test]
async fn a_clean_stop_ends_data_before_control() {
    let root = tempfile::tempdir().expect("a directory");
    let notes = root.path().join("notes");
    let stop = until(&notes, |text| text.lines().count() == 2);
    run(obedient("control", &notes), obedient("data", &notes), QUICK, stop).await.expect("a clean stop");
    let text = read(&notes);
    assert!(text.ends_with("data stops\ncontrol stops\n"), "{text}");
}

#[tokio::test]
async fn a_process_that_ends_is_started_again_and_the_other_left_alone() {
    let root = tempfile::tempdir().expect("a directory");
    let (control, data) = (root.path().join("control"), root.path().join("data"));
    let crashing = script("data", "echo life >> $0; kill -9 $$", &data);
    let stop = until(&data, |text| text.lines().count() >= 4);
    run(obedient("control", &control), crashing, QUICK, stop).await.expect("a clean stop");
    assert_eq!(read(&control), "control runs\ncontrol stops\n");
}

#[tokio::test]
async fn exit_code_78_stops_the_node_with_the_childs_words() {
    let root = tempfile::tempdir().expect("a directory");
    let (control, data) = (root.path().join("control"), root.path().join("data"));
    let text = "echo life >> $0; echo 'log line' >&2; echo 'error 201 DeviceInUse: /dev/sda: ext4' >&2; \
                echo '  what to do: …' >&2; exit 78";
    // Control must be up before it can be seen to be stopped.
    let refusing = script(
        "xsan-data",
        &format!("while [ ! -s {} ]; do sleep 0.01; done; {text}", control.display()),
        &data,
    );
    let error = run(obedient("control", &control), refusing, QUICK, std::future::pending())
        .await
        .expect_err("it refuses");
    assert_eq!(error.to_string(), "xsan-data can not run: error 201 DeviceInUse: /dev/sda: ext4");
    assert_eq!(error.exit_code(), DO_NOT_RESTART);
    assert_eq!(read(&data), "life\n", "it is not started twice");
    assert_eq!(read(&control), "control runs\ncontrol stops\n");
}

#[tokio::test]
async fn a_process_deaf_to_sigterm_is_killed() {
    let root = tempfile::tempdir().expect("a directory");
    let (control, data) = (root.path().join("control"), root.path().join("data"));
    let deaf = script("data", "trap '' TERM; echo $$ >> $0; while :; do sleep 0.05; done", &data);
    let stop = async {
        until(&data, |text| text.ends_with('\n')).await;
        until(&control, |text| text.ends_with('\n')).await;
    };
    let begin = Instant::now();
    run(obedient("control", &control), deaf, QUICK, stop).await.expect("a clean stop");
    assert!(begin.elapsed() >= QUICK.stop_wait);
    let pid = read(&data).trim().to_owned();
    assert!(!Path::new("/proc").join(pid).exists(), "it is gone and waited for");
}

#[tokio::test]
async fn a_program_that_is_not_there_is_tried_again() {
    let root = tempfile::tempdir().expect("a directory");
    let (control, late) = (root.path().join("control"), root.path().join("late"));
    let notes = root.path().join("notes");
    let missing = Program { name: "data", path: late.clone(), arguments: vec![notes.clone().into()] };
    let stop = async {
        until(&control, |text| text.ends_with('\n')).await;
        // Renamed into place when complete: a file that is open for writing can not be run.
        let aside = root.path().join("aside");
        std::fs::write(&aside, "#!/bin/sh\necho found >> $1; exec sleep 100\n").expect("it writes");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&aside, mode).expect("it is ours");
        std::fs::rename(&aside, &late).expect("it is ours");
        until(&notes, |text| text == "found\n").await;
    };
    run(obedient("control", &control), missing, QUICK, stop).await.expect("a clean stop");
}

/// The request to be killed with the parent is the child's from its first instruction on. (That the kernel keeps
/// it is seen where whole nodes are killed.)
#[tokio::test]
async fn children_die_with_the_thread_that_started_them() {
    let root = tempfile::tempdir().expect("a directory");
    let notes = root.path().join("notes");
    let path = notes.clone();
    let started = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let child = start(&script("data", "echo $$ > $0; exec sleep 100", &path)).expect("it starts");
            until(&path, |text| text.ends_with('\n')).await;
            // Neither waited for nor killed by us.
            std::mem::forget(child);
        });
    });
    started.join().expect("the thread ends");
    let status = Path::new("/proc").join(read(&notes).trim()).join("stat");
    until(&status, |text| text.is_empty() || text.contains(") Z")).await;
}

#[test]
fn the_last_error_line_is_kept_and_all_is_copied() {
    let text = b"error 5 Timeout: a\nmore\nerror 6 Busy: b\r\nlast \xff bytes";
    let mut copy = Vec::new();
    assert_eq!(copy_lines(&text[..], &mut copy).as_deref(), Some("error 6 Busy: b"));
    assert_eq!(copy, text);
}

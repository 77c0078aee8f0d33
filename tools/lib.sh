# shellcheck shell=bash
# Shared by the scripts that build XSAN in release mode and run one of its programs on nodes of its own.
# Sourced after `set -euo pipefail`.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
work=
program=

build_release() {
    "$root/tools/setup"
    echo "building XSAN (release; the first time takes some minutes)"
    (cd "$root" && cargo build --release --locked --workspace --bins --quiet)
}

# The comment at the head of the calling script.
print_usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
}

# Runs a program of this build in a work directory that is gone afterwards, however it ends. The program's
# nodes die with it; ending it and removing the directory is all there is to do.
run_in_work_directory() {
    local name=$1 status=0
    shift
    mkdir -p "$root/target/work"
    work=$(mktemp -d "$root/target/work/$name-XXXX")
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    XSAN_WORK_DIR=$work "$root/target/release/$name" "$@" &
    program=$!
    wait "$program" || status=$?
    program=
    exit "$status"
}

clean_up() {
    if [ -n "$program" ]; then
        kill "$program" 2>/dev/null || true
        wait "$program" 2>/dev/null || true
    fi
    if [ -n "${XSAN_KEEP:-}" ]; then echo "kept: $work"; else rm -rf "$work"; fi
}

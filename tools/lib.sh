# shellcheck shell=bash
# Shared by the scripts: where things are, what a run needs of this machine, and how a program gets nodes of its own.
# Sourced after `set -euo pipefail`.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# The longest path of a directory with a cluster in it, in bytes: WORK_PATH_MAX of tests/src/cluster.rs.
readonly WORK_PATH_MAX=70
work=
program=

# What the scripts run is what they have built, wherever the caller's cargo builds.
export CARGO_TARGET_DIR=$root/target
if [ -n "${XSAN_WORK_DIR:-}" ]; then
    XSAN_WORK_DIR=$(realpath -m -- "$XSAN_WORK_DIR")
    export XSAN_WORK_DIR
fi
base=${XSAN_WORK_DIR:-$root/target/work}

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# The path of sudo has no ~/.cargo/bin: cargo is looked for there, and at home of the user who called sudo.
find_cargo() {
    local home
    if command -v cargo >/dev/null; then return; fi
    for home in "${HOME:-}" "$(getent passwd "${SUDO_USER:-}" | cut -d: -f6)"; do
        if [ -n "$home" ] && [ -x "$home/.cargo/bin/cargo" ]; then
            export PATH="$home/.cargo/bin:$PATH"
            # The cargo of rustup looks for its toolchains at home of the one who runs it.
            if [ -d "$home/.rustup" ]; then export RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}; fi
            return
        fi
    done
}
find_cargo

check_work_path() {
    local LC_ALL=C path=$1
    if [ "${#path}" -gt "$WORK_PATH_MAX" ]; then
        fail "$path has ${#path} bytes, too long for the Unix sockets in it (at most $WORK_PATH_MAX);" \
            "set XSAN_WORK_DIR to a shorter directory on a real disk"
    fi
}

# Nodes register their buffers with io_uring, and the kernel counts what all processes of a user lock together. It does
# not count for those with CAP_IPC_LOCK (bit 14), as root.
check_memlock() {
    local mib=$1 limit capabilities
    capabilities=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)
    if [ $((16#$capabilities >> 14 & 1)) -eq 1 ]; then return; fi
    ulimit -S -l "$(ulimit -H -l)"
    limit=$(ulimit -S -l)
    if [ "$limit" = unlimited ] || [ "$limit" -ge $((mib * 1024)) ]; then return; fi
    cat >&2 <<MESSAGE
${0##*/}: $mib MiB of memory have to be locked, and you may lock $limit KiB. To raise that, for this shell or for every login from now on:
    sudo prlimit --memlock=unlimited --pid \$\$
    echo "$(id -un) - memlock unlimited" | sudo tee /etc/security/limits.d/xsan.conf
MESSAGE
    exit 1
}

# What nodes with so many MiB of buffers together need, before any time goes into a build.
check_machine() {
    check_work_path "$base/moves-1234/c-123456"
    check_memlock "$1"
}

# For nodes with so many MiB of buffers together.
build_release() {
    check_machine "$1"
    "$root/tools/setup"
    echo "building XSAN (release; the first time takes some minutes)"
    (cd "$root" && cargo build --release --locked --workspace --bins --quiet)
}

# The comment at the head of the calling script.
print_usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
}

# Runs a program of this build in a work directory that is gone afterwards, unless the program fails. The program's
# nodes die with it; ending it and removing the directory is all there is to do.
run_in_work_directory() {
    local name=$1 status=0
    shift
    mkdir -p "$base"
    work=$(mktemp -d "$base/${name#xsan-}-XXXX")
    trap 'clean_up $?' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    XSAN_KEEP=caller XSAN_WORK_DIR=$work "$root/target/release/$name" "$@" &
    program=$!
    wait "$program" || status=$?
    program=
    return "$status"
}

clean_up() {
    local status=$1
    if [ -n "$program" ]; then
        kill "$program" 2>/dev/null || true
        wait "$program" 2>/dev/null || true
    fi
    if [ -n "${XSAN_KEEP:-}" ]; then
        echo "kept: $work"
    elif [ "$status" -eq 0 ] || [ "$status" -eq 130 ] || [ "$status" -eq 143 ]; then
        rm -rf "$work"
    # A program that ended at once, as for a wrong option, leaves it empty.
    elif ! rmdir "$work" 2>/dev/null; then
        # Devices and images: seldom looked at, and large.
        find "$work" -type f -size +64M ! -name '*.log' -delete
        echo "the nodes' logs are kept in $work (XSAN_KEEP=1 keeps their devices, too)" >&2
    fi
}

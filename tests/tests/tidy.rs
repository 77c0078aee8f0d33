//! What keeps the source as CONTRIBUTING.md promises, checked on the text itself.
//!
//! Each rule is a test of its own and names every line that breaks it.

#![expect(clippy::unwrap_used, reason = "a test's unwrap is its assertion")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use xsan_protocol::error::Code;

const LINES_MAX: usize = 1000;

/// Crates of the workspace, and the ones of XSAN that each may import outside its own tests.
const CRATES: &[(&str, &str, &[&str])] = &[
    ("protocol", "xsan_protocol", &[]),
    ("nodekit", "xsan_nodekit", &["xsan_protocol"]),
    ("dataplane", "xsan_dataplane", &["xsan_protocol", "xsan_nodekit"]),
    ("controlplane", "xsan_controlplane", &["xsan_protocol", "xsan_nodekit", "xsan_client"]),
    ("client", "xsan_client", &["xsan_protocol"]),
    ("xsan-cli", "xsan_cli", &["xsan_protocol", "xsan_client", "xsan_nodekit"]),
    ("tests", "xsan_tests", &["xsan_protocol"]),
];

/// Modules of the data plane, each below those before it: a module imports only from its own and lower ones.
/// `net` and `disk` stand side by side.
const DATAPLANE_LEVELS: &[&[&str]] =
    &[&["shard"], &["gateway"], &["volume"], &["replication"], &["store"], &["net", "disk"], &["io"]];

/// Data without behaviour towards others, for every level: buffers are what the levels hand to each other.
const DATAPLANE_SHARED: &[&str] = &["disk::buffers", "config", "stats"];

/// The deterministic core, and what it must not reach for: a clock, a file, a socket, a random number, a thread.
const CORE: &[&str] = &["dataplane/src/replication", "dataplane/src/store"];
const CORE_FORBIDDEN: &[&str] = &[
    "Instant::now",
    "SystemTime",
    "std::fs",
    "std::net::Tcp",
    "std::net::Udp",
    "monoio",
    "io_uring",
    "std::thread",
];

/// Where the data plane may hold `unsafe`.
const UNSAFE_ALLOWED: &[&str] = &[
    "dataplane/src/disk/",
    "dataplane/src/gateway/vhost_user/",
    "dataplane/src/shard/mailbox",
    "dataplane/src/shard/buffers",
    "dataplane/src/shard/topology",
];

struct Source {
    /// From the root of the repository.
    name: String,
    text: String,
}

impl Source {
    /// Lines outside comments, with their numbers; comments may speak of what code may not do.
    fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// As `code_lines`, up to a module of tests inside the file; nothing of a file of tests.
    fn product_lines(&self) -> Vec<(usize, &str)> {
        if self.is_tests() {
            return Vec::new();
        }
        let is_product = |(_, line): &(usize, &str)| !line.trim_start().starts_with("#[cfg(test)]");
        // The attribute may stand on one import only; it opens the tests when a module follows.
        let lines: Vec<(usize, &str)> = self.code_lines().collect();
        let tests = lines.windows(2).position(|pair| {
            !is_product(&pair[0]) && pair[1].1.trim_start().starts_with("mod ") && pair[1].1.ends_with('{')
        });
        lines[..tests.unwrap_or(lines.len())].to_vec()
    }

    fn is_tests(&self) -> bool {
        self.name.contains("/tests/") || self.name.ends_with("tests.rs") || self.name.contains("/examples/")
    }

    fn is_this_file(&self) -> bool {
        self.name.ends_with("tests/tests/tidy.rs")
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every file of the repository with one of these endings, in order.
fn files(endings: &[&str]) -> Vec<Source> {
    fn walk(directory: &Path, root: &Path, endings: &[&str], found: &mut Vec<Source>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let file_name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if file_name != "target" && file_name != ".git" {
                    walk(&path, root, endings, found);
                }
            } else if endings.iter().any(|ending| file_name.ends_with(ending)) {
                let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                found.push(Source { name, text: fs::read_to_string(&path).unwrap() });
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), &root(), endings, &mut found);
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!found.is_empty(), "no file ends with {endings:?}: the walk is broken");
    found
}

fn rust_files() -> Vec<Source> {
    files(&[".rs"])
}

fn none(what: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{what}:\n{}", broken.join("\n"));
}

#[test]
fn every_file_opens_with_what_it_is() {
    let broken: Vec<String> = rust_files()
        .into_iter()
        // The tests beside `x.rs` are described by it.
        .filter(|file| !file.name.ends_with("/tests.rs") && !file.text.starts_with("//! "))
        .map(|file| file.name)
        .collect();
    none("files that do not open with `//!`", &broken);
}

#[test]
fn no_file_is_too_long_to_read() {
    let broken: Vec<String> = rust_files()
        .iter()
        .map(|file| (file.text.lines().count(), &file.name))
        .filter(|(count, _)| *count > LINES_MAX)
        .map(|(count, name)| format!("{name}: {count} lines"))
        .collect();
    none(&format!("files over {LINES_MAX} lines"), &broken);
}

#[test]
fn nothing_is_left_for_later() {
    let words =
        ["todo!", "unimplemented!", "dbg!", "FIXME", "XXX", "TODO", "#[allow", "#![allow", "#[ignore"];
    let mut broken = Vec::new();
    for file in rust_files().iter().filter(|file| !file.is_this_file()) {
        for (index, line) in file.text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                broken.push(format!("{}:{}: {}", file.name, index + 1, line.trim()));
            }
        }
    }
    none("left-overs, bare allows and ignored tests", &broken);
}

#[test]
fn no_path_of_one_machine_is_written_down() {
    let roots = ["/root/", "/home/", "/work/"];
    let mut broken = Vec::new();
    for file in
        files(&[".rs", ".md", ".toml", ".sh", ".proto", ".txt"]).iter().filter(|file| !file.is_this_file())
    {
        for (index, line) in file.text.lines().enumerate() {
            // A path begins a word; `file/work/` of a longer path is none.
            let starts_path = |root: &&str| {
                line.match_indices(*root).any(|(at, _)| {
                    line[..at].chars().next_back().is_none_or(|before| " \"'`(=".contains(before))
                })
            };
            if roots.iter().any(starts_path) {
                broken.push(format!("{}:{}: {}", file.name, index + 1, line.trim()));
            }
        }
    }
    none("paths of one machine", &broken);
}

#[test]
fn crates_import_in_one_direction() {
    let mut broken = Vec::new();
    for file in rust_files() {
        let Some((directory, own, allowed)) = crate_of(&file) else {
            assert!(file.name.starts_with("benches/"), "{} belongs to no known crate", file.name);
            continue;
        };
        if !file.name.starts_with(&format!("{directory}/src/")) {
            continue;
        }
        for (number, line) in file.product_lines() {
            for (_, other, _) in CRATES {
                let used = contains_word(line, other);
                if used && other != own && !allowed.contains(other) {
                    broken.push(format!("{}:{number}: {}", file.name, line.trim()));
                }
            }
        }
    }
    none("imports against the direction of the crates", &broken);
}

fn crate_of(file: &Source) -> Option<&'static (&'static str, &'static str, &'static [&'static str])> {
    CRATES.iter().find(|(directory, ..)| file.name.starts_with(&format!("{directory}/")))
}

fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part)
    })
}

#[test]
fn modules_of_the_data_plane_import_downwards() {
    let level_of = |module: &str| DATAPLANE_LEVELS.iter().position(|level| level.contains(&module));
    let mut broken = Vec::new();
    let mut seen = BTreeMap::new();
    for file in rust_files() {
        let Some(inside) = file.name.strip_prefix("dataplane/src/") else { continue };
        let module = inside.split(['/', '.']).next().unwrap();
        let Some(level) = level_of(module) else { continue };
        *seen.entry(module.to_owned()).or_insert(0) += 1;
        for (number, line) in file.product_lines() {
            for imported in imports(line) {
                if DATAPLANE_SHARED.iter().any(|shared| imported.starts_with(shared)) {
                    continue;
                }
                let other = imported.split("::").next().unwrap();
                if level_of(other).is_some_and(|other| other < level) {
                    broken.push(format!("{}:{number}: {module} imports {imported}", file.name));
                }
            }
        }
    }
    assert!(seen.len() >= 5, "only {seen:?} were looked at: the walk is broken");
    none("imports against the direction of the modules", &broken);
}

/// What a line takes from its own crate: the paths behind `crate::`, those of a group in braces one by one.
fn imports(line: &str) -> Vec<String> {
    let path = |tail: &str| -> String {
        tail.trim_start().chars().take_while(|c| c.is_alphanumeric() || "_:".contains(*c)).collect()
    };
    let mut found = Vec::new();
    for (at, prefix) in line.match_indices("crate::") {
        let tail = &line[at + prefix.len()..];
        let Some(group) = tail.strip_prefix('{') else {
            found.push(path(tail));
            continue;
        };
        let mut depth = 0;
        let members = group.split(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0 && c == ','
        });
        found.extend(members.map(path).filter(|member| !member.is_empty()));
    }
    found
}

#[test]
fn imports_are_found_in_every_form() {
    assert_eq!(imports("use crate::store::Store;"), ["store::Store"]);
    assert_eq!(imports("let x = crate::io::now(crate::net::frame());"), ["io::now", "net::frame"]);
    let group = "use crate::{disk::{ring, device}, gateway, volume::request};";
    assert_eq!(imports(group), ["disk::", "gateway", "volume::request"]);
    assert!(imports("use xsan_protocol::error::Code;").is_empty());
}

#[test]
fn groups_of_imports_stay_on_one_line() {
    // What `imports` can not see must not be written.
    let mut broken = Vec::new();
    for file in rust_files().iter().filter(|file| file.name.starts_with("dataplane/src/")) {
        for (number, line) in file.product_lines() {
            if line.contains("crate::{") && !line.contains('}') {
                broken.push(format!("{}:{number}: name each module in a `use` of its own", file.name));
            }
        }
    }
    none("imports that hide their direction", &broken);
}

#[test]
fn the_core_reaches_for_nothing_outside() {
    let mut broken = Vec::new();
    for file in rust_files() {
        if !CORE.iter().any(|directory| file.name.starts_with(directory)) {
            continue;
        }
        for (number, line) in file.product_lines() {
            if CORE_FORBIDDEN.iter().any(|word| line.contains(word)) {
                broken.push(format!("{}:{number}: {}", file.name, line.trim()));
            }
        }
    }
    none("the core has a clock, file, socket or thread", &broken);
}

#[test]
fn unsafe_code_of_the_data_plane_stays_in_its_places() {
    let mut broken = Vec::new();
    for file in rust_files() {
        let is_product = file.name.starts_with("dataplane/src/") || file.name.starts_with("protocol/src/");
        if !is_product || UNSAFE_ALLOWED.iter().any(|place| file.name.starts_with(place)) {
            continue;
        }
        for (number, line) in file.product_lines() {
            if contains_word(line, "unsafe") && !line.contains("unsafe_op_in_unsafe_fn") {
                broken.push(format!("{}:{number}: {}", file.name, line.trim()));
            }
        }
    }
    none("unsafe outside its places", &broken);
}

#[test]
fn every_error_number_is_documented_with_a_way_out() {
    let page = fs::read_to_string(root().join("docs/errors/README.md")).unwrap();
    let broken: Vec<String> = Code::ALL
        .iter()
        .filter(|code| {
            let row =
                format!("| {} | {} | {} | {} |", code.number(), code.name(), code.what(), code.remedy());
            !page.contains(&row) || code.remedy().is_empty()
        })
        .map(|code| format!("{code:?}"))
        .collect();
    none("error numbers that docs/errors/README.md lacks", &broken);
    for code in Code::ALL {
        let known = [1..=99, 100..=199, 200..=299, 300..=399];
        assert!(known.iter().any(|range| range.contains(&code.number())), "{code:?} is in no range");
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for file in files(&[".md"]) {
        let directory = root().join(&file.name).parent().unwrap().to_owned();
        for link in file.text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = link.split('#').next().unwrap();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            if !directory.join(path).exists() {
                broken.push(format!("{}: {link}", file.name));
            }
        }
    }
    none("links to nothing", &broken);
}

#[test]
fn the_architecture_names_what_is_there() {
    let root = root();
    let page = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let places = ["", "dataplane/src", "protocol/src", "controlplane/src"];
    let mut broken = Vec::new();
    let mut checked = 0;
    for name in page.split('`').skip(1).step_by(2) {
        let (path, function) = name.split_once(": ").unwrap_or((name, ""));
        if path.contains(['\n', ' ']) || !(path.ends_with(".rs") || path.contains('/')) {
            continue;
        }
        checked += 1;
        let found = places.iter().map(|place| root.join(place).join(path)).find(|path| path.exists());
        let declared = |path: PathBuf| {
            let forms = [format!("fn {function}("), format!("fn {function}<")];
            function.is_empty() || {
                let text = fs::read_to_string(path).unwrap();
                forms.iter().any(|form| text.contains(form))
            }
        };
        if !found.is_some_and(declared) {
            broken.push(name.to_owned());
        }
    }
    assert!(checked > 10, "only {checked} names were looked at: the page or the search has changed");
    none("names in ARCHITECTURE.md that lead to nothing", &broken);
}

/// Every script for people: all of `tools` and `benches`, but what others source; and what CI runs.
fn scripts() -> Vec<(String, String)> {
    let listed = ["tools", "benches"].into_iter().flat_map(|directory| {
        let names = fs::read_dir(root().join(directory)).unwrap();
        names.map(move |entry| format!("{directory}/{}", entry.unwrap().file_name().to_string_lossy()))
    });
    let mut names: Vec<String> = listed.filter(|name| !name.ends_with(".sh")).collect();
    names.push(".ci/run".to_owned());
    names.sort();
    assert!(names.len() >= 10, "only {names:?} were found");
    let read = |name: String| {
        let text = fs::read_to_string(root().join(&name)).unwrap();
        (name, text)
    };
    names.into_iter().map(read).collect()
}

#[test]
fn scripts_stop_at_the_first_error() {
    let strict =
        |text: &str| text.starts_with("#!/usr/bin/env bash\n") && text.contains("\nset -euo pipefail\n");
    let broken: Vec<String> =
        scripts().into_iter().filter(|(_, text)| !strict(text)).map(|(name, _)| name).collect();
    none("scripts without `set -euo pipefail`", &broken);
}

/// Itself, or by what it calls: `build_release` of tools/lib.sh, or tools/test.
#[test]
fn every_script_sets_up_what_it_needs() {
    let calls =
        |text: &str| ["tools/setup", "build_release", "tools/test"].iter().any(|call| text.contains(call));
    let lines = |text: &str| -> String {
        text.lines().filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n")
    };
    let others = scripts().into_iter().filter(|(name, _)| name != "tools/setup");
    let broken: Vec<String> = others.filter(|(_, text)| !calls(&lines(text))).map(|(name, _)| name).collect();
    none("scripts that do not call tools/setup", &broken);
}

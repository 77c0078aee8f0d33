//! How the tools lay out what they show: tables, lists of facts, times and latencies.

use std::fmt::Display;

use comfy_table::{CellAlignment, ContentArrangement, Table};

/// A column's title; a number column is aligned to the right.
#[derive(Clone, Copy, Debug)]
pub enum Column {
    Text(&'static str),
    Number(&'static str),
}
pub use Column::{Number, Text};

/// A table without lines: two spaces between columns, so that it can be read, and cut by `awk`.
pub fn table(columns: &[Column], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|column| match column {
        Text(title) | Number(title) => *title,
    }));
    for row in rows {
        assert_eq!(row.len(), columns.len());
        // An empty cell would vanish for `awk`, and look forgotten to people.
        table.add_row(row.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }));
    }
    for (index, column) in columns.iter().enumerate() {
        let shown = table.column_mut(index).expect("every column has a title");
        shown.set_padding((0, 2));
        if matches!(column, Number(_)) {
            shown.set_cell_alignment(CellAlignment::Right);
        }
    }
    trim_lines(&table.to_string())
}

/// A table whose titles are only known as it is made: the first row.
pub fn grid(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<_> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}  ", width = *width));
        format!("{}\n", cells.collect::<String>())
    };
    trim_lines(&rows.iter().map(line).collect::<String>())
}

/// `Name     value` lines.
pub fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let lines = facts.iter().map(|(name, value)| format!("{name:width$}  {value}\n"));
    trim_lines(&lines.collect::<String>())
}

fn trim_lines(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `1 node`, `2 nodes`.
pub fn count(number: impl Into<u64>, noun: &str) -> String {
    match number.into() {
        1 => format!("1 {noun}"),
        many => format!("{many} {noun}s"),
    }
}

/// `43 %` of `whole`.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return String::from("-");
    }
    let percent = part as f64 * 100.0 / whole as f64;
    if part > 0 && percent < 1.0 { String::from("< 1 %") } else { format!("{percent:.0} %") }
}

pub fn yes_or_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

pub fn join<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

/// Microseconds as people compare them: `86 µs`, `1.24 ms`, `2.10 s`.
pub fn latency(us: f64) -> String {
    match us {
        us if us < 9.95 => format!("{us:.1} µs"),
        us if us < 999.5 => format!("{us:.0} µs"),
        us if us < 999_500.0 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

/// An age in milliseconds: `120 ms`, `4.2 s`, `3 min`, `2 h`, `5 days`.
pub fn age(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1e3),
        60_000..7_200_000 => format!("{} min", ms / 60_000),
        7_200_000..172_800_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} days", ms / 86_400_000),
    }
}

/// An interval as it was set, nothing rounded: `90 s`, `150 min`, `24 h`, `7 days`.
pub fn interval(ms: u64) -> String {
    let units = [(86_400_000, "days"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")];
    match units.into_iter().find(|(unit, _)| ms > *unit && ms.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{} {name}", ms / unit),
        None => format!("{ms} ms"),
    }
}

/// `2026-11-21 04:30:00 UTC`, of milliseconds since 1970.
pub fn time(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in eras of 400 years. Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_show_what_is_empty() {
        let rows = [vec!["a".into(), "9".into()], vec![String::new(), "1000".into()]];
        assert_eq!(table(&[Text("NAME"), Number("SIZE")], rows), "NAME  SIZE\na        9\n-     1000\n");
    }

    #[test]
    fn facts_align() {
        assert_eq!(
            facts(&[("Node", "a".into()), ("State of it", "b".into())]),
            "Node         a\nState of it  b\n"
        );
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [latency(0.0), latency(86.4), latency(1240.0), latency(2.1e6)],
            ["0.0 µs", "86 µs", "1.24 ms", "2.10 s"]
        );
        assert_eq!([age(120), age(4_210), age(190_000), age(8_000_000)], ["120 ms", "4.2 s", "3 min", "2 h"]);
        assert_eq!(
            [percent(0, 10), percent(1, 1000), percent(1, 3), percent(1, 0)],
            ["0 %", "< 1 %", "33 %", "-"]
        );
        assert_eq!([count(1u32, "node"), count(3u32, "node")], ["1 node", "3 nodes"]);
    }

    #[test]
    fn intervals_are_exact() {
        let shown = [90, 150 * 60, 60 * 3600, 86_400, 7 * 86_400, 600, 60].map(|s| interval(s * 1000));
        assert_eq!(shown, ["90 s", "150 min", "60 h", "24 h", "7 days", "10 min", "60 s"]);
        assert_eq!(interval(1_500), "1500 ms");
    }

    #[test]
    fn times_are_of_the_calendar() {
        assert_eq!(time(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(time(951_827_696_000), "2000-02-29 12:34:56 UTC");
        assert_eq!(time(1_795_235_400_999), "2026-11-21 04:30:00 UTC");
    }
}

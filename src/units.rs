//! Quantities as people type them.

use std::time::Duration;

/// Reads `500ms`, `30s`, `5m`, `2h`, or several of them together (`1m30s`).
pub fn duration(s: &str) -> Result<Duration, String> {
    let wrong = || format!("{s:?} is no duration: write it like 500ms, 30s, 5m, 2h or 1m30s");
    let mut total = Duration::ZERO;
    let mut rest = s;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at(letters);
        let ms_each: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(wrong()),
        };
        let ms = number.parse().ok().and_then(|n: u64| n.checked_mul(ms_each)).ok_or_else(wrong)?;
        total = total.checked_add(Duration::from_millis(ms)).ok_or_else(wrong)?;
        rest = tail;
    }
    if s.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// A span of time in its largest unit, rounded down: `40s`, `5m`, `7h`, `12d`.
pub fn rough(span: Duration) -> String {
    let seconds = span.as_secs();
    let (each, unit) = match seconds {
        0..60 => (1, "s"),
        60..3_600 => (60, "m"),
        3_600..86_400 => (3_600, "h"),
        _ => (86_400, "d"),
    };
    format!("{}{unit}", seconds / each)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rough_spans() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (60, "1m"), (7199, "1h"), (90_000, "1d")] {
            assert_eq!(rough(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("1h1m1s1ms"), Ok(Duration::from_millis(3_661_001)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        for bad in [
            "",
            "30",
            "s",
            "1.5s",
            "-1s",
            "1 s",
            "3d",
            "99999999999999999999s",
            "9999999999999999999h",
            "5µs",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}

//! Did any client see versions mixed? Decided after the run, from what was recorded, by pure functions.
//!
//! The promise under test: once any client has seen an answer of the new version, no later-sent
//! request is answered by the old one. The rule in full is at [`analyse`].

/// Two real switches are never closer than this: a hold, a drain and a human are in between.
const SETTLED_US: u64 = 100_000;
/// Nor is a version taken for settled on fewer answers, however far apart: two strays are no epoch.
const SETTLED_ANSWERS: usize = 5;

/// One answer: when its request was sent, when it was complete, and which version it named.
/// 16 bytes, because a run keeps one for every request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    sent_us: u64,
    took_us: u32,
    pub version: u16,
}

impl Sample {
    pub fn new(sent_us: u64, end_us: u64, version: u16) -> Sample {
        // 71 minutes; no timeout is that long.
        let took_us = u32::try_from(end_us.saturating_sub(sent_us)).unwrap_or(u32::MAX);
        Sample { sent_us, took_us, version }
    }

    fn end_us(&self) -> u64 {
        self.sent_us + u64::from(self.took_us)
    }
}

/// From `at_us` on, clients saw the version `to`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Switched {
    pub at_us: u64,
    pub from: u16,
    pub to: u16,
}

/// Finds the changes of version, and counts the mixed answers.
///
/// Answers are taken in the order in which they were complete. An epoch has a version and a start T,
/// the end of its first answer; the first answer of all starts the first epoch. An answer of the
/// epoch's version is good. An answer of another version is
///
/// 1. good when its request was sent at or before T: an old answer that was under way;
/// 2. else **mixed** when the epoch's version outlives it: of the requests sent after this answer was
///    complete, the first *settled* version is the epoch's own. A version is settled by a run of
///    requests, uninterrupted in order of sending, that has at least 5 answers and lasts at least
///    100 ms; the last run counts as settled however short it is;
/// 3. else the first answer of a new epoch: a change.
///
/// So a stray answer of the old version is one mixed answer, two real switches a while apart (v1, v2,
/// v1) are two changes, and a reload during which both versions answer is one change at the first new
/// answer, after which every old answer whose request was sent later is mixed. With fewer than 5
/// requests between two switches the two cannot be told from a stray: use a higher rate.
///
/// With `expected` given and no more changes than that if each answer that could begin an epoch does (2 left out),
/// and each lasts for 5 answers, these explain all: none is mixed. So it is also told right where answers take longer than it is from one
/// switch to the next, and no run of requests in order of sending settles anything. Else the rules hold as they are,
/// and each change beyond that many is a mixed answer too (it stays in the list).
pub fn analyse(samples: &[Sample], expected: Option<usize>) -> (Vec<Switched>, u64) {
    if samples.iter().all(|s| s.version == samples[0].version) {
        return (Vec::new(), 0);
    }
    // Recorded in this order already, so the sort is one pass.
    let mut by_end: Vec<&Sample> = samples.iter().collect();
    by_end.sort_by_key(|s| s.end_us());
    if let Some(expected) = expected {
        let (changes, _) = epochs(&by_end, |_, _| false);
        let answers = |from: &Switched, until: u64| {
            let in_epoch = |s: &&&Sample| s.version == from.to && (from.at_us..until).contains(&s.end_us());
            by_end.iter().filter(in_epoch).count()
        };
        let mut between = changes.windows(2);
        if changes.len() <= expected && between.all(|w| answers(&w[0], w[1].at_us) >= SETTLED_ANSWERS) {
            return (changes, 0);
        }
    }
    let later = Later::new(samples);
    let (changes, mixed) = epochs(&by_end, |us, version| later.settled_after(us) == Some(version));
    let beyond = expected.map_or(0, |expected| changes.len().saturating_sub(expected) as u64);
    (changes, mixed + beyond)
}

/// The changes, and the answers that are mixed because the epoch's version `outlives` when they were complete.
fn epochs(by_end: &[&Sample], outlives: impl Fn(u64, u16) -> bool) -> (Vec<Switched>, u64) {
    let (mut changes, mut mixed) = (Vec::new(), 0);
    let (mut version, mut start_us) = (by_end[0].version, by_end[0].end_us());
    for answer in by_end {
        if answer.version == version || answer.sent_us <= start_us {
            continue;
        }
        let end_us = answer.end_us();
        if outlives(end_us, version) {
            mixed += 1;
        } else {
            changes.push(Switched { at_us: end_us, from: version, to: answer.version });
            (version, start_us) = (answer.version, end_us);
        }
    }
    (changes, mixed)
}

/// The requests in order of sending, as runs of one version each.
struct Later<'a> {
    by_send: Vec<&'a Sample>,
    /// Where in `by_send` each run starts, and the version settled first by this run or a later one.
    runs: Vec<(usize, u16)>,
}

impl Later<'_> {
    fn new(samples: &[Sample]) -> Later<'_> {
        let mut by_send: Vec<&Sample> = samples.iter().collect();
        by_send.sort_by_key(|s| s.sent_us);
        let mut runs: Vec<(usize, u16)> = Vec::new();
        for (i, s) in by_send.iter().enumerate() {
            if runs.last().is_none_or(|(_, version)| *version != s.version) {
                runs.push((i, s.version));
            }
        }
        // From behind: a run that settles nothing takes over what the next one says.
        let mut end = by_send.len();
        for i in (0..runs.len()).rev() {
            let start = runs[i].0;
            if end < by_send.len() && !settles(&by_send[start..end]) {
                runs[i].1 = runs[i + 1].1;
            }
            end = start;
        }
        Later { by_send, runs }
    }

    /// The first settled version among the requests sent after `us`; none if there are none.
    fn settled_after(&self, us: u64) -> Option<u16> {
        let first = self.by_send.partition_point(|s| s.sent_us <= us);
        let version = self.by_send.get(first)?.version;
        // Only the rest of the run that `first` is in counts.
        let next = self.runs.partition_point(|(start, _)| *start <= first);
        match self.runs.get(next) {
            Some((end, _)) if settles(&self.by_send[first..*end]) => Some(version),
            Some((_, settled)) => Some(*settled),
            None => Some(version),
        }
    }
}

fn settles(run: &[&Sample]) -> bool {
    match run {
        [first, .., last] => run.len() >= SETTLED_ANSWERS && last.sent_us - first.sent_us >= SETTLED_US,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One request a millisecond from `from_ms` to `to_ms`, each answered after 300 µs.
    fn steady(from_ms: u64, to_ms: u64, version: impl Fn(u64) -> u16) -> Vec<Sample> {
        (from_ms..to_ms).map(|ms| Sample::new(ms * 1000, ms * 1000 + 300, version(ms))).collect()
    }

    fn change(at_us: u64, from: u16, to: u16) -> Switched {
        Switched { at_us, from, to }
    }

    #[test]
    fn a_sample_is_small() {
        assert_eq!(size_of::<Sample>(), 16);
    }

    #[test]
    fn nothing_and_one_version() {
        assert_eq!(analyse(&[], None), (vec![], 0));
        assert_eq!(analyse(&steady(0, 1000, |_| 1), Some(1)), (vec![], 0));
    }

    #[test]
    fn one_clean_change() {
        let samples = steady(0, 1000, |ms| if ms < 500 { 1 } else { 2 });
        assert_eq!(analyse(&samples, None), (vec![change(500_300, 1, 2)], 0));
        assert_eq!(analyse(&samples, Some(1)).1, 0);
    }

    #[test]
    fn old_answers_under_way_at_the_change_are_fine() {
        let mut samples = steady(0, 1000, |ms| if ms < 500 { 1 } else { 2 });
        // Sent before the first new answer, complete long after it.
        samples.push(Sample::new(499_500, 900_000, 1));
        samples.push(Sample::new(500_300, 500_900, 1));
        // Held: sent long before, answered by the new version.
        samples.push(Sample::new(400_000, 500_400, 2));
        assert_eq!(analyse(&samples, Some(1)), (vec![change(500_300, 1, 2)], 0));
    }

    #[test]
    fn one_stray_old_answer_is_mixed() {
        for stray in [501, 510, 700, 998] {
            let samples = steady(0, 1000, |ms| if ms < 500 || ms == stray { 1 } else { 2 });
            assert_eq!(analyse(&samples, Some(1)), (vec![change(500_300, 1, 2)], 1), "{stray}");
            assert_eq!(analyse(&samples, Some(3)).1, 1, "nor does it stand for switches that were missed");
        }
        // The very last answer: nothing says which one stays, so it shows as a change too many.
        let samples = steady(0, 1000, |ms| if ms < 500 || ms == 999 { 1 } else { 2 });
        assert_eq!(analyse(&samples, Some(1)).1, 1);
    }

    #[test]
    fn one_stray_new_answer_is_mixed() {
        let samples = steady(0, 1000, |ms| if ms == 500 { 2 } else { 1 });
        assert_eq!(analyse(&samples, None), (vec![], 1));
    }

    #[test]
    fn toggles_are_changes() {
        let samples = steady(0, 1000, |ms| if (ms / 200) % 2 == 0 { 1 } else { 2 });
        let changes =
            vec![change(200_300, 1, 2), change(400_300, 2, 1), change(600_300, 1, 2), change(800_300, 2, 1)];
        assert_eq!(analyse(&samples, Some(4)), (changes.clone(), 0));
        assert_eq!(analyse(&samples, Some(3)), (changes, 1));
    }

    #[test]
    fn a_toggle_and_back_shorter_than_a_switch_can_be_is_mixed() {
        let samples = steady(0, 1000, |ms| if (500..540).contains(&ms) { 2 } else { 1 });
        assert_eq!(analyse(&samples, None), (vec![], 40));
    }

    #[test]
    fn switches_closer_than_answers_take_are_told_apart() {
        // A quarter is answered at once, the rest after up to 700 ms; the version is that of 0.3 ms before the end.
        let took = |ms: u64| [300, 700_000, 250_000, 450_000][(ms % 4) as usize];
        let serves = |us: u64| if (500_000..800_000).contains(&us) { 2 } else { 1 };
        let mut samples: Vec<Sample> = (0..2000u64)
            .map(|ms| (ms * 1000, ms * 1000 + took(ms)))
            .map(|(sent, end)| Sample::new(sent, end, serves(end - 300)))
            .collect();
        let changes = vec![change(500_300, 1, 2), change(800_300, 2, 1)];
        assert_eq!(analyse(&samples, Some(2)), (changes, 0));
        assert!(analyse(&samples, None).1 > 0, "nothing settles here");
        samples.push(Sample::new(900_000, 901_000, 2));
        assert!(analyse(&samples, Some(2)).1 > 0);
    }

    #[test]
    fn three_versions() {
        let samples = steady(0, 900, |ms| (ms / 300) as u16);
        assert_eq!(analyse(&samples, Some(2)), (vec![change(300_300, 0, 1), change(600_300, 1, 2)], 0));
    }

    #[test]
    fn both_answering_for_a_while_counts_every_old_answer() {
        // As a reload of nginx does: for 300 ms every third request still gets the old version.
        let old = |ms: u64| ms < 400 || (ms < 700 && ms.is_multiple_of(3));
        let samples = steady(0, 1000, |ms| if old(ms) { 1 } else { 2 });
        let olds = (401..700).filter(|ms| ms % 3 == 0).count() as u64;
        assert_eq!(analyse(&samples, Some(1)), (vec![change(400_300, 1, 2)], olds));
        assert_eq!(olds, 100);
    }

    #[test]
    fn flapping_back_to_a_known_version_counts_the_one_that_goes() {
        let old = |ms: u64| (1000..1300).contains(&ms) && ms.is_multiple_of(2);
        let samples = steady(0, 2000, |ms| match ms {
            0..500 => 1,
            500..1000 => 2,
            ms if old(ms) => 2,
            _ => 1,
        });
        // 1000 is sent before the first answer of the change back (1001) and complete before it.
        let changes = vec![change(500_300, 1, 2), change(1_001_300, 2, 1)];
        assert_eq!(analyse(&samples, Some(2)), (changes, 149));
    }

    #[test]
    fn order_of_recording_does_not_matter() {
        let mut samples = steady(0, 1000, |ms| if ms < 500 || ms == 600 { 1 } else { 2 });
        samples.reverse();
        assert_eq!(analyse(&samples, None), (vec![change(500_300, 1, 2)], 1));
    }

    #[test]
    fn sparse_strays_are_not_epochs() {
        // 5 requests a second; one stray.
        let samples: Vec<Sample> = (0..50u64)
            .map(|i| Sample::new(i * 200_000, i * 200_000 + 900, if i < 20 || i == 30 { 1 } else { 2 }))
            .collect();
        assert_eq!(analyse(&samples, None), (vec![change(4_000_900, 1, 2)], 1));
    }
}

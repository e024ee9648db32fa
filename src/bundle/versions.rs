//! Which versions of a program may follow which: what its maker supports, as data (`bundle/versions.toml`).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::manifest::Product;
use crate::assets;
use crate::ids::{Version, numbers};

static TABLE: LazyLock<BTreeMap<Product, Rules>> =
    LazyLock::new(|| toml::from_str(assets::VERSIONS).expect("versions.toml is part of this program"));

type Numbers = (u32, u32, u32);

/// The rules for one program.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rules {
    pub page: String,
    #[serde(default)]
    series: Vec<Series>,
    #[serde(default)]
    step: usize,
    #[serde(default)]
    entry: Vec<Entry>,
    #[serde(default)]
    one_way: Vec<OneWay>,
    /// What the maker says of going back.
    pub back: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    to: Series,
    from: Version,
    page: String,
}

/// A change of the data that versions before it cannot read.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OneWay {
    since: Series,
    minutes: u64,
    pub why: String,
    pub page: String,
}

impl OneWay {
    pub fn after(&self) -> Duration {
        Duration::from_secs(60 * self.minutes)
    }

    /// Whether this version has the change.
    pub fn is_past(&self, version: &Version) -> bool {
        version.numbers() >= self.since.first()
    }
}

/// The versions that share their first two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Series(u32, u32);

impl Series {
    fn of((major, minor, _): Numbers) -> Self {
        Self(major, minor)
    }

    fn first(self) -> Numbers {
        (self.0, self.1, 0)
    }

    fn last(self) -> Numbers {
        (self.0, self.1, u32::MAX)
    }
}

impl FromStr for Series {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let series = Self::of(numbers(s));
        if series.to_string() == s { Ok(series) } else { Err(format!("{s:?} is not a series such as 1.10")) }
    }
}

impl TryFrom<String> for Series {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<Series> for String {
    fn from(series: Series) -> String {
        series.to_string()
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The way from one version to a later one.
#[derive(Debug, Default, PartialEq)]
pub struct Route<'a> {
    /// Carried versions between, in order.
    pub via: Vec<&'a Version>,
    /// Versions that are needed beside these, as `1.10.x`.
    pub missing: Vec<String>,
}

/// The rules for this program.
pub fn rules(product: Product) -> &'static Rules {
    &TABLE[&product]
}

impl Rules {
    /// Whether a version may follow any other, so that nothing is ever needed between.
    pub fn is_free(&self) -> bool {
        self.series.is_empty()
    }

    /// The way from one version to another by those that are carried. None where one of the two is not in the table. A
    /// way back leads by no other version.
    pub fn route<'a>(
        &self,
        from: &Version,
        to: &Version,
        carried: impl IntoIterator<Item = &'a Version>,
    ) -> Option<Route<'a>> {
        let carried: Vec<&Version> = carried.into_iter().collect();
        self.search(from.numbers(), to.numbers(), &carried)
    }

    /// For each series up to this version's own: what is needed beside those that are carried.
    pub fn starts<'a>(
        &self,
        to: &Version,
        carried: impl IntoIterator<Item = &'a Version>,
    ) -> Vec<(Series, Vec<String>)> {
        let (carried, to): (Vec<&Version>, _) = (carried.into_iter().collect(), to.numbers());
        let before = self.series.iter().filter(|series| **series <= Series::of(to));
        let missing = |series: &Series| Some((*series, self.search(series.last(), to, &carried)?.missing));
        before.filter_map(missing).collect()
    }

    /// Each hop goes as far as it may: there is no shorter way, for what is reached from a version is reached from any
    /// later one too.
    fn search<'a>(&self, from: Numbers, to: Numbers, carried: &[&'a Version]) -> Option<Route<'a>> {
        let (mut at, mut route) = (from, Route::default());
        while at < to && !self.may_follow(at, to) {
            let near = |next: Numbers| at < next && next < to && self.may_follow(at, next);
            if let Some(stone) = carried.iter().filter(|v| near(v.numbers())).max_by_key(|v| v.numbers()) {
                at = stone.numbers();
                route.via.push(stone);
            } else {
                let series = self.series.iter().rev().find(|series| near(series.last()))?;
                at = series.last();
                route.missing.push(format!("{series}.x"));
            }
        }
        Some(route)
    }

    fn may_follow(&self, from: Numbers, to: Numbers) -> bool {
        let place = |version| self.series.iter().position(|series| *series == Series::of(version));
        let near = match (place(from), place(to)) {
            _ if self.is_free() || Series::of(from) == Series::of(to) => true,
            (Some(from), Some(to)) => to - from <= self.step,
            _ => false,
        };
        near && self.entries(from, to).next().is_none()
    }

    /// The rules that forbid this hop, whatever lies between.
    fn entries(&self, from: Numbers, to: Numbers) -> impl Iterator<Item = &Entry> {
        self.entry.iter().filter(move |entry| to >= entry.to.first() && from < entry.from.numbers())
    }

    /// The maker's pages about a way, for people.
    pub fn pages(&self, from: &Version, to: &Version) -> String {
        let entries = self.entries(from.numbers(), to.numbers()).map(|entry| entry.page.as_str());
        let mut pages: Vec<&str> = [self.page.as_str()].into_iter().chain(entries).collect();
        pages.dedup();
        pages.join(", ")
    }

    /// Changes of the data since the earlier version `to`, which that one cannot read.
    pub fn one_ways(&self, from: &Version, to: &Version) -> impl Iterator<Item = &OneWay> {
        self.one_way.iter().filter(move |change| change.is_past(from) && !change.is_past(to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        text.parse().unwrap()
    }

    #[test]
    fn the_table_hangs_together() {
        for product in Product::ALL {
            let rules = rules(product);
            assert!(rules.series.is_sorted_by(|a, b| a < b), "{product}: {:?}", rules.series);
            assert!(rules.is_free() || (rules.step > 0 && rules.back.is_some()), "{product}");
            let entries = rules.entry.iter().map(|e| (e.to, &e.page));
            let one_ways = rules.one_way.iter().map(|o| (o.since, &o.page));
            for (series, page) in entries.chain(one_ways) {
                assert!(rules.series.contains(&series), "{product}: {series} is no series of it");
                assert!(page.starts_with("https://"), "{product}: {page}");
            }
            // No series is out of reach of the one before it.
            for pair in rules.series.windows(2) {
                assert!(rules.may_follow(pair[0].last(), pair[1].first()), "{product}: {pair:?}");
            }
        }
    }

    #[test]
    fn ways_by_what_is_carried() {
        use Product::{Consul, ConsulTemplate, Nomad};
        // From, to, carried; then the way: what is carried of it, and what is missing.
        type Case<'a> = (Product, &'a str, &'a str, &'a [&'a str], Option<(&'a [&'a str], &'a [&'a str])>);
        let stones: &[&str] = &["1.8.4", "1.10.5", "1.11.3"];
        let cases: &[Case] = &[
            (Nomad, "1.6.1", "2.0.5", stones, Some((stones, &[]))),
            (Nomad, "1.6.1", "2.0.5", &[], Some((&[], &["1.8.x", "1.10.x", "1.11.x"]))),
            (Nomad, "1.6.1", "2.0.5", &["1.8.4", "1.11.3"], Some((&["1.8.4", "1.11.3"], &["1.10.x"]))),
            (Nomad, "1.9.0", "2.0.5", stones, Some((&stones[2..], &[]))),
            (Nomad, "1.10.5", "2.0.5", stones, Some((&stones[2..], &[]))),
            (Nomad, "1.11.3", "2.0.5", stones, Some((&[], &[]))),
            (Nomad, "1.4.0", "2.0.5", stones, Some((stones, &["1.6.x"]))),
            (Nomad, "1.2.0", "1.4.0", &[], Some((&[], &["1.3.x"]))),
            (Nomad, "1.6.1", "1.8.4", &[], Some((&[], &[]))),
            // A patch release of a series that the table does not have yet; else there is no word of it.
            (Nomad, "9.1.0", "9.1.7", &[], Some((&[], &[]))),
            (Nomad, "2.0.5", "9.1.0", &[], None),
            (Nomad, "0.9.0", "2.0.5", stones, None),
            (Nomad, "2.0.5", "1.6.1", stones, Some((&[], &[]))),
            (Consul, "1.8.7", "1.10.12", &[], Some((&[], &[]))),
            (Consul, "1.9.5", "1.11.0", &[], Some((&[], &["1.10.x"]))),
            (Consul, "1.8.7", "1.14.2", &["1.10.12"], Some((&["1.10.12"], &["1.12.x"]))),
            (Consul, "1.16.1", "1.21.4", &["1.18.2", "1.20.6"], Some((&["1.18.2", "1.20.6"], &[]))),
            (Consul, "1.21.7", "2.0.1", &[], Some((&[], &[]))),
            (Consul, "1.21.4", "2.0.1", &["1.21.8"], Some((&["1.21.8"], &[]))),
            (ConsulTemplate, "0.20.0", "0.41.0", &[], Some((&[], &[]))),
        ];
        for (product, from, to, carried, expected) in cases {
            let carried: Vec<Version> = carried.iter().map(|v| version(v)).collect();
            let found = rules(*product).route(&version(from), &version(to), &carried);
            let found =
                found.map(|way| (way.via.iter().map(ToString::to_string).collect::<Vec<_>>(), way.missing));
            let expected = expected.map(|(via, missing)| {
                let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
                (owned(via), owned(missing))
            });
            assert_eq!(found, expected, "{product} {from} to {to}");
        }
    }

    #[test]
    fn starting_versions_and_what_each_lacks() {
        let carried = ["1.8.4", "1.10.5", "1.11.3"].map(version);
        let starts = rules(Product::Nomad).starts(&version("2.0.5"), &carried);
        let lacking: Vec<String> = starts
            .iter()
            .filter(|(_, missing)| !missing.is_empty())
            .map(|(series, missing)| format!("{series} {}", missing.join(" ")))
            .collect();
        assert_eq!(
            lacking,
            ["1.1 1.3.x 1.5.x 1.7.x", "1.2 1.3.x 1.5.x 1.7.x", "1.3 1.5.x 1.7.x", "1.4 1.6.x", "1.5 1.7.x"]
        );
        assert_eq!(starts.len() - lacking.len(), 7, "{starts:?}");
    }

    #[test]
    fn data_that_is_not_read_any_more() {
        let since = |from: &str, to: &str| -> Vec<String> {
            let (from, to) = (version(from), version(to));
            let found = rules(Product::Nomad).one_ways(&from, &to);
            found.map(|change| change.since.to_string()).collect()
        };
        assert_eq!(since("2.0.5", "1.6.1"), ["1.9"]);
        assert_eq!(since("1.9.0", "1.2.1"), ["1.3", "1.9"]);
        assert_eq!(since("2.0.5", "1.9.1"), [""; 0]);
        assert_eq!(since("1.8.4", "1.6.1"), [""; 0]);
    }
}

//! Durations as Go writes them, and the schema that bounds one. Decides what a duration's
//! text means; never what a field may hold, which each field says.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Longest text of a duration.
const MAX_TEXT: usize = 24;
/// The part of Go's syntax that a manifest may use: no sign, nothing finer than a millisecond.
const PATTERN: &str = "^([0-9]+([.][0-9]+)?(ms|s|m|h))+$";
/// Largest value that is kept; every field's bound lies far below.
const MAX: time::Duration = time::Duration::from_secs(100 * 365 * 24 * 3600);

/// A span of time, `1m30s` in a manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Duration(time::Duration);

/// Text that is not a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be a duration such as 500ms, 10s or 1m30s")]
pub struct DurationError;

impl Duration {
    /// A whole number of milliseconds.
    #[must_use]
    pub const fn from_millis(ms: u64) -> Self {
        Self(time::Duration::from_millis(ms))
    }

    /// A whole number of seconds.
    #[must_use]
    pub const fn from_secs(s: u64) -> Self {
        Self(time::Duration::from_secs(s))
    }

    /// Whole milliseconds; what is finer is dropped.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// The same as the standard library's type.
    #[must_use]
    pub const fn get(self) -> time::Duration {
        self.0
    }
}

impl FromStr for Duration {
    type Err = DurationError;
    fn from_str(s: &str) -> Result<Self, DurationError> {
        if s.is_empty() || s.len() > MAX_TEXT {
            return Err(DurationError);
        }
        let mut rest = s;
        let mut total = time::Duration::ZERO;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(DurationError)?;
            let (number, tail) = rest.split_at(digits);
            let unit_end = tail.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_end);
            total = total.checked_add(term(number, unit)?).filter(|sum| *sum <= MAX).ok_or(DurationError)?;
            rest = tail;
        }
        Ok(Self(total))
    }
}

/// One number with its unit; exact, since a float would turn `0.3s` into 299 ms.
fn term(number: &str, unit: &str) -> Result<time::Duration, DurationError> {
    let nanos: u128 = match unit {
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return Err(DurationError),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return Err(DurationError),
        Some(parts) => parts,
        None => (number, ""),
    };
    let whole: u128 = whole.parse().map_err(|_| DurationError)?;
    let mut total = whole.checked_mul(nanos).ok_or(DurationError)?;
    let mut scale = nanos;
    for digit in fraction.chars() {
        scale /= 10;
        total += u128::from(digit.to_digit(10).ok_or(DurationError)?) * scale;
    }
    u64::try_from(total).map(time::Duration::from_nanos).map_err(|_| DurationError)
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.as_millis();
        if ms == 0 {
            return f.write_str("0s");
        }
        for (unit, count) in
            [("h", ms / 3_600_000), ("m", ms / 60_000 % 60), ("s", ms / 1_000 % 60), ("ms", ms % 1_000)]
        {
            if count > 0 {
                write!(f, "{count}{unit}")?;
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for Duration {
    type Error = DurationError;
    fn try_from(s: String) -> Result<Self, DurationError> {
        s.parse()
    }
}

impl From<Duration> for String {
    fn from(d: Duration) -> Self {
        d.to_string()
    }
}

impl JsonSchema for Duration {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "maxLength": MAX_TEXT })
    }
}

/// The schema of a field that takes `MIN` to `MAX` milliseconds.
pub(super) fn within<const MIN: u64, const MAX: u64>(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = Duration::json_schema(generator);
    let (low, high) = (Duration::from_millis(MIN), Duration::from_millis(MAX));
    schema.insert(
        "x-kubernetes-validations".into(),
        serde_json::json!([{
            "rule": format!(
                "self.matches('{PATTERN}') && duration(self) >= duration('{low}') && duration(self) <= duration('{high}')"
            ),
            "message": format!("must be a duration from {low} to {high}, such as 500ms, 10s or 1m30s"),
        }]),
    );
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_and_write() {
        for (text, ms, shown) in [
            ("0s", 0, "0s"),
            ("5s", 5_000, "5s"),
            ("500ms", 500, "500ms"),
            ("0.3s", 300, "300ms"),
            ("1.5m", 90_000, "1m30s"),
            ("1h1m1s1ms", 3_661_001, "1h1m1s1ms"),
            ("90s", 90_000, "1m30s"),
            ("2m", 120_000, "2m"),
            ("10s4m", 250_000, "4m10s"),
        ] {
            let duration: Duration = text.parse().unwrap();
            assert_eq!((duration.as_millis(), duration.to_string().as_str()), (ms, shown), "{text}");
        }
        for bad in
            ["", "0", "5", "s", "5 s", "-5s", "+5s", "5us", "5S", "5.s", ".5s", "1..5s", "5s3", "99999999999999999999h"]
        {
            assert_eq!(bad.parse::<Duration>(), Err(DurationError), "{bad}");
        }
    }
}

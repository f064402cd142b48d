//! Sizes of memory, as Kubernetes writes them: a whole number of mebibytes or gibibytes.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// What the schema and [`TryFrom`] both admit: 8Mi to 999999Mi, or 1Gi to 999Gi.
const PATTERN: &str = "^([89]|[1-9][0-9]{1,5})Mi$|^[1-9][0-9]{0,2}Gi$";

/// A size, such as `128Mi` or `2Gi`; at least `8Mi`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(String);

impl Size {
    /// In bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        parse(&self.0).unwrap_or(u64::MAX)
    }
}

fn parse(text: &str) -> Option<u64> {
    let (digits, shift, most) = match (text.strip_suffix("Mi"), text.strip_suffix("Gi")) {
        (Some(digits), _) => (digits, 20, 999_999),
        (None, Some(digits)) => (digits, 30, 999),
        (None, None) => return None,
    };
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    let bytes = digits.parse::<u64>().ok().filter(|n| plain && *n <= most)? << shift;
    (bytes >= 8 << 20).then_some(bytes)
}

impl TryFrom<String> for Size {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        match parse(&text) {
            Some(_) => Ok(Self(text)),
            None => Err("must be 8Mi to 999999Mi, or 1Gi to 999Gi"),
        }
    }
}

impl JsonSchema for Size {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "maxLength": 8, "pattern": PATTERN })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_one_form() {
        let bytes = |text: &str| Size::try_from(text.to_owned()).ok().map(|size| size.bytes());
        for (text, want) in [
            ("8Mi", Some(8 << 20)),
            ("128Mi", Some(128 << 20)),
            ("999999Mi", Some(999_999 << 20)),
            ("2Gi", Some(2 << 30)),
            ("999Gi", Some(999 << 30)),
            ("7Mi", None),
            ("1000000Mi", None),
            ("1000Gi", None),
            ("0Gi", None),
            ("08Mi", None),
            ("+8Mi", None),
            ("8M", None),
            ("8388608", None),
            ("Mi", None),
            ("", None),
        ] {
            assert_eq!(bytes(text), want, "{text}");
        }
    }
}

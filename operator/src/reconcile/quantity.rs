//! Kubernetes quantities by value: `1000m` is `1`, `1024Mi` is `1Gi`. Compares, and never
//! rewrites: the API server has its own canonical form.

/// Whether two quantities are the same amount; what is not a quantity equals only itself.
#[must_use]
pub(super) fn equal(a: &str, b: &str) -> bool {
    a == b || nanos(a).is_some_and(|a| nanos(b) == Some(a))
}

/// The amount in billionths, the finest that the API server keeps, rounded up as it does.
fn nanos(text: &str) -> Option<i128> {
    let digits = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (base, power) = scale(suffix)?;
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let all = format!("{whole}{fraction}");
    if all.is_empty() || !all.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mantissa: i128 = all.parse().ok()?;
    // mantissa × base^power × 10^(9 - digits of the fraction)
    let mut over = mantissa;
    let mut under: i128 = 1;
    let ten = 9 - i32::try_from(fraction.len()).ok()?;
    for (base, power) in [(base, power), (10, ten)] {
        let factor = base.checked_pow(power.unsigned_abs())?;
        if power < 0 { under = under.checked_mul(factor)? } else { over = over.checked_mul(factor)? }
    }
    let amount = over / under + i128::from(over % under != 0);
    Some(if negative { -amount } else { amount })
}

/// A suffix as base and power.
fn scale(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "n" => (10, -9),
        "u" => (10, -6),
        "m" => (10, -3),
        "" => (10, 0),
        "k" => (10, 3),
        "M" => (10, 6),
        "G" => (10, 9),
        "T" => (10, 12),
        "P" => (10, 15),
        "E" => (10, 18),
        "Ki" => (1024, 1),
        "Mi" => (1024, 2),
        "Gi" => (1024, 3),
        "Ti" => (1024, 4),
        "Pi" => (1024, 5),
        "Ei" => (1024, 6),
        _ => (10, suffix.strip_prefix(['e', 'E'])?.parse().ok().filter(|p: &i32| (-18..=18).contains(p))?),
    })
}

#[cfg(test)]
mod tests {
    use super::equal;

    #[test]
    fn amounts_not_spellings() {
        for (a, b, same) in [
            ("1", "1000m", true),
            ("0.5", "500m", true),
            (".5", "500m", true),
            ("1024Mi", "1Gi", true),
            ("1Gi", "1G", false),
            ("1e3", "1k", true),
            ("12E", "12e18", true),
            ("1E2", "100", true),
            ("-1", "-1000m", true),
            ("100m", "1", false),
            ("1.5Gi", "1536Mi", true),
            ("0.0000000001", "1n", true),
            ("junk", "junk", true),
            ("junk", "1", false),
            ("", "0", false),
            ("9999999999999999999999999999Ei", "1", false),
        ] {
            assert_eq!(equal(a, b), same, "{a} {b}");
        }
    }
}

//! Figures from several rounds: the median, and the least and the most beside it.

use std::fmt;

/// One figure of each round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures(Vec<f64>);

impl Figures {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn push(&mut self, figure: f64) {
        self.0.push(figure);
        self.0.sort_by(f64::total_cmp);
    }

    pub(crate) fn median(&self) -> f64 {
        let (low, high) = (self.0.len().saturating_sub(1) / 2, self.0.len() / 2);
        (self.0.get(low).copied().unwrap_or(f64::NAN) + self.0.get(high).copied().unwrap_or(f64::NAN)) / 2.0
    }

    /// One of each.
    pub(crate) fn of_rounds(rounds: impl IntoIterator<Item = f64>) -> Self {
        let mut figures = Self::default();
        rounds.into_iter().for_each(|figure| figures.push(figure));
        figures
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = f.precision().unwrap_or(2);
        let (least, most) = (self.0.first().unwrap_or(&f64::NAN), self.0.last().unwrap_or(&f64::NAN));
        write!(f, "{:.places$} ({least:.places$}–{most:.places$})", self.median())
    }
}

/// The `percent`th of a hundred parts of `sorted`.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

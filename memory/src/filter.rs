//! Metadata of a turn, and expressions over it that say which turns a recall may see.
//! Knows nothing of indexes: what an expression means is here, how it is looked up is in `tags`.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The longest key of metadata, in bytes.
const MAX_KEY_BYTES: usize = 256;
/// The most entries of one turn's metadata.
pub const MAX_METADATA_ENTRIES: usize = 256;
/// How deep expressions may be nested: they are evaluated by recursion.
const MAX_DEPTH: usize = 64;

/// What a key of metadata is set to.
///
/// Values are ordered: flags, then numbers, then texts; each by its own order, numbers by `total_cmp`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Value {
    /// Yes or no.
    Flag(bool),
    /// A finite number; whole numbers are exact up to 2^53, as in JSON.
    Number(f64),
    /// A text, compared byte by byte.
    Text(String),
}

impl Value {
    fn kind(&self) -> u8 {
        match self {
            Self::Flag(_) => 0,
            Self::Number(_) => 1,
            Self::Text(_) => 2,
        }
    }
}

impl Ord for Value {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Flag(a), Self::Flag(b)) => a.cmp(b),
            // Zero has two signs and one value.
            (Self::Number(a), Self::Number(b)) => (a + 0.0).total_cmp(&(b + 0.0)),
            (Self::Text(a), Self::Text(b)) => a.cmp(b),
            _ => self.kind().cmp(&other.kind()),
        }
    }
}

impl PartialOrd for Value {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Value {}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<i32> for Value {
    fn from(number: i32) -> Self {
        Self::Number(number.into())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// What keys begin with that an engine writes beside the caller's: [`Forget::Matching`](crate::Forget::Matching) does not look
/// at them.
pub const ENGINE_KEYS: &str = "mka.";

/// Keys and values of a turn.
pub type Metadata = BTreeMap<String, Value>;

/// Which turns a recall may see, or a [`Forget`](crate::Forget) erases, by their metadata. A turn without a key is accepted
/// by no comparison of it, and by the `not` of each.
///
/// ```
/// use mka_memory::Filter;
///
/// let filter = Filter::eq("kind", "decision")
///     .and(Filter::range("year", 2024, 2026).or(Filter::has("pinned")))
///     .and(Filter::any_of("team", ["red", "blue"]).not());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Filter {
    /// All of them hold; of none, always.
    And(Vec<Filter>),
    /// One of them holds; of none, never.
    Or(Vec<Filter>),
    /// It does not hold.
    Not(Box<Filter>),
    /// The key is set, to any value.
    Has(String),
    /// The key is set to one of these values.
    In(String, Vec<Value>),
    /// The key is set to a value of the bounds' own kind, from the first on and up to the last, both included.
    Range(String, Option<Value>, Option<Value>),
}

impl Filter {
    /// The key is set to this value.
    pub fn eq(key: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::In(key.into(), vec![value.into()])
    }

    /// The key is set to one of these values.
    pub fn any_of<V: Into<Value>>(
        key: impl Into<String>,
        values: impl IntoIterator<Item = V>,
    ) -> Self {
        Self::In(key.into(), values.into_iter().map(Into::into).collect())
    }

    /// The key is set to a value from `from` to `to`, both included.
    pub fn range(key: impl Into<String>, from: impl Into<Value>, to: impl Into<Value>) -> Self {
        Self::Range(key.into(), Some(from.into()), Some(to.into()))
    }

    /// The key is set to `value` or more.
    pub fn at_least(key: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::Range(key.into(), Some(value.into()), None)
    }

    /// The key is set to `value` or less.
    pub fn at_most(key: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::Range(key.into(), None, Some(value.into()))
    }

    /// The key is set.
    pub fn has(key: impl Into<String>) -> Self {
        Self::Has(key.into())
    }

    /// Both hold.
    pub fn and(self, other: Self) -> Self {
        match self {
            Self::And(mut parts) => {
                parts.push(other);
                Self::And(parts)
            }
            first => Self::And(vec![first, other]),
        }
    }

    /// One of the two holds.
    pub fn or(self, other: Self) -> Self {
        match self {
            Self::Or(mut parts) => {
                parts.push(other);
                Self::Or(parts)
            }
            first => Self::Or(vec![first, other]),
        }
    }

    /// It does not hold.
    #[allow(clippy::should_implement_trait)]
    pub fn not(self) -> Self {
        Self::Not(Box::new(self))
    }

    /// Whether a turn with this metadata may be seen: the meaning of the expression, and the reference of the index.
    pub fn accepts(&self, metadata: &Metadata) -> bool {
        match self {
            Self::And(parts) => parts.iter().all(|part| part.accepts(metadata)),
            Self::Or(parts) => parts.iter().any(|part| part.accepts(metadata)),
            Self::Not(part) => !part.accepts(metadata),
            Self::Has(key) => metadata.contains_key(key),
            Self::In(key, values) => metadata.get(key).is_some_and(|value| values.contains(value)),
            Self::Range(key, from, to) => metadata.get(key).is_some_and(|value| {
                let fits = |bound: &Value| bound.kind() == value.kind();
                from.iter().chain(to).all(fits)
                    && from.as_ref().is_none_or(|from| value >= from)
                    && to.as_ref().is_none_or(|to| value <= to)
            }),
        }
    }

    /// What the expression says of every turn, whatever its metadata: that it is accepted, or that it is not. None where it
    /// depends on a key. Each part is looked at by itself: a key that is set or not set depends on the key.
    pub(crate) fn constant(&self) -> Option<bool> {
        // Of parts that are decided by one `value` alone; of none it is the other.
        let decided = |parts: &[Self], value: bool| {
            let mut all = Some(!value);
            for part in parts {
                match part.constant() {
                    Some(constant) if constant == value => return Some(value),
                    Some(_) => {}
                    None => all = None,
                }
            }
            all
        };
        match self {
            Self::And(parts) => decided(parts, false),
            Self::Or(parts) => decided(parts, true),
            Self::Not(part) => part.constant().map(|constant| !constant),
            Self::Has(_) => None,
            Self::In(_, values) => values.is_empty().then_some(false),
            Self::Range(_, Some(from), Some(to)) => {
                (from.kind() != to.kind() || from > to).then_some(false)
            }
            Self::Range(..) => None,
        }
    }

    /// Refuses expressions that are nested too deep or compare with what no turn can have, as every call that takes a filter
    /// does. `operation` is what the error names.
    ///
    /// # Errors
    /// `InvalidArgument` for more than 64 levels, or a number that is not finite.
    pub fn check(&self, operation: &str) -> Result<()> {
        self.check_at(operation, 0)
    }

    fn check_at(&self, operation: &str, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::invalid(format!(
                "{operation}: expected a filter nested at most {MAX_DEPTH} deep, got more"
            )));
        }
        let mut values = match self {
            Self::And(parts) | Self::Or(parts) => {
                return parts.iter().try_for_each(|part| part.check_at(operation, depth + 1));
            }
            Self::Not(part) => return part.check_at(operation, depth + 1),
            Self::Has(_) => return Ok(()),
            Self::In(_, values) => values.iter(),
            Self::Range(_, from, to) => {
                let mut bounds = from.iter().chain(to);
                return bounds.try_for_each(|value| check_value(operation, value));
            }
        };
        values.try_for_each(|value| check_value(operation, value))
    }
}

/// Refuses metadata that no turn can have, as [`Store::commit`](crate::Store::commit) does: for a caller who is to hear of it
/// before other work is done. `operation` is what the error names.
///
/// # Errors
/// `InvalidArgument` for more than 256 entries, a key of other than 1 to 256 bytes, or a number that is not finite.
pub fn check_metadata(operation: &str, metadata: &Metadata) -> Result<()> {
    if metadata.len() > MAX_METADATA_ENTRIES {
        return Err(Error::invalid(format!(
            "{operation}: expected at most {MAX_METADATA_ENTRIES} entries of metadata in one turn, got {}",
            metadata.len()
        )));
    }
    for (key, value) in metadata {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(Error::invalid(format!(
                "{operation}: expected a key of metadata of 1 to {MAX_KEY_BYTES} bytes, got {}",
                key.len()
            )));
        }
        check_value(operation, value)?;
    }
    Ok(())
}

fn check_value(operation: &str, value: &Value) -> Result<()> {
    match value {
        Value::Number(number) if !number.is_finite() => Err(Error::invalid(format!(
            "{operation}: expected finite numbers in metadata, got {number}"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn() -> Metadata {
        [("kind", Value::from("decision")), ("year", 2025.into()), ("pinned", true.into())]
            .map(|(key, value)| (key.to_owned(), value))
            .into()
    }

    #[test]
    fn expressions_mean_what_they_say() {
        let cases = [
            (Filter::eq("kind", "decision"), true),
            (Filter::eq("kind", "note"), false),
            (Filter::eq("year", 2025.0), true),
            (Filter::eq("year", "2025"), false),
            (Filter::range("year", 2024, 2026), true),
            (Filter::range("year", 2025, 2025), true),
            (Filter::at_most("year", 2024), false),
            (Filter::at_least("kind", 1), false),
            (Filter::at_least("kind", "d"), true),
            (Filter::Range("year".into(), None, None), true),
            (Filter::range("year", 2024, "z"), false),
            (Filter::has("pinned").and(Filter::eq("pinned", true)), true),
            (Filter::has("absent"), false),
            (Filter::eq("absent", 1).not(), true),
            (Filter::any_of("kind", ["note", "decision"]).not(), false),
            (Filter::eq("kind", "note").or(Filter::has("year")), true),
            (Filter::And(Vec::new()), true),
            (Filter::Or(Vec::new()), false),
        ];
        for (filter, expected) in cases {
            assert_eq!(filter.accepts(&turn()), expected, "{filter:?}");
            assert!(filter.check("recall").is_ok());
            assert!(filter.constant().is_none_or(|constant| constant == expected), "{filter:?}");
        }
        assert_eq!(Value::from(0.0), Value::from(-0.0));
    }

    #[test]
    fn what_accepts_every_turn_or_none_is_known() {
        let all = || Filter::And(Vec::new());
        let none = || Filter::any_of("kind", Vec::<Value>::new());
        let has = || Filter::has("year");
        let cases = [
            (all(), Some(true)),
            (Filter::Or(Vec::new()), Some(false)),
            (none(), Some(false)),
            (none().not(), Some(true)),
            (none().not().not(), Some(false)),
            (Filter::range("year", 2026, 2024), Some(false)),
            (Filter::range("year", 2024, "z"), Some(false)),
            (Filter::range("year", 2024, 2024), None),
            (Filter::Range("year".into(), None, None), None),
            (Filter::at_least("year", 1), None),
            (Filter::eq("year", 1).not(), None),
            (has(), None),
            (Filter::And(vec![has(), none()]), Some(false)),
            (Filter::And(vec![all(), none().not()]), Some(true)),
            (Filter::And(vec![all(), has()]), None),
            (Filter::Or(vec![all(), has()]), Some(true)),
            (Filter::Or(vec![has(), all()]), Some(true)),
            (Filter::Or(vec![none(), Filter::Or(Vec::new())]), Some(false)),
            (Filter::Or(vec![none(), has()]), None),
        ];
        for (filter, expected) in cases {
            assert_eq!(filter.constant(), expected, "{filter:?}");
            for metadata in [turn(), Metadata::new()] {
                let accepts = filter.accepts(&metadata);
                assert!(expected.is_none_or(|constant| constant == accepts), "{filter:?}");
            }
        }
    }

    #[test]
    fn what_no_turn_can_have_is_refused() {
        assert!(Filter::eq("x", f64::NAN).check("recall").is_err());
        assert!(Filter::at_least("x", f64::INFINITY).check("recall").is_err());
        let deep = (0..100).fold(Filter::has("x"), |filter, _| filter.not());
        assert!(deep.check("recall").is_err());
        let with = |key: &str, value: Value| {
            check_metadata("commit", &Metadata::from([(key.to_owned(), value)]))
        };
        assert!(with("x", f64::NAN.into()).is_err() && with("", 1.into()).is_err());
        assert!(with(&"x".repeat(300), 1.into()).is_err() && with("x", 1.into()).is_ok());
    }
}

//! What turns are marked with, and which marks a recall asks for.
//! Knows no call.

use crate::records::all;
use std::collections::HashMap;

/// What a key of a turn's metadata is set to.
#[derive(Debug, Clone, PartialEq, uniffi::Enum)]
pub enum MetadataValue {
    /// Yes or no.
    Flag {
        /// Which.
        flag: bool,
    },
    /// A finite number; whole numbers are exact up to 2^53.
    Number {
        /// The number.
        number: f64,
    },
    /// A text, compared byte by byte.
    Text {
        /// The text.
        text: String,
    },
}

impl From<MetadataValue> for mka::Value {
    fn from(from: MetadataValue) -> Self {
        match from {
            MetadataValue::Flag { flag } => flag.into(),
            MetadataValue::Number { number } => number.into(),
            MetadataValue::Text { text } => text.into(),
        }
    }
}

/// What a caller marks turns with.
pub(crate) fn marks(from: HashMap<String, MetadataValue>) -> mka::Metadata {
    from.into_iter().map(|(key, value)| (key, value.into())).collect()
}

/// The metadata of a turn; a value of a kind that this surface does not know is left out.
pub(crate) fn metadata(from: mka::Metadata) -> HashMap<String, MetadataValue> {
    let known = from.into_iter().filter_map(|(key, value)| {
        let value = match value {
            mka::Value::Flag(flag) => MetadataValue::Flag { flag },
            mka::Value::Number(number) => MetadataValue::Number { number },
            mka::Value::Text(text) => MetadataValue::Text { text },
            _ => return None,
        };
        Some((key, value))
    });
    known.collect()
}

/// Which turns a recall may see, or a `Forget` erases, by their metadata. A turn without a key is accepted by no comparison of it.
#[derive(Debug, Clone, PartialEq, uniffi::Enum)]
pub enum Filter {
    /// All of them hold; of none, always.
    And {
        /// The parts.
        filters: Vec<Filter>,
    },
    /// One of them holds; of none, never.
    Or {
        /// The parts.
        filters: Vec<Filter>,
    },
    /// None of them holds.
    Not {
        /// The parts.
        filters: Vec<Filter>,
    },
    /// The key is set, to any value.
    Has {
        /// The key.
        key: String,
    },
    /// The key is set to one of these values.
    OneOf {
        /// The key.
        key: String,
        /// The values.
        values: Vec<MetadataValue>,
    },
    /// The key is set to a value of the bounds' own kind between them, both included.
    Range {
        /// The key.
        key: String,
        /// The least value.
        from: Option<MetadataValue>,
        /// The greatest value.
        to: Option<MetadataValue>,
    },
}

impl From<Filter> for mka::Filter {
    fn from(from: Filter) -> Self {
        match from {
            Filter::And { filters } => Self::And(all(filters)),
            Filter::Or { filters } => Self::Or(all(filters)),
            Filter::Not { filters } => Self::Or(all(filters)).not(),
            Filter::Has { key } => Self::Has(key),
            Filter::OneOf { key, values } => Self::In(key, all(values)),
            Filter::Range { key, from, to } => {
                Self::Range(key, from.map(Into::into), to.map(Into::into))
            }
        }
    }
}

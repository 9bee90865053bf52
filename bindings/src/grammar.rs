//! What an answer is held to, for a foreign caller.
//! Knows no call.

/// What an answer is held to, from its first token to its last.
#[derive(Debug, Clone, PartialEq, Eq, uniffi::Enum)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that fits a schema, its properties in the schema's order.
    JsonSchema {
        /// The schema, itself JSON.
        schema: String,
    },
    /// Text that a regular expression matches as a whole.
    Regex {
        /// The expression, in the syntax of Rust's crate `regex`.
        pattern: String,
    },
    /// Text of a context-free grammar.
    Lark {
        /// The grammar, in Lark's notation as llguidance reads it.
        text: String,
    },
}

impl From<Grammar> for mka::Grammar {
    fn from(from: Grammar) -> Self {
        match from {
            Grammar::JsonObject => Self::JsonObject,
            Grammar::JsonSchema { schema } => Self::JsonSchema(schema),
            Grammar::Regex { pattern } => Self::Regex(pattern),
            Grammar::Lark { text } => Self::Lark(text),
        }
    }
}

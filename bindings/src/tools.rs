//! What a model calls and what tools give back, for a foreign caller.
//! Knows no session.

/// A call of a tool, as a model wrote it.
#[derive(Debug, Clone, PartialEq, Eq, uniffi::Record)]
pub struct ToolCall {
    /// The name of the tool.
    pub name: String,
    /// What it is called with: a JSON object, as the model wrote it.
    pub arguments: String,
}

/// What a tool gave back.
#[derive(Debug, Clone, PartialEq, Eq, uniffi::Record)]
pub struct ToolResult {
    /// The result, as the model is to read it; it may be empty.
    pub content: String,
    /// The name of the tool, shown beside what is recalled from the result.
    #[uniffi(default)]
    pub name: Option<String>,
}

impl From<ToolResult> for mka::ToolResult {
    fn from(from: ToolResult) -> Self {
        let mut result = Self::new(from.content);
        result.name = from.name;
        result
    }
}

/// The calls of tools in the text of an answer, in the order in which they stand there; what is no JSON of the form that
/// models write is none.
#[uniffi::export]
pub fn tool_calls(answer: String) -> Vec<ToolCall> {
    let calls = mka::tool_calls(&answer).into_iter();
    calls.map(|call| ToolCall { name: call.name, arguments: call.arguments }).collect()
}

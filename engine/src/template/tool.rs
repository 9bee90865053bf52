//! A function that a model may call, as a chat template sees it.
//! Knows no session; what a model calls is read in `tools`.

use super::json;
use crate::error::{Error, Result};
use minijinja::Value;
use minijinja::value::ValueKind;

/// What a caller offers: `{"type": "function", "function": {"name": .., ..}}`, its keys in the caller's order.
#[derive(Debug, Clone)]
pub(crate) struct Tool(Value);

impl Tool {
    /// Reads each of `tools`, the JSON of a function as OpenAI and transformers write it, or of what stands under `function`
    /// there.
    ///
    /// # Errors
    /// `InvalidArgument`, which says by its index what is something else.
    pub(crate) fn all(tools: &[String]) -> Result<Vec<Self>> {
        let read = |(i, json): (usize, &String)| {
            Self::read(json).map_err(|got| {
                Error::invalid(format!(
                    "tools[{i}]: {got}, expected the JSON of a function with a name, as {{\"type\": \"function\", \"function\": {{\"name\": ..}}}}"
                ))
            })
        };
        tools.iter().enumerate().map(read).collect()
    }

    /// The tool, or what was found in its place.
    fn read(json: &str) -> std::result::Result<Self, String> {
        let tool: Value =
            serde_json::from_str(json).map_err(|error| format!("no JSON: {error}"))?;
        if tool.kind() != ValueKind::Map {
            return Err(format!("JSON of a {}", tool.kind()));
        }
        let field = |of: &Value, key: &str| of.get_attr(key).unwrap_or_default();
        let inner = field(&tool, "function");
        let (function, is_whole) = match inner.kind() {
            ValueKind::Map => (inner, true),
            ValueKind::Undefined => (tool.clone(), false),
            kind => return Err(format!("a function that is a {kind}")),
        };
        if field(&function, "name").as_str().is_none_or(str::is_empty) {
            return Err("a function without a name".into());
        }
        let wrapped =
            || Value::from_iter([("type", Value::from("function")), ("function", function)]);
        Ok(Self(if is_whole { tool } else { wrapped() }))
    }

    pub(super) fn value(&self) -> Value {
        self.0.clone()
    }

    /// The name of its function.
    pub(crate) fn name(&self) -> String {
        let function = self.0.get_attr("function").unwrap_or_default();
        let name = function.get_attr("name").unwrap_or_default();
        name.as_str().unwrap_or_default().to_owned()
    }

    /// Its JSON in one line, in which its texts stand as they are but for quotation marks, backslashes and control characters.
    ///
    /// # Errors
    /// If it nests too deep.
    pub(crate) fn json(&self) -> Result<String> {
        json::line(&self.0).map_err(|e| Error::invalid(format!("tools: {e}")).with_source(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_read_whole_or_bare_and_keeps_the_order_of_its_keys() {
        let bare = r#"{"name": "now", "description": "The <time>", "arguments": {}}"#;
        let whole = format!(r#"{{"type": "function", "function": {bare}}}"#);
        let tools = Tool::all(&[bare.to_owned(), whole.clone()]).unwrap();
        assert_eq!(tools.len(), 2);
        for tool in tools {
            assert_eq!((tool.json().unwrap(), tool.name().as_str()), (whole.clone(), "now"));
        }
        assert!(Tool::all(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_function_is_refused_by_its_index() {
        for (json, got) in [
            ("{", "tools[1]: no JSON: "),
            ("[]", "tools[1]: JSON of a sequence, expected the JSON of a function with a name"),
            ("{}", "tools[1]: a function without a name, expected"),
            (r#"{"name": ""}"#, "tools[1]: a function without a name"),
            (r#"{"name": 7}"#, "tools[1]: a function without a name"),
            (r#"{"function": "now"}"#, "tools[1]: a function that is a string"),
            (r#"{"type": "function", "function": {}}"#, "tools[1]: a function without a name"),
        ] {
            let error = Tool::all(&[r#"{"name": "now"}"#.to_owned(), json.to_owned()]).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::InvalidArgument);
            assert!(error.to_string().starts_with(got), "{error}");
        }
    }
}

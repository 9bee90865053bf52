//! What a model calls and what tools give back: the calls in an answer's text, and the results that a session takes.
//! Knows no session and no template; a tool that is offered is `template::Tool`.

use serde::Deserialize;
use serde_json::value::RawValue;

/// A call of a tool, as a model wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ToolCall {
    /// The name of the tool.
    pub name: String,
    /// What it is called with: a JSON object, as the model wrote it. Nothing has compared it with what the tool takes.
    pub arguments: String,
}

/// What a tool gave back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ToolResult {
    /// The name of the tool, shown beside what is recalled from the result; the model does not see it here.
    pub name: Option<String>,
    /// The result, as the model is to read it; it may be empty.
    pub content: String,
}

impl ToolResult {
    /// A result without a name.
    pub fn new(content: impl Into<String>) -> Self {
        Self { name: None, content: content.into() }
    }

    /// Says which tool gave it.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }
}

/// The calls of tools in the text of an answer, in the order in which they stand there.
///
/// Read is what models write: `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, as often as it stands there (Hermes,
/// Qwen); a list of such objects behind `[TOOL_CALLS]`, or as the whole answer (Mistral); one object as the whole answer, with
/// `parameters` or `arguments`, behind `<|python_tag|>` or not (Llama 3). Thoughts at the beginning, up to `</think>`, are
/// passed over, whether the answer or the template wrote the `<think>` before them; of thoughts that the template began and
/// that were cut before their end nothing tells, and a call in them is taken for one. What is no JSON of that form is no call,
/// and neither is one without a name or with arguments that are no object: the answer is then text alone.
///
/// ```
/// let answer = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}\n</tool_call>";
/// let calls = mka::tool_calls(answer);
/// assert_eq!((calls[0].name.as_str(), calls[0].arguments.as_str()), ("add", "{\"a\": 1, \"b\": 2}"));
/// assert!(mka::tool_calls("1 and 2 make 3.").is_empty());
/// ```
pub fn tool_calls(answer: &str) -> Vec<ToolCall> {
    let said = without_thoughts(answer);
    // What is a call as a whole may hold any mark in a text.
    let whole = [answer, said].into_iter().map(whole).find(|calls| !calls.is_empty());
    whole.unwrap_or_else(|| marked(said))
}

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A call as it is written. Which of the two names its arguments have is the model's matter.
#[derive(Deserialize)]
struct Written<'a> {
    name: String,
    #[serde(borrow)]
    arguments: Option<&'a RawValue>,
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
}

impl Written<'_> {
    /// The call that is all of `json`; without arguments one only if it `may_lack` them.
    fn call(json: &str, may_lack: bool) -> Option<ToolCall> {
        // A list would be taken for the fields in their order.
        let written: Written = serde_json::from_str(json).ok().filter(|_| json.starts_with('{'))?;
        let arguments = match written.arguments.or(written.parameters) {
            Some(json) => object(json.get())?,
            None if may_lack => "{}".to_owned(),
            None => return None,
        };
        let name = written.name;
        (!name.is_empty()).then_some(ToolCall { name, arguments })
    }
}

/// The JSON object that `json` is, or that stands in the text that it is: some models write their arguments as a text.
fn object(json: &str) -> Option<String> {
    if json.starts_with('{') {
        return Some(json.to_owned());
    }
    let inner: String = serde_json::from_str(json).ok()?;
    let is_json = serde_json::from_str::<&RawValue>(&inner).is_ok();
    let inner = inner.trim();
    (is_json && inner.starts_with('{')).then(|| inner.to_owned())
}

/// `answer` behind the thoughts that it begins with; nothing of one that ends in the middle of them.
fn without_thoughts(answer: &str) -> &str {
    const END: &str = "</think>";
    let opens = answer.trim_start().starts_with("<think>");
    let mut from = 0;
    while let Some(at) = answer[from..].find(END).map(|at| from + at) {
        if !opens {
            let behind =
                |mark: &str| answer[from..at].find(mark).map(|start| from + start + mark.len());
            if let Some(start) = [OPEN, "[TOOL_CALLS]"].into_iter().filter_map(behind).min() {
                // A call may hold the tag in a text: what follows begins behind it.
                let mut values =
                    serde_json::Deserializer::from_str(&answer[start..]).into_iter::<&RawValue>();
                from = match values.next() {
                    Some(Ok(call)) if call.get().starts_with(['{', '[']) => {
                        start + values.byte_offset()
                    }
                    _ => start,
                };
                continue;
            }
            if answer[..at].contains("<think>") {
                return answer;
            }
        }
        return &answer[at + END.len()..];
    }
    if opens { "" } else { answer }
}

/// The calls that `answer` is and nothing else.
fn whole(answer: &str) -> Vec<ToolCall> {
    let answer = answer.trim();
    let answer = answer.strip_prefix("<|python_tag|>").unwrap_or(answer).trim_start();
    // Where nothing else says that it is a call, it must say what it is called with.
    match answer.starts_with('[') {
        true => listed(answer, false),
        false => Written::call(answer, false).into_iter().collect(),
    }
}

/// The calls that stand behind marks in `answer`, by the mark that comes first: another may stand in what is called with.
fn marked(answer: &str) -> Vec<ToolCall> {
    if let Some((before, list)) = answer.split_once("[TOOL_CALLS]")
        && !before.contains(OPEN)
    {
        let calls = listed(list, true);
        if !calls.is_empty() {
            return calls;
        }
    }
    tagged(answer)
}

/// Calls between tags. The last of them may lack the closing one: the model ended its turn in its place.
fn tagged(answer: &str) -> Vec<ToolCall> {
    let mut calls = Vec::new();
    let mut rest = answer;
    while let Some((_, behind)) = rest.split_once(OPEN) {
        rest = behind;
        let mut values = serde_json::Deserializer::from_str(behind).into_iter::<&RawValue>();
        let Some(Ok(json)) = values.next() else { continue };
        // The value may hold a tag in a text: what follows begins behind it.
        let after = behind.get(values.byte_offset()..).unwrap_or_default().trim_start();
        if after.is_empty() || after.starts_with(CLOSE) || after.starts_with(OPEN) {
            calls.extend(Written::call(json.get(), true));
            rest = after;
        }
    }
    calls
}

/// Calls in a list, all of them or none; behind it nothing else stands.
fn listed(list: &str, may_lack: bool) -> Vec<ToolCall> {
    let items: Vec<&RawValue> = serde_json::from_str(list).unwrap_or_default();
    let calls = items.into_iter().map(|json| Written::call(json.get(), may_lack));
    calls.collect::<Option<Vec<_>>>().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn called(answer: &str) -> Vec<(String, String)> {
        tool_calls(answer).into_iter().map(|call| (call.name, call.arguments)).collect()
    }

    fn expect(answer: &str, calls: &[(&str, &str)]) {
        let calls: Vec<_> =
            calls.iter().map(|(name, with)| ((*name).to_owned(), (*with).to_owned())).collect();
        assert_eq!(called(answer), calls, "{answer}");
    }

    #[test]
    fn calls_between_tags_are_read_one_by_one() {
        let one = r#"<tool_call>
{"name": "add", "arguments": {"b": 1, "a": 2.0}}
</tool_call>"#;
        let add = ("add", r#"{"b": 1, "a": 2.0}"#);
        expect(one, &[add]);
        let now = r#"<tool_call>{"arguments": {}, "name": "now"}</tool_call>"#;
        expect(&format!("Let me see.\n{one}\n{now} and wait"), &[add, ("now", "{}")]);
        // Without its end, without arguments, with them as a text, under the other name, a tag in a text.
        expect(one.strip_suffix(CLOSE).unwrap(), &[add]);
        expect(r#"<tool_call>{"name": "now"}</tool_call>"#, &[("now", "{}")]);
        let text = r#"<tool_call>{"name": "say", "arguments": "{\"to\": \"me\"} "}</tool_call>"#;
        expect(text, &[("say", r#"{"to": "me"}"#)]);
        let other =
            r#"<tool_call>{"name": "say", "parameters": {"a": "</tool_call>"}}</tool_call>"#;
        expect(other, &[("say", r#"{"a": "</tool_call>"}"#)]);
        expect(&format!("<think>\n{now} or not?\n</think>\n{one}"), &[add]);
        // The template may have written the tag that opens the thoughts.
        expect(&format!("{now} or not?\n</think>\n{one}"), &[add]);
        expect(&format!("{now} or not?\n</think>\nIt is nine."), &[]);
        expect(&format!("{one}\nSo it is <think>a thought</think>."), &[add]);
        // A mark that is only spoken of has a text behind it, no call.
        let drafted = format!("{now}, or \"<tool_call>\"?</think>It is \"nine\".");
        expect(&drafted, &[]);
        let split = "<tool_call>\n{\"name\": \"write\", \"arguments\": {\"text\": \"split at </think>\"}}\n</tool_call>";
        expect(split, &[("write", r#"{"text": "split at </think>"}"#)]);
        expect(
            &format!("{now} or not?\n</think>\n{split}"),
            &[("write", r#"{"text": "split at </think>"}"#)],
        );
    }

    #[test]
    fn what_is_malformed_is_no_call_and_the_others_are_read() {
        let now = r#"<tool_call>{"name": "now"}</tool_call>"#;
        for malformed in [
            r#"<tool_call>{"name": "now"</tool_call>"#,
            r#"<tool_call>{"name": "now"}}</tool_call>"#,
            r#"<tool_call>{"name": ""}</tool_call>"#,
            r#"<tool_call>{"name": 7, "arguments": {}}</tool_call>"#,
            r#"<tool_call>{"name": "now", "arguments": [1]}</tool_call>"#,
            r#"<tool_call>{"name": "now", "arguments": "soon"}</tool_call>"#,
            r#"<tool_call>["now", {}, {}]</tool_call>"#,
            "<tool_call>now()</tool_call>",
            "<tool_call>",
        ] {
            expect(malformed, &[]);
            expect(&format!("{malformed}{now}"), &[("now", "{}")]);
        }
        expect("<think>I would <tool_call>{\"name\": \"now\"}</tool_call>", &[]);
    }

    #[test]
    fn calls_in_a_list_are_read_all_or_none() {
        let list =
            r#"[{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "now"}]"#;
        let calls = [("add", r#"{"a": 1}"#), ("now", "{}")];
        expect(&format!("[TOOL_CALLS]{list}"), &calls);
        expect(&format!("I will see. [TOOL_CALLS] {list}\n"), &calls);
        // The tag is a control token, which stands for no text: without it a list may be one of anything.
        let whole = list.replace(r#""now""#, r#""now", "arguments": {}"#);
        expect(&format!(" {whole}"), &calls);
        expect(&format!("{whole}."), &[]);
        expect(list, &[]);
        expect(r#"[TOOL_CALLS][{"name": "now"}, {"name": 7}]"#, &[]);
        let think = r#"[TOOL_CALLS][{"name":"w","arguments":{"a":"</think>"}}]"#;
        expect(think, &[("w", r#"{"a":"</think>"}"#)]);
        let tag = r#"{"name": "say", "arguments": {"a": "<tool_call>"}}"#;
        let say = ("say", r#"{"a": "<tool_call>"}"#);
        expect(&format!("[{tag}]"), &[say]);
        expect(&format!("[TOOL_CALLS][{tag}]"), &[say]);
        expect(r#"[["now", {}, {}]]"#, &[]);
        expect("[1, 2]", &[]);
        expect("[]", &[]);
    }

    #[test]
    fn an_answer_that_is_one_object_is_a_call_if_it_says_what_it_is_called_with() {
        let call = r#"{"name": "add", "parameters": {"a": 1}}"#;
        for answer in
            [call.to_owned(), format!("\n<|python_tag|>{call}\n"), format!("<think></think>{call}")]
        {
            expect(&answer, &[("add", r#"{"a": 1}"#)]);
        }
        let typed = r#"{"type": "function", "name": "add", "arguments": {"a": 1}}"#;
        expect(typed, &[("add", r#"{"a": 1}"#)]);
        for mark in [OPEN, "[TOOL_CALLS]", "</think>"] {
            let arguments = format!(r#"{{"a": "{mark}"}}"#);
            let call = format!(r#"{{"name": "say", "parameters": {arguments}}}"#);
            expect(&call, &[("say", arguments.as_str())]);
        }
        expect(r#"{"name": "Ada"}"#, &[]);
        expect(r#"{"name": "Ada", "parameters": null}"#, &[]);
        expect(&format!("{call} {call}"), &[]);
        expect(&format!("It is {call}"), &[]);
        expect("", &[]);
    }

    proptest! {
        #[test]
        fn any_text_gives_calls_whose_arguments_are_objects(
            parts in proptest::collection::vec(
                prop_oneof![
                    "(\\PC|\n){0,20}",
                    Just("<tool_call>".to_owned()),
                    Just("</tool_call>".to_owned()),
                    Just("[TOOL_CALLS]".to_owned()),
                    Just("<|python_tag|>".to_owned()),
                    Just("<think>".to_owned()),
                    Just("</think>".to_owned()),
                    Just(r#"{"name": "now"}"#.to_owned()),
                    Just(r#"{"name": "é", "arguments": {"a": "漢"}}"#.to_owned()),
                    Just("[".to_owned()),
                    Just("]".to_owned()),
                ],
                0..8,
            )
        ) {
            for call in tool_calls(&parts.concat()) {
                prop_assert!(!call.name.is_empty());
                let arguments: serde_json::Value = serde_json::from_str(&call.arguments).unwrap();
                prop_assert!(arguments.is_object());
            }
        }
    }
}

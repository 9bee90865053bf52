//! The scaffold of a session in which the model may call tools: what offers them, and what stands around their results.
//! Knows no tokenizer; what a model calls is read in `tools`.

use super::{MARKS, Scaffold, marked, parts_of};
use crate::error::{Error, Result};
use crate::template::{ChatTemplate, Message, Tool, json};

/// The fixed text around what tools gave back: `answer A result B result C answer`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ResultScaffold {
    /// Between the answer that called and the first result.
    pub(crate) to_result: String,
    /// Between two results.
    pub(crate) between: String,
    /// Between the last result and the next answer.
    pub(crate) to_answer: String,
    /// Whether a result is shown without the white space around it.
    pub(crate) trims: bool,
    /// Whether a result is shown as a string of JSON, whose quotation marks are scaffold.
    is_json: bool,
}

/// The number that a result's call has where a template wants one. Mistral's wants nine letters or digits; the models do not
/// number their calls.
const CALL: &str = "000000000";

impl ResultScaffold {
    /// Reads it off a template, if that takes a message of a tool behind an answer.
    pub(super) fn of(template: &ChatTemplate) -> Option<Self> {
        let roles = ["tool", "ipython"].into_iter();
        let mut shapes = roles.flat_map(|role| [(role, false), (role, true)]);
        shapes.find_map(|(role, is_numbered)| {
            Self::by(template, |content| match is_numbered {
                true => Message::new(role, content).of_call(CALL),
                false => Message::new(role, content),
            })
        })
    }

    /// That of the user's messages, for a template that takes none of a tool: between two results is a blank line.
    pub(super) fn users(to_user: &str, to_answer: &str, trims: bool) -> Self {
        Self {
            to_result: to_user.to_owned(),
            between: "\n\n".to_owned(),
            to_answer: to_answer.to_owned(),
            trims,
            is_json: false,
        }
    }

    /// `content` as it stands in a result; without the white space around it, if that [`trims`](Self::trims), already.
    pub(crate) fn written(&self, content: &str) -> String {
        if self.is_json { json::inside(content) } else { content.to_owned() }
    }

    /// That of messages that `result` makes of contents.
    fn by(template: &ChatTemplate, result: impl Fn(&str) -> Message) -> Option<Self> {
        let said = marked(&["user", "assistant"]);
        let with = |contents: &[&str]| -> Vec<Message> {
            said.iter().cloned().chain(contents.iter().copied().map(&result)).collect()
        };
        let one = parts_of(template, &with(&MARKS[2..3]), &[]).ok()?;
        let two = parts_of(template, &with(&MARKS[2..]), &[]).ok()?;
        let [_, _, to_result, to_answer] = one.as_slice() else { return None };
        let [_, _, to_first, between, behind] = two.as_slice() else { return None };
        let has_mark = |text: &String| MARKS.iter().any(|mark| text.contains(mark));
        if to_result != to_first || to_answer != behind || one.iter().chain(&two).any(has_mark) {
            return None;
        }
        // A template that takes whoever is not the user for the model knows no tool.
        let answers = parts_of(template, &marked(&["user", "assistant", "assistant"]), &[]);
        if answers.is_ok_and(|answers| answers == one) {
            return None;
        }
        // A tab outside, as for other messages, and what JSON escapes inside.
        let content = format!("\t {}\" \t", MARKS[2]);
        let text = template.render(&with(&[content.as_str()]), &[], true).ok()?;
        let is_json =
            !text.contains(content.trim()) && text.contains(&json::inside(content.trim()));
        let shows = |content: &str| match is_json {
            true => text.contains(&json::inside(content)),
            false => text.contains(content),
        };
        let trims =
            shows(content.trim()) && !shows(content.trim_end()) && !shows(content.trim_start());
        Some(Self {
            to_result: to_result.clone(),
            between: between.clone(),
            to_answer: to_answer.clone(),
            trims,
            is_json,
        })
    }
}

impl Scaffold {
    /// The same with `tools` offered: before the user's first message, and around the instructions, if the session
    /// `has_system` ones.
    ///
    /// # Errors
    /// `InvalidArgument` if the template does not list every one of them there.
    pub(crate) fn offering(
        &self,
        template: &ChatTemplate,
        tools: &[Tool],
        has_system: bool,
    ) -> Result<Self> {
        if has_system && self.system.is_none() {
            return Err(no_system());
        }
        // Many list tools before the user's last message alone (Mistral's): the first is to be the last.
        let shapes: [&[&str]; 2] = match has_system {
            true => [&["system", "user"], &["system", "user", "assistant"]],
            false => [&["user"], &["user", "assistant", "user"]],
        };
        let names: Vec<String> = tools.iter().map(Tool::name).collect();
        let mut refused = None;
        for roles in shapes {
            let messages = marked(roles);
            let rendered = parts_of(template, &messages, tools)
                .and_then(|with| Ok((with, parts_of(template, &messages, &[])?)));
            let (with, without) = match rendered {
                Ok(parts) => parts,
                Err(error) => {
                    refused = Some(error);
                    continue;
                }
            };
            match (with.as_slice(), without.as_slice()) {
                ([before, after, ..], [plain_before, plain_after, ..])
                    if has_system
                        && lists(&names, &[before, after], &[plain_before, plain_after]) =>
                {
                    return Ok(Self {
                        system: Some((before.clone(), after.clone())),
                        ..self.clone()
                    });
                }
                ([opening, ..], [plain, ..])
                    if !has_system && lists(&names, &[opening], &[plain]) =>
                {
                    return Ok(Self { opening: opening.clone(), ..self.clone() });
                }
                _ => {}
            }
        }
        let mut none = no_place();
        if let Some(error) = refused {
            none = none.with_source(error);
        }
        Err(none)
    }
}

/// Whether `parts` hold each of `names`, as it is or as JSON has it, more often than the `plain` ones. Other words may change
/// too where there are tools, and list none.
fn lists(names: &[String], parts: &[&String], plain: &[&String]) -> bool {
    let count = |parts: &[&String], name: &str| -> usize {
        parts.iter().map(|part| part.matches(name).count()).sum()
    };
    names.iter().all(|name| {
        [name.clone(), json::inside(name)]
            .iter()
            .any(|name| count(parts, name) > count(plain, name))
    })
}

/// What a session that offers tools gets where nothing shows them to the model.
pub(crate) fn no_place() -> Error {
    Error::invalid(
        "tools: the model's chat template has no place for them, expected a model whose template lists tools",
    )
}

/// What a session with instructions gets where the template refuses them.
pub(crate) fn no_system() -> Error {
    Error::invalid("the model's chat template takes no system message, expected none")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::prompt::{Trims, shown};

    /// As Qwen2.5 lists tools, in its instructions, and gives results back, in a message of the user's.
    const QWEN: &str = r#"
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"#;

    /// As Llama 3.1 lists tools, before the user's first words, and gives results back, as strings of JSON.
    const LLAMA: &str = r#"{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, answer with a call.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"#;

    /// As Mistral's of 2024 lists tools, before the user's last message, and wants results numbered.
    const MISTRAL: &str = r#"
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == user_messages[-1] %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- tool | tojson }}
                {{- "]" if loop.last else ", " }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles are supported") }}
    {%- endif %}
{%- endfor %}"#;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, "<s>".into(), "</s>".into()).unwrap()
    }

    fn tools() -> Vec<Tool> {
        let tools = [
            r#"{"name": "now", "description": "The <local> time, à la minute", "parameters": {"type": "object", "properties": {}}}"#,
            r#"{"type": "function", "function": {"name": "add", "parameters": {"b": 1, "a": 2.0}}}"#,
        ];
        Tool::all(&tools.map(str::to_owned)).unwrap()
    }

    /// Appending turn by turn gives the text of rendering the whole conversation.
    fn check(source: &str, system: Option<&str>) {
        let (template, tools) = (template(source), tools());
        let plain = Scaffold::new(&template).unwrap();
        let s = plain.offering(&template, &tools, system.is_some()).unwrap();
        let results = ["{\"time\": \"9:14\"}\n", " 3 "];
        let said = [
            ("user", "what time is it?"),
            ("assistant", "<tool_call>"),
            ("tool", results[0]),
            ("tool", results[1]),
            ("assistant", "it is late."),
            ("user", "and now?"),
        ];
        let system_message = system.map(|system| Message::new("system", system));
        let messages: Vec<Message> = system_message
            .into_iter()
            .chain(said.map(|(role, content)| Message::new(role, content)))
            .collect();
        let mut text = match (system, &s.system) {
            (Some(system), Some((before, after))) => [before.as_str(), system, after].concat(),
            _ => s.opening.clone(),
        };
        for part in [said[0].1, &s.to_answer, said[1].1, &s.result.to_result] {
            text.push_str(part);
        }
        text += &s.result.written(shown(results[0], s.result.trims));
        text += &s.result.between;
        text += &s.result.written(shown(results[1], s.result.trims));
        for part in [s.result.to_answer.as_str(), said[4].1, &s.to_user, said[5].1, &s.to_answer] {
            text.push_str(part);
        }
        assert_eq!(text, template.render(&messages, &tools, true).unwrap());
    }

    #[test]
    fn a_conversation_with_tools_is_appended_as_it_is_rendered() {
        for source in [QWEN, LLAMA] {
            check(source, None);
            check(source, Some("Be brief."));
        }
    }

    #[test]
    fn tools_are_listed_as_transformers_lists_them() {
        let template = template(QWEN);
        let plain = Scaffold::new(&template).unwrap();
        let listed = plain.offering(&template, &tools(), false).unwrap();
        assert_eq!(
            listed.opening,
            "<|im_start|>system\nYou are Qwen.\n\n# Tools\n\n<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"now\", \"description\": \"The <local> time, à la minute\", \"parameters\": {\"type\": \"object\", \"properties\": {}}}}\n{\"type\": \"function\", \"function\": {\"name\": \"add\", \"parameters\": {\"b\": 1, \"a\": 2.0}}}\n</tools><|im_end|>\n<|im_start|>user\n"
        );
        // The rest of the session is as without tools.
        assert_eq!(Scaffold { opening: plain.opening.clone(), ..listed }, plain);
        let (before, after) = plain.offering(&template, &tools(), true).unwrap().system.unwrap();
        assert_eq!(before, "<|im_start|>system\n");
        assert!(
            after.starts_with("\n\n# Tools") && after.ends_with("<|im_start|>user\n"),
            "{after}"
        );
    }

    #[test]
    fn tools_that_stand_before_the_last_message_alone_and_numbered_results_are_scaffold() {
        let template = template(MISTRAL);
        let plain = Scaffold::new(&template).unwrap();
        let listed = plain.offering(&template, &tools(), false).unwrap().opening;
        assert!(listed.starts_with("<s>[AVAILABLE_TOOLS] [{\"type\": \"function\""), "{listed}");
        assert!(listed.ends_with("}}}][/AVAILABLE_TOOLS][INST] "), "{listed}");
        let numbered = ", \"call_id\": \"000000000\"}[/TOOL_RESULTS]";
        let result = &plain.result;
        assert_eq!(result.to_result, "</s>[TOOL_RESULTS] {\"content\": ");
        assert_eq!(result.between, format!("{numbered}[TOOL_RESULTS] {{\"content\": "));
        assert_eq!((result.to_answer.as_str(), result.is_json), (numbered, false));
    }

    #[test]
    fn tools_are_listed_where_they_stand_and_not_where_other_words_change() {
        // As Mistral's of 2025: other instructions where there are tools, and the list before the user's last message.
        let source = r#"
{%- if tools %}{% set sys = 'You are able to call tools.' %}{% else %}{% set sys = 'You have no tools.' %}{% endif %}
{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{%- if messages[0]['role'] == 'system' %}
    {%- set sys = messages[0]['content'] + ' ' + sys %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token + '[SYSTEM_PROMPT]' + sys + '[/SYSTEM_PROMPT]' }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"#;
        let found = template(source);
        let plain = Scaffold::new(&found).unwrap();
        let listed = plain.offering(&found, &tools(), false).unwrap().opening;
        assert!(listed.contains("able to call tools.[/SYSTEM_PROMPT][AVAILABLE_TOOLS][{"));
        assert!(listed.contains("\"name\": \"now\"") && listed.contains("\"name\": \"add\""));
        assert!(listed.ends_with("[/AVAILABLE_TOOLS][INST]"), "{listed}");
        let (before, after) = plain.offering(&found, &tools(), true).unwrap().system.unwrap();
        assert_eq!(before, "<s>[SYSTEM_PROMPT]");
        assert!(after.starts_with(" You are able to call tools.[/SYSTEM_PROMPT][AVAILABLE_TOOLS]"));
        assert!(after.ends_with("}}}][/AVAILABLE_TOOLS][INST]"), "{after}");

        // Nothing but the other words, or one tool of two.
        for (shown, part) in [("tools | tojson", "''"), ("tools | tojson", "tools[0] | tojson")] {
            let hidden = template(&source.replace(shown, part));
            let plain = Scaffold::new(&hidden).unwrap();
            for has_system in [false, true] {
                let error = plain.offering(&hidden, &tools(), has_system).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgument);
                assert!(error.to_string().contains("no place for them"), "{error}");
            }
        }
    }

    #[test]
    fn results_are_shown_as_the_template_shows_them() {
        let of = |source: &str| Scaffold::new(&template(source)).unwrap().result;
        let (qwen, llama) = (of(QWEN), of(LLAMA));
        assert!(!qwen.is_json && !qwen.trims && llama.is_json && !llama.trims);
        assert_eq!(llama.written("a \"b\"\n"), "a \\\"b\\\"\\n");
        assert!(llama.to_result.ends_with("\n\n\"") && llama.to_answer.starts_with("\"<|eot_id|>"));
        let trimmed = of(&QWEN.replace("{{- message.content }}", "{{- message.content | trim }}"));
        assert!(trimmed.trims && !trimmed.is_json);
        let trimmed =
            of(&LLAMA.replace("message.content | tojson", "message.content | trim | tojson"));
        assert!(trimmed.trims && trimmed.is_json);
        // Roles that are printed as they are given.
        let chatml = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        assert_eq!(of(chatml).to_result, "<|im_end|>\n<|im_start|>tool\n");
    }

    #[test]
    fn a_template_without_tools_gives_results_in_messages_of_the_user_and_refuses_to_list_any() {
        let source = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}";
        let template = template(source);
        let plain = Scaffold::new(&template).unwrap();
        assert_eq!(plain.trims, Trims { user: true, ..Trims::default() });
        let users = ResultScaffold::users("</s>[INST] ", " [/INST]", true);
        assert_eq!(plain.result, users);
        let lenient = source.replace("raise_exception('roles must alternate')", "''");
        assert_eq!(Scaffold::new(&self::template(&lenient)).unwrap().result, users);
        for (has_system, expected) in [(false, "no place for them"), (true, "no system message")] {
            let error = plain.offering(&template, &tools(), has_system).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(expected), "{error}");
        }
        assert_eq!(Scaffold::plain().result, ResultScaffold::users("\n\n", "\n", false));
    }
}

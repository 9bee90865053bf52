//! A model's chat template: Jinja as HuggingFace writes it, rendered by minijinja.
//! Knows no tokenizer; where the text around the contents lies is read off by `prompt`.

pub(crate) mod json;
mod tool;

pub(crate) use tool::Tool;

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use minijinja::{Environment, ErrorKind as JinjaKind, Value as Jinja, context};
use serde::Serialize;
use serde_json::Value;
use std::borrow::Cow;
use std::path::Path;

/// One message as a template sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Message {
    role: String,
    content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_call_id: Option<String>,
}

impl Message {
    pub(crate) fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), tool_call_id: None }
    }

    /// The same as the result of the call `id`.
    pub(crate) fn of_call(mut self, id: &str) -> Self {
        self.tool_call_id = Some(id.to_owned());
        self
    }
}

/// A compiled chat template with the model's own begin and end tokens.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    /// What it sees as `tools` where there are none.
    no_tools: Jinja,
    /// The model's template of the name `tool_use`, if it has one.
    tool_use: Option<Box<ChatTemplate>>,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// # Errors
    /// If the source is no template.
    pub(crate) fn new(source: &str, bos_token: String, eos_token: String) -> Result<Self> {
        let source: &str = &without_generation_tags(source);
        let mut environment = Environment::new();
        // As transformers' apply_chat_template sets up Jinja.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<Jinja, _> {
            Err(minijinja::Error::new(JinjaKind::InvalidOperation, text))
        });
        // A template that prints today's date would render the same conversation differently each day and void what is
        // cached of it: the date is left out.
        environment.add_function("strftime_now", |_format: String| String::new());
        // minijinja's own writes some signs in a way that is safe in HTML.
        environment.add_filter("tojson", json::tojson);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|source| {
            Error::model(format!("chat template: {source}")).with_source(source)
        })?;
        // None, as transformers passes it.
        Ok(Self { environment, bos_token, eos_token, no_tools: Jinja::from(()), tool_use: None })
    }

    /// The template of a HuggingFace folder: chat_template.jinja, or `chat_template` of tokenizer_config.json; that for tools is
    /// additional_chat_templates/tool_use.jinja, or stands beside the other in the configuration.
    ///
    /// # Errors
    /// If a file is there but cannot be read as what it should be.
    pub(crate) fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let read = |name: &str| -> Result<Option<String>> {
            let path = folder.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Error::io("read chat template", &path, error)),
            }
        };
        let config: Value = match read("tokenizer_config.json")? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|e| Error::model(format!("tokenizer_config.json: {e}")).with_source(e))?,
            None => Value::Null,
        };
        // A file stands for all that the configuration holds, as in transformers.
        let (source, named) = match read("chat_template.jinja")? {
            Some(source) => (Some(source), None),
            None => template_sources(config.get("chat_template"))?,
        };
        let Some(source) = source else { return Ok(None) };
        let tool_use = read("additional_chat_templates/tool_use.jinja")?.or(named);
        let token = |key: &str| match config.get(key) {
            Some(Value::String(token)) => token.clone(),
            Some(object) => {
                object.get("content").and_then(Value::as_str).unwrap_or_default().to_owned()
            }
            None => String::new(),
        };
        let template = Self::new(&source, token("bos_token"), token("eos_token"))?;
        Ok(Some(template.beside(tool_use.as_deref())))
    }

    /// The template of a GGUF file, if it has one, and that for tools.
    ///
    /// # Errors
    /// If the source is no template.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Option<Self>> {
        const KEY: &str = "tokenizer.chat_template";
        const TOOL_USE: &str = "tokenizer.chat_template.tool_use";
        if !gguf.contains(KEY) {
            return Ok(None);
        }
        let token = |key: &str| -> String {
            let id = gguf.u32(key).ok().map(|id| id as usize);
            let tokens = gguf.strs("tokenizer.ggml.tokens").unwrap_or_default();
            id.and_then(|id| tokens.get(id).cloned()).unwrap_or_default()
        };
        let bos = token("tokenizer.ggml.bos_token_id");
        let template = Self::new(gguf.str(KEY)?, bos, token("tokenizer.ggml.eos_token_id"))?;
        Ok(Some(template.beside(gguf.str(TOOL_USE).ok())))
    }

    /// The template that lists tools and shows their results: that named for it, where the model has one, or itself.
    pub(crate) fn for_tools(&self) -> &Self {
        self.tool_use.as_deref().unwrap_or(self)
    }

    /// The same with the source of the template that is named `tool_use`. One that cannot be read is left out: the model chats
    /// without it.
    fn beside(mut self, tool_use: Option<&str>) -> Self {
        let Some(source) = tool_use else { return self };
        match Self::new(source, self.bos_token.clone(), self.eos_token.clone()) {
            Ok(template) => {
                // transformers takes it where tools are given alone: it may walk through them without asking whether there are
                // any, and the scaffold is read off it without.
                let no_tools = std::iter::empty::<Jinja>().collect();
                self.tool_use = Some(Box::new(Self { no_tools, ..template }));
            }
            Err(error) => tracing::warn!(%error, "the template named tool_use is left out"),
        }
        self
    }

    /// Renders a conversation, in which the model may call `tools`, with the header of the next answer if
    /// `add_generation_prompt`.
    ///
    /// # Errors
    /// If the template refuses the messages, with its own words.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        tools: &[Tool],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let tools = match tools {
            [] => self.no_tools.clone(),
            tools => tools.iter().map(Tool::value).collect(),
        };
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|e| Error::model(format!("chat template: {e}")).with_source(e))?;
        template
            .render(context! {
                messages,
                tools,
                add_generation_prompt,
                bos_token => self.bos_token,
                eos_token => self.eos_token,
            })
            .map_err(|e| Error::model(format!("chat template: {e:#}")).with_source(e))
    }
}

/// `source` with `{% generation %}` and `{% endgeneration %}`, tags of transformers' own that mark for training what the model
/// says, as a block that is always written.
fn without_generation_tags(source: &str) -> String {
    let mut parts = source.split("{%");
    let mut written = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (inside, _) = part.split_once("%}").unwrap_or_default();
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let part = match word {
            "generation" => Cow::Owned(part.replacen(word, "if true", 1)),
            "endgeneration" => Cow::Owned(part.replacen(word, "endif", 1)),
            _ => Cow::Borrowed(part),
        };
        written.push_str("{%");
        written.push_str(&part);
    }
    written
}

/// The template, and that for tools. `chat_template` is a string, or a list of named ones, of which "default" and "tool_use" are
/// meant.
fn template_sources(value: Option<&Value>) -> Result<(Option<String>, Option<String>)> {
    match value {
        None | Some(Value::Null) => Ok((None, None)),
        Some(Value::String(source)) => Ok((Some(source.clone()), None)),
        Some(Value::Array(named)) => {
            let source = |name: &str| -> Option<String> {
                let is_it =
                    |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some(name);
                let template = named.iter().find(is_it)?.get("template")?;
                template.as_str().map(str::to_owned)
            };
            let default = source("default").ok_or_else(|| {
                Error::model(
                    "tokenizer_config.json: chat_template list, expected one named default",
                )
            })?;
            Ok((Some(default), source("tool_use")))
        }
        Some(other) => Err(Error::model(format!(
            "tokenizer_config.json: chat_template {other}, expected a string or a list"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Value as GgufValue;
    use crate::gguf::writer::Writer;
    use crate::prompt::{Scaffold, Trims, shown};

    const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    const LLAMA3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
    const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}";

    fn scaffold(source: &str) -> Scaffold {
        let template = ChatTemplate::new(source, "<s>".into(), "</s>".into()).unwrap();
        Scaffold::new(&template).unwrap()
    }

    /// Appending turn by turn gives the text of rendering the whole conversation.
    fn check(source: &str) {
        let template = ChatTemplate::new(source, "<s>".into(), "</s>".into()).unwrap();
        let s = scaffold(source);
        let messages: Vec<_> = [("user", "one"), ("assistant", "two"), ("user", "three")]
            .map(|(role, content)| Message::new(role, content))
            .into();
        let answered = [s.opening.as_str(), "one", &s.to_answer, &s.answer_lead, "two"].concat();
        let appended = [answered.as_str(), &s.to_user, "three", &s.to_answer].concat();
        assert_eq!(appended, template.render(&messages, &[], true).unwrap());
    }

    #[test]
    fn appended_turns_equal_the_whole_rendering() {
        check(SMOLLM2);
        check(LLAMA3);
        check(MISTRAL);
        check(MISTRAL_LAST);
        assert_eq!(scaffold(MISTRAL_LAST).answer_lead, " ");
        assert_eq!(scaffold(MISTRAL).answer_lead, "");
    }

    #[test]
    fn default_and_given_system_messages_are_scaffold() {
        let s = scaffold(SMOLLM2);
        assert!(s.opening.contains("You are SmolLM"));
        assert_eq!(
            s.system.unwrap(),
            ("<|im_start|>system\n".into(), "<|im_end|>\n<|im_start|>user\n".into())
        );
        // Mistral's template refuses a system message with its own words: there is none to give.
        assert!(scaffold(MISTRAL).system.is_none());
    }

    /// As Mistral wrote it in 2024: instructions stand in the last message, if that is the user's.
    const MISTRAL_LAST: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}{% if message['role'] == 'user' %}{% if loop.last and system_message is defined %}{{ '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}";

    #[test]
    fn instructions_that_stand_in_the_last_message_alone_are_scaffold() {
        let s = scaffold(MISTRAL_LAST);
        assert_eq!(s.system.unwrap(), ("<s>[INST] ".into(), "\n\n".into()));
        assert_eq!((s.opening.as_str(), s.to_answer.as_str()), ("<s>[INST] ", "[/INST]"));
    }

    #[test]
    fn white_space_that_a_template_cuts_off_is_known_by_whose_it_is() {
        let all = Trims { system: true, user: true, answer: true };
        assert_eq!(scaffold(LLAMA3).trims, all);
        for source in [SMOLLM2, MISTRAL, MISTRAL_LAST] {
            assert_eq!(scaffold(source).trims, Trims::default());
        }
        let asked = MISTRAL
            .replace("'[INST] ' + message['content']", "'[INST] ' + message['content'].strip()");
        assert_eq!(scaffold(&asked).trims, Trims { user: true, ..Trims::default() });
        // White space at one end alone is not what is meant.
        let first = MISTRAL
            .replace("'[INST] ' + message['content']", "'[INST] ' + message['content'].lstrip()");
        assert_eq!(scaffold(&first).trims, Trims::default());

        let template = ChatTemplate::new(LLAMA3, "<s>".into(), "</s>".into()).unwrap();
        let s = scaffold(LLAMA3);
        let said = [("system", " be brief\n"), ("user", "\n one "), ("assistant", " two")];
        let messages: Vec<_> =
            said.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        let [system, user, answer] = said.map(|(_, content)| shown(content, true));
        let (before, after) = s.system.unwrap();
        let text = [before.as_str(), system, &after, user, &s.to_answer, answer].concat();
        assert!(template.render(&messages, &[], false).unwrap().starts_with(&text), "{text}");
        assert_eq!((shown(" a ", false), shown(" \n", true)), (" a ", " \n"));
    }

    /// As SmolLM3's marks what the model says.
    const MARKED: &str = "{% for message in messages %}{% if message.role == 'assistant' %}\n    {%- generation %}\n    {{- '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}\n    {%- endgeneration %}\n{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn what_marks_an_answer_for_training_changes_nothing() {
        assert_eq!(
            without_generation_tags("a{%- generation -%}b{%endgeneration+%}c"),
            "a{%- if true -%}b{%endif+%}c"
        );
        let other =
            "{%- if generation -%}{% set x = 'endgeneration' %}{% generations %}{% generation";
        assert_eq!(without_generation_tags(other), other);
        check(MARKED);
        let plain = MARKED.replace("{%- generation %}", "{%- if 1 %}");
        let plain = plain.replace("{%- endgeneration %}", "{%- endif %}");
        assert_eq!(scaffold(MARKED), scaffold(&plain));
        assert!(scaffold(MARKED).to_answer.ends_with("<|im_start|>assistant\n"));
    }

    const CHATML: &str = "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    /// As that of Hermes 2 Pro named tool_use, which walks through the tools without asking whether there are any.
    const HERMES_TOOLS: &str = r#"{{- bos_token }}
{{- '<|im_start|>system\nHere are the available tools: <tools>' }}
{%- for tool in tools %}
    {{- ' ' }}
    {{- tool | tojson }}
{%- endfor %}
{{- ' </tools><|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}
            {{- '<|im_start|>tool\n' }}
        {%- endif %}
        {{- '<tool_response>\n' }}
        {{- message.content }}
        {%- if not loop.last %}
            {{- '\n</tool_response>\n' }}
        {%- else %}
            {{- '\n</tool_response>' }}
        {%- endif %}
        {%- if loop.last or loop.nextitem.role != "tool" %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"#;
    const LISTED: &str = "<s><|im_start|>system\nHere are the available tools: <tools> {\"type\": \"function\", \"function\": {\"name\": \"now\"}} </tools><|im_end|>\n";

    fn offered(template: &ChatTemplate, has_system: bool) -> Result<Scaffold> {
        let tools = Tool::all(&[r#"{"name": "now"}"#.to_owned()]).unwrap();
        Scaffold::new(template).unwrap().offering(template.for_tools(), &tools, has_system)
    }

    /// What a session without tools gets is the other template's; what `template` lists and gives back is Hermes'.
    fn check_hermes(template: &ChatTemplate) {
        let plain = Scaffold::new(template).unwrap();
        assert_eq!(Scaffold { result: scaffold(CHATML).result, ..plain.clone() }, scaffold(CHATML));
        assert_eq!(plain.opening, "<s><|im_start|>user\n");
        let listed = offered(template, false).unwrap();
        assert_eq!(listed.opening, format!("{LISTED}<|im_start|>user\n"));
        assert_eq!(Scaffold { opening: plain.opening.clone(), ..listed }, plain);
        let (before, after) = offered(template, true).unwrap().system.unwrap();
        assert_eq!(before, format!("{LISTED}<|im_start|>system\n"));
        assert_eq!(after, "<|im_end|>\n<|im_start|>user\n");
        let result = &plain.result;
        assert_eq!(result.to_result, "<|im_end|>\n<|im_start|>tool\n<tool_response>\n");
        assert_eq!(result.between, "\n</tool_response>\n<tool_response>\n");
        assert_eq!(result.to_answer, "\n</tool_response><|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn tools_and_results_are_read_off_the_template_that_is_named_for_them() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let read = || ChatTemplate::from_folder(folder.path()).unwrap().unwrap();
        let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": [
            {"name": "default", "template": CHATML},
            {"name": "tool_use", "template": HERMES_TOOLS},
        ]});
        write("tokenizer_config.json", &config.to_string());
        check_hermes(&read());
        // A file stands for the whole list.
        write("chat_template.jinja", CHATML);
        assert!(offered(&read(), false).is_err());
        std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        write("additional_chat_templates/tool_use.jinja", HERMES_TOOLS);
        check_hermes(&read());
        // One that is no template is as none.
        write("additional_chat_templates/tool_use.jinja", "{% for %}");
        assert!(offered(&read(), false).is_err());
        assert_eq!(Scaffold::new(&read()).unwrap(), scaffold(CHATML));

        let writer = Writer::default()
            .strs("tokenizer.ggml.tokens", &["<s>", "</s>"])
            .set("tokenizer.ggml.bos_token_id", GgufValue::U32(0))
            .set("tokenizer.ggml.eos_token_id", GgufValue::U32(1))
            .set("tokenizer.chat_template", GgufValue::Str(CHATML.to_owned()));
        let read = |writer: &Writer| {
            let gguf = Gguf::parse(&writer.bytes(), Path::new("test.gguf")).unwrap();
            ChatTemplate::from_gguf(&gguf).unwrap().unwrap()
        };
        assert!(offered(&read(&writer), false).is_err());
        let tool_use = GgufValue::Str(HERMES_TOOLS.to_owned());
        check_hermes(&read(&writer.set("tokenizer.chat_template.tool_use", tool_use)));
    }

    #[test]
    fn a_broken_template_is_an_error() {
        assert!(ChatTemplate::new("{% for %}", String::new(), String::new()).is_err());
        let silent = ChatTemplate::new("hello", String::new(), String::new()).unwrap();
        assert!(Scaffold::new(&silent).is_err());
    }
}

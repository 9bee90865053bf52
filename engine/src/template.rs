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
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The template of a HuggingFace folder: chat_template.jinja, or `chat_template` of tokenizer_config.json.
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
        let source = match read("chat_template.jinja")? {
            Some(source) => Some(source),
            None => template_source(config.get("chat_template"))?,
        };
        let Some(source) = source else { return Ok(None) };
        let token = |key: &str| match config.get(key) {
            Some(Value::String(token)) => token.clone(),
            Some(object) => {
                object.get("content").and_then(Value::as_str).unwrap_or_default().to_owned()
            }
            None => String::new(),
        };
        Self::new(&source, token("bos_token"), token("eos_token")).map(Some)
    }

    /// The template of a GGUF file, if it has one.
    ///
    /// # Errors
    /// If the source is no template.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Option<Self>> {
        const KEY: &str = "tokenizer.chat_template";
        if !gguf.contains(KEY) {
            return Ok(None);
        }
        let token = |key: &str| -> String {
            let id = gguf.u32(key).ok().map(|id| id as usize);
            let tokens = gguf.strs("tokenizer.ggml.tokens").unwrap_or_default();
            id.and_then(|id| tokens.get(id).cloned()).unwrap_or_default()
        };
        let bos = token("tokenizer.ggml.bos_token_id");
        Self::new(gguf.str(KEY)?, bos, token("tokenizer.ggml.eos_token_id")).map(Some)
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
        // Without any it is none, as transformers passes it.
        let tools = match tools {
            [] => Jinja::from(()),
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

/// `chat_template` is a string, or a list of named ones of which "default" is meant.
fn template_source(value: Option<&Value>) -> Result<Option<String>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template").and_then(Value::as_str))
            .map(|source| Some(source.to_owned()))
            .ok_or_else(|| {
                Error::model(
                    "tokenizer_config.json: chat_template list, expected one named default",
                )
            }),
        Some(other) => Err(Error::model(format!(
            "tokenizer_config.json: chat_template {other}, expected a string or a list"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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

    #[test]
    fn a_broken_template_is_an_error() {
        assert!(ChatTemplate::new("{% for %}", String::new(), String::new()).is_err());
        let silent = ChatTemplate::new("hello", String::new(), String::new()).unwrap();
        assert!(Scaffold::new(&silent).is_err());
    }
}

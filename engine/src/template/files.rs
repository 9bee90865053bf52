//! Finds a chat template and its special tokens in a model's files.
//! Knows where they are kept; not what a template says.

use std::path::Path;

use serde_json::Value;

use super::wrong;
use crate::gguf::Gguf;
use crate::{Error, ErrorKind, Result};

/// A template's source and the tokens it may name; absent tokens are empty.
pub(super) struct Found {
    pub(super) source: String,
    pub(super) bos_token: String,
    pub(super) eos_token: String,
}

pub(super) fn of_folder(folder: &Path) -> Result<Option<Found>> {
    let config_path = folder.join("tokenizer_config.json");
    let config = match read(&config_path)? {
        None => Value::Null,
        Some(text) => serde_json::from_str(&text).map_err(|source| {
            let text = format!("reading {}: {source}", config_path.display());
            Error::new(ErrorKind::Corrupted, text).with_source(source)
        })?,
    };
    let source = match read(&folder.join("chat_template.jinja"))? {
        Some(source) => source,
        None => match &config["chat_template"] {
            Value::Null => return Ok(None),
            Value::String(source) => source.clone(),
            Value::Array(named) => named_default(named, &config_path)?,
            other => {
                return Err(wrong(format!(
                    "{}: expected a text or a list of named texts, got {other}",
                    config_path.display()
                )));
            }
        },
    };
    Ok(Some(Found {
        source,
        bos_token: token(&config["bos_token"]),
        eos_token: token(&config["eos_token"]),
    }))
}

pub(super) fn of_gguf(gguf: &Gguf) -> Result<Option<Found>> {
    const TEMPLATE: &str = "tokenizer.chat_template";
    if !gguf.contains(TEMPLATE) {
        return Ok(None);
    }
    let tokens = gguf.strs("tokenizer.ggml.tokens")?;
    let token = |key: &str| -> Result<String> {
        if !gguf.contains(key) {
            return Ok(String::new());
        }
        let id = gguf.u32(key)?;
        tokens.get(id as usize).cloned().ok_or_else(|| {
            let num_tokens = tokens.len();
            wrong(format!("{}: {key} is {id}, expected below {num_tokens}", gguf.path().display()))
        })
    };
    Ok(Some(Found {
        source: gguf.str(TEMPLATE)?.to_owned(),
        bos_token: token("tokenizer.ggml.bos_token_id")?,
        eos_token: token("tokenizer.ggml.eos_token_id")?,
    }))
}

/// The text of a file, `None` where there is no such file.
fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::io("reading", path, source)),
    }
}

fn named_default(named: &[Value], path: &Path) -> Result<String> {
    let names: Vec<&str> = named.iter().filter_map(|entry| entry["name"].as_str()).collect();
    named
        .iter()
        .find(|entry| entry["name"] == "default")
        .and_then(|entry| entry["template"].as_str())
        .map(str::to_owned)
        .ok_or_else(|| {
            wrong(format!("{}: expected one named \"default\", got {names:?}", path.display()))
        })
}

/// A special token is a text, or an object that holds it.
fn token(value: &Value) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

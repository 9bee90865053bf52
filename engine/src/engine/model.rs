//! A model with its tokenizer and chat template, from its files.
//! Knows neither a session nor a store.

use crate::error::{Error, ErrorKind, Result};
use crate::grammar::{Constraint, Grammar, GrammarCompiler};
use crate::hub::ModelFiles;
use crate::models::config::{DecoderConfig, token_ids};
use crate::models::decoder::Decoder;
use crate::models::weights::Weights;
use crate::parallel::TensorGroup;
use crate::prompt::{self, Scaffold};
use crate::template::{ChatTemplate, Tool};
use crate::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A model, loaded: what sessions need of it.
pub(crate) struct Model {
    pub(crate) name: String,
    /// The folder or GGUF file that it was loaded from.
    pub(crate) path: PathBuf,
    pub(crate) decoder: Decoder,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) scaffold: Scaffold,
    /// For what a session alone knows: the tools that it is offered.
    template: Option<ChatTemplate>,
    pub(crate) end_of_turn: Vec<u32>,
    /// Made for the first answer that is held to a grammar; or why there is none.
    grammars: OnceLock<Result<GrammarCompiler, String>>,
}

impl Model {
    pub(super) fn load(
        files: &ModelFiles,
        device: &candle_core::Device,
        group: &TensorGroup,
    ) -> Result<Self> {
        match files {
            ModelFiles::Folder(folder) => Self::load_folder(folder, device, group),
            ModelFiles::Gguf(path) => Self::load_gguf(path, device, group),
        }
    }

    fn load_folder(
        folder: &Path,
        device: &candle_core::Device,
        group: &TensorGroup,
    ) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).map_err(|e| Error::io("read model file", &path, e))
        };
        let mut config = DecoderConfig::from_json(&read("config.json")?)?;
        if let Ok(text) = read("generation_config.json")
            && let Ok(json) = serde_json::from_str::<serde_json::Value>(&text)
        {
            config.eos_token_ids.extend(token_ids(json.get("eos_token_id")));
        }
        let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
        let template = ChatTemplate::from_folder(folder)?;
        let scaffold = scaffold_of(template.as_ref())?;
        let weights = Weights::open_folder(folder)?;
        let decoder = Decoder::load_part(config, &weights, device, group)?;
        let model = Self::new(folder, decoder, tokenizer, scaffold, &[])?;
        Ok(Self { template, ..model })
    }

    fn load_gguf(path: &Path, device: &candle_core::Device, group: &TensorGroup) -> Result<Self> {
        let (weights, gguf) = Weights::open_gguf(path)?;
        let mut config = DecoderConfig::from_gguf(&gguf)?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let special = tokenizer.special_ids();
        config.eos_token_ids.extend([special.eos, special.eot].into_iter().flatten());
        let template = ChatTemplate::from_gguf(&gguf)?;
        let scaffold = scaffold_of(template.as_ref())?;
        let decoder = Decoder::load_part(config, &weights, device, group)?;
        // Not in the configuration, which is a part of what a snapshot is known by.
        let ends = tokenizer.ends_by_name();
        let model = Self::new(path, decoder, tokenizer, scaffold, &ends)?;
        Ok(Self { template, ..model })
    }

    fn new(
        path: &Path,
        decoder: Decoder,
        tokenizer: Tokenizer,
        scaffold: Scaffold,
        other_ends: &[u32],
    ) -> Result<Self> {
        // What begins a document, and what the template writes, the model must know too.
        let mut written = tokenizer.prefix().to_vec();
        let Scaffold { opening, to_answer, answer_lead, to_user, result, .. } = &scaffold;
        let given = [&result.to_result, &result.between, &result.to_answer];
        let system = scaffold.system.iter().flat_map(|(before, after)| [before, after]);
        let around = [opening, to_answer, answer_lead, to_user].into_iter();
        for text in around.chain(given).chain(system) {
            written.extend(tokenizer.encode_with_specials(text)?);
        }
        let largest = written.iter().map(|id| *id as usize + 1).max().unwrap_or(0);
        let spoken = tokenizer.spoken_size().max(largest);
        let embedded = decoder.config.vocab_size;
        if spoken > embedded {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "open model {}: tokenizer of {spoken} tokens, expected at most the model's {embedded}",
                    path.display()
                ),
            ));
        }
        let mut end_of_turn = decoder.config.eos_token_ids.clone();
        end_of_turn.extend(other_ends);
        // A chat model ends its turn with the token that its template writes after an answer.
        let after = tokenizer.encode_with_specials(scaffold.to_user.trim_start())?;
        if let Some(first) = after.first()
            && tokenizer.is_special(*first)
        {
            end_of_turn.push(*first);
        }
        end_of_turn.sort_unstable();
        end_of_turn.dedup();
        let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let (path, template, grammars) = (path.to_owned(), None, OnceLock::new());
        Ok(Self { name, path, decoder, tokenizer, scaffold, template, end_of_turn, grammars })
    }

    /// What holds an answer to `grammar`, if there is one.
    ///
    /// # Errors
    /// `InvalidArgument`, in the name of `operation`, for one that does not compile or that this model cannot follow.
    pub(crate) fn held_to(
        &self,
        operation: &str,
        grammar: Option<&Grammar>,
    ) -> Result<Option<Constraint>> {
        let Some(grammar) = grammar else { return Ok(None) };
        let num_tokens = self.decoder.config.vocab_size;
        let compiler = self
            .grammars
            .get_or_init(|| GrammarCompiler::new(&self.tokenizer, num_tokens, &self.end_of_turn));
        let compiler = compiler.as_ref().map_err(|got| {
            Error::invalid(format!(
                "{operation}: grammar: {got}, expected a model of text in bytes, or no grammar"
            ))
        })?;
        compiler.compile(operation, grammar).map(Some)
    }

    /// The scaffold of a session that is offered `tools`, and given instructions if it `has_system` ones.
    ///
    /// # Errors
    /// `InvalidArgument` if the template has no place for tools or no system message, or a tool holds a control token or
    /// a mark of the engine's.
    pub(crate) fn offering(&self, tools: &[Tool], has_system: bool) -> Result<Scaffold> {
        let template = self.template.as_ref().ok_or_else(prompt::no_place)?;
        for (i, tool) in tools.iter().enumerate() {
            // What a tool says of itself may come from elsewhere, and stands in text whose control tokens count.
            let json = tool.json()?;
            if self.tokenizer.encode(&json, true)? != self.tokenizer.encode(&json, false)? {
                return Err(Error::invalid(format!(
                    "tools[{i}]: a control token of the model in its text, expected none"
                )));
            }
            // The template's text would be cut there.
            if let Some(mark) = prompt::MARKS.into_iter().find(|mark| json.contains(mark)) {
                return Err(Error::invalid(format!(
                    "tools[{i}]: text of the engine's own, {mark:?}, expected none"
                )));
            }
        }
        self.scaffold.offering(template.for_tools(), tools, has_system)
    }
}

fn scaffold_of(template: Option<&ChatTemplate>) -> Result<Scaffold> {
    template.map_or_else(|| Ok(Scaffold::plain()), Scaffold::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Opens a small model of 128 rows with a tokenizer of as many tokens and `<image>`, which its template may write.
    fn open(is_special: bool, template: Option<&str>) -> Result<Model> {
        const ROWS: usize = 128;
        let golden =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join("smollm2");
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), folder.path().join(name)).unwrap();
        }
        let mut tokenizer = crate::testing::sentencepiece("never");
        let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        for id in vocab.len()..ROWS {
            vocab.insert(format!("word{id}"), json!(id));
        }
        tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": ROWS, "content": "<image>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": is_special,
        }));
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        if let Some(template) = template {
            std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        }
        let files = ModelFiles::Folder(folder.path().to_owned());
        let model = Model::load(&files, &candle_core::Device::Cpu, &TensorGroup::alone())?;
        assert_eq!(model.decoder.config.vocab_size, ROWS);
        assert_eq!(model.tokenizer.vocab_size(), ROWS + 1);
        Ok(model)
    }

    #[test]
    fn a_special_token_beyond_the_models_rows_is_refused_only_if_something_writes_it() {
        assert_eq!(open(true, None).unwrap().tokenizer.spoken_size(), 128);
        let turn = "{% for message in messages %}[{{ message.content }}]{% endfor %}";
        assert!(open(true, Some(turn)).is_ok());
        let marked = turn.replace('[', "<image>");
        for refused in [open(false, None), open(true, Some(marked.as_str()))] {
            let error = refused.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
            assert!(error.to_string().contains("tokenizer of 129 tokens"), "{error}");
        }
    }
}

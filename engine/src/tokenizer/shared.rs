//! One vocabulary under two ways of reading added tokens: parsed, or treated as text.
//! Knows nothing of files: it starts from a tokenizer that has been built.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::TrainerWrapper;
use tokenizers::{AddedToken, Model, ModelWrapper, Token, Tokenizer as HfTokenizer, TokenizerImpl};

use super::Core;

/// A model behind a counter: the two tokenizers made by [`split`] hold one vocabulary.
#[derive(Clone)]
pub(super) struct SharedModel(Arc<ModelWrapper>);

impl Model for SharedModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        self.0.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> TrainerWrapper {
        self.0.get_trainer()
    }
}

/// The same tokenizer twice: parsing added tokens, and treating control tokens as text.
pub(super) fn split(tokenizer: &HfTokenizer) -> Result<(Core, Core), String> {
    let model = SharedModel(Arc::new(tokenizer.get_model().clone()));
    let build = || -> Result<Core, String> {
        let mut core: Core = TokenizerImpl::new(model.clone());
        core.with_normalizer(tokenizer.get_normalizer().cloned())
            .map_err(|source| format!("normalizer: {source}"))?
            .with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned())
            .with_decoder(tokenizer.get_decoder().cloned())
            .with_added_vocabulary(tokenizer.get_added_vocabulary().clone());
        Ok(core)
    };
    let mut full = build()?;
    full.set_encode_special_tokens(false);
    let mut plain = build()?;
    let markup: Vec<AddedToken> = plain
        .get_added_vocabulary()
        .get_added_tokens_decoder()
        .values()
        .filter(|token| !token.special && looks_like_markup(&token.content))
        .map(|token| token.clone().special(true))
        .collect();
    plain.add_special_tokens(markup).map_err(|source| format!("added tokens: {source}"))?;
    plain.set_encode_special_tokens(true);
    Ok((full, plain))
}

/// One past the largest id.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Of vocabulary and added tokens.
    pub(super) all: usize,
    /// The same but for those that the file marks as special.
    pub(super) spoken: usize,
}

impl Sizes {
    pub(super) fn of(tokenizer: &HfTokenizer) -> Self {
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let mut sizes = Self { all: 0, spoken: 0 };
        for id in tokenizer.get_vocab(true).into_values() {
            let size = id as usize + 1;
            sizes.all = sizes.all.max(size);
            if !added.get(&id).is_some_and(|token| token.special) {
                sizes.spoken = sizes.spoken.max(size);
            }
        }
        sizes
    }
}

/// Elements of HTML that vocabularies have tags of as ordinary tokens (Gemma). `s` is not one of them: `<s>` begins a document
/// elsewhere.
const HTML: &str = "a b blockquote body caption code div em footer h1 h2 h3 h4 h5 h6 html i iframe img li span strong sub sup \
    table tbody td tfoot th thead tr u ul";

/// Files mark some tokens that steer a model (`<tool_call>`, `<think>`) as ordinary additions.
fn looks_like_markup(content: &str) -> bool {
    let bracketed = |open, close| content.starts_with(open) && content.ends_with(close);
    let is_any = bracketed('<', '>') || bracketed('[', ']') || content.contains("<|");
    content.len() > 2 && is_any && !is_html(content)
}

/// Whether `content` is the tag that opens or closes an element of [`HTML`].
fn is_html(content: &str) -> bool {
    let inside = content.strip_prefix('<').and_then(|rest| rest.strip_suffix('>'));
    let name = inside.map(|inside| inside.strip_prefix('/').unwrap_or(inside));
    name.is_some_and(|name| HTML.split(' ').any(|own| own == name))
}

//! Recall inside attention: which older tokens are kept, chosen and attended to, as its caller configures it.
//! Knows no session and no file; the parts below hold the pages, choose among them and lay them out.

mod codec;
mod copied;
mod device;
mod disk;
mod estimate;
mod filling;
mod gather;
mod index;
mod intake;
mod landmarks;
mod lexical;
#[cfg(test)]
mod measure;
mod message;
mod reading;
mod recalled;
mod restoring;
mod rivals;
mod scan;
mod selection;
mod shares;
mod signs;
mod store;
#[cfg(test)]
mod tests;
mod vote;

pub(crate) use codec::Number;
pub use codec::PagePrecision;
pub(crate) use disk::FreshPage;
pub(crate) use filling::FillMemory;
pub(crate) use gather::{RecallScope, Together};
pub(crate) use message::Message;
pub(crate) use reading::PageSource;
pub(crate) use recalled::Recalled;
pub(crate) use selection::{OVER_FETCH, POOLED};
pub(crate) use store::{PageShape, PageStore};

use crate::error::{Error, Result};
use mka_kernels::PAGE_TOKENS;

/// How older tokens come back into a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RecallPolicy {
    /// Not at all: the window is attended, and the first page of the stream or those of its instructions.
    Off,
    /// As text put before the message.
    #[default]
    Text,
    /// As keys and values inside attention.
    Pages,
    /// As text and inside attention.
    Both,
}

impl RecallPolicy {
    /// Whether text is looked up.
    pub(crate) fn has_text(self) -> bool {
        matches!(self, Self::Text | Self::Both)
    }

    /// Whether pages are attended.
    pub(crate) fn has_pages(self) -> bool {
        matches!(self, Self::Pages | Self::Both)
    }
}

/// The rule by which recalled tokens are chosen; all but the first are other systems' rules over the same pages, for
/// comparison. Every rule chooses `PageConfig::tokens` tokens (InfLLM as many whole blocks as that holds), and none in
/// the layers below `PageConfig::first_layer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PageRule {
    /// Softmax a head, then the sum over a key/value head's group, over what is scored (TokenSelect, arXiv 2411.02886). A card
    /// scores every key, up to the length that [`LandmarkScan`] says. The processor scores a code of every key, and then
    /// twice as many tokens as are recalled by their keys. With other scans landmarks are scored, means of 8 keys with
    /// outliers (ShadowKV, arXiv 2410.21465), and then four times as many tokens by their keys.
    #[default]
    Mka,
    /// Nothing: sinks and window (StreamingLLM, arXiv 2309.17453).
    Streaming,
    /// Blocks of 128 tokens by the mean of their four representative keys, one choice for all heads
    /// (InfLLM, arXiv 2402.04617). Representatives are ranked by the queries of the window that follows them. As many
    /// blocks as there are tokens for, and beside them a last page that waits for the other half of its block.
    InfLlm,
    /// Runs of 16 tokens by the upper bound that their least and largest key entries give (Quest, arXiv 2406.10774).
    Quest,
    /// Tokens by the sum over all heads of each head's softmax over all tokens, one choice for all heads
    /// (TokenSelect, arXiv 2411.02886).
    TokenSelect,
}

/// What [`PageRule::Mka`] scores to choose among stored tokens.
///
/// A card that has the session's pages scores every key itself for `Auto`, up to 524,288 stored tokens, and for `KeyCodes`,
/// and every landmark otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LandmarkScan {
    /// As `KeyCodes` where the processor chooses from the start; for a session that outgrew a card, as `Flat` up to 524,288
    /// stored tokens and as `TwoLevel` beyond.
    #[default]
    Auto,
    /// Every landmark, the mean of 8 keys.
    Flat,
    /// The mean of each page's landmarks first, then the landmarks of the best pages.
    TwoLevel,
    /// Those whose sign codes are nearest to the query's (random hyperplanes; Charikar, 2002). Gives no estimate for
    /// `PageUsage::recovered`.
    SignHash,
    /// Every key, by a code of one bit a number (RaBitQ, arXiv 2405.12497).
    KeyCodes,
}

/// What a block of a prompt attends to while the stream fits the model's trained length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Prefill {
    /// Sinks, window and what is chosen for the block: device memory is constant.
    #[default]
    Selected,
    /// Every stored token, as the model was trained; device memory grows up to the trained length.
    Dense,
}

/// Recall inside attention: budgets and rules.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageConfig {
    /// Tokens that each key/value head recalls, rounded up to whole pages of 64.
    pub tokens: usize,
    /// Bytes of host memory, mapped files among it, for the stored pages of one session and their index. Beyond it the least
    /// used pages stay on disk alone (as far as `MemoryConfig::evicted_page_bytes` allows), or the oldest are let go. Where the
    /// processor chooses there are 4 bytes beside it for each query head and stored token.
    pub bytes: u64,
    /// Bytes of the model's own device, where that is not the processor, for the stored pages of one session: as long as
    /// they hold all of them, tokens are chosen and copied there; beyond, in host memory. What was reserved stays until
    /// the session is closed.
    pub device_bytes: u64,
    /// How stored keys and values are held.
    pub precision: PagePrecision,
    /// How tokens are chosen.
    pub rule: PageRule,
    /// What is scored for a choice before keys are.
    pub scan: LandmarkScan,
    /// What a prompt's blocks attend to.
    pub prefill: Prefill,
    /// Tokens that a choice serves, its own among them: decoded tokens in a row look for much the same. 1 chooses anew for
    /// each. A choice ends in any case once a page leaves the window, and at a commit. None: 4 where a card chooses and
    /// for other systems' rules; on the processor, where a choice takes the longer the more is stored, 16, 32 or 64.
    pub reuse_steps: Option<usize>,
    /// Layers below this one choose nothing: their queries look nearby.
    pub first_layer: usize,
    /// Tokens to either side of a stored token whose votes count for it: what stands beside what is asked for comes along.
    /// 0: each by itself; at most a page of 64.
    pub vote_reach: usize,
    /// Whether what a message's queries asked for stays asked for while it is answered.
    pub keep_votes: bool,
    /// Whether the rare words of a message pin the places where they stand.
    pub lexical: bool,
    /// Whether the tokens that are not recalled enter the softmax too, each page as its mean key and mean value.
    pub estimate: bool,
    /// Whether positions are counted over what is attended from where sinks, window and `tokens` no longer hold the stream,
    /// whatever is recalled then; else from the model's trained length on, and over the stream before. A model reads worse at
    /// the end of the length that it was trained on, and what is attended is mostly shorter; what is told by how far tokens
    /// stand apart is told less. With `Prefill::Dense` positions are those of the stream in any case.
    pub compact: bool,
}

impl Default for PageConfig {
    fn default() -> Self {
        Self {
            tokens: 2048,
            bytes: 2 << 30,
            device_bytes: 4 << 30,
            precision: PagePrecision::default(),
            rule: PageRule::default(),
            scan: LandmarkScan::default(),
            prefill: Prefill::default(),
            reuse_steps: None,
            first_layer: 3,
            vote_reach: 16,
            keep_votes: true,
            lexical: true,
            estimate: false,
            compact: true,
        }
    }
}

/// What recall inside attention did for a turn.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct PageUsage {
    /// Tokens of the stream whose keys and values are stored and can be chosen.
    pub stored_tokens: usize,
    /// Tokens that each key/value head recalled for a query.
    pub recalled_tokens: usize,
    /// For each layer, the share of the answer's attention that went to recalled tokens.
    pub share: Vec<f32>,
    /// For each layer, the share of the attention to all stored tokens that the recalled ones hold, as landmarks
    /// estimate it; 0 where the layer recalled nothing or its rule gives no estimate. Low means that much of what the
    /// answer asked for was left out.
    pub recovered: Vec<f32>,
}

impl PageConfig {
    /// Refuses what no model of `trained_tokens` could attend to together with a window of `window_tokens`.
    pub(crate) fn check(&self, window_tokens: usize, trained_tokens: usize) -> Result<()> {
        if self.vote_reach > PAGE_TOKENS {
            return Err(Error::invalid(format!(
                "open: pages.vote_reach {}, expected at most {PAGE_TOKENS}",
                self.vote_reach
            )));
        }
        // Sinks, recalled tokens and the window, which begins on a page's border, share the trained length.
        let beside = window_tokens + 2 * PAGE_TOKENS;
        let room = trained_tokens.saturating_sub(beside);
        // What is above the room may be too much to be rounded up.
        let fits = (1..=room).contains(&self.tokens);
        if !fits || self.tokens.next_multiple_of(PAGE_TOKENS) > room {
            return Err(Error::invalid(format!(
                "open: pages.tokens {}, expected 1 to {room}: a trained length of {trained_tokens} less the window of {window_tokens} and {} more",
                self.tokens,
                2 * PAGE_TOKENS
            )));
        }
        Ok(())
    }
}

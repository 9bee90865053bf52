//! Setters that make an option type in one expression, outside of the crate too, where no struct literal does.
//! Knows no default value and no call: the types stand beside what reads them, which checks their ranges.

use crate::engine::MemoryConfig;
use crate::feeding::{FeedMode, FeedOptions};
use crate::grammar::Grammar;
use crate::pages::{LandmarkScan, PageConfig, PagePrecision, PageRule, Prefill, RecallPolicy};
use crate::quote::Quote;
use crate::sampling::Sampling;
use crate::session::SendOptions;
use mka_memory::{Filter, Value};

impl Sampling {
    /// Divides logits by `temperature`; 0 takes the most likely token.
    #[must_use]
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = temperature;
        self
    }

    /// Keeps the `k` most likely tokens; 0 keeps all.
    #[must_use]
    pub fn top_k(mut self, k: usize) -> Self {
        self.top_k = k;
        self
    }

    /// Keeps the smallest set of tokens whose probability reaches `p`; 1 keeps all.
    #[must_use]
    pub fn top_p(mut self, p: f32) -> Self {
        self.top_p = p;
        self
    }

    /// Drops tokens less likely than the share `p` of the most likely one; 0 drops none.
    #[must_use]
    pub fn min_p(mut self, p: f32) -> Self {
        self.min_p = p;
        self
    }

    /// Makes recent tokens less likely by `penalty`; 1 changes none.
    #[must_use]
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.repetition_penalty = penalty;
        self
    }

    /// Draws by `seed`.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
}

impl SendOptions {
    /// Chooses tokens at `temperature`; [`SendOptions::sampling`] sets the rest.
    #[must_use]
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.sampling.temperature = temperature;
        self
    }

    /// Draws tokens by `seed`.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.sampling.seed = seed;
        self
    }

    /// Says when the message was said, milliseconds since 1970.
    #[must_use]
    pub fn time_ms(mut self, time_ms: i64) -> Self {
        self.time_ms = Some(time_ms);
        self
    }

    /// Marks message and answer with `value` under `key`.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Looks up memories of turns that `filter` accepts alone.
    #[must_use]
    pub fn recall_filter(mut self, filter: Filter) -> Self {
        self.recall_filter = Some(filter);
        self
    }

    /// Opens a new session in which the model may call `tools`, each the JSON of a function.
    #[must_use]
    pub fn tools<T: Into<String>>(mut self, tools: impl IntoIterator<Item = T>) -> Self {
        self.tools = tools.into_iter().map(Into::into).collect();
        self
    }

    /// Holds the answer to `grammar`.
    #[must_use]
    pub fn grammar(mut self, grammar: Grammar) -> Self {
        self.grammar = Some(grammar);
        self
    }
}

impl FeedOptions {
    /// Gives the session instructions that stand before its first document.
    #[must_use]
    pub fn system(mut self, instructions: impl Into<String>) -> Self {
        self.system = Some(instructions.into());
        self
    }

    /// Marks the document with `value` under `key`.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Says what of the document the model reads.
    #[must_use]
    pub fn mode(mut self, mode: FeedMode) -> Self {
        self.mode = mode;
        self
    }

    /// Says when the document was given, milliseconds since 1970.
    #[must_use]
    pub fn time_ms(mut self, time_ms: i64) -> Self {
        self.time_ms = Some(time_ms);
        self
    }
}

impl MemoryConfig {
    /// Attends to the last `tokens` exactly.
    #[must_use]
    pub fn window_tokens(mut self, tokens: usize) -> Self {
        self.window_tokens = tokens;
        self
    }

    /// Reads a prompt at most `tokens` at a time.
    #[must_use]
    pub fn block_tokens(mut self, tokens: usize) -> Self {
        self.block_tokens = tokens;
        self
    }

    /// Looks up `k` memories for each message; 0 recalls nothing.
    #[must_use]
    pub fn recall_k(mut self, k: usize) -> Self {
        self.recall_k = k;
        self
    }

    /// Puts at most `tokens` of recalled text before a message.
    #[must_use]
    pub fn recall_tokens(mut self, tokens: usize) -> Self {
        self.recall_tokens = tokens;
        self
    }

    /// Quotes as much of each recalled passage as `quote` says.
    #[must_use]
    pub fn quote(mut self, quote: Quote) -> Self {
        self.quote = quote;
        self
    }

    /// Keeps `bytes` of evicted pages on disk for each session.
    #[must_use]
    pub fn evicted_page_bytes(mut self, bytes: u64) -> Self {
        self.evicted_page_bytes = bytes;
        self
    }

    /// Brings older tokens back by `policy`.
    #[must_use]
    pub fn recall(mut self, policy: RecallPolicy) -> Self {
        self.recall = policy;
        self
    }

    /// Recalls inside attention as `pages` says.
    #[must_use]
    pub fn pages(mut self, pages: PageConfig) -> Self {
        self.pages = pages;
        self
    }
}

impl PageConfig {
    /// Recalls `tokens` for each key/value head.
    #[must_use]
    pub fn tokens(mut self, tokens: usize) -> Self {
        self.tokens = tokens;
        self
    }

    /// Holds at most `bytes` of a session's pages in host memory.
    #[must_use]
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.bytes = bytes;
        self
    }

    /// Holds at most `bytes` of them on the model's own device.
    #[must_use]
    pub fn device_bytes(mut self, bytes: u64) -> Self {
        self.device_bytes = bytes;
        self
    }

    /// Holds stored keys and values in `precision`.
    #[must_use]
    pub fn precision(mut self, precision: PagePrecision) -> Self {
        self.precision = precision;
        self
    }

    /// Chooses tokens by `rule`.
    #[must_use]
    pub fn rule(mut self, rule: PageRule) -> Self {
        self.rule = rule;
        self
    }

    /// Scores what `scan` says before keys are.
    #[must_use]
    pub fn scan(mut self, scan: LandmarkScan) -> Self {
        self.scan = scan;
        self
    }

    /// Lets a prompt's blocks attend to what `prefill` says.
    #[must_use]
    pub fn prefill(mut self, prefill: Prefill) -> Self {
        self.prefill = prefill;
        self
    }

    /// Chooses anew after `steps` decoded tokens.
    #[must_use]
    pub fn reuse_steps(mut self, steps: usize) -> Self {
        self.reuse_steps = Some(steps);
        self
    }

    /// Chooses nothing in the layers below `layer`.
    #[must_use]
    pub fn first_layer(mut self, layer: usize) -> Self {
        self.first_layer = layer;
        self
    }

    /// Counts the votes of `tokens` to either side for a stored token.
    #[must_use]
    pub fn vote_reach(mut self, tokens: usize) -> Self {
        self.vote_reach = tokens;
        self
    }

    /// Says whether what a message asked for stays asked for while it is answered.
    #[must_use]
    pub fn keep_votes(mut self, keep: bool) -> Self {
        self.keep_votes = keep;
        self
    }

    /// Says whether the rare words of a message pin the places where they stand.
    #[must_use]
    pub fn lexical(mut self, lexical: bool) -> Self {
        self.lexical = lexical;
        self
    }

    /// Says whether tokens that are not recalled enter the softmax as their pages' means.
    #[must_use]
    pub fn estimate(mut self, estimate: bool) -> Self {
        self.estimate = estimate;
        self
    }

    /// Says whether positions are counted over what is attended as soon as something is left out.
    #[must_use]
    pub fn compact(mut self, compact: bool) -> Self {
        self.compact = compact;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Literals that name every field: one that has no setter yet does not compile.

    #[test]
    fn every_setter_sets_its_own_field() {
        let sampling = Sampling::default()
            .temperature(0.7)
            .top_k(40)
            .top_p(0.9)
            .min_p(0.1)
            .repetition_penalty(1.1)
            .seed(7);
        let expected = Sampling {
            temperature: 0.7,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.1,
            seed: 7,
        };
        assert_eq!(sampling, expected);
        let pages = PageConfig::default()
            .tokens(128)
            .bytes(1)
            .device_bytes(2)
            .precision(PagePrecision::Int8)
            .rule(PageRule::Quest)
            .scan(LandmarkScan::Flat)
            .prefill(Prefill::Dense)
            .reuse_steps(3)
            .first_layer(4)
            .vote_reach(5)
            .keep_votes(false)
            .lexical(false)
            .estimate(true)
            .compact(false);
        let expected = PageConfig {
            tokens: 128,
            bytes: 1,
            device_bytes: 2,
            precision: PagePrecision::Int8,
            rule: PageRule::Quest,
            scan: LandmarkScan::Flat,
            prefill: Prefill::Dense,
            reuse_steps: Some(3),
            first_layer: 4,
            vote_reach: 5,
            keep_votes: false,
            lexical: false,
            estimate: true,
            compact: false,
        };
        assert_eq!(pages, expected);
        let memory = MemoryConfig::default()
            .window_tokens(256)
            .block_tokens(64)
            .recall_k(2)
            .recall_tokens(100)
            .quote(Quote::Passage)
            .evicted_page_bytes(3)
            .recall(RecallPolicy::Both)
            .pages(pages.clone());
        let expected = MemoryConfig {
            window_tokens: 256,
            block_tokens: 64,
            recall_k: 2,
            recall_tokens: 100,
            quote: Quote::Passage,
            evicted_page_bytes: 3,
            recall: RecallPolicy::Both,
            pages,
        };
        assert_eq!(memory, expected);
    }

    #[test]
    fn options_of_a_call_are_one_expression() {
        let options = SendOptions::default().temperature(0.7).seed(7).time_ms(5).max_new_tokens(9);
        assert_eq!(options.sampling, Sampling::default().temperature(0.7).seed(7));
        assert_eq!((options.time_ms, options.max_new_tokens), (Some(5), Some(9)));
        let year = Filter::eq("year", 2024.0);
        let options = SendOptions::default().metadata("year", 2024.0).recall_filter(year.clone());
        assert_eq!(options.metadata.get("year"), Some(&Value::from(2024.0)));
        assert_eq!(options.recall_filter, Some(year));
        let options = SendOptions::default().grammar(Grammar::JsonObject);
        assert_eq!(options.grammar, Some(Grammar::JsonObject));
        let options = FeedOptions::default().mode(FeedMode::Text).time_ms(5).name("book.txt");
        let options = options.system("Be brief.").metadata("kind", "book");
        let expected = FeedOptions {
            system: Some("Be brief.".into()),
            metadata: [("kind".to_owned(), Value::from("book"))].into(),
            mode: FeedMode::Text,
            time_ms: Some(5),
            name: Some("book.txt".into()),
            ..FeedOptions::default()
        };
        assert_eq!(options, expected);
    }
}

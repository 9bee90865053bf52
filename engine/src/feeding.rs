//! Taking in a document: cut into sections, remembered as text, and read by the model as far as asked.
//! Knows no question; the document stays an open user message, which another document continues and a question closes.

use crate::conversation::{Conversation, Pending, note_opening};
use crate::engine::Model;
use crate::error::{Error, Result};
use crate::generation::{self, Before};
use crate::memory::check_metadata;
use crate::pages::RecallPolicy;
use crate::snapshot::OpenTurn;
use crate::stream::{FeedEvent, FeedSummary, Sink};
use crate::tokenizer::Joined;
use mka_memory::{Metadata, NewTurn, Role};
use std::iter::{once, repeat};
use std::ops::Range;

/// What of a document the model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum FeedMode {
    /// `Model` up to four windows, `Text` beyond: on a processor a model reads hundreds of tokens a second, text memory
    /// takes in thousands. `Model` always in an engine of [`RecallPolicy::Pages`], which looks no text up.
    #[default]
    Auto,
    /// Every token runs through the model, and the text is remembered too.
    Model,
    /// The text is remembered; the model reads the last part that fits its window.
    Text,
}

/// How a document is taken in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FeedOptions {
    /// What the model reads.
    pub mode: FeedMode,
    /// Name of the document, shown beside what is recalled from it.
    pub name: Option<String>,
    /// Whether the text stands outside the chat template, for a completion to go on from it.
    pub completion: bool,
    /// When the document was given, milliseconds since 1970; None: now.
    pub time_ms: Option<i64>,
    /// By what the tokens that the model reads recall older ones; None: as the engine was opened. `Off` and `Text` read a
    /// document at the window's speed: what it leaves behind can be recalled all the same, but was written with the window
    /// alone in sight.
    pub recall: Option<RecallPolicy>,
    /// What the document's turns are marked with, for a filter of [`Recall`](crate::Recall) or [`Forget`](crate::Forget) to
    /// ask for: as [`NewTurn::metadata`], without keys that begin with `mka.`.
    pub metadata: Metadata,
    /// Instructions that stand before the first message of a session, which the document begins if the model reads of it;
    /// ignored later, as [`SendOptions::system`](crate::SendOptions::system) is. Where they would stand and the model's chat
    /// template takes none, the document is refused as `InvalidArgument`, before anything of it is stored.
    pub system: Option<String>,
}

impl FeedOptions {
    /// Every token through the model.
    pub fn through_model() -> Self {
        Self { mode: FeedMode::Model, ..Self::default() }
    }

    /// As text memory.
    pub fn text() -> Self {
        Self { mode: FeedMode::Text, ..Self::default() }
    }

    /// Takes in the text without the chat template.
    pub fn completion(mut self, completion: bool) -> Self {
        self.completion = completion;
        self
    }

    /// Says by what the tokens that are read recall older ones.
    pub fn recall(mut self, recall: RecallPolicy) -> Self {
        self.recall = Some(recall);
        self
    }

    /// Names the document.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }
}

/// Bytes of one section, a turn of the log: about 512 tokens of English, one forward pass.
const SECTION_BYTES: usize = 2048;
/// Tokens read between commits: a crash loses half a minute of reading at 300 tokens a second, or a whole one while the
/// commit before is still being written.
pub(crate) const COMMIT_TOKENS: usize = 8192;
/// Sections of text memory between commits: 512 KiB, so that syncing the disk costs little.
const COMMIT_SECTIONS: usize = 256;

/// How far a document has been taken in.
pub(crate) struct Taken {
    pub(crate) fed_bytes: u64,
    pub(crate) committed_bytes: u64,
    pub(crate) total_bytes: u64,
}

/// [`take_in`] with its progress sent to a stream.
pub(crate) fn feed(
    conversation: &mut Conversation,
    text: &str,
    options: &FeedOptions,
    now_ms: i64,
    sink: &Sink<FeedEvent>,
) -> Result<FeedSummary> {
    check_metadata("feed", &options.metadata)?;
    let time_ms = options.time_ms.unwrap_or(now_ms);
    conversation.set_policy("feed", options.recall.unwrap_or(conversation.shared.config.recall))?;
    let system = options.system.as_deref();
    let before = Before { system, joined: true, ..Before::default() };
    take_in(conversation, text, options, time_ms, before, &mut |taken| {
        sink.send(FeedEvent::Progress {
            fed_bytes: taken.fed_bytes,
            committed_bytes: taken.committed_bytes,
            total_bytes: taken.total_bytes,
        })
    })
}

/// Takes in `text`; `progress` says whether to go on.
///
/// # Errors
/// `Cancelled` when `progress` said no: what was committed stays.
pub(crate) fn take_in(
    conversation: &mut Conversation,
    text: &str,
    options: &FeedOptions,
    time_ms: i64,
    before: Before<'_>,
    progress: &mut dyn FnMut(&Taken) -> bool,
) -> Result<FeedSummary> {
    if text.is_empty() {
        return Err(Error::invalid("feed: text is empty, expected a document"));
    }
    let shared = conversation.shared.clone();
    let sections = sections(text);
    let total_bytes = text.len() as u64;
    let window = shared.config.window_tokens;
    let (mode, first_read) = match &shared.model {
        None => (FeedMode::Text, sections.len()),
        Some(model) => match options.mode {
            FeedMode::Model => (FeedMode::Model, 0),
            // What is not looked up must be read to be recalled.
            FeedMode::Auto if shared.config.recall == RecallPolicy::Pages => (FeedMode::Model, 0),
            // Four bytes a token is English prose; only the default rests on it.
            FeedMode::Auto if text.len() / 4 <= 4 * window => (FeedMode::Model, 0),
            // A quarter of the window stays free for the question and what is recalled for it.
            _ => (FeedMode::Text, tail(model, text, &sections, window - window / 4)?),
        },
    };
    tracing::debug!(?mode, sections = sections.len(), first_read, "feed");
    if let Some(model) = &shared.model
        && first_read < sections.len()
        && !options.completion
    {
        generation::check_opening(model, conversation.state.open, before.system)?;
    }
    let (remembered, read) = sections.split_at(first_read);
    let mut feeding = Feeding {
        summary: FeedSummary {
            bytes: total_bytes,
            model_tokens: 0,
            chunks_added: 0,
            chunks_deduplicated: 0,
        },
        taken: Taken { fed_bytes: 0, committed_bytes: 0, total_bytes },
        turns: Vec::new(),
        starts: Vec::new(),
        pending: None,
        text,
        options,
        time_ms,
        before,
        progress,
    };
    let taken = feeding.remember(conversation, remembered);
    let taken = taken.and_then(|()| feeding.read(conversation, read));
    let taken = taken.and_then(|()| feeding.commit_and_ask(conversation));
    // The caller takes the conversation back after an error: nothing may be under way by then.
    let ended = feeding.end_commit(conversation);
    // A disk that failed is what the caller must hear of, whatever else ended the feed.
    ended.and(taken)?;
    Ok(feeding.summary)
}

/// Whether a commit is waited for at once, or taken note of once it is done, at the latest when the next one is due.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Await {
    Now,
    Later,
}

/// A document on its way in.
struct Feeding<'a> {
    summary: FeedSummary,
    taken: Taken,
    turns: Vec<NewTurn>,
    starts: Vec<Option<u64>>,
    /// A commit under way, and the bytes of the document that are on disk after it.
    pending: Option<(Pending, u64)>,
    text: &'a str,
    options: &'a FeedOptions,
    time_ms: i64,
    before: Before<'a>,
    progress: &'a mut dyn FnMut(&Taken) -> bool,
}

impl Feeding<'_> {
    /// Takes in `sections` as text memory.
    fn remember(
        &mut self,
        conversation: &mut Conversation,
        sections: &[Range<usize>],
    ) -> Result<()> {
        for section in sections {
            self.push(section, Vec::new(), None);
            if self.turns.len() == COMMIT_SECTIONS {
                self.commit_and_ask(conversation)?;
            }
        }
        Ok(())
    }

    /// Runs `sections` through the model.
    fn read(&mut self, conversation: &mut Conversation, sections: &[Range<usize>]) -> Result<()> {
        let shared = conversation.shared.clone();
        let mut uncommitted = 0;
        // What goes on in the message that the first section opens.
        let next = Before { joined: true, ..Before::default() };
        for (section, before) in sections.iter().zip(once(self.before).chain(repeat(next))) {
            let model = shared.model("feed")?;
            let open = conversation.state.open;
            let mut read = Joined::behind(&model.tokenizer, conversation.last_token());
            match self.options.completion {
                true => generation::bare_opening(&mut read, open),
                false => generation::opening(&mut read, model, open, before)?,
            }
            let opening_tokens = read.num_tokens();
            conversation.keep_opening(opening_tokens)?;
            read.content(&self.text[section.clone()])?;
            let tokens = read.take()?;
            let start = conversation.position();
            let (progress, taken) = (&mut self.progress, &self.taken);
            conversation.prefill(&tokens, &mut || progress(taken))?;
            conversation.state.open = OpenTurn::User;
            uncommitted += tokens.len();
            self.summary.model_tokens += tokens.len() as u64;
            self.push(section, tokens, Some(start));
            let opens = before.instructs(open) && !self.options.completion;
            if let Some(turn) = self.turns.last_mut().filter(|_| opens) {
                note_opening(turn, opening_tokens);
            }
            if self.pending.as_ref().is_some_and(|(pending, _)| pending.is_done()) {
                self.end_commit(conversation)?;
            }
            let is_full = conversation.pages_wait();
            if uncommitted >= COMMIT_TOKENS || is_full {
                let waits = is_full || !conversation.may_go_on();
                // When it is due depends on the disk: whether to go on is asked before the next block.
                self.commit(conversation, if waits { Await::Now } else { Await::Later })?;
                uncommitted = 0;
            }
        }
        Ok(())
    }

    /// Adds a section to what the next commit stores.
    fn push(&mut self, section: &Range<usize>, tokens: Vec<u32>, start: Option<u64>) {
        let mut turn = NewTurn::new(Role::Document, &self.text[section.clone()]);
        turn.time_ms = self.time_ms;
        turn.source = self.options.name.clone();
        turn.metadata = self.options.metadata.clone();
        turn.tokens = tokens;
        self.turns.push(turn);
        self.starts.push(start);
        self.taken.fed_bytes = section.end as u64;
    }

    /// Commits what is taken in, and is `Cancelled` if the caller wants no more.
    fn commit_and_ask(&mut self, conversation: &mut Conversation) -> Result<()> {
        let go_on = self.commit(conversation, Await::Now)?;
        match conversation.is_cancelled_anywhere(!go_on)? {
            true => Err(Error::cancelled("feed")),
            false => Ok(()),
        }
    }

    /// Commits what is taken in; whether the caller wants to go on.
    fn commit(&mut self, conversation: &mut Conversation, wait: Await) -> Result<bool> {
        self.end_commit(conversation)?;
        if !self.turns.is_empty() {
            let turns = std::mem::take(&mut self.turns);
            let starts = std::mem::take(&mut self.starts);
            let pending = conversation.begin_commit(turns, &starts)?;
            self.pending = Some((pending, self.taken.fed_bytes));
            if wait == Await::Now {
                self.end_commit(conversation)?;
            }
        }
        Ok((self.progress)(&self.taken))
    }

    /// Waits for the commit under way, if there is one.
    fn end_commit(&mut self, conversation: &mut Conversation) -> Result<()> {
        let Some((pending, bytes)) = self.pending.take() else { return Ok(()) };
        let committed = conversation.end_commit(pending)?;
        self.summary.chunks_added += committed.chunks_added;
        self.summary.chunks_deduplicated += committed.chunks_deduplicated;
        self.taken.committed_bytes = bytes;
        Ok(())
    }
}

/// Cuts `text` into sections of at most [`SECTION_BYTES`], at the best border in their last quarter: a blank line, a
/// line, a sentence, a word. A cut stands before the white space, which then begins the next section's first token.
pub(crate) fn sections(text: &str) -> Vec<Range<usize>> {
    let mut sections = Vec::new();
    let mut start = 0;
    while text.len() - start > SECTION_BYTES {
        let end = floor_char_boundary(text, start + SECTION_BYTES);
        let from = floor_char_boundary(text, start + SECTION_BYTES / 4 * 3);
        let tail = &text[from..end];
        let cut = ["\n\n", "\n", ". ", "? ", "! ", " "]
            .iter()
            .find_map(|border| {
                // Before the white space, but behind the mark that ends a sentence.
                tail.rfind(border)
                    .map(|at| at + border.len() - border.trim_start_matches(['.', '?', '!']).len())
            })
            .map_or(end, |at| from + at);
        let cut = if cut > start { cut } else { end };
        sections.push(start..cut);
        start = cut;
    }
    if start < text.len() {
        sections.push(start..text.len());
    }
    sections
}

fn floor_char_boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// The first of the last sections that fit `budget` tokens together.
fn tail(model: &Model, text: &str, sections: &[Range<usize>], budget: usize) -> Result<usize> {
    let mut left = budget;
    let mut first = sections.len();
    for (i, section) in sections.iter().enumerate().rev() {
        let tokens = model.tokenizer.count(&text[section.clone()])?;
        if tokens > left {
            break;
        }
        left -= tokens;
        first = i;
    }
    Ok(first)
}

/// Splits a message of more than `longest` tokens into a document and the message that ends it.
pub(crate) fn split_long<'a>(
    model: &Model,
    message: &'a str,
    longest: usize,
) -> Result<(&'a str, &'a str)> {
    // A token is at least one byte, so short messages need no count.
    if message.len() <= longest || model.tokenizer.count(message)? <= longest {
        return Ok(("", message));
    }
    let sections = sections(message);
    let first = tail(model, message, &sections, longest)?;
    let cut = match sections.get(first) {
        Some(section) => section.start,
        // One section alone is over the budget: its last bytes are the message, one token each at most.
        None => floor_char_boundary(message, message.len() - longest.min(message.len())),
    };
    Ok(message.split_at(cut))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sections_are_the_text_in_order_and_never_too_long(text in "(\\PC| |\n|\\. ){0,6000}") {
            let sections = sections(&text);
            let joined: String = sections.iter().map(|range| &text[range.clone()]).collect();
            prop_assert_eq!(joined, text);
            prop_assert!(sections.iter().all(|range| range.len() <= SECTION_BYTES && !range.is_empty()));
        }
    }

    #[test]
    fn a_text_of_one_long_word_is_cut_at_characters() {
        let text = "é".repeat(5000);
        assert_eq!(sections(&text).len(), 5);
    }
}

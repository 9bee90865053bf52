//! Answering what tools gave back: their results as the template shows them, each a turn of the log or, of a long one, several.
//! Knows neither a handle nor a thread, nor what was called.

use super::{Asked, Prompt, Quotation, answer, check_marks, recall, turn};
use crate::conversation::{Conversation, note_batch};
use crate::engine::Model;
use crate::error::{Error, Result};
use crate::feeding::{self, COMMIT_TOKENS};
use crate::generation;
use crate::prompt;
use crate::session::SendOptions;
use crate::snapshot::OpenTurn;
use crate::stream::{Event, Sink, Usage};
use crate::tokenizer::Joined;
use crate::tools::ToolResult;
use mka_memory::{NewTurn, Role};
use std::ops::Range;

/// Answers `results`; the usage, or none for a caller who is gone.
///
/// # Errors
/// `InvalidArgument` without a result, before the first answer, or for settings outside their range; what the model or the
/// store gives.
pub(crate) fn send_results(
    conversation: &mut Conversation,
    results: &[ToolResult],
    options: &SendOptions,
    sink: &Sink<Event>,
) -> Result<Option<Usage>> {
    if results.is_empty() {
        return Err(Error::invalid("send_tool: no result, expected one at least"));
    }
    options.sampling.check()?;
    check_marks("send_tool", options)?;
    let shared = conversation.shared.clone();
    let model = shared.model("send_tool")?;
    let open = conversation.state.open;
    if open == OpenTurn::Start {
        return Err(Error::invalid(
            "send_tool: nothing was said yet, expected an answer that calls",
        ));
    }
    let constraint = model.held_to("send_tool", options.grammar.as_ref())?;
    let now_ms = shared.now_ms()?;
    let time_ms = options.time_ms.unwrap_or(now_ms);
    conversation.set_policy("send_tool", options.recall.unwrap_or(shared.config.recall))?;
    // A result has the template around it in any case.
    let options = &SendOptions { completion: false, ..options.clone() };

    let (parts, num_read) = parts(model, results, shared.config.window_tokens)?;
    let contents: Vec<&str> = parts[num_read..].iter().map(|part| part.said).collect();
    let tail = contents.join("\n");
    let coming_tokens = model.tokenizer.count(&tail)?;
    // Results that fill the window hide what the user asked of them.
    let question = if num_read > 0 { conversation.last_words()? } else { None };
    let query = match &question {
        Some(question) => format!("{}\n{tail}", question.text),
        None => tail,
    };
    if num_read > 0 {
        take_in(conversation, (&parts, num_read), options, time_ms, sink)?;
    }
    let words = model.tokenizer.encode(&query, false)?;
    let asked = Asked { query: &query, question: question.as_ref(), coming_tokens };
    let (recalled, hits) = match query.trim().is_empty() {
        true => Default::default(),
        false => recall(conversation, asked, options, now_ms)?,
    };
    if !hits.is_empty() {
        // A caller who is gone is noticed before the first block.
        sink.send(Event::Recalled(hits));
    }

    let scaffold = &model.scaffold.result;
    let mut written = Joined::behind(&model.tokenizer, conversation.last_token());
    let mut quotation = 0..0;
    let mut turns = Vec::new();
    for (i, part) in parts.iter().enumerate().skip(num_read) {
        part.open(&mut written, model, open, i == 0)?;
        if i == num_read && !recalled.is_empty() {
            if !part.begins {
                written.content(&scaffold.written("\n\n"))?;
            }
            quotation.start = written.num_tokens();
            written.content(&scaffold.written(&recalled))?;
            quotation.end = written.num_tokens();
            written.content(&scaffold.written(&format!("\n{}", part.shown)))?;
        } else {
            written.content(&scaffold.written(part.shown))?;
        }
        if i + 1 == parts.len() {
            written.scaffold(&scaffold.to_answer)?;
            if !options.answer_prefix.is_empty() {
                written.scaffold(&model.scaffold.answer_lead)?;
            }
            written.content(&options.answer_prefix)?;
        }
        let mut given = part.turn(options, time_ms, written.take()?);
        note_batch(&mut given, i, parts.len());
        turns.push(given);
    }
    // Memory is quoted in the first, and there is one.
    let first = std::mem::take(&mut turns[0].tokens);
    let (own, quotation) = Quotation::cut(first, recalled, quotation);
    turns[0].tokens = own;
    answer(conversation, Prompt { turns, quotation, words }, options, constraint, sink)
}

/// What is a turn of its own: a result, or a section of a long one.
#[derive(Clone, Copy)]
struct Part<'a> {
    result: &'a ToolResult,
    /// As the log has it.
    said: &'a str,
    /// As the model is shown it.
    shown: &'a str,
    /// Whether the result begins with it.
    begins: bool,
}

impl<'a> Part<'a> {
    fn whole(result: &'a ToolResult, trims: bool) -> Self {
        let (said, shown) = (result.content.as_str(), prompt::shown(&result.content, trims));
        Self { result, said, shown, begins: true }
    }

    /// The sections of `text`, which is what this begins with or all of it.
    fn sections(&self, text: &'a str) -> Vec<Self> {
        let sections = feeding::sections(text);
        if sections.len() <= 1 && text.len() == self.shown.len() {
            return vec![*self];
        }
        let part = |section: Range<usize>| {
            let begins = section.start == 0;
            let text = &text[section];
            Self { said: text, shown: text, begins, ..*self }
        };
        sections.into_iter().map(part).collect()
    }

    /// Writes what stands before it; `open` is what the results follow, and it `is_first` behind that.
    fn open(
        &self,
        written: &mut Joined<'_>,
        model: &Model,
        open: OpenTurn,
        is_first: bool,
    ) -> Result<()> {
        let scaffold = &model.scaffold.result;
        match (is_first, self.begins) {
            (true, _) => generation::closing(written, model, open, &scaffold.to_result),
            (false, true) => written.scaffold(&scaffold.between),
            (false, false) => Ok(()),
        }
    }

    fn turn(&self, options: &SendOptions, time_ms: i64, tokens: Vec<u32>) -> NewTurn {
        let mut given = turn(Role::Tool, self.said.to_owned(), time_ms, tokens);
        given.source = self.result.name.clone();
        given.metadata = options.metadata.clone();
        given
    }
}

/// `results` as parts, and how many of these are read and committed before memory is looked up. Where they are longer than
/// half a `window` together that is all but a tail of a quarter: the last results that fit, or the end of the last one.
fn parts<'a>(
    model: &Model,
    results: &'a [ToolResult],
    window: usize,
) -> Result<(Vec<Part<'a>>, usize)> {
    let trims = model.scaffold.result.trims;
    let whole: Vec<Part<'a>> = results.iter().map(|result| Part::whole(result, trims)).collect();
    let count = |part: &Part<'_>| model.tokenizer.count(part.shown);
    let counts = whole.iter().map(count).collect::<Result<Vec<usize>>>()?;
    if counts.iter().sum::<usize>() <= window / 2 {
        return Ok((whole, 0));
    }
    // What is recalled takes half a window at most, and what the user asked an eighth: all of it stands in the last window,
    // with room for an answer.
    let longest = window / 4;
    let mut tail_tokens = 0;
    let fits = |count: &&usize| {
        tail_tokens += **count;
        tail_tokens <= longest
    };
    let num_fitting = counts.iter().rev().take_while(fits).count();
    let (head, tail) = whole.split_at(whole.len() - num_fitting.max(1));
    let mut parts: Vec<Part<'a>> = Vec::new();
    for part in head {
        parts.extend(part.sections(part.shown));
    }
    let mut tail = tail.to_vec();
    if num_fitting == 0
        && let [last] = tail.as_mut_slice()
    {
        let (beginning, end) = feeding::split_long(model, last.shown, longest)?;
        parts.extend(last.sections(beginning));
        *last = Part { said: end, shown: end, begins: beginning.is_empty(), ..*last };
    }
    let num_read = parts.len();
    parts.append(&mut tail);
    Ok((parts, num_read))
}

/// Reads and commits the first `num_read` of `parts`, the first of which stands behind what is open.
///
/// # Errors
/// `Cancelled` if the caller is gone: what was committed stays.
fn take_in(
    conversation: &mut Conversation,
    (parts, num_read): (&[Part<'_>], usize),
    options: &SendOptions,
    time_ms: i64,
    sink: &Sink<Event>,
) -> Result<()> {
    let shared = conversation.shared.clone();
    let model = shared.model("send_tool")?;
    let open = conversation.state.open;
    conversation.last_prompt = None;
    let (mut turns, mut starts, mut uncommitted) = (Vec::new(), Vec::new(), 0);
    for (i, part) in parts.iter().enumerate().take(num_read) {
        let mut written = Joined::behind(&model.tokenizer, conversation.last_token());
        part.open(&mut written, model, open, i == 0)?;
        written.content(&model.scaffold.result.written(part.shown))?;
        let mut given = part.turn(options, time_ms, written.take()?);
        note_batch(&mut given, i, parts.len());
        starts.push(Some(conversation.position()));
        conversation.prefill(&given.tokens, &mut || !sink.is_cancelled())?;
        // Should it end here, what comes next closes it.
        conversation.state.open = OpenTurn::Results;
        uncommitted += given.tokens.len();
        turns.push(given);
        if i + 1 == num_read || uncommitted >= COMMIT_TOKENS || conversation.pages_wait() {
            let (turns, starts) = (std::mem::take(&mut turns), std::mem::take(&mut starts));
            conversation.commit(turns, &starts, None)?;
            uncommitted = 0;
        }
        if conversation.is_cancelled_anywhere(sink.is_cancelled())? {
            return Err(Error::cancelled("send_tool"));
        }
    }
    Ok(())
}

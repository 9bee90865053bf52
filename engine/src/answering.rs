//! Answering a message: what is recalled for it, its prompt, the answer, their turns in the log; and answering it once more.
//! Knows neither a handle nor a thread.

mod results;
#[cfg(test)]
mod tests;

pub(crate) use results::send_results;

use crate::conversation::{self, Conversation, LastPrompt, note_opening};
use crate::engine::{Model, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::feeding::{self, FeedMode, FeedOptions, Taken};
use crate::generation::{self, Answer, Before, Stop};
use crate::grammar::Constraint;
use crate::memory::check_metadata;
use crate::pages::{Message, RecallPolicy};
use crate::prompt::{self, Scaffold};
use crate::quote;
use crate::session::SendOptions;
use crate::snapshot::OpenTurn;
use crate::stream::{Event, Sink, StopReason, Usage};
use crate::template::Tool;
use crate::tokenizer::Joined;
use mka_memory::{
    ENGINE_KEYS, Hit, MAX_METADATA_ENTRIES, NewTurn, Recall, Role, Turn, TurnId, Value,
};
use std::ops::Range;

/// Metadata of an answer in the log that was begun with words of the caller's, or goes on in text: how long those are.
const PREFIX_BYTES: &str = "mka.answer_prefix_bytes";
/// Metadata of the same: whether the message has no chat template around it.
const COMPLETION: &str = "mka.answer_completion";
/// The most entries of a message's metadata: the engine has up to two of its own beside them, in the turn of the answer and
/// in those of results.
const MAX_MARKS: usize = MAX_METADATA_ENTRIES - 2;

/// Memories below this share of the best one's score stay out of the prompt.
///
/// Where one passage answers, the others score a quarter of it, and a small model is led astray by them; where several
/// answer, their scores are close.
const RECALL_FLOOR: f32 = 0.5;

/// What a message asks of memory.
struct Asked<'a> {
    query: &'a str,
    /// What the user said, where the message is none of the user's and may have left it behind: it is quoted too.
    question: Option<&'a Turn>,
    /// Tokens of the message.
    coming_tokens: usize,
}

/// What is recalled for a message, as text and hits.
fn recall(
    conversation: &Conversation,
    asked: Asked<'_>,
    options: &SendOptions,
    now_ms: i64,
) -> Result<(String, Vec<Hit>)> {
    let Asked { query: message, question, coming_tokens } = asked;
    let shared = &conversation.shared;
    let k = options.recall_k.unwrap_or(shared.config.recall_k);
    // Recalled text may take half the window at most, so that the message and an answer fit beside it.
    let budget = shared.config.recall_tokens.min(shared.config.window_tokens / 2);
    let has_text = options.recall.unwrap_or(shared.config.recall).has_text();
    if !has_text || k == 0 || budget == 0 {
        return Ok((String::new(), Vec::new()));
    }
    let mut except_turns = conversation.turns_in_window(coming_tokens + budget);
    let question = question.filter(|turn| !except_turns.contains(&turn.id));
    // A question is found best by itself, and would keep out what answers it.
    except_turns.extend(question.map(|turn| turn.id));
    let query = Recall {
        k,
        across_sessions: options.across_sessions,
        except_turns,
        now_ms: Some(now_ms),
        filter: options.recall_filter.clone(),
        ..Recall::default()
    };
    let mut hits = shared.store.recall(&conversation.scope, message, &query)?;
    let floor = hits.first().map_or(0.0, |best| best.score * RECALL_FLOOR);
    hits.retain(|hit| hit.score >= floor);
    let quotations = quote::Quotation::of(&hits, message, shared.config.quote);
    let (mut text, chosen) =
        quote::assemble(&quotations, budget, |text| shared.count_tokens(text))?;
    if let Some(question) = question
        && shared.count_tokens(&question.text)? <= shared.config.window_tokens / 8
    {
        text = quote::behind_words(&question.text, &text);
    }
    // An index that is built in the background may find other hits in another process: the prompt is one.
    let text = shared.model("recall")?.decoder.group.first_text(text)?;
    Ok((text, chosen.into_iter().map(|i| hits[i].clone()).collect()))
}

/// Answers `message`; the usage, or none for a caller who is gone.
///
/// # Errors
/// `InvalidArgument` for an empty message or settings outside their range; what the model or the store gives.
pub(crate) fn send(
    conversation: &mut Conversation,
    message: &str,
    options: &SendOptions,
    sink: &Sink<Event>,
) -> Result<Option<Usage>> {
    if message.is_empty() {
        return Err(Error::invalid("send: message is empty, expected text"));
    }
    options.sampling.check()?;
    check_marks("send", options)?;
    let shared = conversation.shared.clone();
    let model = shared.model("send")?;
    let constraint = model.held_to("send", options.grammar.as_ref())?;
    if !options.completion {
        generation::check_opening(model, conversation.state.open, options.system.as_deref())?;
    }
    let now_ms = shared.now_ms()?;
    let time_ms = options.time_ms.unwrap_or(now_ms);

    let policy = options.recall.unwrap_or(shared.config.recall);
    conversation.set_policy("send", policy)?;
    let offering = offering(model, conversation.state.open, options)?;
    let before = Before {
        system: options.system.as_deref(),
        joined: options.joined,
        offering: offering.as_ref(),
    };
    // As the template would show it; of a message that goes on in a document the beginning stands there.
    let said = message;
    let goes_on = options.joined && conversation.state.open == OpenTurn::User;
    let trims = model.scaffold.trims.user && !options.completion;
    let message = if goes_on { prompt::shown_end(said, trims) } else { prompt::shown(said, trims) };
    let longest = shared.config.window_tokens / 2;
    let (document, message) = feeding::split_long(model, message, longest)?;
    let said = if document.is_empty() { said } else { message };
    // What was cut off a long message is its beginning.
    let mut before_message = before;
    if !document.is_empty() {
        // What is not looked up must be read to be recalled: by this message, or by those after it.
        let is_read = [policy, shared.config.recall].contains(&RecallPolicy::Pages);
        let mode = if is_read { FeedMode::Model } else { FeedMode::Text };
        let metadata = options.metadata.clone();
        let feed = FeedOptions { mode, metadata, ..FeedOptions::default() };
        let feed = feed.completion(options.completion);
        let go_on = &mut |_: &Taken| !sink.is_cancelled();
        let taken = feeding::take_in(conversation, document, &feed, time_ms, before, go_on)?;
        before_message.joined |= taken.model_tokens > 0;
    }

    let own_tokens = model.tokenizer.encode(message, false)?;
    let asked = Asked { query: message, question: None, coming_tokens: own_tokens.len() };
    let (recalled, hits) = recall(conversation, asked, options, now_ms)?;
    if !hits.is_empty() {
        // A caller who is gone is noticed before the first block.
        sink.send(Event::Recalled(hits));
    }

    // The prompt: scaffold, quoted memories, message, scaffold. Contents are encoded so that no text in them can
    // become a control token.
    let open = conversation.state.open;
    let mut written = Joined::behind(&model.tokenizer, conversation.last_token());
    match options.completion {
        true => generation::bare_opening(&mut written, open),
        false => generation::opening(&mut written, model, open, before_message)?,
    }
    let opening_tokens = written.num_tokens();
    conversation.keep_opening(opening_tokens)?;
    let is_open = matches!(open, OpenTurn::User | OpenTurn::Results);
    if written.num_tokens() == 0 && is_open && !recalled.is_empty() {
        written.content("\n\n")?;
    }
    let quotation_start = written.num_tokens();
    written.content(&recalled)?;
    let quotation = quotation_start..written.num_tokens();
    match recalled.is_empty() {
        true => written.content(message)?,
        false => written.content(&format!("\n{message}"))?,
    }
    if !options.completion {
        written.scaffold(&model.scaffold.to_answer)?;
        if !options.answer_prefix.is_empty() {
            written.scaffold(&model.scaffold.answer_lead)?;
        }
    }
    written.content(&options.answer_prefix)?;
    let (own, quotation) = Quotation::cut(written.take()?, recalled, quotation);
    let mut asking = turn(Role::User, said.to_owned(), time_ms, own);
    asking.metadata = options.metadata.clone();
    if before_message.instructs(open) && !options.completion {
        note_opening(&mut asking, opening_tokens);
    }
    let prompt = Prompt { turns: vec![asking], quotation, words: own_tokens };
    answer(conversation, prompt, options, constraint, sink)
}

/// The scaffold of a session that begins with the tools of `options`, if it does.
///
/// # Errors
/// `InvalidArgument` for what is no tool, or where the model is shown none.
fn offering(model: &Model, open: OpenTurn, options: &SendOptions) -> Result<Option<Scaffold>> {
    let tools = Tool::all(&options.tools)?;
    if tools.is_empty() || open != OpenTurn::Start {
        return Ok(None);
    }
    if options.completion {
        return Err(Error::invalid(
            "tools: completion leaves the chat template out, expected none",
        ));
    }
    model.offering(&tools, options.system.is_some()).map(Some)
}

/// A message that is ready to be read: one of the user's, or what tools gave back.
struct Prompt {
    /// Its turns in the log with their tokens, those of the quotation left out.
    turns: Vec<NewTurn>,
    quotation: Quotation,
    /// Tokens of its own words, which are looked for in the stored pages.
    words: Vec<u32>,
}

/// What memory gives to a message, within its first turn. A turn of its own, which is forgotten with what it quotes, to the
/// last token: the message stands without it.
struct Quotation {
    text: String,
    tokens: Vec<u32>,
    /// Tokens of the first turn that stand before it.
    tokens_before: usize,
}

impl Quotation {
    /// The tokens of a turn less those `within`, which quote `text`.
    fn cut(mut tokens: Vec<u32>, text: String, within: Range<usize>) -> (Vec<u32>, Self) {
        let tokens_before = within.start;
        let quoted = tokens.drain(within).collect();
        (tokens, Self { text, tokens: quoted, tokens_before })
    }
}

/// Reads `prompt`, answers it and commits both; the usage, or none for a caller who is gone.
fn answer(
    conversation: &mut Conversation,
    prompt: Prompt,
    options: &SendOptions,
    constraint: Option<Constraint>,
    sink: &Sink<Event>,
) -> Result<Option<Usage>> {
    let Prompt { turns: own, quotation, words } = prompt;
    let mut tokens: Vec<u32> = own.iter().flat_map(|turn| turn.tokens.iter().copied()).collect();
    let at = quotation.tokens_before;
    tokens.splice(at..at, quotation.tokens.iter().copied());
    let start = conversation.position();
    let reused = conversation.attended_tokens();
    let Some((last_token, head)) = tokens.split_last() else {
        return Err(Error::invalid("message gives no token, expected at least one"));
    };
    let mut go_on = || !sink.is_cancelled();
    conversation.prefill_message(&words, head, &mut go_on)?;
    let (mut before_last, asked) = (conversation.save(), conversation.message());
    let prompt_tokens = conversation.attended_tokens() + 1;
    let answer = generation::generate(conversation, *last_token, options, constraint, sink)?;

    let time_ms = own.first().map_or(0, |turn| turn.time_ms);
    let recalled_tokens = quotation.tokens.len();
    let (mut turns, mut starts) = (Vec::new(), Vec::new());
    if !quotation.text.is_empty() {
        let mut quoted = turn(Role::Recalled, quotation.text, time_ms, quotation.tokens);
        let before = Value::from(quotation.tokens_before as f64);
        quoted.metadata.insert(conversation::TOKENS_BEFORE.to_owned(), before);
        turns.push(quoted);
        starts.push(None);
    }
    let (mut begins, mut within) = (start, recalled_tokens);
    for turn in own {
        starts.push(Some(begins));
        // The quotation stands in the first.
        begins += (turn.tokens.len() + std::mem::take(&mut within)) as u64;
        turns.push(turn);
    }
    let message_starts = starts.clone();
    turns.push(turn_of(&answer, options, time_ms));
    starts.push(Some(begins));
    let (answer_turn, usage) = finish(
        conversation,
        (turns, starts, None),
        &answer.stop,
        Usage {
            prompt_tokens,
            reused_tokens: reused.min(prompt_tokens),
            recalled_tokens,
            generated_tokens: answer.tokens.len(),
            stream_tokens: conversation.position(),
            stop: StopReason::MaxTokens,
            pages: conversation.page_usage()?,
            answer_turn: None,
        },
    )?;
    conversation.last_prompt = answer_turn.map(|answer| {
        // Once its answer is taken back the message stands in the window all the same.
        before_last.note_starts(answer - message_starts.len() as TurnId, message_starts);
        LastPrompt {
            answer,
            before_last,
            last_token: *last_token,
            answer_prefix: options.answer_prefix.clone(),
            completion: options.completion,
            message: asked,
        }
    });
    Ok(usage)
}

/// Refuses a filter that is malformed, and metadata of a message that leaves no room for the engine's own beside it, in the
/// turn of the answer.
fn check_marks(operation: &str, options: &SendOptions) -> Result<()> {
    options.recall_filter.iter().try_for_each(|filter| filter.check(operation))?;
    let metadata = &options.metadata;
    if metadata.len() > MAX_MARKS {
        return Err(Error::invalid(format!(
            "{operation}: expected at most {MAX_MARKS} entries of metadata, got {}",
            metadata.len()
        )));
    }
    check_metadata(operation, metadata)
}

/// The turn of an answer that was generated. Text and tokens do not tell how it was begun, where a stop string cut it.
fn turn_of(answer: &Answer, options: &SendOptions, time_ms: i64) -> NewTurn {
    let prefix = options.answer_prefix.as_str();
    let text = format!("{prefix}{}", answer.text);
    let mut turn = turn(Role::Assistant, text, time_ms, answer.tokens.clone());
    turn.metadata = options.metadata.clone();
    // One that is held to a grammar keeps a first blank without going on in text.
    let keeps_blank = options.grammar.is_some() && answer.text.starts_with(' ');
    if options.completion || !prefix.is_empty() || keeps_blank {
        turn.metadata.insert(PREFIX_BYTES.to_owned(), Value::from(prefix.len() as f64));
        turn.metadata.insert(COMPLETION.to_owned(), Value::from(options.completion));
    }
    turn
}

/// The words that an answer in the log was begun with, and whether it goes on in text: a blank that its tokens begin with is
/// then there. Of an answer that does not say so, as none did once, the words are its text less what its tokens say.
fn begun(shared: &Shared, turn: &Turn) -> Result<(String, bool)> {
    if let Some(Value::Number(bytes)) = turn.metadata.get(PREFIX_BYTES)
        && let Some(Value::Flag(completion)) = turn.metadata.get(COMPLETION)
    {
        let prefix = turn.text.get(..*bytes as usize).unwrap_or_default();
        return Ok((prefix.to_owned(), *completion));
    }
    let Model { tokenizer, scaffold, .. } = shared.model("regenerate")?;
    let inside = tokenizer.decode_inside(&turn.tokens);
    let alone = tokenizer.decode(&turn.tokens, true)?;
    let goes_on = inside != alone && turn.text.ends_with(&inside);
    let generated = if goes_on { inside } else { alone };
    if prompt::shown(&turn.text, scaffold.trims.answer) == generated {
        // White space that the template cuts off an answer that was appended began nothing.
        return Ok((String::new(), goes_on));
    }
    let prefix = turn.text.strip_suffix(generated.as_str()).unwrap_or_default();
    Ok((prefix.to_owned(), goes_on))
}

fn turn(role: Role, text: String, time_ms: i64, tokens: Vec<u32>) -> NewTurn {
    let mut turn = NewTurn::new(role, text);
    turn.time_ms = time_ms;
    turn.tokens = tokens;
    turn
}

/// Commits a finished or cancelled answer, the last of `turns`: its number, and what to tell the caller, if there is one.
fn finish(
    conversation: &mut Conversation,
    (turns, starts, retract): (Vec<NewTurn>, Vec<Option<u64>>, Option<Range<TurnId>>),
    stop: &Stop,
    usage: Usage,
) -> Result<(Option<TurnId>, Option<Usage>)> {
    conversation.state.open = OpenTurn::Answered { closed_by: stop.closed_by() };
    let committed = conversation.commit(turns, &starts, retract)?;
    let answer_turn = committed.turns.last().copied();
    Ok((answer_turn, stop.reason().map(|stop| Usage { stop, answer_turn, ..usage })))
}

fn no_answer() -> Error {
    Error::new(ErrorKind::NotFound, "regenerate: no answer, expected one as the last turn")
}

/// Answers the last message once more, in the place of the answer that it has.
///
/// # Errors
/// `NotFound` where the last turn is no answer; those of [`send`].
pub(crate) fn regenerate(
    conversation: &mut Conversation,
    options: &SendOptions,
    sink: &Sink<Event>,
) -> Result<Option<Usage>> {
    options.sampling.check()?;
    let shared = conversation.shared.clone();
    let model = shared.model("regenerate")?;
    let constraint = model.held_to("regenerate", options.grammar.as_ref())?;
    let time_ms = options.time_ms.map_or_else(|| shared.now_ms(), Ok)?;
    conversation.set_policy("regenerate", options.recall.unwrap_or(shared.config.recall))?;
    let last = conversation.last_turn()?.filter(|turn| turn.role == Role::Assistant);
    let before = last.ok_or_else(no_answer)?;
    // Before anything is taken back: where the window is filled again, stored pages are lost.
    if !conversation.ends_asked(before.id)? {
        return Err(no_answer());
    }
    let answered = answer_again(conversation, options, constraint, sink, (&before, time_ms));
    // The stream stood before the old answer's end: no point behind it can be gone back to.
    conversation.is_half_way = answered.is_err();
    answered
}

/// Answers the message whose answer was the turn `before`, in place of it.
fn answer_again(
    conversation: &mut Conversation,
    options: &SendOptions,
    constraint: Option<Constraint>,
    sink: &Sink<Event>,
    (before, time_ms): (&Turn, i64),
) -> Result<Option<Usage>> {
    let shared = conversation.shared.clone();
    let answer_turn = before.id;
    // Behind the answer there may stand one that was remembered, which answers nothing that the stream holds.
    let kept = conversation.last_prompt.clone().filter(|last| last.answer == answer_turn);
    let here = kept.filter(|last| conversation.try_take_back(&last.before_last));
    let last = match here {
        Some(last) => last,
        None => {
            // The prompt's pages are gone: fill the window again from the log, up to the prompt's last token.
            let last_token = conversation.refill(answer_turn, true)?.ok_or_else(no_answer)?;
            let (answer_prefix, completion) = begun(&shared, before)?;
            LastPrompt {
                answer: answer_turn,
                before_last: conversation.save(),
                last_token,
                answer_prefix,
                completion,
                message: Message::default(),
            }
        }
    };
    conversation.set_message(&last.message);
    let reused = conversation.attended_tokens();
    let start = conversation.position() + 1;
    let mut metadata = before.metadata.clone();
    metadata.retain(|key, _| !key.starts_with(ENGINE_KEYS));
    let options = SendOptions {
        answer_prefix: last.answer_prefix.clone(),
        completion: last.completion,
        metadata,
        ..options.clone()
    };
    let answer = generation::generate(conversation, last.last_token, &options, constraint, sink)?;
    if answer.tokens.is_empty() && matches!(answer.stop, Stop::Cancelled) {
        // There is nothing that could stand in its place.
        return Err(Error::cancelled("regenerate"));
    }
    let turns = vec![turn_of(&answer, &options, time_ms)];
    let (answer_turn, usage) = finish(
        conversation,
        (turns, vec![Some(start)], Some(answer_turn..answer_turn + 1)),
        &answer.stop,
        Usage {
            prompt_tokens: reused + 1,
            reused_tokens: reused,
            recalled_tokens: 0,
            generated_tokens: answer.tokens.len(),
            stream_tokens: conversation.position(),
            stop: StopReason::MaxTokens,
            pages: conversation.page_usage()?,
            answer_turn: None,
        },
    )?;
    conversation.last_prompt = answer_turn.map(|answer| LastPrompt { answer, ..last });
    Ok(usage)
}

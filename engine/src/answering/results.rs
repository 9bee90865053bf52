//! Answering what tools gave back: their results as the template shows them, each a turn of the log.
//! Knows neither a handle nor a thread, nor what was called.

use super::{Prompt, Quotation, answer, check_marks, recall, turn};
use crate::conversation::Conversation;
use crate::error::{Error, Result};
use crate::feeding;
use crate::generation;
use crate::prompt;
use crate::session::SendOptions;
use crate::snapshot::OpenTurn;
use crate::stream::{Event, Sink, Usage};
use crate::tokenizer::Joined;
use crate::tools::ToolResult;
use mka_memory::Role;

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
    let now_ms = shared.now_ms()?;
    let time_ms = options.time_ms.unwrap_or(now_ms);
    conversation.set_policy("send_tool", options.recall.unwrap_or(shared.config.recall))?;
    // A result has the template around it in any case.
    let options = &SendOptions { completion: false, ..options.clone() };

    let contents: Vec<&str> = results.iter().map(|result| result.content.as_str()).collect();
    let said = contents.join("\n");
    // By the end of what is long, as a message is: what is asked of memory is no longer than that.
    let (_, query) = feeding::split_long(model, &said, shared.config.window_tokens / 2)?;
    let words = model.tokenizer.encode(query, false)?;
    let (recalled, hits) = match query.trim().is_empty() {
        true => Default::default(),
        false => recall(conversation, query, options, model.tokenizer.count(&said)?, now_ms)?,
    };
    if !hits.is_empty() {
        // A caller who is gone is noticed before the first block.
        sink.send(Event::Recalled(hits));
    }

    let scaffold = &model.scaffold.result;
    let mut written = Joined::behind(&model.tokenizer, conversation.last_token());
    generation::closing(&mut written, model, open, &scaffold.to_result)?;
    let quotation_start = written.num_tokens();
    written.content(&scaffold.written(&recalled))?;
    let quotation = quotation_start..written.num_tokens();
    let mut turns = Vec::new();
    for (i, result) in results.iter().enumerate() {
        if i > 0 {
            written.scaffold(&scaffold.between)?;
        }
        let content = prompt::shown(&result.content, scaffold.trims);
        match i == 0 && !recalled.is_empty() {
            true => written.content(&scaffold.written(&format!("\n{content}")))?,
            false => written.content(&scaffold.written(content))?,
        }
        if i + 1 == results.len() {
            written.scaffold(&scaffold.to_answer)?;
            if !options.answer_prefix.is_empty() {
                written.scaffold(&model.scaffold.answer_lead)?;
            }
            written.content(&options.answer_prefix)?;
        }
        let mut given = turn(Role::Tool, result.content.clone(), time_ms, written.take()?);
        given.source = result.name.clone();
        given.metadata = options.metadata.clone();
        turns.push(given);
    }
    // Memory is quoted in the first, and there is one.
    let first = std::mem::take(&mut turns[0].tokens);
    let (own, quotation) = Quotation::cut(first, recalled, quotation);
    turns[0].tokens = own;
    answer(conversation, Prompt { turns, quotation, words }, options, sink)
}

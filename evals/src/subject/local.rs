//! Subjects that run a model of this machine through the public API of mka, each sample in processes of its own.
//! Knows no benchmark: what a subject is given of a sample is a row of a table.

use super::way::{Feeding, Given, Way, names};
use super::{Answer, Fed, Options, Subject, prompt_hash};
use crate::cut;
use crate::job::{self, Ask, Job, Memory, Outcome, PageOptions, Result, Scratch};
use crate::sample::Sample;
use mka::{Device, Engine, ModelSource};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tokens kept free for the chat template around a message: more than those of the templates at hand take, SmolLM2's
/// with its system message of about 30 among them.
pub(crate) const SCAFFOLD_TOKENS: usize = 64;

/// The tokenizer of the model under test and what is known of it.
pub(crate) struct Model {
    engine: Engine,
    pub(crate) name: String,
    pub(crate) trained_tokens: usize,
    /// The folder or GGUF file that it was loaded from.
    pub(crate) path: PathBuf,
    /// The engine's memory folder, which stays empty.
    _scratch: Scratch,
}

impl Model {
    /// Opens the model that `source` names.
    pub(crate) fn open(source: &str) -> Result<Self> {
        let scratch = Scratch::new("tokenizer")?;
        let engine = Engine::builder(scratch.path().join("store"))
            .model(source.parse::<ModelSource>()?)
            // It only counts tokens.
            .device(Device::Cpu)
            .open_blocking()?;
        let (Some(name), Some(path), Some(trained_tokens)) =
            (engine.model_name(), engine.model_path(), engine.trained_tokens())
        else {
            return Err(format!("model {source}: not loaded, expected a model").into());
        };
        let (name, path) = (name.to_owned(), path.to_owned());
        Ok(Self { name, trained_tokens, path, engine, _scratch: scratch })
    }

    /// Tokens of `text` without special ones.
    pub(crate) fn count_tokens(&self, text: &str) -> Result<usize> {
        Ok(self.engine.count_tokens(text)?)
    }
}

pub(crate) struct Local {
    way: &'static Way,
    options: Options,
    model: Arc<Model>,
}

impl Local {
    /// # Errors
    /// If no local subject has the name.
    pub(crate) fn new(name: &str, options: &Options, model: Arc<Model>) -> Result<Self> {
        let way = Way::find(name)
            .ok_or_else(|| format!("subjects: {name:?}, expected one of {}", names().join(", ")))?;
        Ok(Self { way, options: options.clone(), model })
    }

    /// The whole prompt or, where it is longer than the window, its two ends: as context and question.
    fn cut(&self, sample: &Sample) -> Result<(String, String)> {
        let count = |text: &str| self.model.count_tokens(text);
        let taken = sample.max_new_tokens + SCAFFOLD_TOKENS + count(&sample.answer_prefix)?;
        let room = self.options.window.checked_sub(taken).ok_or_else(|| {
            format!("truncate: window {}, expected at least {taken}", self.options.window)
        })?;
        cut_to(sample, room, &count)
    }

    /// One process: reads the prompt and answers.
    fn ask_at_once(&self, sample: &Sample) -> Result<Answer> {
        let (window, (context, question)) = match self.way.given {
            Given::Cut => (self.options.window, self.cut(sample)?),
            _ => (self.model.trained_tokens, (sample.context.clone(), sample.question.clone())),
        };
        let scratch = scratch()?;
        let job = Job {
            window,
            feed: feed_file(&scratch, &context)?,
            through_model: true,
            ask: Some(ask(sample, question, true)),
            ..self.job(&scratch, sample)
        };
        let outcome = self.run(&job)?;
        // The context came with the question, so that reading it is part of the wait for the answer.
        let first_token_s = outcome.feed_s + outcome.first_token_s;
        Ok(Answer { first_token_s, feed_s: 0.0, reused_tokens: 0, ..answer(sample, outcome) })
    }

    /// Two processes: one feeds, the other is asked.
    fn ask_later(&self, sample: &Sample, feeding: Feeding) -> Result<Answer> {
        let scratch = scratch()?;
        let job = self.job(&scratch, sample);
        let fed = match feed_file(&scratch, &sample.context)? {
            None => Outcome::default(),
            feed => {
                let through_model = feeding == Feeding::Model || self.options.through_model;
                self.run(&Job { feed, through_model, ..job.clone() })?
            }
        };
        let ask = Some(ask(sample, sample.question.clone(), self.options.joined));
        let outcome = self.run(&Job { ask, ..job })?;
        let peak_rss_bytes = fed.peak_rss_bytes.max(outcome.peak_rss_bytes);
        Ok(Answer { feed_s: fed.feed_s, peak_rss_bytes, ..answer_later(sample, outcome) })
    }

    /// [`Local::ask_later`] of what one process fed for all subjects that share it.
    fn ask_shared(&self, sample: &Sample, slot: &mut Option<Fed>) -> Result<Answer> {
        let fed = match slot.take().filter(|fed| fed.context == sample.context) {
            Some(fed) => fed,
            None => self.feed_shared(sample)?,
        };
        let Fed { scratch, outcome: Outcome { feed_s, peak_rss_bytes: peak, .. }, .. } =
            slot.insert(fed);
        let job = Job {
            session: Some(self.way.name.to_owned()),
            ask: Some(ask(sample, sample.question.clone(), self.options.joined)),
            ..self.job(scratch, sample)
        };
        let outcome = self.run(&job)?;
        let peak_rss_bytes = outcome.peak_rss_bytes.max(*peak);
        Ok(Answer { feed_s: *feed_s, peak_rss_bytes, ..answer_later(sample, outcome) })
    }

    /// Feeds the sample's context once, into a session for each subject that shares it.
    fn feed_shared(&self, sample: &Sample) -> Result<Fed> {
        let scratch = scratch()?;
        let sharing = || {
            let ways = self.options.subjects.iter().filter_map(|name| Way::find(name));
            ways.filter(|way| way.shares_feed())
        };
        let memory = match sharing().any(|way| way.memory == Memory::InfLlm) {
            // It keeps what no other rule does, which they pass over.
            true => Memory::InfLlm,
            false => Memory::Pages,
        };
        let job = Job {
            memory,
            feed: feed_file(&scratch, &sample.context)?,
            through_model: true,
            forks: sharing().map(|way| way.name.to_owned()).collect(),
            // Nothing is recalled here, so nothing is wanted on a card.
            page_options: PageOptions {
                page_device_mib: Some(0),
                ..self.options.page_options.clone()
            },
            ..self.job(&scratch, sample)
        };
        let outcome = self.run(&job)?;
        Ok(Fed { context: sample.context.clone(), scratch, outcome })
    }

    /// Does a job in a process apart.
    fn run(&self, job: &Job) -> Result<Outcome> {
        match self.options.keep_processes {
            true => job::spawn_kept(job, self.options.threads),
            false => job::spawn(job, self.options.threads),
        }
    }

    /// What all processes of a sample have in common, its device among it: each thread that asks has one.
    fn job(&self, scratch: &Scratch, sample: &Sample) -> Job {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static TURN: usize = NEXT.fetch_add(1, Ordering::Relaxed);
        }
        let devices = &self.options.device;
        let turn = TURN.with(|turn| turn % devices.len().max(1));
        Job {
            store: scratch.path().join("store"),
            model: self.options.model.clone(),
            window: self.options.window,
            device: devices.get(turn).cloned(),
            memory: self.way.memory,
            recall_k: Some(self.options.recall_k),
            page_tokens: self.options.page_tokens,
            page_options: self.options.page_options.clone(),
            completion: !sample.chat,
            ..Job::default()
        }
    }
}

impl Subject for Local {
    fn name(&self) -> &str {
        self.way.name
    }

    fn fits(&self, sample: &Sample) -> bool {
        if self.way.given != Given::Whole {
            return true;
        }
        let tokens = match sample.tokens {
            0 => [&sample.context, &sample.question, &sample.answer_prefix]
                .into_iter()
                .map(|text| self.model.count_tokens(text))
                .sum::<Result<usize>>()
                .map(|tokens| tokens + sample.max_new_tokens + SCAFFOLD_TOKENS),
            tokens => Ok(tokens),
        };
        // A prompt that cannot be counted is asked, so that its error is reported.
        !tokens.is_ok_and(|tokens| tokens > self.model.trained_tokens)
    }

    fn answer(&self, sample: &Sample, fed: &mut Option<Fed>) -> Result<Answer> {
        let is_shared = self.way.shares_feed()
            && self.options.page_options.page_windowed_feed
            && !sample.context.is_empty();
        match self.way.given {
            _ if is_shared => self.ask_shared(sample, fed),
            Given::Whole | Given::Cut => self.ask_at_once(sample),
            Given::Before(feeding) => self.ask_later(sample, feeding),
        }
    }
}

fn ask(sample: &Sample, message: String, joined: bool) -> Ask {
    Ask {
        message,
        answer_prefix: sample.answer_prefix.clone(),
        max_new_tokens: sample.max_new_tokens,
        stop: sample.stop.clone(),
        joined,
    }
}

/// [`answer`] of a process that found its session fed: who comes back with a question waits for the session, too.
fn answer_later(sample: &Sample, outcome: Outcome) -> Answer {
    let session_s = outcome.session_s;
    let answer = answer(sample, outcome);
    Answer { first_token_s: session_s + answer.first_token_s, session_s, ..answer }
}

fn answer(sample: &Sample, outcome: Outcome) -> Answer {
    Answer {
        output: outcome.output,
        prompt_hash: prompt_hash(sample),
        prompt_tokens: outcome.prompt_tokens,
        reused_tokens: outcome.reused_tokens,
        recalled_tokens: outcome.recalled_tokens,
        generated_tokens: outcome.generated_tokens,
        first_token_s: outcome.first_token_s,
        session_s: 0.0,
        decode_tokens_per_s: outcome.decode_tokens_per_s,
        feed_s: outcome.feed_s,
        peak_rss_bytes: outcome.peak_rss_bytes,
    }
}

/// A folder for one sample; two workers never share one.
fn scratch() -> Result<Scratch> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    Scratch::new(&format!("sample-{}", NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// A file with the text to feed; None where there is nothing to.
fn feed_file(scratch: &Scratch, text: &str) -> Result<Option<PathBuf>> {
    if text.is_empty() {
        return Ok(None);
    }
    scratch.write("context.txt", text).map(Some)
}

/// Context and question of the sample's prompt, of which the first and the last `room` / 2 tokens are left where it is
/// longer than `room`.
fn cut_to(
    sample: &Sample,
    room: usize,
    count: &dyn Fn(&str) -> Result<usize>,
) -> Result<(String, String)> {
    let prompt = format!("{}{}", sample.context, sample.question);
    let Some((head, tail)) = cut::ends(&prompt, room, count)? else {
        return Ok((sample.context.clone(), sample.question.clone()));
    };
    // A question that was cut itself is asked as far as it is there.
    let (rest, question) = match tail.strip_suffix(sample.question.as_str()) {
        Some(rest) => (rest, sample.question.as_str()),
        None => ("", tail),
    };
    Ok((format!("{head}{rest}"), question.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Cell, Metric};

    fn sample(context: &str, question: &str) -> Sample {
        Sample {
            cell: Cell { task: "task".into(), group: "all".into(), index: 0 },
            context: context.into(),
            question: question.into(),
            answer_prefix: String::new(),
            references: Vec::new(),
            classes: Vec::new(),
            max_new_tokens: 4,
            stop: Vec::new(),
            chat: true,
            metric: Metric::new("none", |_, _, _| 0.0),
            tokens: 0,
        }
    }

    #[test]
    fn who_comes_back_waits_for_the_session_too() {
        let outcome = Outcome { session_s: 1.5, first_token_s: 0.25, ..Outcome::default() };
        let later = answer_later(&sample("", "?"), outcome.clone());
        assert_eq!((later.first_token_s, later.session_s), (1.75, 1.5));
        let at_once = answer(&sample("", "?"), outcome);
        assert_eq!((at_once.first_token_s, at_once.session_s), (0.25, 0.0));
    }

    fn chars(text: &str) -> Result<usize> {
        Ok(text.chars().count())
    }

    #[test]
    fn a_prompt_that_fits_is_left_alone() {
        let (context, question) = cut_to(&sample("abc", "def"), 6, &chars).unwrap();
        assert_eq!((context.as_str(), question.as_str()), ("abc", "def"));
    }

    #[test]
    fn the_middle_is_cut_and_both_ends_stay() {
        let letters: String = ('a'..='z').collect();
        let (context, question) = cut_to(&sample(&letters, "?!"), 10, &chars).unwrap();
        assert_eq!((context.as_str(), question.as_str()), ("abcdexyz", "?!"));
        // Half of an odd room is rounded down, as the official cut does.
        let (context, _) = cut_to(&sample(&letters, "?!"), 11, &chars).unwrap();
        assert_eq!(context, "abcdexyz");
    }

    #[test]
    fn a_question_longer_than_half_the_room_is_cut_too() {
        let (context, question) = cut_to(&sample("abc", "0123456789"), 8, &chars).unwrap();
        assert_eq!((context.as_str(), question.as_str()), ("abc0", "6789"));
    }

    #[test]
    fn a_cut_never_splits_a_character() {
        let text = "äöü€".repeat(50);
        for room in 0..40 {
            let (context, question) = cut_to(&sample(&text, "ß?"), room, &chars).unwrap();
            let left = context.chars().count() + question.chars().count();
            assert_eq!(left, room / 2 * 2, "room {room}");
        }
    }
}

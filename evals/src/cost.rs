//! What a session costs by length: peak memory, decode speed, feeding, and reopening to the bit.
//! Knows no task and no score.

use crate::job::{self, Ask, Job, Memory, Outcome, PageOptions, Result, Scratch};
use crate::run::each_once;
use crate::subject::Model;
use std::path::PathBuf;

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct Args {
    /// Model folder, GGUF file or repository id.
    #[arg(long, default_value = "HuggingFaceTB/SmolLM2-135M-Instruct")]
    model: String,
    /// Text files to feed, repeated where they are too short.
    #[arg(long, value_delimiter = ',', required = true)]
    haystack: Vec<PathBuf>,
    /// Tokens (about) fed through the model.
    #[arg(long, value_delimiter = ',', default_value = "2048,4096,8192,32768")]
    lengths: Vec<usize>,
    /// Tokens (about) fed as text memory.
    #[arg(long, value_delimiter = ',', default_value = "131072,1048576")]
    text_lengths: Vec<usize>,
    /// Tokens attended exactly.
    #[arg(long, default_value_t = 2048)]
    window: usize,
    /// What is recalled of a stream fed through the model: each length is measured with each of them.
    #[arg(long, value_delimiter = ',', default_value = "off")]
    memory: Vec<Memory>,
    #[command(flatten)]
    page_options: PageOptions,
    /// Where the model runs: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Tokens decoded to measure the speed.
    #[arg(long, default_value_t = 128)]
    decode: usize,
    /// Questions asked of each length in turn; times are medians over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// The beginning of `text`, repeated where it is too short, with about `tokens` tokens, and how many it has.
fn beginning(text: &str, tokens: usize, model: &Model) -> Result<(String, usize)> {
    // English prose; every further guess goes by what the one before it had.
    let mut chars = tokens * 4;
    for _ in 0..3 {
        let cut: String = text.chars().cycle().take(chars).collect();
        chars = chars * tokens / model.count_tokens(&cut)?.max(1);
    }
    let cut: String = text.chars().cycle().take(chars).collect();
    let counted = model.count_tokens(&cut)?;
    Ok((cut, counted))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut text = String::new();
    for path in &args.haystack {
        let bytes = std::fs::read(path).map_err(|e| format!("haystack {}: {e}", path.display()))?;
        text.push_str(&String::from_utf8_lossy(&bytes));
    }
    if text.is_empty() {
        return Err("cost: the haystack is empty".into());
    }
    let tokenizer = Model::open(&args.model)?;
    println!("revision {}, window {}", job::revision(), args.window);
    println!(
        "| fed as | memory | tokens | read by the model | feed s | tokens/s | peak MiB | reopen s | first token s | of feeding % | session alone: reopen s | its first token s | its share of feeding % | decoded | decode tok/s | of which choosing more than once a page % | same bits | device |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    let model = args
        .lengths
        .iter()
        .flat_map(|length| args.memory.iter().map(move |memory| (true, *memory, *length)));
    let text_alone = args.text_lengths.iter().map(|length| (false, Memory::Off, *length));
    // Each once: a stream's folder has its name.
    let asked: Vec<_> = model.chain(text_alone).collect();
    let mut streams = Vec::new();
    for (through_model, memory, length) in each_once(&asked) {
        let scratch = Scratch::new(&format!("cost-{through_model}-{memory:?}-{length}"))?;
        let (cut, tokens) = beginning(&text, length, &tokenizer)?;
        let path = scratch.write("text.txt", &cut)?;
        let base = Job {
            store: scratch.path().join("store"),
            model: args.model.clone(),
            window: args.window,
            device: Some(args.device.clone()),
            memory,
            page_options: args.page_options.clone(),
            ..Job::default()
        };
        let peek = Some("And then".to_owned());
        // The same process goes on after feeding; the next one reopens: both look at the same next token.
        let fed = job::spawn(
            &Job { feed: Some(path), through_model, peek: peek.clone(), ..base.clone() },
            0,
        )?;
        let again = job::spawn(&Job { peek, ..base.clone() }, 0)?;
        streams.push(Stream {
            _scratch: scratch,
            base,
            through_model,
            tokens,
            fed,
            again,
            asked: Vec::new(),
            chosen_once: Vec::new(),
        });
    }
    // The lengths take turns, so that a machine that slows down for a while does so for all of them.
    for round in 1..=args.rounds.max(1) {
        for stream in &mut streams {
            let ask = Ask {
                // A list that a greedy small model does not end early: the speed rests on every token of it.
                message: "Count from 1 to 1000.".into(),
                answer_prefix: "1, 2, 3, 4, 5, 6,".into(),
                max_new_tokens: args.decode,
                ..Ask::default()
            };
            let base = Job { ask: Some(ask), ..stream.base.clone() };
            // Once, at the end: what is asked then makes the stream longer.
            let reopen = round == args.rounds.max(1);
            stream.asked.push(job::spawn(&Job { reopen, ..base.clone() }, 0)?);
            if stream.base.memory == Memory::Pages {
                // A choice that is never made again costs what attending to it costs.
                let page_options =
                    PageOptions { page_reuse: Some(usize::MAX), ..base.page_options.clone() };
                stream.chosen_once.push(job::spawn(&Job { page_options, ..base }, 0)?);
            }
        }
    }
    for stream in &streams {
        println!("{}", stream.row());
    }
    Ok(())
}

/// One length: what feeding it cost, and every question asked of it.
struct Stream {
    /// Removed with its store at the end.
    _scratch: Scratch,
    base: Job,
    through_model: bool,
    tokens: usize,
    fed: Outcome,
    again: Outcome,
    asked: Vec<Outcome>,
    /// The same questions with one choice for every token, where pages are recalled.
    chosen_once: Vec<Outcome>,
}

impl Stream {
    fn row(&self) -> String {
        let last = self.asked.last().cloned().unwrap_or_default();
        let median_of = |outcomes: &[Outcome], value: fn(&Outcome) -> f64| {
            let mut values: Vec<f64> = outcomes.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let median = |value: fn(&Outcome) -> f64| median_of(&self.asked, value);
        let choosing = match self.chosen_once.is_empty() {
            true => String::new(),
            false => {
                let speed: fn(&Outcome) -> f64 = |asked| asked.decode_tokens_per_s;
                format!(
                    "{:.1}",
                    (1.0 - median(speed) / median_of(&self.chosen_once, speed)) * 100.0
                )
            }
        };
        let (fed, again) = (&self.fed, &self.again);
        let of_feeding = |seconds: f64| seconds / fed.feed_s * 100.0;
        format!(
            "| {} | {} | {} | {} | {:.1} | {:.0} | {} | {:.2} | {:.2} | {:.2} | {:.3} | {:.3} | {:.2} | {} | {:.1} | {choosing} | {} | {} |",
            if self.through_model { "model" } else { "text" },
            format!("{:?}", self.base.memory).to_lowercase(),
            self.tokens,
            fed.fed_tokens,
            fed.feed_s,
            self.tokens as f64 / fed.feed_s,
            fed.peak_rss_bytes >> 20,
            median(|asked| asked.open_s),
            median(|asked| asked.first_token_s),
            of_feeding(median(|asked| asked.open_s + asked.first_token_s)),
            last.reopen_s,
            last.reopened_first_token_s,
            of_feeding(last.reopen_s + last.reopened_first_token_s),
            self.asked.iter().map(|asked| asked.generated_tokens).sum::<usize>(),
            median(|asked| asked.decode_tokens_per_s),
            if fed.logits_hash == again.logits_hash { "yes" } else { "NO" },
            fed.device
        )
    }
}

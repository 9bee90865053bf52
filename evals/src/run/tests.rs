//! Runs of a made-up benchmark through made-up subjects with fixed timings.
//! Knows no model.

use super::*;
use crate::sample::Metric;
use crate::subject::prompt_hash;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Two tasks of three samples at each group; the group "twice" asks a second time and scores in two ways.
struct Letters {
    groups: Vec<&'static str>,
}

impl Benchmark for Letters {
    fn name(&self) -> &'static str {
        "letters"
    }

    fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for group in &self.groups {
            for task in ["copy", "count"] {
                for index in 0..3 {
                    cells.push(Cell { task: task.into(), group: (*group).into(), index });
                }
            }
        }
        cells
    }

    fn sample(&self, cell: &Cell, count_tokens: &dyn Fn(&str) -> Result<usize>) -> Result<Sample> {
        let context = format!("{} {}\n", cell.task, cell.group);
        Ok(Sample {
            cell: cell.clone(),
            question: format!("{}?", cell.index),
            answer_prefix: String::new(),
            references: vec![cell.index.to_string()],
            classes: Vec::new(),
            max_new_tokens: 1,
            stop: Vec::new(),
            chat: true,
            // Thirds: sums of them depend on their order, which the summary must not.
            metric: Metric::new("share", |output, references, _| {
                f64::from(u8::from(output != references[0])) / 3.0
            }),
            tokens: count_tokens(&context)?,
            context,
        })
    }

    fn follow_up(&self, cell: &Cell, answer: &str) -> Result<Option<Sample>> {
        static HALF: Metric = Metric::new("half", |_, _, _| 0.5);
        if cell.group != "twice" {
            return Ok(None);
        }
        let mut sample = self.sample(cell, &|_| Ok(0))?;
        sample.question = format!("{answer}, so?");
        sample.metric.also = Some(&HALF);
        Ok(Some(sample))
    }
}

/// Answers with `word`; fails where it is told to.
struct Parrot {
    name: &'static str,
    asked: AtomicUsize,
    fails: AtomicBool,
}

impl Parrot {
    fn boxed(name: &'static str) -> Box<dyn Subject> {
        Box::new(Self { name, asked: AtomicUsize::new(0), fails: AtomicBool::new(false) })
    }
}

impl Subject for Parrot {
    fn name(&self) -> &str {
        self.name
    }

    fn fits(&self, sample: &Sample) -> bool {
        self.name != "short" || sample.cell.group != "131072"
    }

    fn answer(&self, sample: &Sample, _: &mut Option<Fed>) -> Result<Answer> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.fails.load(Ordering::Relaxed) && sample.cell.index == 1 {
            return Err("the parrot is tired".into());
        }
        let length: f64 = sample.cell.group.parse().unwrap_or(1000.0);
        if sample.question.ends_with("so?") {
            // What a short second question takes, which is not what the sample took.
            return Ok(Answer {
                output: "3".into(),
                prompt_hash: prompt_hash(sample),
                prompt_tokens: 5,
                generated_tokens: 4,
                first_token_s: 0.01,
                decode_tokens_per_s: 90.0,
                peak_rss_bytes: 200 << 20,
                ..Answer::default()
            });
        }
        Ok(Answer {
            output: if self.name == "short" { "1" } else { "2" }.into(),
            prompt_hash: prompt_hash(sample),
            prompt_tokens: 7,
            reused_tokens: 1,
            recalled_tokens: sample.cell.index,
            generated_tokens: 3,
            first_token_s: 0.1 * (sample.cell.index + 1) as f64,
            session_s: 0.05,
            decode_tokens_per_s: 20.0 + 1.0 / (sample.cell.index + 1) as f64,
            feed_s: length / 1e4,
            peak_rss_bytes: (300 + length.sqrt() as u64) << 20,
        })
    }
}

const GROUPS: [&str; 3] = ["4096", "16384", "131072"];

fn go(out: &Path, jobs: usize, limit: Option<usize>, subjects: &[Box<dyn Subject>]) -> Result<()> {
    let options = Options { out: out.into(), jobs, limit, threshold: Some(20.0) };
    let count = |text: &str| -> Result<usize> { Ok(text.len()) };
    run(&Letters { groups: GROUPS.into() }, subjects, &count, &options, json!({ "seed": 42 }))
}

fn parrots() -> Vec<Box<dyn Subject>> {
    vec![Parrot::boxed("long"), Parrot::boxed("short")]
}

fn read(out: &Path, name: &str) -> String {
    std::fs::read_to_string(out.join(name)).unwrap()
}

#[test]
fn the_table_holds_the_means_done_by_hand() {
    let out = tempfile::tempdir().unwrap();
    go(out.path(), 1, None, &parrots()).unwrap();
    let table = read(out.path(), "table.md");
    // Two of three answers are worth a third: 22.2 of 100. `short` cannot be asked at the longest length.
    for line in [
        "| task | group | long | short |",
        "| copy | 4096 | 22.2 (3) | 22.2 (3) |",
        "| copy | 131072 | 22.2 (3) | - |",
        "| average | 16384 | 22.2 (2) | 22.2 (2) |",
        "| long | 131072 |",
        "| short | 16384 |",
        // feed: 4096 / 1e4; first token: 0.1, 0.2, 0.3; decode: 20 + (1 + 1/2 + 1/3) / 3; recalled: 0, 1, 2.
        "| short | 4096 | 6 | 0.41 | 0.20 | 20.6 | 1 | 364 |",
    ] {
        assert!(table.lines().any(|l| l == line), "{line} in\n{table}");
    }
    let run: Value = serde_json::from_str(&read(out.path(), "run.json")).unwrap();
    assert_eq!((&run["benchmark"], &run["header"]["seed"]), (&json!("letters"), &json!(42)));
    assert!(run["starts"][0]["device"]["cpus"].as_u64().unwrap() > 0);
}

#[test]
fn a_run_that_was_killed_goes_on_to_the_same_summary() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    go(whole.path(), 1, None, &parrots()).unwrap();
    go(killed.path(), 1, None, &parrots()).unwrap();
    // Some lines are lost and the last one is half there.
    let log = read(killed.path(), log::FILE);
    let lines: Vec<&str> = log.lines().collect();
    let kept = [&lines[..4], &lines[9..20]].concat().join("\n");
    std::fs::write(killed.path().join(log::FILE), format!("{kept}\n{}", &lines[20][..25])).unwrap();
    for file in ["table.md", "accuracy.svg", "decode_time.png"] {
        std::fs::remove_file(killed.path().join(file)).unwrap();
    }

    let again = parrots();
    go(killed.path(), 2, None, &again).unwrap();
    for file in ["table.md", "accuracy.svg", "decode_time.png"] {
        let files = [&whole, &killed].map(|out| std::fs::read(out.path().join(file)).unwrap());
        assert_eq!(files[0], files[1], "{file}");
    }
    let mut logs = [&whole, &killed]
        .map(|out| read(out.path(), log::FILE).lines().map(str::to_owned).collect::<Vec<_>>());
    logs.iter_mut().for_each(|log| log.sort());
    assert_eq!(logs[0], logs[1]);
    assert_eq!(logs[0].len(), 30);

    let run: Value = serde_json::from_str(&read(killed.path(), "run.json")).unwrap();
    assert_eq!(run["starts"].as_array().unwrap().len(), 2);
}

#[test]
fn a_finished_run_asks_nothing_again() {
    let out = tempfile::tempdir().unwrap();
    go(out.path(), 1, None, &parrots()).unwrap();
    let log = read(out.path(), log::FILE);
    go(out.path(), 3, None, &parrots()).unwrap();
    assert_eq!(log, read(out.path(), log::FILE));
}

#[test]
fn a_limit_counts_by_task_and_group_and_can_be_raised() {
    let out = tempfile::tempdir().unwrap();
    let keys = || -> BTreeSet<Key> {
        log::read(out.path()).unwrap().into_iter().map(|record| record.key).collect()
    };
    go(out.path(), 1, Some(1), &[Parrot::boxed("long")]).unwrap();
    assert_eq!(keys().len(), 6);
    assert!(keys().iter().all(|key| key.index == 0));
    go(out.path(), 1, Some(2), &[Parrot::boxed("long")]).unwrap();
    assert_eq!(keys().len(), 12);
    assert_eq!(read(out.path(), log::FILE).lines().count(), 12);
}

#[test]
fn what_is_asked_for_twice_runs_once() {
    let out = tempfile::tempdir().unwrap();
    let options = Options { out: out.path().into(), jobs: 2, limit: Some(2), threshold: None };
    let benchmark = Letters { groups: vec!["4096", "16384", "4096"] };
    let count = |text: &str| -> Result<usize> { Ok(text.len()) };
    run(&benchmark, &parrots()[..1], &count, &options, json!({})).unwrap();
    assert_eq!(read(out.path(), log::FILE).lines().count(), 8);
    assert!(read(out.path(), "table.md").contains("| copy | 4096 | "));
    assert_eq!(each_once(&[2, 1, 2, 3, 1]), [2, 1, 3]);
}

#[test]
fn jobs_side_by_side_give_the_same_table() {
    let (one, many) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    go(one.path(), 1, None, &parrots()).unwrap();
    go(many.path(), 8, None, &parrots()).unwrap();
    assert_eq!(read(one.path(), "table.md"), read(many.path(), "table.md"));
}

#[test]
fn a_failed_sample_is_told_left_out_and_tried_again() {
    let out = tempfile::tempdir().unwrap();
    let parrot = Parrot { name: "long", asked: AtomicUsize::new(0), fails: AtomicBool::new(true) };
    let parrot: &'static Parrot = Box::leak(Box::new(parrot));
    let subjects: [Box<dyn Subject>; 1] = [Box::new(parrot)];
    let error = go(out.path(), 2, None, &subjects).unwrap_err().to_string();
    assert!(error.contains("6 samples failed"), "{error}");
    // The others were asked all the same.
    assert_eq!(parrot.asked.load(Ordering::Relaxed), 18);
    assert_eq!(log::read(out.path()).unwrap().len(), 12);
    assert!(read(out.path(), log::FILE).contains(r#""error":"the parrot is tired""#));
    assert!(read(out.path(), "table.md").contains("| copy | 4096 | 16.7 (2) |"));

    parrot.fails.store(false, Ordering::Relaxed);
    go(out.path(), 2, None, &subjects).unwrap();
    assert_eq!(parrot.asked.load(Ordering::Relaxed), 24);
    assert_eq!(log::read(out.path()).unwrap().len(), 18);
    assert!(read(out.path(), "table.md").contains("| copy | 4096 | 22.2 (3) |"));
}

impl Subject for &'static Parrot {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn fits(&self, sample: &Sample) -> bool {
        (**self).fits(sample)
    }

    fn answer(&self, sample: &Sample, fed: &mut Option<Fed>) -> Result<Answer> {
        (**self).answer(sample, fed)
    }
}

#[test]
fn another_config_or_a_second_process_is_refused() {
    let out = tempfile::tempdir().unwrap();
    go(out.path(), 1, Some(1), &parrots()).unwrap();
    let log = read(out.path(), log::FILE);
    let options = Options { out: out.path().into(), jobs: 1, limit: None, threshold: None };
    let again = || {
        let count = |text: &str| -> Result<usize> { Ok(text.len()) };
        let benchmark = Letters { groups: GROUPS.into() };
        run(&benchmark, &parrots(), &count, &options, json!({ "seed": 7 })).unwrap_err().to_string()
    };
    assert!(again().contains("header.seed: 42 in the folder, 7 now"), "{}", again());
    assert_eq!(log, read(out.path(), log::FILE));
    let held = Log::open::<Record>(out.path(), log::FILE).unwrap();
    assert!(again().contains("another run has it open"), "{}", again());
    drop(held);
    std::fs::remove_file(out.path().join("run.json")).unwrap();
    assert!(again().contains("samples without run.json"), "{}", again());
}

#[test]
fn a_folder_whose_first_tokens_left_the_opening_out_is_refused() {
    let out = tempfile::tempdir().unwrap();
    go(out.path(), 1, Some(1), &parrots()).unwrap();
    let log = read(out.path(), log::FILE);
    let mut run: Value = serde_json::from_str(&read(out.path(), "run.json")).unwrap();
    let said = run["header"].as_object_mut().unwrap().remove("first_token_s");
    assert_eq!(said, Some(json!(FIRST_TOKEN_S)));
    std::fs::write(out.path().join("run.json"), run.to_string()).unwrap();
    let error = go(out.path(), 1, None, &parrots()).unwrap_err().to_string();
    let expected =
        r#"header.first_token_s: null in the folder, "from the question on, session_s in it" now"#;
    assert!(error.contains(expected), "{error}");
    assert_eq!(log, read(out.path(), log::FILE));
}

#[test]
fn a_damaged_line_is_named() {
    let out = tempfile::tempdir().unwrap();
    go(out.path(), 1, Some(1), &parrots()).unwrap();
    let log = read(out.path(), log::FILE);
    std::fs::write(out.path().join(log::FILE), log.replacen('\n', "\n{nonsense}\n", 1)).unwrap();
    let error = go(out.path(), 1, Some(1), &parrots()).unwrap_err().to_string();
    assert!(error.contains("samples.jsonl: line 2: "), "{error}");
}

#[test]
fn plots_are_written_and_show_something() {
    let out = tempfile::tempdir().unwrap();
    go(out.path(), 2, None, &parrots()).unwrap();
    for name in ["accuracy", "decode_time", "peak_memory"] {
        let svg = read(out.path(), &format!("{name}.svg"));
        for label in ["4K", "16K", "128K", "long", "short", "letters"] {
            assert!(svg.contains(label), "{label} in {name}.svg");
        }
        let file = std::fs::File::open(out.path().join(format!("{name}.png"))).unwrap();
        let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (960, 600));
        // The title has dark pixels in the top rows, the axis labels have them in the bottom rows.
        let dark = |rows: std::ops::Range<usize>| {
            let pixels = &pixels[rows.start * 960 * 3..rows.end * 960 * 3];
            pixels.chunks(3).filter(|p| p.iter().all(|c| *c < 100)).count()
        };
        assert!(
            dark(0..50) > 100 && dark(550..600) > 100,
            "{name}: {} {}",
            dark(0..50),
            dark(550..600)
        );
        let coloured =
            pixels.chunks(3).filter(|p| p.iter().max().unwrap() - p.iter().min().unwrap() > 100);
        assert!(coloured.count() > 200, "{name}");
    }
}

#[test]
fn groups_that_are_no_lengths_have_no_plots() {
    let out = tempfile::tempdir().unwrap();
    let options = Options { out: out.path().into(), jobs: 1, limit: None, threshold: None };
    let benchmark = Letters { groups: vec!["4-8k", "0-4k"] };
    let count = |text: &str| -> Result<usize> { Ok(text.len()) };
    run(&benchmark, &parrots(), &count, &options, json!({})).unwrap();
    assert!(!out.path().join("accuracy.svg").exists());
    let table = read(out.path(), "table.md");
    assert!(table.contains("| average | 0-4k |") && !table.contains("Effective length"));
}

#[test]
fn a_second_question_is_scored_and_the_first_answer_kept() {
    let out = tempfile::tempdir().unwrap();
    let options = Options { out: out.path().into(), jobs: 1, limit: Some(1), threshold: None };
    let benchmark = Letters { groups: vec!["twice"] };
    let count = |text: &str| -> Result<usize> { Ok(text.len()) };
    run(&benchmark, &parrots()[..1], &count, &options, json!({})).unwrap();
    let records = log::read(out.path()).unwrap();
    assert_eq!(records.len(), 2);
    let first = benchmark.sample(&benchmark.cells()[0], &count).unwrap();
    let alone = parrots()[0].answer(&first, &mut None).unwrap();
    assert_eq!((&records[0].reasoning, records[0].tokens), (&alone.output, first.tokens));
    let expected = Answer { output: "3".into(), generated_tokens: 3 + 4, ..alone };
    assert_eq!(records[0].answer, expected);
    assert_eq!(records[0].also, Some(("half".to_owned(), 0.5)));
    assert!(read(out.path(), "table.md").contains("| copy, half | twice | 50.0 (1) |"));
}

#[test]
fn a_sample_that_cannot_be_made_fails_for_every_subject() {
    let out = tempfile::tempdir().unwrap();
    let options = Options { out: out.path().into(), jobs: 1, limit: Some(1), threshold: None };
    let benchmark = Letters { groups: vec!["all"] };
    let count = |_: &str| -> Result<usize> { Err("no tokenizer".into()) };
    let error = run(&benchmark, &parrots(), &count, &options, json!({})).unwrap_err().to_string();
    assert!(error.contains("4 samples failed"), "{error}");
}

#[test]
fn a_command_takes_the_options_of_run_and_subjects_together() {
    #[derive(clap::Parser)]
    struct Args {
        #[command(flatten)]
        run: Options,
        #[command(flatten)]
        subject: crate::subject::Options,
    }
    <Args as clap::CommandFactory>::command().debug_assert();
    let line = ["evals", "--out", "runs/a", "--subjects", "full,mka", "--jobs", "3"];
    let args = <Args as clap::Parser>::try_parse_from(line).unwrap();
    assert_eq!((args.run.jobs, args.run.limit, args.run.threshold), (3, None, None));
    assert_eq!(args.subject.subjects, ["full", "mka"]);
}

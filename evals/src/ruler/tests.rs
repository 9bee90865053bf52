//! All thirteen tasks together: sizes, golden samples, errors. Uses a tokenizer that counts words and digits.
//! Knows no template; those are tested beside their tasks.

use super::*;
use std::cell::Cell as Counter;
use std::path::Path;

fn count(text: &str) -> Result<usize> {
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    Ok(text.split_whitespace().count() + digits)
}

/// Files of every kind that a task needs, written once a test.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let prose: String = (0..900)
            .map(|n| format!("Sentence {n} tells of the river\nand of {} boats. ", n * 7 % 31))
            .collect();
        std::fs::write(folder.path().join("prose.txt"), prose).expect("a file");
        let text =
            |name: &str, n: usize| format!("{name} {n} was seen near the old mill. ").repeat(5);
        let articles: Vec<_> = (0..30)
            .map(|article| {
                let paragraphs: Vec<_> = (0..4)
                    .map(|n| {
                        let id = article * 4 + n;
                        let answers = [serde_json::json!({"text": format!("A{id}")})];
                        serde_json::json!({"context": text("Fox", id),
                            "qas": [{"question": format!("Who is fox {id}?"), "answers": answers}]})
                    })
                    .collect();
                serde_json::json!({ "paragraphs": paragraphs })
            })
            .collect();
        let squad = serde_json::json!({ "data": articles });
        std::fs::write(folder.path().join("squad.json"), squad.to_string()).expect("a file");
        let questions: Vec<_> = (0..12)
            .map(|id| {
                let context: Vec<_> = (0..10)
                    .map(|n| serde_json::json!([format!("Owl {id}"), [text("Owl", id * 10 + n)]]))
                    .collect();
                serde_json::json!({"question": format!("Which owl is {id}?"), "answer": format!("B{id}"),
                    "context": context})
            })
            .collect();
        let hotpot = serde_json::Value::from(questions);
        std::fs::write(folder.path().join("hotpot.json"), hotpot.to_string()).expect("a file");
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self, tasks: &[&str], lengths: &[usize]) -> Config {
        Config {
            lengths: lengths.to_vec(),
            tasks: tasks.iter().map(|&task| task.to_owned()).collect(),
            samples: 2,
            seed: 42,
            essays: vec![self.path("prose.txt")],
            squad: Some(self.path("squad.json")),
            hotpot: Some(self.path("hotpot.json")),
            scaffold_tokens: 20,
            ..Config::default()
        }
    }
}

fn all() -> Vec<&'static str> {
    TASKS.iter().map(|task| task.name).collect()
}

/// The largest unit of a task in tokens of [`count`].
fn unit(task: &str) -> usize {
    match task {
        // A sentence of noise.
        "niah_single_1" | "vt" => 4,
        "niah_multikey_2" => 10 + 1 + 7,
        // A uuid has 30 random hexadecimal digits, and there are two.
        "niah_multikey_3" => 11 + 2 * 32,
        // Three entries of at most two words and five digits.
        "cwe" => 3 * (3 + 5),
        // 5 times eight words and three digits, the heading with a number of three digits, the title.
        "qa_1" | "qa_2" => 5 * 11 + 5 + 4,
        _ => 1 + 4,
    }
}

#[test]
fn the_files_of_a_run_are_those_that_its_tasks_read() {
    let files = Files::new();
    std::fs::write(files.path("words.txt"), "sheep\nhill\n").expect("a file");
    for (task, name) in [
        ("vt", None),
        ("niah_single_2", Some("prose.txt")),
        ("cwe", Some("words.txt")),
        ("qa_1", Some("squad.json")),
        ("qa_2", Some("hotpot.json")),
    ] {
        let words = Some(files.path("words.txt"));
        let ruler = Ruler::open(Config { words, ..files.config(&[task], &[4_096]) }).expect(task);
        let expected: Vec<PathBuf> = name.into_iter().map(|name| files.path(name)).collect();
        assert_eq!(ruler.files(), expected, "{task}");
    }
}

#[test]
fn every_sample_fills_its_length_and_no_more() {
    let files = Files::new();
    let ruler = Ruler::open(files.config(&all(), &[1_024, 4_096, 16_384])).expect("all files");
    let cells = ruler.cells();
    assert_eq!(cells.len(), 13 * 3 * 2);
    for cell in cells {
        let sample = ruler.sample(&cell, &count).expect("it fits");
        let length: usize = cell.group.parse().expect("a length");
        let whole = count(&(sample.context.clone() + &sample.question)).expect("it counts");
        let prefix = count(&sample.answer_prefix).expect("it counts");
        assert_eq!(sample.tokens, whole + 20 + prefix + sample.max_new_tokens, "{cell:?}");
        assert!(sample.tokens <= length, "{cell:?}: {}", sample.tokens);
        let slack = (length / 100).max(unit(&cell.task));
        assert!(length - sample.tokens <= slack, "{cell:?}: {}", sample.tokens);
        assert!(sample.context.ends_with('\n') && !sample.question.contains("\nDocument"));
        assert!(!sample.references.is_empty());
    }
}

#[test]
fn a_text_of_large_units_is_drawn_until_one_fills_the_length() {
    let files = Files::new();
    let config = Config { samples: 12, ..files.config(&["niah_multikey_3"], &[4_096]) };
    let ruler = Ruler::open(config).expect("no file is needed");
    let mut drawn_again = 0;
    for cell in ruler.cells() {
        let task = find(&cell.task).expect("one of the thirteen");
        let sample = ruler.sample(&cell, &count).expect("it fits");
        assert!(4_096 - sample.tokens <= 40 && sample.tokens <= 4_096, "{}", sample.tokens);
        let first = ruler.draft(task, 4_096, cell.index, 0, &count).expect("it is drawn");
        drawn_again += usize::from(first.references != sample.references);
    }
    assert!(drawn_again > 0, "every first drawing filled the length: the test shows nothing");
}

#[test]
fn answers_are_in_the_text_of_synthetic_tasks() {
    let files = Files::new();
    let tasks: Vec<&str> = all().into_iter().filter(|task| !task.starts_with("qa")).collect();
    let ruler = Ruler::open(files.config(&tasks, &[4_096])).expect("all files");
    for cell in ruler.cells() {
        let sample = ruler.sample(&cell, &count).expect("it fits");
        for reference in &sample.references {
            assert!(sample.context.contains(reference.as_str()), "{cell:?}: {reference}");
        }
    }
}

/// Bytes of a sample as one number.
fn hash(sample: &Sample) -> u64 {
    let Sample { context, question, answer_prefix, references, .. } = sample;
    seed::fnv1a(&format!("{context}|{question}|{answer_prefix}|{}", references.join("|")))
}

#[test]
fn samples_are_the_same_bytes_for_a_seed() {
    let files = Files::new();
    let ruler = Ruler::open(files.config(&all(), &[4_096])).expect("all files");
    let hashes: Vec<(&str, u64)> = TASKS
        .iter()
        .map(|task| {
            let cell = Cell { task: task.name.to_owned(), group: "4096".to_owned(), index: 1 };
            (task.name, hash(&ruler.sample(&cell, &count).expect("it fits")))
        })
        .collect();
    let golden: [(&str, u64); 13] = [
        ("niah_single_1", 0xb162_8582_ce17_d252),
        ("niah_single_2", 0x9ba9_2269_b14e_f004),
        ("niah_single_3", 0xa544_e02a_bf17_462f),
        ("niah_multikey_1", 0x0537_7a08_2482_d5e1),
        ("niah_multikey_2", 0xf6b1_e35e_5161_0612),
        ("niah_multikey_3", 0x15a3_ffb9_bfea_e66d),
        ("niah_multivalue", 0xf459_298e_556d_6892),
        ("niah_multiquery", 0x4df7_0297_039d_9d81),
        ("vt", 0x7c7a_412b_32fd_e01c),
        ("cwe", 0x2f43_4c7d_047c_bf9b),
        ("fwe", 0x4ee2_8927_820b_a638),
        ("qa_1", 0x0dfa_204a_200b_e532),
        ("qa_2", 0xed3e_5114_b5d1_79e5),
    ];
    assert_eq!(hashes, golden);
}

#[test]
fn seed_task_length_and_index_each_change_a_sample() {
    let files = Files::new();
    let make = |seed: u64, task: &str, length: usize, index: usize| {
        let config = Config { seed, ..files.config(&[task], &[length]) };
        let ruler = Ruler::open(config).expect("all files");
        let sample = ruler.sample(&ruler.cells()[index], &count).expect("it fits");
        sample.references
    };
    let base = make(42, "niah_single_1", 4_096, 0);
    assert_eq!(base, make(42, "niah_single_1", 4_096, 0));
    assert_ne!(base, make(43, "niah_single_1", 4_096, 0));
    assert_ne!(base, make(42, "niah_single_2", 4_096, 0));
    assert_ne!(base, make(42, "niah_single_1", 8_192, 0));
    assert_ne!(base, make(42, "niah_single_1", 4_096, 1));
}

#[test]
fn a_million_tokens_are_counted_at_most_four_times() {
    let files = Files::new();
    let tasks: Vec<&str> = all().into_iter().filter(|&task| task != "cwe").collect();
    let length = 1 << 20;
    let ruler = Ruler::open(files.config(&tasks, &[length])).expect("all files");
    for cell in ruler.cells().into_iter().filter(|cell| cell.index == 0) {
        let read = Counter::new(0);
        let counting = |text: &str| {
            let tokens = count(text)?;
            read.set(read.get() + tokens);
            Ok(tokens)
        };
        let sample = ruler.sample(&cell, &counting).expect("it fits");
        assert!(length - sample.tokens <= length / 100, "{cell:?}: {}", sample.tokens);
        assert!(read.get() <= 4 * length, "{cell:?}: {}", read.get());
    }
}

#[test]
fn depths_place_the_needle() {
    let files = Files::new();
    for task in ["niah_single_1", "niah_single_2", "niah_multikey_2"] {
        let config = Config { depths: vec![0.0, 100.0], ..files.config(&[task], &[2_048]) };
        let ruler = Ruler::open(config).expect("all files");
        for (index, share) in [(0, 0.0), (1, 1.0)] {
            let sample = ruler.sample(&ruler.cells()[index], &count).expect("it fits");
            let at = sample.context.find(&sample.references[0]).expect("the needle");
            let got = at as f64 / sample.context.len() as f64;
            assert!((got - share).abs() < 0.05, "{task} {index}: {got}");
        }
    }
}

fn error(config: Config) -> String {
    Ruler::open(config).err().expect("an error").to_string()
}

#[test]
fn an_unknown_task_is_answered_with_the_thirteen() {
    let message = error(Config { tasks: vec!["niah".to_owned()], ..Config::default() });
    assert!(
        message.starts_with("ruler: task \"niah\", expected one of niah_single_1, "),
        "{message}"
    );
    assert!(all().iter().all(|task| message.contains(task)), "{message}");
}

#[test]
fn a_missing_file_is_asked_for_by_task_and_flag() {
    for (task, flag) in [("niah_multikey_1", "--essays"), ("qa_1", "--squad"), ("qa_2", "--hotpot")]
    {
        let message = error(Config { tasks: vec![task.to_owned()], ..Config::default() });
        assert!(message.starts_with(&format!("ruler: {task} needs {flag} with ")), "{message}");
    }
    let tasks = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"];
    let tasks = tasks.map(str::to_owned).to_vec();
    assert!(Ruler::open(Config { tasks, ..Config::default() }).is_ok());
}

#[test]
fn essays_without_words_or_without_text_are_errors() {
    let files = Files::new();
    let with = |path: &Path| {
        let essays = vec![path.to_owned()];
        error(Config { essays, ..files.config(&["niah_single_2"], &[4_096]) })
    };
    let path = files.path("empty.txt");
    std::fs::write(&path, " \n").expect("a file");
    let shown = path.display();
    assert_eq!(with(&path), format!("ruler: --essays {shown}: expected prose, got no words"));
    std::fs::write(&path, [0xff, 0xfe]).expect("a file");
    assert!(with(&path).starts_with(&format!("ruler: --essays {shown}: ")));
}

#[test]
fn a_length_without_room_is_an_error() {
    let files = Files::new();
    let ruler = Ruler::open(files.config(&all(), &[60, 160, 240])).expect("all files");
    for cell in ruler.cells() {
        let message = ruler.sample(&cell, &count).err().map(|e| e.to_string());
        let length = &cell.group;
        let start = format!("ruler: {} at length {length}, expected at least ", cell.task);
        match message {
            Some(message) => assert!(message.starts_with(&start), "{message}"),
            None => assert!(!["60"].contains(&length.as_str()), "{cell:?}"),
        }
    }
}

#[test]
fn too_few_words_for_cwe_are_asked_for() {
    let files = Files::new();
    let length = 400_000;
    let config = files.config(&["cwe"], &[length]);
    let ruler = Ruler::open(config.clone()).expect("no file is needed");
    let message = ruler.sample(&ruler.cells()[0], &count).expect_err("too few").to_string();
    assert!(message.contains("needs more than 8166 distinct words: give --words"), "{message}");
    let path = files.path("words.txt");
    let words: String = (0..20_000).map(|n| format!("word{}\n", n)).collect();
    std::fs::write(&path, words).expect("a file");
    let ruler = Ruler::open(Config { words: Some(path), ..config }).expect("all files");
    let sample = ruler.sample(&ruler.cells()[0], &count).expect("enough words");
    assert!(length - sample.tokens <= length / 100);
}

#[test]
fn depths_outside_of_the_text_are_errors() {
    let message = error(Config { depths: vec![50.0, 101.0], ..Config::default() });
    assert_eq!(message, "ruler: depth 101, expected percent from 0 to 100");
}

//! Which samples the official files give, and which files are refused.
//! Knows no prompt and no metric beyond one of each.

use super::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn v1_record(length: usize) -> Value {
    json!({
        "input": "Who?", "context": "Text.", "answers": ["Ada", "A. L."], "length": length, "dataset": "qasper",
        "language": "en", "all_classes": null, "_id": "0",
    })
}

fn v2_record(difficulty: &str, length: &str) -> Value {
    json!({
        "_id": "0", "domain": "d", "sub_domain": "s", "difficulty": difficulty, "length": length, "answer": "B",
        "question": "Which?", "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d", "context": "Text.",
    })
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

/// Opens a folder with one file.
fn open(
    file: &str,
    text: &str,
    version: Version,
    tasks: &[&str],
    limit: Option<usize>,
) -> (TempDir, Result<LongBench>) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(file), text).unwrap();
    let tasks = tasks.iter().map(|task| task.to_string()).collect();
    let config = Config { data: folder.path().to_owned(), version, tasks, limit };
    (folder, LongBench::open(config))
}

fn cells(bench: &LongBench) -> Vec<(String, String, usize)> {
    bench.cells().into_iter().map(|cell| (cell.task, cell.group, cell.index)).collect()
}

fn cell(task: &str, group: &str, index: usize) -> (String, String, usize) {
    (task.to_owned(), group.to_owned(), index)
}

#[test]
fn samples_of_v1_are_the_lines_of_their_file() {
    let text = lines(&[v1_record(5), v1_record(9000), v1_record(5)]);
    let (folder, bench) = open("qasper.jsonl", &text, Version::V1, &["qasper"], Some(2));
    let bench = bench.unwrap();
    assert_eq!(bench.name(), "longbench");
    assert_eq!(bench.files(), [folder.path().join("qasper.jsonl")]);
    assert_eq!(cells(&bench), [cell("qasper", "all", 0), cell("qasper", "all", 1)]);
    let sample = bench.sample(&bench.cells()[1], &|text| Ok(text.len())).unwrap();
    assert_eq!(sample.references, ["Ada", "A. L."]);
    assert!(sample.context.ends_with("\n\nArticle: Text.\n\n") && sample.chat);
    assert!(sample.question.ends_with("\n\nQuestion: Who?\n\nAnswer:"));
    assert_eq!((sample.metric.score)("Ada", &sample.references, &sample.classes), 1.0);
}

#[test]
fn without_names_the_tasks_are_those_whose_file_is_there() {
    let text = lines(&[v1_record(5)]);
    for (file, version) in [("qasper.jsonl", Version::V1), ("qasper_e.jsonl", Version::V1E)] {
        let (_folder, bench) = open(file, &text, version, &[], None);
        let tasks: Vec<_> = cells(&bench.unwrap()).into_iter().map(|cell| cell.0).collect();
        assert_eq!(tasks, ["qasper"]);
        let (_folder, bench) = open(file, &text, version, &["qasper", "hotpotqa"], None);
        let error = bench.err().unwrap().to_string();
        assert!(error.contains("open ") && error.contains("hotpotqa"), "{error}");
        let (_folder, bench) = open("other.jsonl", &text, version, &[], None);
        assert!(bench.err().unwrap().to_string().contains("no samples in "));
    }
}

#[test]
fn samples_of_longbench_e_are_grouped_by_length() {
    let lengths = [3999, 4000, 3, 7999, 8000];
    let text = lines(&lengths.map(v1_record));
    let (_folder, bench) = open("qasper_e.jsonl", &text, Version::V1E, &["qasper"], Some(1));
    let bench = bench.unwrap();
    assert_eq!(bench.name(), "longbench_e");
    let expected = [cell("qasper", "0-4k", 0), cell("qasper", "4-8k", 1), cell("qasper", "8k+", 4)];
    assert_eq!(cells(&bench), expected);
}

#[test]
fn samples_of_v2_are_grouped_by_difficulty_and_length() {
    let records = [
        v2_record("hard", "short"),
        v2_record("easy", "long"),
        v2_record("hard", "medium"),
        v2_record("easy", "long"),
    ];
    let array = serde_json::to_string_pretty(&records).unwrap();
    for (file, text) in [("data.json", array), ("data.jsonl", lines(&records))] {
        let (_folder, bench) = open(file, &text, Version::V2, &[], None);
        let bench = bench.unwrap();
        assert_eq!(bench.name(), "longbench_v2");
        let expected = [
            cell("v2_easy", "long", 1),
            cell("v2_easy", "long", 3),
            cell("v2_hard", "short", 0),
            cell("v2_hard", "medium", 2),
        ];
        assert_eq!(cells(&bench), expected);
        let sample = bench.sample(&bench.cells()[0], &|text| Ok(text.len())).unwrap();
        assert_eq!(
            (sample.metric.score)("The correct answer is (B).", &sample.references, &[]),
            1.0
        );
    }
}

#[test]
fn only_tasks_with_reasoning_have_a_second_question() {
    let text = lines(&[v2_record("easy", "short")]);
    let tasks = ["v2_easy_cot", "v2_easy_no_context"];
    let (_folder, bench) = open("data.jsonl", &text, Version::V2, &tasks, None);
    let bench = bench.unwrap();
    let [alone, reasoned] = &bench.cells()[..] else { panic!("{:?}", bench.cells()) };
    let second = bench.follow_up(reasoned, "so b").unwrap().unwrap();
    assert!(second.question.contains("step by step: so b\n"));
    assert!(bench.follow_up(alone, "so b").unwrap().is_none());
}

#[test]
fn bad_data_is_named() {
    let good = v1_record(1);
    let mut incomplete = good.clone();
    incomplete.as_object_mut().unwrap().remove("context");
    let mut unanswered = v2_record("easy", "short");
    unanswered["answer"] = json!("E");
    let cases = [
        (
            "qasper.jsonl",
            format!("{good}\n{{\"input\": \n"),
            Version::V1,
            "qasper.jsonl: line 2: EOF",
        ),
        (
            "qasper.jsonl",
            lines(&[good.clone(), good.clone(), incomplete]),
            Version::V1,
            "qasper.jsonl: line 3: missing field `context`",
        ),
        ("other.jsonl", lines(&[good]), Version::V1, "open "),
        (
            "data.jsonl",
            lines(&[unanswered]),
            Version::V2,
            "data.jsonl: line 1: unknown variant `E`",
        ),
        ("other.json", String::new(), Version::V2, "data.json: "),
        ("trec.jsonl", lines(&[v1_record(1)]), Version::V1, "trec.jsonl: line 1: no `all_classes`"),
    ];
    for (file, text, version, expected) in cases {
        let tasks: &[&str] = match version {
            Version::V2 => &[],
            _ if file == "trec.jsonl" => &["trec"],
            _ => &["qasper"],
        };
        let (_folder, bench) = open(file, &text, version, tasks, None);
        let error = bench.err().unwrap().to_string();
        assert!(error.starts_with("longbench: ") && error.contains(expected), "{error}");
    }
}

#[test]
fn files_without_a_sample_are_refused() {
    let (_folder, bench) = open("data.json", "[]", Version::V2, &[], None);
    assert!(bench.err().unwrap().to_string().contains("no samples in "));
}

#[test]
fn unknown_tasks_are_refused() {
    let cases = [(Version::V1, "v2_easy"), (Version::V1E, "musique"), (Version::V2, "qasper")];
    for (version, task) in cases {
        let (_folder, bench) = open("data.jsonl", "", version, &["nothing", task], None);
        let error = bench.err().unwrap().to_string();
        assert!(error.contains("unknown task \"nothing\", expected one of "), "{error}");
        let (_folder, bench) = open("data.jsonl", "", version, &[task], None);
        assert!(bench.err().unwrap().to_string().contains(task));
    }
}

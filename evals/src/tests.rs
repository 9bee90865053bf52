//! The commands that the documentation shows, as the command line reads them.
//! Knows no command by name and runs none.

use super::Args;
use clap::{CommandFactory, Parser};
use regex::{Captures, Regex};
use std::collections::HashMap;
use std::path::Path;

/// Lines of the shell blocks of `page` with their numbers, those that go on in the next one joined.
fn shell_lines(page: &str) -> Vec<(usize, String)> {
    let (mut lines, mut begun, mut in_shell) = (Vec::new(), String::new(), false);
    for (i, line) in page.lines().enumerate() {
        if line.starts_with("```") {
            in_shell = line == "```sh";
        } else if in_shell {
            begun.push_str(line.trim_end_matches('\\'));
            if !line.ends_with('\\') {
                lines.push((i + 1, std::mem::take(&mut begun)));
            }
        }
    }
    lines
}

/// Commands of a line by their words: quotes are taken off, and a comment ends it.
fn commands(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut quote = None;
    // The blank ends the last word.
    for letter in line.chars().chain([' ']) {
        match (quote, letter) {
            (Some(open), _) if letter == open => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(letter),
            (None, '\'' | '"') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, ' ' | ';' | '&' | '|' | '(' | ')') => {
                commands.last_mut().unwrap().extend(word.take());
                if letter != ' ' {
                    commands.push(Vec::new());
                }
            }
            (None, _) => word.get_or_insert_default().push(letter),
        }
    }
    commands
}

/// The command line of `evals` in `words`, behind `do` and variables of the environment or as cargo runs it.
fn of_evals(words: &[String]) -> Option<&[String]> {
    let program = words.iter().position(|word| word != "do" && !word.contains('='))?;
    if words[program] == "evals" {
        return Some(&words[program..]);
    }
    let is_run = |words: &[String]| words[0] == "--bin" && words[1] == "evals" && words[2] == "--";
    let run = words.windows(3).position(is_run)?;
    // The two dashes stand where the name of the program is looked for.
    (words[program] == "cargo").then(|| &words[run + 2..])
}

/// Commands of `evals` in `page`, with the numbers of their lines; of others and of those that run one inside none.
fn documented(page: &str) -> Vec<(usize, Vec<String>)> {
    let variable = Regex::new(r"\$\{?(\w+)\}?").unwrap();
    let assignment = Regex::new(r#"^(\w+)=(?:"([^"]*)"|(\S*))$"#).unwrap();
    let mut values: HashMap<String, String> = HashMap::new();
    let mut found = Vec::new();
    for (number, line) in shell_lines(page) {
        if line.contains("$(") || line.contains('`') {
            continue;
        }
        // Those of loops have numbers.
        let expanded = variable.replace_all(&line, |name: &Captures| {
            values.get(&name[1]).cloned().unwrap_or_else(|| "1".to_owned())
        });
        let line = expanded.into_owned();
        if let Some(assigned) = assignment.captures(&line) {
            let value = assigned.get(2).or(assigned.get(3)).map_or("", |value| value.as_str());
            values.insert(assigned[1].to_owned(), value.to_owned());
            continue;
        }
        for words in commands(&line) {
            found.extend(of_evals(&words).map(|words| (number, words.to_vec())));
        }
    }
    found
}

#[test]
fn commands_are_found_as_a_shell_reads_them() {
    let page = "evals outside\n```sh\nT=a,b\nR=\"evals ruler --tasks $T\"\n# evals comment\n\
                for seed in 42 43; do X=1 $R --seed $seed \\\n  --out 'r # 1'; done # evals so\n\
                pip install x && evals a & cargo run --bin evals -- b; echo $(evals c)\nevals d\n```\n";
    let expected = [
        (7, vec!["evals", "ruler", "--tasks", "a,b", "--seed", "1", "--out", "r # 1"]),
        (9, vec!["evals", "d"]),
    ];
    let found = documented(page);
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for ((line, words), (expected_line, expected)) in found.iter().zip(expected) {
        assert_eq!((*line, words.join("|")), (expected_line, expected.join("|")));
    }
    let found = documented("```sh\npip install x && evals a & cargo run --bin evals -- b\n```\n");
    let words: Vec<_> = found.iter().map(|(_, words)| words.join(" ")).collect();
    assert_eq!(words, ["evals a", "-- b"]);
}

#[test]
fn every_documented_command_is_one_that_the_program_takes() {
    Args::command().debug_assert();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut pages = vec![root.join("README.md")];
    for folder in ["evals/docs", "engine/docs"] {
        let files = std::fs::read_dir(root.join(folder)).unwrap();
        let files = files.map(|file| file.unwrap().path());
        pages.extend(files.filter(|path| path.extension().is_some_and(|ending| ending == "md")));
    }
    let (mut count, mut refused) = (0, Vec::new());
    for page in pages {
        for (line, words) in documented(&std::fs::read_to_string(&page).unwrap()) {
            count += 1;
            if let Err(error) = Args::try_parse_from(words) {
                refused.push(format!("{}:{line}: {error}", page.display()));
            }
        }
    }
    assert!(count > 50, "{count} commands");
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

//! Variable tracking (vt): one chain of assignments in noise, and which names hold the value.
//! Knows no length but that of the worked example.
//!
//! Source: `scripts/data/synthetic/variable_tracking.py` and `constants.py`.

use super::haystack::{NOISE, lines_with};
use super::seed::{Seed, Stream};
use super::{Draft, size};
use crate::job::Result;
use rand::Rng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;

const INTRO: &str =
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";

/// The names of a chain: one is given the value, four more are given the name before.
const NUM_NAMES: usize = 5;

/// Tokens of the worked example with its answer prefix, at most.
const EXAMPLE_TOKENS: usize = 500;

/// One chain.
struct Chain {
    names: Vec<String>,
    value: u32,
}

impl Chain {
    fn draw(rng: &mut ChaCha8Rng, name_len: usize) -> Self {
        let mut names: Vec<String> = Vec::new();
        while names.len() < NUM_NAMES {
            let name: String =
                (0..name_len).map(|_| char::from(rng.random_range(b'A'..=b'Z'))).collect();
            // A variable called VAR, or two of one name, would make the example a riddle.
            if name != "VAR" && !names.contains(&name) {
                names.push(name);
            }
        }
        Self { names, value: rng.random_range(10_000..99_999) }
    }

    /// The assignments in their order. The blank at the end of all but the first is the template's.
    fn statements(&self) -> impl Iterator<Item = String> {
        let first = format!("VAR {} = {}", self.names[0], self.value);
        let hops = self.names.windows(2).map(|two| format!("VAR {} = VAR {} ", two[1], two[0]));
        std::iter::once(first).chain(hops)
    }

    /// The text with `num_lines` lines of noise, up to the question; places come from `seed` and `stream`.
    fn context(&self, num_lines: usize, seed: Seed, stream: Stream) -> String {
        let mut places = index::sample(&mut seed.rng(stream), num_lines, NUM_NAMES).into_vec();
        places.sort_unstable();
        let inserts: Vec<_> = places.into_iter().zip(self.statements()).collect();
        let lines = lines_with(num_lines, |text| text.push_str(NOISE), &inserts);
        format!("{INTRO}{lines}\n")
    }

    fn question(&self) -> String {
        format!(
            "Question: Find all variables that are assigned the value {} in the text above.",
            self.value
        )
    }

    fn answer_prefix(&self) -> String {
        format!(
            " Answer: According to the chain(s) of variable assignment in the text above, {NUM_NAMES} variables are \
             assigned the value {}, they are: ",
            self.value
        )
    }

    /// The example up to its answer.
    fn example(&self, num_lines: usize, seed: Seed) -> String {
        let context = self.context(num_lines, seed.shared(), Stream::Example);
        context + &self.question() + &self.answer_prefix()
    }
}

/// A sample. Every sample of a run has an example of the same size with its assignments in the same places, and names
/// and value of its own.
pub(super) fn draft<'a>(
    seed: Seed,
    count_tokens: &dyn Fn(&str) -> Result<usize>,
) -> Result<Draft<'a>> {
    let shared = Chain::draw(&mut seed.shared().rng(Stream::Answer), 3);
    let mut measure = |num_lines| count_tokens(&shared.example(num_lines, seed));
    let fit = size::largest(EXAMPLE_TOKENS, NUM_NAMES..=EXAMPLE_TOKENS, &mut measure)?;
    let example_lines = fit.map_or(NUM_NAMES, |fit| fit.units);

    let shown = Chain::draw(&mut seed.rng(Stream::Example), 3);
    let example = format!("{} {}\n\n", shown.example(example_lines, seed), shown.names.join(" "));
    let chain = Chain::draw(&mut seed.rng(Stream::Answer), 5);
    Ok(Draft {
        question: chain.question(),
        answer_prefix: chain.answer_prefix(),
        references: chain.names.clone(),
        units: NUM_NAMES..=usize::MAX,
        repeated: Some(NOISE),
        context: Box::new(move |num_lines| {
            format!("{example}{}", chain.context(num_lines, seed, Stream::Places))
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed(index: usize) -> Seed {
        Seed::new(42, "vt", 4_096, index, 0)
    }

    #[test]
    fn the_text_is_the_template() {
        let names = ["AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"].map(str::to_owned).to_vec();
        let chain = Chain { names, value: 12_345 };
        assert_eq!(
            chain.context(5, seed(0), Stream::Places) + &chain.question() + &chain.answer_prefix(),
            format!(
                "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n\
                 VAR AAAAA = 12345\n{NOISE}\nVAR BBBBB = VAR AAAAA \n{NOISE}\nVAR CCCCC = VAR BBBBB \n{NOISE}\n\
                 VAR DDDDD = VAR CCCCC \n{NOISE}\nVAR EEEEE = VAR DDDDD \n{NOISE}\n\
                 Question: Find all variables that are assigned the value 12345 in the text above. Answer: According \
                 to the chain(s) of variable assignment in the text above, 5 variables are assigned the value 12345, \
                 they are: "
            )
        );
    }

    #[test]
    fn an_example_with_its_answer_comes_first() {
        let words = |text: &str| Ok(text.split_whitespace().count());
        let draft = draft(seed(0), &words).expect("words can be counted");
        let text = (draft.context)(20);
        let (example, task) = text.split_once("\n\nMemorize").expect("an example and a task");
        let (_, answer) = example.rsplit_once(", they are:  ").expect("an answer");
        let names: Vec<&str> = answer.split(' ').collect();
        assert_eq!(names.len(), 5);
        assert!(
            names.iter().all(|name| name.len() == 3 && example.contains(&format!("VAR {name} = ")))
        );
        let tokens = example.split_whitespace().count() - names.len();
        // A line of noise is 19 words.
        assert!(tokens <= 500 && tokens > 480, "{tokens}");
        assert!(draft.references.iter().all(|name| task.contains(&format!("VAR {name} = "))));
    }

    #[test]
    fn examples_of_a_run_differ_in_names_and_value_alone() {
        let words = |text: &str| Ok(text.split_whitespace().count());
        let shape = |index| {
            let draft = draft(seed(index), &words).expect("words can be counted");
            let text = (draft.context)(20);
            let (example, _) = text.split_once(", they are: ").expect("an example");
            let lines = example.lines().map(|line| line.starts_with("VAR ")).collect::<Vec<_>>();
            (lines, example.to_owned())
        };
        let (one, other) = (shape(0), shape(1));
        assert_eq!(one.0, other.0);
        assert_ne!(one.1, other.1);
    }
}

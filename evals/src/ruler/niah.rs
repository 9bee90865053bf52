//! Needles in a haystack: the eight tasks that ask for values of keys.
//! Knows neither lengths nor tokens.
//!
//! Source: `scripts/data/synthetic/niah.py` and `constants.py`.

use super::Draft;
use super::haystack::{Essay, NOISE, lines_with};
use super::lexicon::Lexicon;
use super::seed::{Seed, Stream};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom, index};
use rand_chacha::ChaCha8Rng;
use std::fmt::Write as _;

/// What surrounds the needles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hay {
    Noise,
    Essay,
    /// Other needles.
    Needles,
}

/// What a key or a value looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    Words,
    Numbers,
    Uuids,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Niah {
    pub(super) hay: Hay,
    pub(super) key: Token,
    pub(super) value: Token,
    pub(super) num_keys: usize,
    pub(super) num_values: usize,
    pub(super) num_queries: usize,
}

impl Niah {
    pub(super) fn num_needles(&self) -> usize {
        self.num_keys * self.num_values
    }
}

impl Token {
    fn plural(self) -> &'static str {
        match self {
            Token::Words => "words",
            Token::Numbers => "numbers",
            Token::Uuids => "uuids",
        }
    }

    fn draw(self, rng: &mut ChaCha8Rng, lexicon: &Lexicon) -> String {
        match self {
            Token::Words => {
                let adjective = lexicon.adjectives.choose(rng).copied().unwrap_or_default();
                let noun = lexicon.nouns.choose(rng).copied().unwrap_or_default();
                format!("{adjective}-{noun}")
            }
            Token::Numbers => rng.random_range(1_000_000..10_000_000u32).to_string(),
            Token::Uuids => {
                // Version 4, variant 1 of RFC 4122.
                let bits = rng.random::<u128>() & !(0xf << 76) & !(0x3 << 62) | 4 << 76 | 2 << 62;
                let hex = format!("{bits:032x}");
                let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
                parts.join("-")
            }
        }
    }
}

/// The sentence that is hidden; it stays in the plural whatever is asked.
fn needle(value: Token, key: &str, value_text: &str) -> String {
    format!("One of the special magic {} for {key} is: {value_text}.", value.plural())
}

/// The sentences around the haystack, in the singular where one value is asked for.
struct Frame {
    intro: String,
    question: String,
    answer_prefix: String,
}

impl Frame {
    fn new(value: Token, query: &str, num_answers: usize) -> Self {
        let things = value.plural();
        if num_answers == 1 {
            let thing = things.trim_end_matches('s');
            return Self {
                intro: format!(
                    "A special magic {thing} is hidden within the following text. Make sure to memorize it. I will \
                     quiz you about the {thing} afterwards.\n"
                ),
                question: format!(
                    "What is the special magic {thing} for {query} mentioned in the provided text?"
                ),
                answer_prefix: format!(
                    " The special magic {thing} for {query} mentioned in the provided text is"
                ),
            };
        }
        Self {
            intro: format!(
                "Some special magic {things} are hidden within the following text. Make sure to memorize it. I will \
                 quiz you about the {things} afterwards.\n"
            ),
            question: format!(
                "What are all the special magic {things} for {query} mentioned in the provided text?"
            ),
            answer_prefix: format!(
                " The special magic {things} for {query} mentioned in the provided text are"
            ),
        }
    }
}

/// `a`; `a, and b`; `a, b, and c`.
fn enumerate(keys: &[&str]) -> String {
    match keys {
        [] => String::new(),
        [key] => (*key).to_owned(),
        [keys @ .., last] => format!("{}, and {last}", keys.join(", ")),
    }
}

/// A sample of `niah`. `depths` are one percentage a needle, or none for the official rule; `essay` is needed where
/// the haystack is one, and without it there is no sample.
pub(super) fn draft<'a>(
    niah: Niah,
    essay: Option<&'a Essay>,
    lexicon: &'a Lexicon,
    depths: Vec<f64>,
    seed: Seed,
) -> Option<Draft<'a>> {
    let rng = &mut seed.rng(Stream::Answer);
    let mut keys: Vec<String> = Vec::new();
    while keys.len() < niah.num_keys {
        let key = niah.key.draw(rng, lexicon);
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let values: Vec<Vec<String>> = keys
        .iter()
        .map(|_| (0..niah.num_values).map(|_| niah.value.draw(rng, lexicon)).collect())
        .collect();
    let mut needles: Vec<String> = keys
        .iter()
        .zip(&values)
        .flat_map(|(key, values)| values.iter().map(|value| needle(niah.value, key, value)))
        .collect();
    needles.shuffle(rng);
    let asked = index::sample(rng, niah.num_keys, niah.num_queries).into_vec();
    let query = enumerate(&asked.iter().map(|&key| keys[key].as_str()).collect::<Vec<_>>());
    let references: Vec<String> = asked.iter().flat_map(|&key| values[key].clone()).collect();
    let Frame { intro, question, answer_prefix } =
        Frame::new(niah.value, &query, niah.num_queries * niah.num_values);

    let essay = match niah.hay {
        Hay::Essay => Some(essay?),
        Hay::Noise | Hay::Needles => None,
    };
    let context = move |units: usize| {
        let mut text = intro.clone();
        match essay {
            Some(essay) => push_essay(&mut text, essay, units, &needles, &depths, seed),
            None => {
                let places = line_places(units, needles.len(), &depths, seed);
                let inserts: Vec<_> = places.into_iter().zip(needles.iter().cloned()).collect();
                let mut rng = seed.rng(Stream::Haystack);
                let line = |text: &mut String| match niah.hay {
                    Hay::Needles => push_distractor(text, niah, &keys, lexicon, &mut rng),
                    Hay::Noise | Hay::Essay => text.push_str(NOISE),
                };
                text.push_str(&lines_with(units, line, &inserts));
            }
        }
        text.push('\n');
        text
    };
    let min = if essay.is_some() { 0 } else { niah.num_needles() };
    Some(Draft {
        context: Box::new(context),
        units: min..=usize::MAX,
        repeated: (niah.hay == Hay::Noise).then_some(NOISE),
        question,
        answer_prefix,
        references,
    })
}

/// A needle of another key: one with an asked key would be a second answer.
fn push_distractor(
    text: &mut String,
    niah: Niah,
    keys: &[String],
    lexicon: &Lexicon,
    rng: &mut ChaCha8Rng,
) {
    let mut key = niah.key.draw(rng, lexicon);
    while keys.contains(&key) {
        key = niah.key.draw(rng, lexicon);
    }
    let value = niah.value.draw(rng, lexicon);
    // Writing to a String cannot fail.
    let _ = write!(text, "{}", needle(niah.value, &key, &value));
}

/// The lines before which needles stand, ascending.
fn line_places(num_lines: usize, num_needles: usize, depths: &[f64], seed: Seed) -> Vec<usize> {
    let mut places = match depths.is_empty() {
        true => index::sample(&mut seed.rng(Stream::Places), num_lines, num_needles).into_vec(),
        false => depths.iter().map(|&depth| at_depth(num_lines, depth)).collect(),
    };
    places.sort_unstable();
    places
}

/// Appends `num_words` words of prose with the needles between sentences, joined as the official generator joins them:
/// an empty stretch before, between or after needles still has its blanks.
fn push_essay(
    text: &mut String,
    essay: &Essay,
    num_words: usize,
    needles: &[String],
    depths: &[f64],
    seed: Seed,
) {
    let num_sentences = essay.num_sentences(num_words);
    let mut depths = depths.to_vec();
    if depths.is_empty() {
        // Forty depths spread evenly over 0 to 100, rounded to whole percents; each is taken once.
        let drawn = index::sample(&mut seed.rng(Stream::Places), 40, needles.len());
        depths = drawn.into_iter().map(|step| (step as f64 * 100.0 / 39.0).round()).collect();
    }
    depths.sort_unstable_by(f64::total_cmp);
    let mut from = 0;
    for (depth, needle) in depths.into_iter().zip(needles) {
        let to = essay.words_before(at_depth(num_sentences, depth), num_words);
        essay.push_words(text, from, to);
        text.push(' ');
        text.push_str(needle);
        text.push(' ');
        from = to;
    }
    essay.push_words(text, from, num_words);
}

fn at_depth(num_units: usize, depth_percent: f64) -> usize {
    (num_units as f64 * (depth_percent / 100.0)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lexicon() -> Lexicon {
        Lexicon {
            adjectives: vec!["fuzzy"],
            nouns: vec!["badger", "ant", "bee", "cat", "dog"],
            words: Vec::new(),
            more_words: Vec::new(),
        }
    }

    const SINGLE: Niah = Niah {
        hay: Hay::Noise,
        key: Token::Words,
        value: Token::Numbers,
        num_keys: 1,
        num_values: 1,
        num_queries: 1,
    };

    fn seed() -> Seed {
        Seed::new(42, "niah", 4_096, 0, 0)
    }

    #[test]
    fn one_answer_is_asked_for_in_the_singular() {
        let lexicon = Lexicon { nouns: vec!["badger"], ..lexicon() };
        let draft = draft(SINGLE, None, &lexicon, vec![50.0], seed()).expect("noise needs no file");
        let value = &draft.references[0];
        assert_eq!(
            (draft.context)(2) + &draft.question + &draft.answer_prefix,
            format!(
                "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz \
                 you about the number afterwards.\n{NOISE}\nOne of the special magic numbers for fuzzy-badger is: \
                 {value}.\n{NOISE}\nWhat is the special magic number for fuzzy-badger mentioned in the provided \
                 text? The special magic number for fuzzy-badger mentioned in the provided text is"
            )
        );
    }

    #[test]
    fn several_answers_are_asked_for_in_the_plural() {
        let niah = Niah { hay: Hay::Essay, num_keys: 4, num_queries: 4, ..SINGLE };
        let essay = Essay::new("It was. It is! Will it be?").expect("it has words");
        let lexicon = lexicon();
        let draft = draft(niah, Some(&essay), &lexicon, vec![0.0, 34.0, 34.0, 100.0], seed())
            .expect("there is an essay");
        let text = (draft.context)(7) + &draft.question + &draft.answer_prefix;
        let masked: String =
            text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        let mut needles = masked.split("One of ").skip(1).map(|rest| {
            let key = rest.strip_prefix("the special magic numbers for ").expect("a needle");
            key.split(' ').next().expect("a key")
        });
        let mut next = || needles.next().expect("four needles");
        let (a, b, c, d) = (next(), next(), next(), next());
        let query = draft.question.strip_prefix("What are all the special magic numbers for ");
        let query = query.and_then(|rest| rest.strip_suffix(" mentioned in the provided text?"));
        let query = query.expect("the template");
        assert_eq!(query.split(", ").count(), 4);
        assert!(query.split(", ").last().expect("four keys").starts_with("and fuzzy-"));
        let hidden = |key: &str| format!("One of the special magic numbers for {key} is: 0000000.");
        let (a, b, c, d) = (hidden(a), hidden(b), hidden(c), hidden(d));
        assert_eq!(
            masked,
            format!(
                "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will \
                 quiz you about the numbers afterwards.\n {a} It was. {b}  {c} It is! Will it be? {d} \n\
                 What are all the special magic numbers for {query} mentioned in the provided text? The special \
                 magic numbers for {query} mentioned in the provided text are"
            )
        );
    }

    #[test]
    fn answers_follow_the_order_of_the_query() {
        let niah = Niah { hay: Hay::Essay, num_keys: 4, num_queries: 4, ..SINGLE };
        let essay = Essay::new("It was.").expect("it has words");
        let lexicon = lexicon();
        let draft = draft(niah, Some(&essay), &lexicon, Vec::new(), seed()).expect("an essay");
        let text = (draft.context)(100);
        let keys = draft
            .question
            .split("fuzzy-")
            .skip(1)
            .map(|rest| rest.split([',', ' ']).next().expect("split gives one"));
        for (key, value) in keys.zip(&draft.references) {
            assert!(text.contains(&format!("for fuzzy-{key} is: {value}.")), "{key} {value}");
        }
    }

    #[test]
    fn a_longer_haystack_of_needles_begins_with_the_shorter() {
        let niah = Niah { hay: Hay::Needles, key: Token::Uuids, value: Token::Uuids, ..SINGLE };
        let lexicon = lexicon();
        let draft = draft(niah, None, &lexicon, vec![100.0], seed()).expect("no file is needed");
        let (short, long) = ((draft.context)(3), (draft.context)(5));
        let lines =
            |text: &str, num: usize| text.lines().take(num).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(lines(&short, 4), lines(&long, 4));
        assert_eq!(long.lines().count(), 7);
        assert!(long.lines().last().is_some_and(|line| line.contains(&draft.references[0])));
    }

    #[test]
    fn uuids_are_of_version_4() {
        let uuid = Token::Uuids.draw(&mut seed().rng(Stream::Answer), &lexicon());
        let parts: Vec<&str> = uuid.split('-').collect();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        assert!(parts[2].starts_with('4') && parts[3].starts_with(['8', '9', 'a', 'b']), "{uuid}");
    }

    #[test]
    fn keys_are_listed_with_an_and() {
        assert_eq!(enumerate(&["a"]), "a");
        assert_eq!(enumerate(&["a", "b"]), "a, and b");
        assert_eq!(enumerate(&["a", "b", "c"]), "a, b, and c");
    }
}

//! Questions over documents (qa_1, qa_2): those of the question, then others of the data set.
//! Knows no tokens.
//!
//! Source: `scripts/data/synthetic/qa.py` and `constants.py`.

use super::Draft;
use super::seed::{Seed, Stream};
use crate::job::Result;
use rand::seq::SliceRandom;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;

const INTRO: &str = "Answer the question based on the given documents. Only give me the answer and do not output any \
                     other words.\n\nThe following are given documents.\n\n";
const QUESTION: &str = "Answer the question based on the given documents. Only give me the answer and do not output \
                        any other words.\n\nQuestion: ";
const ANSWER_PREFIX: &str = " Answer:";

/// A data set.
pub(super) struct Qa {
    /// Every document once, sorted.
    documents: Vec<String>,
    /// In the order of the file: sample `i` is question `i`.
    questions: Vec<Question>,
}

struct Question {
    text: String,
    answers: Vec<String>,
    /// Indexes of the documents that belong to the question.
    own: Vec<usize>,
    /// Those of the same article, which come before any other.
    related: Vec<usize>,
}

#[derive(Deserialize)]
struct Squad {
    data: Vec<Article>,
}

#[derive(Deserialize)]
struct Article {
    paragraphs: Vec<Paragraph>,
}

#[derive(Deserialize)]
struct Paragraph {
    context: String,
    qas: Vec<SquadQuestion>,
}

#[derive(Deserialize)]
struct SquadQuestion {
    question: String,
    answers: Vec<Answer>,
    /// Absent in SQuAD v1 and what derives from it: all of its questions have an answer.
    #[serde(default)]
    is_impossible: bool,
}

#[derive(Deserialize)]
struct Answer {
    text: String,
}

/// Under its official names or the short ones of samples of the data set.
#[derive(Deserialize)]
struct HotpotQuestion {
    #[serde(alias = "q")]
    question: String,
    #[serde(alias = "a")]
    answer: HotpotAnswer,
    #[serde(alias = "docs")]
    context: Vec<HotpotDocument>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum HotpotAnswer {
    One(String),
    Any(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum HotpotDocument {
    /// A title and its sentences.
    Titled(String, Vec<String>),
    /// The same as one text.
    Text(String),
}

impl HotpotQuestion {
    fn documents(&self) -> Vec<String> {
        let text = |document: &HotpotDocument| match document {
            HotpotDocument::Titled(title, sentences) => format!("{title}\n{}", sentences.concat()),
            HotpotDocument::Text(text) => text.clone(),
        };
        self.context.iter().map(text).collect()
    }
}

impl Qa {
    /// # Errors
    /// If the file cannot be read, is not of that format, or has fewer than `samples` questions with an answer.
    pub(super) fn open_squad(path: &Path, samples: usize) -> Result<Self> {
        let source = format!("--squad {}", path.display());
        Self::from_squad(read(path, &source, "SQuAD v2.0 JSON")?).with(samples, &source)
    }

    /// # Errors
    /// If the file cannot be read, is not of that format, or has fewer than `samples` questions.
    pub(super) fn open_hotpot(path: &Path, samples: usize) -> Result<Self> {
        let source = format!("--hotpot {}", path.display());
        Self::from_hotpot(read(path, &source, "HotpotQA distractor JSON")?).with(samples, &source)
    }

    fn with(self, samples: usize, source: &str) -> Result<Self> {
        match self.questions.len() {
            enough if enough >= samples => Ok(self),
            got => Err(format!("ruler: {source}: expected {samples} questions, got {got}").into()),
        }
    }

    fn from_squad(squad: Squad) -> Self {
        let paragraphs = squad.data.iter().flat_map(|article| &article.paragraphs);
        let mut builder = Builder::new(paragraphs.map(|paragraph| paragraph.context.clone()));
        for article in squad.data {
            let texts = article.paragraphs.iter().map(|paragraph| &*paragraph.context);
            let article_idx: Vec<usize> = builder.indexes(texts);
            for paragraph in article.paragraphs {
                let own = builder.indexes([&*paragraph.context].into_iter());
                let others = article_idx.iter().filter(|idx| !own.contains(idx));
                let related: Vec<usize> = others.copied().collect();
                for question in paragraph.qas.into_iter().filter(|question| !question.is_impossible)
                {
                    builder.qa.questions.push(Question {
                        text: question.question,
                        answers: question.answers.into_iter().map(|answer| answer.text).collect(),
                        own: own.clone(),
                        related: related.clone(),
                    });
                }
            }
        }
        builder.qa
    }

    fn from_hotpot(questions: Vec<HotpotQuestion>) -> Self {
        let mut builder = Builder::new(questions.iter().flat_map(HotpotQuestion::documents));
        for question in questions {
            let own = builder.indexes(question.documents().iter().map(String::as_str));
            builder.qa.questions.push(Question {
                text: question.question,
                answers: match question.answer {
                    HotpotAnswer::One(answer) => vec![answer],
                    HotpotAnswer::Any(answers) => answers,
                },
                own,
                related: Vec::new(),
            });
        }
        builder.qa
    }

    /// Sample `index`; a unit is a document. Documents of the question's article come before any other, or, `mixed`,
    /// among all. None if there is no such question.
    pub(super) fn draft(&self, index: usize, seed: Seed, mixed: bool) -> Option<Draft<'_>> {
        let question = self.questions.get(index)?;
        let rng = &mut seed.rng(Stream::Haystack);
        let mut related = match mixed {
            true => Vec::new(),
            false => question.related.clone(),
        };
        related.shuffle(rng);
        let mut chosen = vec![false; self.documents.len()];
        let mut order = Vec::with_capacity(self.documents.len());
        for &document in question.own.iter().chain(&related) {
            chosen[document] = true;
            order.push(document);
        }
        let mut others: Vec<usize> = (0..chosen.len()).filter(|&idx| !chosen[idx]).collect();
        others.shuffle(rng);
        order.extend(others);
        Some(Draft {
            units: question.own.len()..=usize::MAX,
            repeated: None,
            question: format!("{QUESTION}{}", question.text),
            answer_prefix: ANSWER_PREFIX.to_owned(),
            references: question.answers.clone(),
            context: Box::new(move |num_documents| {
                // From as many as there are, the official generator repeats them all in their order.
                let mut documents: Vec<usize> = match num_documents < self.documents.len() {
                    true => order[..num_documents].to_vec(),
                    false => (0..self.documents.len()).cycle().take(num_documents).collect(),
                };
                documents.shuffle(&mut seed.rng(Stream::Places));
                context(documents.into_iter().map(|document| &*self.documents[document]))
            }),
        })
    }
}

/// A data set whose documents are known and whose questions come one by one.
struct Builder {
    qa: Qa,
    index_of: HashMap<String, usize>,
}

impl Builder {
    fn new(documents: impl Iterator<Item = String>) -> Self {
        let documents: Vec<String> = documents.collect::<BTreeSet<_>>().into_iter().collect();
        let index_of = documents.iter().cloned().zip(0..).collect();
        Self { qa: Qa { documents, questions: Vec::new() }, index_of }
    }

    fn indexes<'a>(&self, documents: impl Iterator<Item = &'a str>) -> Vec<usize> {
        documents.filter_map(|document| self.index_of.get(document).copied()).collect()
    }
}

fn context<'a>(documents: impl Iterator<Item = &'a str>) -> String {
    let mut text = INTRO.to_owned();
    for (document, number) in documents.zip(1..) {
        // Writing to a String cannot fail.
        let _ = write!(text, "Document {number}:\n{document}\n\n");
    }
    text
}

/// Reads JSON, which may be gzipped.
fn read<T: DeserializeOwned>(path: &Path, source: &str, format: &str) -> Result<T> {
    let mut bytes = std::fs::read(path).map_err(|e| format!("ruler: {source}: {e}"))?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        flate2::read::MultiGzDecoder::new(&*bytes)
            .read_to_end(&mut plain)
            .map_err(|e| format!("ruler: {source}: expected gzip, got {e}"))?;
        bytes = plain;
    }
    Ok(serde_json::from_slice(&bytes)
        .map_err(|e| format!("ruler: {source}: expected {format}, got {e}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn squad() -> Qa {
        let json = serde_json::json!({"version": "v2.0", "data": [
            {"title": "t", "paragraphs": [
                {"context": "Bees hum.", "qas": [
                    {"id": "1", "question": "Who hums?", "is_impossible": false,
                     "answers": [{"text": "Bees", "answer_start": 0}, {"text": "bees", "answer_start": 0}]},
                    {"id": "2", "question": "Who sings?", "is_impossible": true, "answers": []}]},
                {"context": "Ants walk.", "qas": []}]},
            {"title": "u", "paragraphs": [
                {"context": "Cats nap.", "qas": [
                    {"id": "3", "question": "Who naps?", "answers": [{"text": "Cats", "answer_start": 0}]}]}]},
        ]});
        Qa::from_squad(serde_json::from_value(json).expect("the format"))
    }

    fn seed() -> Seed {
        Seed::new(42, "qa_1", 4_096, 0, 0)
    }

    #[test]
    fn the_text_is_the_template() {
        let qa = squad();
        let draft = qa.draft(1, seed(), false).expect("two questions have answers");
        assert_eq!(
            (draft.context)(1) + &draft.question + &draft.answer_prefix,
            "Answer the question based on the given documents. Only give me the answer and do not output any other \
             words.\n\nThe following are given documents.\n\nDocument 1:\nCats nap.\n\nAnswer the question based on \
             the given documents. Only give me the answer and do not output any other words.\n\nQuestion: Who naps? \
             Answer:"
        );
        assert_eq!(draft.references, ["Cats"]);
    }

    #[test]
    fn documents_of_the_article_come_before_others() {
        let qa = squad();
        let draft = qa.draft(0, seed(), false).expect("two questions have answers");
        assert_eq!(draft.references, ["Bees", "bees"]);
        let documents = |num| {
            let text = (draft.context)(num);
            ["Bees", "Ants", "Cats"].map(|word| text.matches(&format!(":\n{word} ")).count())
        };
        assert_eq!([1, 2, 3, 4].map(documents), [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 2, 1]]);
    }

    #[test]
    fn mixed_documents_of_the_article_come_among_others() {
        let qa = squad();
        let second = |index: usize| {
            let seed = Seed::new(42, "qa_1", 4_096, index, 64);
            let draft = qa.draft(0, seed, true).expect("two questions have answers");
            let text = (draft.context)(2);
            assert!(text.contains(":\nBees "));
            text.contains(":\nCats ")
        };
        let others = (0..40).filter(|index| second(*index)).count();
        assert!((5..35).contains(&others), "{others}");
    }

    #[test]
    fn hotpot_documents_are_a_title_and_its_sentences() {
        let json = r#"[{"_id": "1", "question": "Who?", "answer": "Bees", "type": "bridge", "level": "hard",
            "supporting_facts": [["A", 0]], "context": [["A", ["One.", " Two."]], ["B", ["Three."]]]}]"#;
        let qa = Qa::from_hotpot(serde_json::from_str(json).expect("the format"));
        assert_eq!(qa.documents, ["A\nOne. Two.", "B\nThree."]);
        let draft = qa.draft(0, seed(), false).expect("there is a question");
        assert_eq!(draft.units, 2..=usize::MAX);
        assert_eq!(draft.references, ["Bees"]);
        let short = r#"[{"q": "Who?", "a": ["Bees"], "docs": ["A\nOne. Two.", "B\nThree."]}]"#;
        let same = Qa::from_hotpot(serde_json::from_str(short).expect("the format"));
        assert_eq!(same.documents, qa.documents);
        assert_eq!(same.questions[0].answers, ["Bees"]);
    }

    #[test]
    fn a_file_is_plain_or_gzipped() {
        let folder = tempfile::tempdir().expect("a folder");
        let json = r#"[{"question": "Who?", "answer": "Bees", "context": [["A", ["One."]]]}]"#;
        let plain = folder.path().join("hotpot.json");
        std::fs::write(&plain, json).expect("a file");
        let packed = folder.path().join("hotpot.json.gz");
        let file = std::fs::File::create(&packed).expect("a file");
        let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        encoder.write_all(json.as_bytes()).expect("the file can be written");
        encoder.finish().expect("the file can be written");
        for path in [plain, packed] {
            assert_eq!(Qa::open_hotpot(&path, 1).expect("the format").questions.len(), 1);
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_path() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("data.json");
        let shown = path.display().to_string();
        let message = |text: &[u8], samples: usize| {
            std::fs::write(&path, text).expect("a file");
            let squad = Qa::open_squad(&path, samples).err().map(|e| e.to_string());
            let hotpot = Qa::open_hotpot(&path, samples).err().map(|e| e.to_string());
            [squad.unwrap_or_default(), hotpot.unwrap_or_default()]
        };
        let [squad, hotpot] = message(b"{\"data\": 1}", 1);
        assert!(
            squad.starts_with(&format!("ruler: --squad {shown}: expected SQuAD v2.0 JSON, got "))
        );
        assert!(hotpot.starts_with(&format!("ruler: --hotpot {shown}: expected HotpotQA ")));
        let [squad, _] = message(b"{\"data\": []}", 1);
        assert_eq!(squad, format!("ruler: --squad {shown}: expected 1 questions, got 0"));
        let [squad, _] = message(&[0x1f, 0x8b, 0], 1);
        assert!(squad.starts_with(&format!("ruler: --squad {shown}: expected gzip, got ")));
        let missing = folder.path().join("none");
        let error = Qa::open_squad(&missing, 1).err().expect("no file").to_string();
        assert!(error.starts_with(&format!("ruler: --squad {}: ", missing.display())));
    }
}

//! Measures when recalled pages make recalled text needless, on cases of its own; opt-in, by `MKA_BOTH_MODEL` (a GGUF file)
//! and `MKA_BOTH_PROSE` (a text file).
//! Knows the public API alone.

use crate::{finish, wait};
use mka::{Engine, FeedOptions, MemoryConfig, ModelSource, RecallPolicy, Scope, SendOptions};

/// What is told, asked and expected: the first half asks with the words that were told, the second half with others.
const CASES: [(&str, &str, &str); 24] = [
    ("The locker code of Ada Brandt is 48213.", "What is the locker code of Ada Brandt?", "48213"),
    (
        "The lighthouse keeper at Skerry Point is Tomas Oduya.",
        "Who is the lighthouse keeper at Skerry Point?",
        "Oduya",
    ),
    (
        "The spare key of Ruth Calloway lies under the blue kettle.",
        "Where does the spare key of Ruth Calloway lie?",
        "kettle",
    ),
    ("The ferry to Lindow leaves at 17:40.", "When does the ferry to Lindow leave?", "17:40"),
    (
        "The favourite dish of Captain Imre is pickled herring.",
        "What is the favourite dish of Captain Imre?",
        "herring",
    ),
    (
        "The password of the Orion archive is marigold.",
        "What is the password of the Orion archive?",
        "marigold",
    ),
    (
        "The horse of Sister Agathe is called Juniper.",
        "What is the horse of Sister Agathe called?",
        "Juniper",
    ),
    (
        "The meeting of the glaziers is in room 309.",
        "In which room is the meeting of the glaziers?",
        "309",
    ),
    (
        "The violin of Leo Marchetti was made in Cremona.",
        "Where was the violin of Leo Marchetti made?",
        "Cremona",
    ),
    (
        "The parcel for Mrs Whitlock weighs 26 pounds.",
        "How much does the parcel for Mrs Whitlock weigh?",
        "26",
    ),
    ("The new mayor of Dunmore is Petra Vance.", "Who is the new mayor of Dunmore?", "Vance"),
    (
        "The map of the caves is hidden in the piano.",
        "Where is the map of the caves hidden?",
        "piano",
    ),
    (
        "Doctor Halloran put the banknotes inside the grandfather clock.",
        "Where did the physician hide the money?",
        "clock",
    ),
    (
        "Old Jasper tends the bees behind the chapel.",
        "What animals are kept near the church?",
        "bees",
    ),
    (
        "Niamh sails her dinghy, the Kestrel, every Sunday.",
        "What is the name of the girl's boat?",
        "Kestrel",
    ),
    (
        "Uncle Bela sold his cottage in Trieste.",
        "In which city did the relative have a house?",
        "Trieste",
    ),
    ("The choir rehearses on Thursdays.", "On which day do the singers practise?", "Thursday"),
    (
        "Mr Finch grows turnips on his allotment.",
        "Which vegetable does the gardener plant?",
        "turnip",
    ),
    (
        "The baker's son became a diver.",
        "What profession did the child of the bread maker choose?",
        "diver",
    ),
    (
        "Colonel Ames lost his sabre at Badajoz.",
        "Where did the officer mislay his sword?",
        "Badajoz",
    ),
    (
        "Greta paints with her left hand, only in green.",
        "Which colour does the artist use?",
        "green",
    ),
    ("The twins quarrelled about a telescope.", "What did the siblings fight over?", "telescope"),
    (
        "The burglar came in through the skylight.",
        "How did the thief get into the building?",
        "skylight",
    ),
    ("Aunt Odile is afraid of swans.", "Which bird frightens the old lady?", "swan"),
];

#[test]
fn when_pages_make_text_needless() {
    let (Some(model), Some(prose)) =
        (std::env::var_os("MKA_BOTH_MODEL"), std::env::var_os("MKA_BOTH_PROSE"))
    else {
        return;
    };
    let prose = std::fs::read_to_string(prose).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut config = MemoryConfig::with_window(512);
    config.recall = RecallPolicy::Both;
    config.pages.tokens = 512;
    config.evicted_page_bytes = 4 << 30;
    let engine = Engine::builder(folder.path().join("store"))
        .model(ModelSource::path(std::path::PathBuf::from(model)))
        .memory(config)
        .open_blocking()
        .unwrap();
    let mut told = engine.session_blocking(Scope::user("ada").session("told")).unwrap();
    // A fact between every two paragraphs' worth of prose, and as much behind the last one.
    let sentences: Vec<&str> = prose.split_inclusive(". ").collect();
    let each = sentences.len() / (CASES.len() + 2);
    let mut text = String::new();
    for (i, some) in sentences.chunks(each).enumerate() {
        text.extend(some.iter().copied());
        if let Some((fact, ..)) = CASES.get(i) {
            text.push_str(fact);
            text.push(' ');
        }
    }
    wait(told.feed_with(text, FeedOptions::through_model()).finish()).unwrap();
    println!("| asked | recovered | recovered, upper half | pages | both | text tokens |");
    let mut rows = Vec::new();
    for (i, (_, asked, expected)) in CASES.iter().enumerate() {
        let ask = |policy: RecallPolicy| {
            let mut fork = wait(told.fork(&format!("{i}-{policy:?}"))).unwrap();
            let options = SendOptions::default().recall(policy).max_new_tokens(20);
            let (answer, usage) = finish(fork.send_with(*asked, options)).unwrap();
            let is_right = answer.to_lowercase().contains(&expected.to_lowercase());
            (is_right, usage)
        };
        let (by_pages, usage) = ask(RecallPolicy::Pages);
        let recovered = usage.pages.unwrap().recovered;
        let mean = |layers: &[f32]| layers.iter().sum::<f32>() / layers.len() as f32;
        let (all, upper) = (mean(&recovered[3..]), mean(&recovered[recovered.len() / 2..]));
        let (by_both, usage) = ask(RecallPolicy::Both);
        let text = usage.recalled_tokens;
        println!(
            "| {asked} | {all:.3} | {upper:.3} | {} | {} | {text} |",
            u8::from(by_pages),
            u8::from(by_both)
        );
        rows.push((all, upper, by_pages, by_both));
    }
    for (name, upper) in [("all layers", false), ("upper half", true)] {
        println!("text re-read below | right answers, recovered mass of {name} | text left out |");
        for percent in (0..=100).step_by(5) {
            let below = percent as f32 / 100.0;
            let reads = |row: &&(f32, f32, bool, bool)| (if upper { row.1 } else { row.0 }) < below;
            let right = rows.iter().filter(|row| if reads(row) { row.3 } else { row.2 });
            let left_out = rows.iter().filter(|row| !reads(row)).count();
            println!("| {below:.2} | {} | {left_out} |", right.count());
        }
    }
}

//! Models as an engine opens them, and the streams that their sessions make.

use super::*;
use crate::hub::ModelFiles;
use crate::tokenizer::Tokenizer;

#[test]
fn an_answer_of_a_gguf_model_ends_with_every_end_that_its_vocabulary_has() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/gguf/model.gguf");
    let files = ModelFiles::Gguf(path);
    let model = Model::load(&files, &candle_core::Device::Cpu, &TensorGroup::alone()).unwrap();
    let id = |token: &str| model.tokenizer.id(token).unwrap();
    assert_eq!(model.end_of_turn, [id("<|endoftext|>"), id("<|im_end|>")]);
    // A snapshot made when fewer tokens ended an answer is still this model's.
    assert_eq!(model.decoder.config.eos_token_ids, [id("<|im_end|>")]);
}

#[test]
fn an_engine_says_where_the_files_of_its_model_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/gguf/model.gguf");
    let builder = |name: &str| {
        let memory = MemoryConfig::with_window(128);
        Engine::builder(folder.path().join(name)).memory(memory).device(Device::Cpu)
    };
    let engine = builder("with").model(ModelSource::path(&path)).open_blocking().unwrap();
    assert_eq!(engine.model_path(), Some(path.as_path()));
    assert_eq!(builder("without").open_blocking().unwrap().model_path(), None);
}

/// An engine in `folder` over a model with a vocabulary of SentencePiece, and its tokenizer.
fn sentencepiece(folder: &Path, own_blank: &str, template: &str) -> (Engine, Tokenizer) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/smollm2");
    let model = folder.join("model");
    std::fs::create_dir_all(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), model.join(name)).unwrap();
    }
    let tokenizer = crate::testing::sentencepiece(own_blank).to_string();
    std::fs::write(model.join("tokenizer.json"), tokenizer).unwrap();
    let settings = serde_json::json!({
        "bos_token": "<s>", "eos_token": "</s>", "chat_template": template,
    });
    std::fs::write(model.join("tokenizer_config.json"), settings.to_string()).unwrap();
    let engine = Engine::builder(folder.join("store"))
        .model(ModelSource::path(&model))
        .device(Device::Cpu)
        .memory(MemoryConfig::with_window(128))
        .open_blocking()
        .unwrap();
    (engine, Tokenizer::from_file(&model.join("tokenizer.json")).unwrap())
}

/// Sends `message` and asks for no more than the beginning of its answer.
fn send(chat: &mut Session, message: &str, answer_prefix: &str) {
    let options = crate::SendOptions::default().max_new_tokens(0).recall_k(0);
    let mut events = chat.send_with(message, options.answer_prefix(answer_prefix));
    while let Some(event) = events.next_blocking() {
        event.unwrap();
    }
}

/// Tokens of all turns of `chat`.
fn stream(engine: &Engine, chat: &Session) -> Vec<u32> {
    let turns = engine.shared.store.turns(chat.scope(), 0..99).unwrap();
    turns.into_iter().flat_map(|turn| turn.tokens).collect()
}

#[test]
fn a_stream_of_sentencepiece_tokens_is_that_of_the_rendered_conversation() {
    let template = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}";
    for own_blank in ["by its normalizer", "always", "first"] {
        let folder = tempfile::tempdir().unwrap();
        let (engine, tokenizer) = sentencepiece(folder.path(), own_blank, template);
        let scope = Scope::user("ada").session("trip");
        let mut chat = engine.session_blocking(scope).unwrap();
        send(&mut chat, "Hello", "");
        send(&mut chat, "a cat", "");
        let text = "<s>[INST] Hello [/INST]</s>[INST] a cat [/INST]";
        let rendered = tokenizer.encode_with_specials(text).unwrap();
        assert_eq!(stream(&engine, &chat), rendered, "{own_blank}");
    }
}

#[test]
fn an_answer_that_was_not_generated_has_the_blank_that_the_template_writes_before_it() {
    use mka_memory::{NewTurn, Role};
    let template = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}";
    for own_blank in ["by its normalizer", "always", "first"] {
        let folder = tempfile::tempdir().unwrap();
        let (engine, tokenizer) = sentencepiece(folder.path(), own_blank, template);
        let open = |name: &str| engine.session_blocking(Scope::user("ada").session(name));
        let rendered = |text: &str| tokenizer.encode_with_specials(text).unwrap();

        let mut chat = open("appended").unwrap();
        let turns = [(Role::User, "a cat"), (Role::Assistant, "Hello"), (Role::User, "a coat")];
        let turns = turns.map(|(role, text)| NewTurn::new(role, text));
        let mut feed = chat.append(turns.into());
        while let Some(event) = feed.next_blocking() {
            event.unwrap();
        }
        let text = "<s>[INST] a cat [/INST] Hello</s>[INST] a coat [/INST]";
        assert_eq!(stream(&engine, &chat), rendered(text), "{own_blank}");

        let mut chat = open("begun").unwrap();
        send(&mut chat, "a cat", "Hello");
        let text = "<s>[INST] a cat [/INST] Hello";
        assert_eq!(stream(&engine, &chat), rendered(text), "{own_blank}");
    }
}

//! What a conversation holds while it goes back to what the store has.

use super::*;
use crate::{Engine, MemoryConfig, ModelSource};
use std::path::Path;

#[test]
fn a_conversation_lets_go_of_its_window_before_it_is_opened_again_and_keeps_its_sinks() {
    let folder = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/gguf/model.gguf");
    let engine = Engine::builder(folder.path().join("store"))
        .model(ModelSource::path(model))
        .memory(MemoryConfig::with_window(64))
        .open_blocking()
        .unwrap();
    let scope = Scope::user("ada").session("trip");
    let mut conversation = Conversation::open(engine.shared.clone(), scope.clone()).unwrap();
    conversation.keep_opening(2 * PAGE_TOKENS).unwrap();
    let sink_pages = |of: &Conversation| of.cache.as_ref().map(Cache::sink_pages);
    assert_eq!(sink_pages(&conversation), Some(2));
    // No log is of a scope without a session: the opening fails, and shows what was held until then.
    conversation.scope = Scope::user("ada");
    conversation.reopen().unwrap_err();
    assert!(conversation.is_half_way);
    assert_eq!(sink_pages(&conversation), None);
    conversation.scope = scope;
    conversation.reopen().unwrap();
    assert!(!conversation.is_half_way);
    assert_eq!(sink_pages(&conversation), Some(2));
}

//! What a token and a recall cost from Rust: `overhead MODEL` prints microseconds; Python has a twin.

use mka::{
    Device, Engine, Event, MemoryConfig, ModelSource, NewTurn, Recall, Role, Scope, SendOptions,
};
use std::time::Instant;

#[allow(dead_code)]
#[path = "../src/wait.rs"]
mod wait;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("expected MODEL")?;
    let folder = tempfile::tempdir()?;
    let engine = Engine::builder(folder.path().join("store.mka"))
        .model(ModelSource::path(model))
        .device(Device::Cpu)
        .memory(MemoryConfig::with_window(128))
        .open_blocking()?;
    let mut chat = engine.session_blocking(Scope::user("ada").session("trip"))?;
    for run in 0..3 {
        let start = Instant::now();
        let options = SendOptions::default().max_new_tokens(2000).recall_k(0);
        let mut events = chat.send_with("go on", options);
        let mut tokens = 0;
        while let Some(event) = events.next_blocking() {
            tokens += u32::from(matches!(event?, Event::Token(_)));
        }
        let spent = start.elapsed().as_secs_f64() * 1e6 / f64::from(tokens);
        println!("run {run}: {spent:.1} us a token, {tokens} tokens");
    }
    let facts = (0..500)
        .map(|i| {
            let fact = format!("Fact {i}: the number of thing {} is {}.", i % 37, i * 7);
            NewTurn::new(Role::User, fact)
        })
        .collect();
    let scope = Scope::user("bob").session("facts");
    wait::wait(engine.memory().remember(&scope, facts))?;
    for run in 0..3 {
        let start = Instant::now();
        for i in 0..1000 {
            let query = format!("number of thing {}", i % 37);
            let recall = Recall::default();
            wait::wait(engine.memory().recall(&Scope::user("bob"), &query, recall))?;
        }
        println!("run {run}: {:.1} us a recall", start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(())
}

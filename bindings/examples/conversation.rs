//! One scripted conversation from Rust; its twin in `python/examples` prints the same bytes.
//!
//! `conversation STORE MODEL SCRIPT FROM TO` runs steps FROM to before TO of SCRIPT and prints a line an event.

use mka::{
    Device, Engine, Event, FeedEvent, FeedMode, FeedOptions, MemoryConfig, NewTurn, Role, Scope,
    SendOptions, StopReason,
};
use serde_json::Value;

/// The first step's time; each is a second later. Milliseconds since 1970.
const START_MS: i64 = 1_700_000_000_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [store, model, script, from, to] = args.as_slice() else {
        return Err("expected STORE MODEL SCRIPT FROM TO".into());
    };
    let steps: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(script)?)?;
    let memory = MemoryConfig::with_window(128).block_tokens(64);
    let engine = Engine::builder(store)
        .model(model.parse()?)
        .device(Device::Cpu)
        .memory(memory)
        .open_blocking()?;
    let mut chat = engine.session_blocking(Scope::user("ada").session("trip"))?;
    for (i, step) in steps.iter().enumerate().take(to.parse()?).skip(from.parse()?) {
        println!("step {i}");
        let time_ms = START_MS + 1000 * i as i64;
        if let Some(text) = step["remember"].as_str() {
            let turn = NewTurn::new(Role::User, text).at(time_ms);
            let scope = Scope::user("ada").session("facts");
            let remembered = engine.memory().remember_blocking(&scope, vec![turn])?;
            println!("remembered {}", remembered.chunks_added);
        } else if let Some(text) = step["feed"].as_str() {
            let mode = if step["mode"] == "model" { FeedMode::Model } else { FeedMode::Text };
            let options = FeedOptions::default().mode(mode).time_ms(time_ms);
            let times = step["times"].as_u64().unwrap_or(1) as usize;
            let mut feed = chat.feed_with(text.repeat(times), options);
            while let Some(event) = feed.next_blocking() {
                if let FeedEvent::Done(fed) = event? {
                    println!(
                        "fed {} {} {} {}",
                        fed.bytes, fed.model_tokens, fed.chunks_added, fed.chunks_deduplicated
                    );
                }
            }
        } else {
            let mut options = SendOptions::default();
            options.max_new_tokens = step["max_new_tokens"].as_u64().map(|tokens| tokens as usize);
            options.across_sessions = step["across_sessions"].as_bool().unwrap_or(false);
            options.sampling.temperature = step["temperature"].as_f64().unwrap_or(0.0) as f32;
            options.sampling.seed = step["seed"].as_u64().unwrap_or(0);
            options.time_ms = Some(time_ms);
            let mut events = match step["send"].as_str() {
                Some(message) => chat.send_with(message, options),
                None => chat.regenerate(options),
            };
            while let Some(event) = events.next_blocking() {
                show(&event?);
            }
        }
    }
    drop(chat);
    engine.close_blocking();
    Ok(())
}

fn show(event: &Event) {
    match event {
        Event::Recalled(hits) => {
            for hit in hits {
                println!("hit {} {} {}", hit.chunk, hit.source.session, hit.source.turn);
            }
        }
        Event::Token(token) => {
            let hex: String = token.text.bytes().map(|byte| format!("{byte:02x}")).collect();
            println!("token {hex}");
        }
        Event::Done(usage) => println!(
            "done {} {} {} {} {} {}",
            usage.prompt_tokens,
            usage.reused_tokens,
            usage.recalled_tokens,
            usage.generated_tokens,
            usage.stream_tokens,
            match usage.stop {
                StopReason::EndOfTurn => "end_of_turn",
                StopReason::MaxTokens => "max_tokens",
                StopReason::StopString => "stop_string",
                _ => "other",
            }
        ),
        _ => {}
    }
}

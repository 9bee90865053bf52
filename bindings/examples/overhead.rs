//! What a token, a recall and a cancel cost from Rust: `overhead MODEL [TOKENS]` prints microseconds; Python and Swift have twins.

use mka::{
    Device, Engine, Event, MemoryConfig, ModelSource, NewTurn, Recall, Role, Scope, SendOptions,
};
use std::hint::black_box;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("expected MODEL")?;
    let max_new_tokens = std::env::args().nth(2).map_or(Ok(2000), |tokens| tokens.parse())?;
    let folder = tempfile::tempdir()?;
    let engine = Engine::builder(folder.path().join("store.mka"))
        .model(ModelSource::path(model))
        .device(Device::Cpu)
        .memory(MemoryConfig::with_window(128))
        .open_blocking()?;
    let mut chat = engine.session_blocking(Scope::user("ada").session("trip"))?;
    for run in 0..3 {
        let options = SendOptions::default().max_new_tokens(max_new_tokens).recall_k(0);
        let mut events = chat.send_with("go on", options);
        // From the first token on: what a turn costs once is not a token's.
        events.next_blocking().ok_or("expected an answer")??;
        let (start, cpu, own) = (Instant::now(), process_us(), thread_us());
        let mut tokens = 0;
        while let Some(event) = events.next_blocking() {
            tokens += u32::from(matches!(event?, Event::Token(_)));
        }
        let spent = start.elapsed().as_secs_f64() * 1e6 / f64::from(tokens);
        let cpu = (process_us() - cpu) / f64::from(tokens);
        let own = (thread_us() - own) / f64::from(tokens);
        println!(
            "run {run}: {spent:.1} us a token, {cpu:.1} of CPU time, {own:.1} of it the reader's, {tokens} tokens"
        );
    }
    let before = chat.num_turns()?;
    let options = SendOptions::default().max_new_tokens(max_new_tokens).recall_k(0);
    let mut events = chat.send_with("tell me a long story", options);
    let mut seen = 0;
    while let Some(event) = events.next_blocking() {
        seen += u32::from(matches!(event?, Event::Token(_)));
        if seen == 5 {
            break;
        }
    }
    let (start, canceller) = (Instant::now(), events.canceller());
    canceller.cancel();
    let chosen = canceller.generated_tokens();
    while events.next_blocking().is_some() {}
    let (stopped, after) = (start.elapsed().as_micros(), canceller.generated_tokens());
    let scope = Scope::user("ada").session("trip");
    let answer = engine.memory().turns_blocking(&scope, before + 1..before + 2)?;
    let kept = answer.first().map_or(0, |turn| turn.tokens.len());
    println!(
        "cancelled at token {seen}: {chosen} chosen then, {after} in all, {kept} kept, {stopped} us to stop"
    );
    for facts in [8, 500, 10_000] {
        let owner = Scope::user(format!("owner of {facts}"));
        let turns = (0..facts)
            .map(|i| {
                let fact = format!("Fact {i}: the number of thing {} is {}.", i % 37, i * 7);
                NewTurn::new(Role::User, fact)
            })
            .collect();
        engine.memory().remember_blocking(&owner.clone().session("facts"), turns)?;
        // A thousand recalls; the least of twenty runs is what other work on the machine disturbs least.
        let (mut least, mut read) = (f64::INFINITY, 0.0);
        for _ in 0..20 {
            let start = Instant::now();
            for i in 0..50 {
                let query = format!("number of thing {}", i % 37);
                // An agent reads text and score of what it is given.
                for hit in engine.memory().recall_blocking(&owner, &query, Recall::default())? {
                    read += hit.text.len() as f64 + f64::from(hit.score);
                }
            }
            least = least.min(start.elapsed().as_secs_f64() * 1e6 / 50.0);
        }
        black_box(read);
        println!("{least:.1} us a recall among {facts} facts, the least of 20 runs of 50");
    }
    Ok(())
}

/// CPU time of all threads so far, microseconds.
fn process_us() -> f64 {
    clock_us(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// CPU time of this thread so far, microseconds.
fn thread_us() -> f64 {
    clock_us(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock_us(clock: libc::clockid_t) -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` may be written to; the clocks are those that every POSIX system has.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

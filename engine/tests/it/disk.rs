//! A disk that fills up during `feed` and `send`: an error that says so, and nothing that was acknowledged is lost.

use crate::{engine, finish, trip, wait};
use mka::{ErrorKind, FeedOptions, SendOptions};
use std::path::Path;
use std::process::Command;

const CHILD: &str = "MKA_FULL_DISK_TEST_FOLDER";
const LIMIT: &str = "MKA_FULL_DISK_TEST_BYTES";

/// Feeds and sends until a file may not grow any more, then asks once more. Prints what was acknowledged.
fn work(folder: &Path, limit: u64) {
    let engine = engine(folder, 128);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let rlimit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: `rlimit` is a valid struct for the call's duration; ignoring a signal installs no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &rlimit), 0);
    }
    for number in 0.. {
        let text = format!("document {number} says that the disk is filling. ").repeat(40);
        let fed = wait(chat.feed_with(text, FeedOptions::through_model()).finish()).map(|_| ());
        let done = fed.and_then(|()| {
            let options = SendOptions::default().max_new_tokens(3).recall_k(2);
            finish(chat.send_with(format!("message {number} here"), options)).map(|_| ())
        });
        let Err(error) = done else {
            println!("\nacknowledged {number}");
            continue;
        };
        println!("\nrefused {:?}", error.kind());
        // The session is still there to be asked, whatever it answers; what it holds can be read.
        let _ = finish(chat.send("and now?"));
        assert!(chat.num_turns().is_ok());
        break;
    }
    println!("\nended");
}

#[test]
fn a_full_disk_stops_feed_and_send_with_an_error_and_loses_nothing() {
    if let Some(folder) = std::env::var_os(CHILD) {
        work(Path::new(&folder), std::env::var(LIMIT).unwrap().parse().unwrap());
        return;
    }
    for limit in [700_000u64, 1_500_000, 3_000_000] {
        let folder = tempfile::tempdir().unwrap();
        drop(engine(folder.path(), 128));
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("disk::a_full_disk_stops_feed_and_send_with_an_error_and_loses_nothing")
            .env(CHILD, folder.path())
            .env(LIMIT, limit.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let said = format!("limit {limit}:\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.lines().any(|line| line == "ended"), "{said}");
        let refused = format!("refused {:?}", ErrorKind::Storage);
        assert!(text.lines().any(|line| line == refused), "{said}");
        let acknowledged: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("acknowledged ")).collect();
        assert!(!acknowledged.is_empty(), "{said}");

        // The disk has room again.
        let engine = engine(folder.path(), 128);
        let mut chat = engine.session_blocking(trip()).unwrap();
        let chunks = wait(engine.memory().chunks(&trip(), 0..usize::MAX, None)).unwrap();
        for number in acknowledged {
            for said in [format!("message {number} here"), format!("document {number} says")] {
                assert!(chunks.iter().any(|chunk| chunk.text.contains(&said)), "lost {said}");
            }
        }
        finish(chat.send_with("go on", SendOptions::default().max_new_tokens(2))).unwrap();
    }
}

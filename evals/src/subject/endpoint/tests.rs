//! The endpoint against a server of a few lines.
//! Knows no real server.

use super::*;
use crate::sample::{Cell, Metric};
use std::io::Write;
use std::net::TcpListener;
use std::thread::JoinHandle;

/// Answers one request with `response` and gives back the request's first line and body.
fn serve(response: &'static str) -> (String, JoinHandle<(String, serde_json::Value)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1/", listener.local_addr().unwrap());
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let (mut first, mut length) = (String::new(), 0);
        reader.read_line(&mut first).unwrap();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let line = line.trim().to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(bytes) = line.strip_prefix("content-length:") {
                length = bytes.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        stream.write_all(response.as_bytes()).unwrap();
        (first, serde_json::from_slice(&body).unwrap())
    });
    (url, served)
}

const HEADERS: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

fn sample(chat: bool) -> Sample {
    Sample {
        cell: Cell { task: "task".into(), group: "all".into(), index: 0 },
        context: "The sky is blue.\n".into(),
        question: "Which colour has the sky?".into(),
        answer_prefix: " The sky is".into(),
        references: vec!["blue".into()],
        classes: Vec::new(),
        max_new_tokens: 7,
        stop: if chat { Vec::new() } else { vec!["\n".into()] },
        chat,
        metric: Metric::new("none", |_, _, _| 0.0),
        tokens: 0,
    }
}

fn endpoint(url: &str, prefill: bool) -> Endpoint {
    Endpoint::parse(&format!("peer={url},tiny"), prefill).unwrap()
}

#[test]
fn a_chat_is_streamed_and_counted() {
    let response = concat!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n",
        ": a comment\n\n",
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":null},\"finish_reason\":null}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"dark \"},\"finish_reason\":null}]}\r\n\r\n",
        "data:{\"choices\":[{\"delta\":{\"content\":\"blue\"},\"finish_reason\":null}]}\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":21,\"completion_tokens\":3,\"prompt_tokens_details\":{\"cached_tokens\":5}}}\n\n",
        "data: [DONE]\n\n",
    );
    let (url, served) = serve(response);
    let answer = endpoint(&url, false).answer(&sample(true), &mut None).unwrap();
    assert_eq!(answer.output, "dark blue");
    assert_eq!((answer.prompt_tokens, answer.generated_tokens, answer.reused_tokens), (21, 3, 5));
    assert_eq!(answer.prompt_hash, prompt_hash(&sample(true)));
    assert!(answer.first_token_s > 0.0 && answer.decode_tokens_per_s > 0.0);
    let (first, body) = served.join().unwrap();
    assert_eq!(first, "POST /v1/chat/completions HTTP/1.1\r\n");
    assert_eq!(
        body,
        json!({
            "model": "tiny", "temperature": 0, "max_tokens": 7, "stream": true,
            "stream_options": { "include_usage": true },
            "messages": [{
                "role": "user",
                "content": "The sky is blue.\nWhich colour has the sky?\nThe sky is",
            }],
        })
    );
}

#[test]
fn a_completion_is_the_bare_text_with_its_prefix_and_stops() {
    let response = concat!(
        "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
        "data: {\"choices\":[{\"text\":\" bl\",\"finish_reason\":null}]}\n\n",
        "data: {\"choices\":[{\"text\":\"ue\",\"finish_reason\":\"length\"}]}\n\n",
    );
    let (url, served) = serve(response);
    let answer = endpoint(&url, false).answer(&sample(false), &mut None).unwrap();
    assert_eq!((answer.output.as_str(), answer.generated_tokens), (" blue", 2));
    let (first, body) = served.join().unwrap();
    assert_eq!(first, "POST /v1/completions HTTP/1.1\r\n");
    assert_eq!(body["prompt"], "The sky is blue.\nWhich colour has the sky? The sky is");
    assert_eq!(body["stop"], json!(["\n"]));
}

#[test]
fn what_is_thought_counts_in_time_and_is_no_answer() {
    let thought = |name: &str, text: &str| {
        format!("data: {{\"choices\":[{{\"delta\":{{\"{name}\":\"{text}\"}}}}]}}\n\n")
    };
    let end = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}],\"usage\":{\"completion_tokens\":100}}\n\n";
    let cases = [
        // Nothing of the hundred tokens is seen, or all of them at once: no speed can be told.
        (end.to_owned(), false),
        (thought("reasoning_content", "Hm.") + end, false),
        (thought("reasoning_content", "Hm, ") + &thought("reasoning_content", "yes.") + end, true),
        (thought("reasoning", "Hm, ") + &thought("reasoning", "yes.") + end, true),
    ];
    for (stream, is_measured) in cases {
        let (url, served) = serve(format!("{HEADERS}{stream}").leak());
        let answer = endpoint(&url, false).answer(&sample(true), &mut None).unwrap();
        assert_eq!((answer.output.as_str(), answer.generated_tokens), ("", 100), "{stream}");
        assert_eq!(answer.decode_tokens_per_s > 0.0, is_measured, "{stream}");
        assert!(answer.first_token_s > 0.0, "{stream}");
        served.join().unwrap();
    }
    let speed = decode_speed(101, Duration::from_millis(500));
    assert_eq!((speed, decode_speed(101, Duration::ZERO)), (200.0, 0.0));
}

#[test]
fn prefill_sends_the_prefix_as_the_assistants() {
    let endpoint = endpoint("http://localhost:1/v1", true);
    let (_, body) = endpoint.request(&sample(true));
    assert_eq!(body["messages"][1], json!({ "role": "assistant", "content": " The sky is" }));
    let (_, body) = endpoint.request(&Sample { answer_prefix: String::new(), ..sample(true) });
    assert_eq!(body["messages"].as_array().unwrap().len(), 1);
}

#[test]
fn refusals_and_broken_streams_are_errors() {
    let half =
        "data: {\"choices\":[{\"delta\":{\"content\":\"half\"},\"finish_reason\":null}]}\n\n";
    let cases = [
        (
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 16\r\nconnection: close\r\n\r\ncontext too long".to_owned(),
            "status 400 Bad Request, expected 200: context too long",
        ),
        ("HTTP/1.1 307 Elsewhere\r\nlocation: http://example.com/\r\ncontent-length: 0\r\n\r\n".to_owned(), "307"),
        (format!("{HEADERS}{half}"), "broke off"),
        (format!("{HEADERS}data: {{\"error\":{{\"message\":\"out of memory\"}}}}\n\n"), "out of memory"),
        (format!("{HEADERS}data: {{nonsense\n\n"), "in \"{nonsense\""),
    ];
    for (response, expected) in cases {
        let (url, served) = serve(response.leak());
        let error = endpoint(&url, false).answer(&sample(true), &mut None).unwrap_err().to_string();
        assert!(error.contains(expected) && error.starts_with("endpoint peer ("), "{error}");
        served.join().unwrap();
    }
}

#[test]
fn other_machines_are_refused() {
    for url in [
        "http://example.com/v1",
        "http://10.0.0.1:8000/v1",
        "http://0.0.0.0:8000/v1",
        "http://127.0.0.1@example.com/v1",
        "http://localhost.example.com/v1",
        "https://127.0.0.1/v1",
        "127.0.0.1:8000",
        "not a url",
    ] {
        let error = Endpoint::parse(&format!("peer={url},tiny"), false).err().unwrap();
        assert!(error.to_string().contains("expected") || url.contains(' '), "{url}: {error}");
    }
    for url in [
        "http://127.0.0.1:8000/v1",
        "http://[::1]:8000/v1",
        "http://localhost/v1",
        "http://127.1.2.3",
    ] {
        Endpoint::parse(&format!("peer={url},tiny"), false).unwrap();
    }
    for text in [
        "peer",
        "peer=http://127.0.0.1/v1",
        "=http://127.0.0.1/v1,tiny",
        "peer=http://127.0.0.1/v1,",
    ] {
        assert!(Endpoint::parse(text, false).is_err(), "{text}");
    }
}

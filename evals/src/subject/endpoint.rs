//! A server of this machine with OpenAI's interface as a subject: the whole prompt in one request, streamed back.
//! Knows no benchmark and no model file; it reaches no other machine.
//!
//! Source: OpenAI's API reference, `chat/completions` and `completions` with `stream`, as llama.cpp, vLLM and Ollama
//! serve them.

use super::{Answer, Fed, Subject, prompt_hash};
use crate::job::Result;
use crate::sample::Sample;
use serde::Deserialize;
use serde_json::json;
use std::io::{BufRead, BufReader, Read};
use std::net::IpAddr;
use std::time::{Duration, Instant};
use ureq::http::Uri;

/// A prompt of a million tokens takes a processor most of an hour to read.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2 * 3600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// More than any answer: a server that goes on for ever is stopped.
const MOST_ANSWER_BYTES: u64 = 64 << 20;
/// What of a refusal is shown.
const MOST_ERROR_BYTES: u64 = 2048;

pub(crate) struct Endpoint {
    name: String,
    /// Without a slash at its end.
    url: String,
    model: String,
    prefill: bool,
    agent: ureq::Agent,
}

/// One event of the stream: of a chat, of a completion, or the usage at its end.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
    /// What is thought before the answer and no part of it, by either name; a server may send both.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: usize,
    #[serde(default)]
    completion_tokens: usize,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<usize>,
}

impl Endpoint {
    /// Reads `name=url,model`.
    ///
    /// # Errors
    /// If a part is missing, or the URL is not plain HTTP to this machine.
    pub(crate) fn parse(text: &str, prefill: bool) -> Result<Self> {
        let parts = text.split_once('=').and_then(|(name, rest)| {
            let (url, model) = rest.split_once(',')?;
            let given = [name, url, model].iter().all(|part| !part.trim().is_empty());
            given.then(|| (name.trim(), url.trim().trim_end_matches('/'), model.trim()))
        });
        let (name, url, model) = parts.ok_or_else(|| {
            format!("endpoint {text:?}, expected name=http://127.0.0.1:port/v1,model")
        })?;
        check_loopback(url)?;
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // Neither a proxy of the environment nor a redirection may carry a prompt off this machine.
            .proxy(None)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(ANSWER_TIMEOUT))
            .build()
            .new_agent();
        Ok(Self {
            name: name.to_owned(),
            url: url.to_owned(),
            model: model.to_owned(),
            prefill,
            agent,
        })
    }

    /// Path and body of the request.
    fn request(&self, sample: &Sample) -> (&'static str, serde_json::Value) {
        let prompt = format!("{}{}", sample.context, sample.question);
        let prefix = &sample.answer_prefix;
        let mut body = json!({
            "model": self.model,
            "temperature": 0,
            "max_tokens": sample.max_new_tokens,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if !sample.stop.is_empty() {
            body["stop"] = json!(sample.stop);
        }
        if !sample.chat {
            body["prompt"] = json!(format!("{prompt}{prefix}"));
            return ("completions", body);
        }
        body["messages"] = match (prefix.trim(), self.prefill) {
            ("", _) => json!([{ "role": "user", "content": prompt }]),
            (_, true) => json!([
                { "role": "user", "content": prompt },
                { "role": "assistant", "content": prefix },
            ]),
            (line, false) => json!([{ "role": "user", "content": format!("{prompt}\n{line}") }]),
        };
        ("chat/completions", body)
    }

    fn ask(&self, sample: &Sample) -> Result<Answer> {
        let (path, body) = self.request(sample);
        let started = Instant::now();
        let mut response = self
            .agent
            .post(format!("{}/{path}", self.url))
            .header("content-type", "application/json")
            .header("accept", "text/event-stream")
            .send(serde_json::to_vec(&body)?)?;
        let status = response.status();
        if !status.is_success() {
            let mut said = Vec::new();
            // A refusal that cannot be read to its end is shown as far as it came.
            let _ = response.body_mut().as_reader().take(MOST_ERROR_BYTES).read_to_end(&mut said);
            let said = String::from_utf8_lossy(&said);
            return Err(format!("{path}: status {status}, expected 200: {}", said.trim()).into());
        }
        let mut answer = Answer { prompt_hash: prompt_hash(sample), ..Answer::default() };
        // When the first and the last piece came, of the answer or of what is thought before it.
        let mut came: Option<(Duration, Duration)> = None;
        let mut pieces = 0;
        let reader = BufReader::new(response.body_mut().as_reader().take(MOST_ANSWER_BYTES));
        let mut ended = false;
        for line in reader.lines() {
            let line = line?;
            // Other lines of an event stream are comments, names and blanks between events.
            let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                ended = true;
                break;
            }
            let chunk: Chunk = serde_json::from_str(data).map_err(|e| {
                format!("{path}: {e} in {:?}", &data[..data.floor_char_boundary(200)])
            })?;
            if let Some(error) = chunk.error {
                return Err(format!("{path}: {error}").into());
            }
            if let Some(choice) = chunk.choices.into_iter().next() {
                let delta = choice.delta.unwrap_or_default();
                let text = delta.content.or(choice.text).unwrap_or_default();
                let thought = [delta.reasoning_content, delta.reasoning];
                if thought.into_iter().flatten().any(|thought| !thought.is_empty())
                    || !text.is_empty()
                {
                    let now = started.elapsed();
                    came = Some((came.map_or(now, |(first, _)| first), now));
                    pieces += 1;
                }
                answer.output.push_str(&text);
                ended |= choice.finish_reason.is_some();
            }
            if let Some(usage) = chunk.usage {
                answer.prompt_tokens = usage.prompt_tokens;
                answer.generated_tokens = usage.completion_tokens;
                let cached = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
                answer.reused_tokens = cached.unwrap_or(0);
            }
        }
        if !ended {
            return Err(format!(
                "{path}: the stream broke off, expected a finish_reason or [DONE]"
            )
            .into());
        }
        // Servers that count nothing send about a token a piece.
        if answer.generated_tokens == 0 {
            answer.generated_tokens = pieces;
        }
        let end = started.elapsed();
        let (first, last) = came.unwrap_or((end, end));
        answer.first_token_s = first.as_secs_f64();
        answer.decode_tokens_per_s = decode_speed(answer.generated_tokens, last - first);
        Ok(answer)
    }
}

impl Subject for Endpoint {
    fn name(&self) -> &str {
        &self.name
    }

    /// The server's window is not known: it refuses by itself what it cannot take.
    fn fits(&self, _: &Sample) -> bool {
        true
    }

    fn answer(&self, sample: &Sample, _: &mut Option<Fed>) -> Result<Answer> {
        self.ask(sample).map_err(|e| format!("endpoint {} ({}): {e}", self.name, self.url).into())
    }
}

/// Tokens a second behind the first one; 0 where they took no time, for they came in one piece or unseen.
fn decode_speed(tokens: usize, taken: Duration) -> f64 {
    if taken.is_zero() { 0.0 } else { tokens.saturating_sub(1) as f64 / taken.as_secs_f64() }
}

/// Samples may hold what must not leave the machine, and scores over a network measure the network.
fn check_loopback(url: &str) -> Result<()> {
    let uri: Uri = url.parse().map_err(|e| format!("endpoint {url:?}: {e}"))?;
    if uri.scheme_str() != Some("http") {
        return Err(format!("endpoint {url:?}: expected http://, without TLS").into());
    }
    let host = uri.host().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    if host == "localhost" || address.is_ok_and(|address| address.is_loopback()) {
        return Ok(());
    }
    Err(format!("endpoint {url:?}: host {host:?}, expected 127.0.0.1, [::1] or localhost").into())
}

#[cfg(test)]
mod tests;

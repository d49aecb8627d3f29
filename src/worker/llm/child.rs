//! The child of an `llm` role: makes one call, blocking, and writes what comes of it to stdout. It is for one call, so
//! nothing is pooled, nothing is tried again, and a redirection is an error: the key goes to `base_url` alone.
//!
//! Over `https://` the first of `ALL_PROXY`, `HTTPS_PROXY` and `HTTP_PROXY` is the proxy, but for what `NO_PROXY` names;
//! `http://`, which is for this machine, has none. `SSL_CERT_FILE` stands for the system's certificates.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::http::{HeaderMap, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body, BodyReader};

use super::{Call, Failure, Line};
use crate::config::meta::is_figure;
use crate::model::limits;
use crate::model::status::LlmError;
use crate::os::clock;
use crate::worker::redact::{Redactor, Stream};

/// What is kept of the model's name and of why it finished.
const WORD_CHARS: usize = 128;

/// What a server answers, whole or as one piece of a stream.
#[derive(Debug, Deserialize)]
struct Completion {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Value>,
    model: Option<String>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    message: Option<Said>,
    delta: Option<Said>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Said {
    content: Option<String>,
}

/// Makes the call that `input` describes; the last line says how it ended. Success is an answer.
pub fn run(mut input: impl Read, mut output: impl Write) -> ExitCode {
    let mut call = Vec::new();
    let read = input.read_to_end(&mut call);
    let end = read
        .map_err(serde_json::Error::io)
        .and_then(|_| serde_json::from_slice::<Call>(&call))
        .map_err(|error| Failure::new(LlmError::BadRequest, format!("stdin is no call: {error}")))
        .and_then(|call| Conversation::new(&call, key(&call)?, &mut output).hold());
    let is_answer = end.is_ok();
    let last = end.unwrap_or_else(|error| Line::Error { error });
    match write(&mut output, &last) {
        Ok(()) if is_answer => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn write(output: &mut impl Write, line: &Line) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    output.write_all(&bytes)?;
    output.flush()
}

fn key(call: &Call) -> Result<Option<String>, Failure> {
    let Some(file) = &call.api_key_file else {
        return Ok(None);
    };
    let shown = file.display();
    let refused = |why: String| Failure::new(LlmError::Unauthorized, why);
    let key = std::fs::read_to_string(file).map_err(|error| {
        refused(format!(
            "cannot read the API key from {shown}: {error}; is the credential there?"
        ))
    })?;
    let key = key.trim();
    if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(refused(format!(
            "the API key in {shown} is not one word of printable ASCII"
        )));
    }
    Ok(Some(key.to_owned()))
}

/// One call as it goes.
struct Conversation<'a, W> {
    call: &'a Call,
    url: String,
    key: Option<String>,
    redactor: Redactor,
    /// For the reply: the server may quote the key there, too.
    clean: Stream,
    output: &'a mut W,
    /// How long the reply is.
    said: usize,
    usage: Option<Map<String, Value>>,
    model: Option<String>,
    finish_reason: Option<String>,
    /// Without one it is no completion.
    has_choice: bool,
}

impl<'a, W: Write> Conversation<'a, W> {
    fn new(call: &'a Call, key: Option<String>, output: &'a mut W) -> Self {
        let redactor = Redactor::new(&key);
        Self {
            url: format!("{}/chat/completions", call.base_url.trim_end_matches('/')),
            clean: redactor.stream(),
            call,
            key,
            redactor,
            output,
            said: 0,
            usage: None,
            model: None,
            finish_reason: None,
            has_choice: false,
        }
    }

    fn hold(mut self) -> Result<Line, Failure> {
        let mut request = agent(self.call)?
            .post(&self.url)
            .header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let response = request.send(self.request().to_string());
        let (head, body) = response.map_err(|error| self.broken(error))?.into_parts();
        if !head.status.is_success() {
            return Err(self.refused(head.status, &head.headers, body));
        }
        let kind = head
            .headers
            .get("content-type")
            .map_or(&b""[..], |kind| kind.as_bytes());
        if kind.starts_with(b"text/event-stream") {
            self.stream(bounded(body, limits::LLM_STREAM_BYTES))?;
        } else {
            self.whole(bounded(body, limits::LLM_BODY_BYTES))?;
        }
        let rest = self.clean.finish();
        self.write(&rest)?;
        Ok(Line::End {
            usage: self.usage,
            model: self.model,
            finish_reason: self.finish_reason,
        })
    }

    fn request(&self) -> Value {
        let mut request = json!({"model": self.call.model, "messages": self.call.messages});
        if self.call.stream {
            request["stream"] = true.into();
            request["stream_options"] = json!({"include_usage": true});
        }
        if let Some(temperature) = self.call.temperature {
            request["temperature"] = temperature.into();
        }
        if let Some(most) = self.call.max_tokens {
            request["max_tokens"] = most.into();
        }
        request
    }

    /// An answer that comes whole, asked for so or not.
    fn whole(&mut self, mut body: BodyReader<'_>) -> Result<(), Failure> {
        let mut bytes = Vec::new();
        body.read_to_end(&mut bytes)
            .map_err(|error| self.broken(error))?;
        match serde_json::from_slice(&bytes) {
            Ok(completion) => self.take(completion)?,
            Err(error) if error.is_eof() => return Err(self.cut_off()),
            Err(error) => return Err(self.malformed(&error.to_string(), &bytes)),
        }
        self.chosen(&bytes)
    }

    /// Server-sent events: a completion in each line `data:`, until `[DONE]`.
    fn stream(&mut self, body: BodyReader<'_>) -> Result<(), Failure> {
        let (mut body, mut line, mut is_done) = (BufReader::new(body), Vec::new(), false);
        while !is_done {
            line.clear();
            let read = body
                .by_ref()
                .take(limits::LINE_BYTES as u64)
                .read_until(b'\n', &mut line);
            match read {
                Ok(0) => break,
                Ok(limits::LINE_BYTES) => {
                    return Err(self.too_large("one line of the stream", limits::LINE_BYTES));
                }
                Ok(_) => {}
                Err(_) if self.finish_reason.is_some() => break,
                Err(error) => return Err(self.broken(error)),
            }
            let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else {
                continue;
            };
            is_done = data == b"[DONE]";
            match serde_json::from_slice(data) {
                Ok(piece) => self.take(piece)?,
                Err(_) if is_done || data.is_empty() => {}
                Err(_) if !line.ends_with(b"\n") => break,
                Err(error) => return Err(self.malformed(&error.to_string(), data)),
            }
        }
        if !is_done && self.finish_reason.is_none() {
            return Err(self.cut_off());
        }
        self.chosen(b"")
    }

    fn chosen(&self, body: &[u8]) -> Result<(), Failure> {
        if !self.has_choice {
            return Err(self.malformed("it has no choices with a content", body));
        }
        Ok(())
    }

    /// What one completion, or a piece of one, says.
    fn take(&mut self, completion: Completion) -> Result<(), Failure> {
        if let Some(error) = completion.error.filter(|error| !error.is_null()) {
            let quoted = self.quoted(json!({"error": error}).to_string().as_bytes());
            return Err(Failure::new(
                LlmError::ServerError,
                format!("{} answered with an error: {quoted}", self.url),
            ));
        }
        self.model = completion.model.map(short).or(self.model.take());
        match completion.usage {
            Some(Value::Object(usage)) if is_figure(&json!(usage)) => self.usage = Some(usage),
            _ => {}
        }
        let Some(choice) = completion.choices.into_iter().next() else {
            return Ok(());
        };
        self.finish_reason = choice
            .finish_reason
            .map(short)
            .or(self.finish_reason.take());
        let content = choice
            .delta
            .or(choice.message)
            .and_then(|said| said.content);
        // A refusal and a call of a tool are none.
        self.has_choice |= content.is_some();
        let content = content.unwrap_or_default();
        self.said += content.len();
        if self.said > limits::REPLY_BYTES {
            return Err(self.too_large("the reply", limits::REPLY_BYTES));
        }
        let text = self.clean.push(content.as_bytes());
        self.write(&text)
    }

    fn write(&mut self, text: &[u8]) -> Result<(), Failure> {
        let text = String::from_utf8_lossy(text).into_owned();
        write(self.output, &Line::Text { text }).map_err(|error| {
            Failure::new(
                LlmError::CutOff,
                format!("cannot write the reply to stdout: {error}"),
            )
        })
    }

    /// A status that is no success.
    fn refused(&self, status: StatusCode, headers: &HeaderMap, body: Body) -> Failure {
        let (class, help) = match status.as_u16() {
            401 | 403 => (
                LlmError::Unauthorized,
                "check the credential that the provider's api_key names",
            ),
            404 | 405 | 410 => (
                LlmError::NotFound,
                "check the provider's base_url and model",
            ),
            408 => (LlmError::TimeOut, "it waited too long for the request"),
            429 => (
                LlmError::RateLimited,
                "ask less often, or for a higher limit",
            ),
            500.. => (LlmError::ServerError, "the server has a problem of its own"),
            300..=399 => (
                LlmError::BadRequest,
                "redirections are not followed: put the last address into base_url",
            ),
            _ => (
                LlmError::BadRequest,
                "it does not take what it was asked for",
            ),
        };
        let mut bytes = Vec::new();
        // What can be had of its text is enough.
        let _ = bounded(body, 64 * 1024).read_to_end(&mut bytes);
        let header = |name| headers.get(name)?.to_str().ok();
        let quoted = match header("location") {
            Some(location) if status.is_redirection() => self.quoted(location.as_bytes()),
            _ => self.quoted(&bytes),
        };
        let (url, status) = (&self.url, status.as_u16());
        Failure {
            status: Some(status),
            retry_after_ms: header("retry-after")
                .and_then(|value| retry_after(value, clock::wall_us())),
            ..Failure::new(class, format!("{url} answered {status}: {quoted} ({help})"))
        }
    }

    /// A connection that did not come to be, or broke.
    fn broken(&self, error: impl Into<ureq::Error>) -> Failure {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let error = error.into();
        let class = match &error {
            ureq::Error::Timeout(_) => LlmError::TimeOut,
            ureq::Error::Io(error) => match error.kind() {
                BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => {
                    return self.cut_off();
                }
                _ => LlmError::Unreachable,
            },
            ureq::Error::Http(_) | ureq::Error::BadUri(_) => LlmError::BadRequest,
            ureq::Error::Protocol(_) => LlmError::Malformed,
            ureq::Error::LargeResponseHeader(..) | ureq::Error::BodyExceedsLimit(_) => {
                LlmError::TooLarge
            }
            _ => LlmError::Unreachable,
        };
        let help = match class {
            LlmError::TimeOut => "; see timeout and stall of the role and timeout of the provider",
            LlmError::Unreachable => "; is the server there, and base_url right?",
            _ => "",
        };
        let why = self.quoted(error.to_string().as_bytes());
        Failure::new(
            class,
            format!("the call of {} failed: {why}{help}", self.url),
        )
    }

    fn cut_off(&self) -> Failure {
        let (url, said) = (&self.url, self.said);
        Failure::new(
            LlmError::CutOff,
            format!("{url} ended the connection before its reply, of which {said} bytes came"),
        )
    }

    fn too_large(&self, what: &str, most: usize) -> Failure {
        Failure::new(
            LlmError::TooLarge,
            format!("{what} of {} is larger than {most} bytes", self.url),
        )
    }

    fn malformed(&self, why: &str, what: &[u8]) -> Failure {
        let quoted = self.quoted(what);
        // What does not fit is quoted whole by who reads it.
        let why: String = why.chars().take(limits::LLM_ERROR_CHARS).collect();
        Failure::new(
            LlmError::Malformed,
            format!(
                "{} answered what is no chat completion: {why}: {quoted}",
                self.url
            ),
        )
    }

    /// What the server said, for people: its message when it has one; without the key, short, on one line.
    fn quoted(&self, body: &[u8]) -> String {
        let message = serde_json::from_slice::<Value>(body).ok().and_then(|body| {
            let at = |place| {
                body.pointer(place)
                    .and_then(Value::as_str)
                    .map(str::to_owned)
            };
            at("/error/message")
                .or_else(|| at("/error"))
                .or_else(|| at("/message"))
        });
        let text = message.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
        let text = self.redactor.redact(text.trim());
        let text: String = text.chars().take(limits::LLM_ERROR_CHARS).collect();
        format!("“{}”", text.escape_debug())
    }
}

fn agent(call: &Call) -> Result<Agent, Failure> {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_global(Some(Duration::from_millis(call.timeout_ms)))
        .timeout_resolve(Some(limits::LLM_CONNECT))
        .timeout_connect(Some(limits::LLM_CONNECT))
        .user_agent(concat!("nerve/", env!("CARGO_PKG_VERSION")));
    if call.base_url.starts_with("https://") {
        let tls = TlsConfig::builder().root_certs(system_certificates()?);
        config = config.tls_config(tls.build());
    } else {
        config = config.proxy(None);
    }
    Ok(config.build().new_agent())
}

fn system_certificates() -> Result<RootCerts, Failure> {
    let found = rustls_native_certs::load_native_certs().certs;
    if found.is_empty() {
        let why =
            "the system has no certificates, so no server can be trusted: install ca-certificates";
        return Err(Failure::new(LlmError::Unreachable, why.to_owned()));
    }
    let certificates = found
        .iter()
        .map(|found| Certificate::from_der(found).to_owned());
    Ok(RootCerts::new_with_certs(&certificates.collect::<Vec<_>>()))
}

/// A word that the server chose, which is not to be a novel.
fn short(mut word: String) -> String {
    if let Some((end, _)) = word.char_indices().nth(WORD_CHARS) {
        word.truncate(end);
    }
    word
}

fn bounded(body: Body, most: u64) -> BodyReader<'static> {
    body.into_with_config().limit(most).reader()
}

/// `Retry-After`: seconds, or a date of HTTP.
fn retry_after(value: &str, now_us: u64) -> Option<u64> {
    let seconds = value.trim().parse::<u64>().ok();
    seconds
        .map(|seconds| seconds.saturating_mul(1_000))
        .or_else(|| {
            let at = jiff::fmt::rfc2822::parse(value)
                .ok()?
                .timestamp()
                .as_millisecond();
            Some(u64::try_from(at).ok()?.saturating_sub(now_us / 1_000))
        })
}

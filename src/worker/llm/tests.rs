//! The child against a server that says what a test wants, byte by byte.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use super::*;
use crate::model::limits;

const KEY: &str = "sk-canary-0123456789abcdef";

/// How the server ends a conversation.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Close,
    /// It stays, until the client goes.
    Stay,
}

/// Answers one connection with these bytes; gives back the request's head and body.
fn serve(
    answer: impl AsRef<[u8]> + Send + 'static,
    end: End,
) -> (String, JoinHandle<io::Result<(String, Value)>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1/", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let request = read_request(&stream);
        // A client that has had enough closes early.
        let _ = stream.write_all(answer.as_ref());
        if end == End::Stay {
            let _ = stream.read_to_end(&mut Vec::new());
        }
        request
    });
    (url, thread)
}

fn read_request(stream: &TcpStream) -> io::Result<(String, Value)> {
    let (mut reader, mut head) = (BufReader::new(stream), String::new());
    while !head.ends_with("\r\n\r\n") {
        reader.read_line(&mut head)?;
    }
    let length = head.to_lowercase();
    let length = length
        .split("content-length: ")
        .nth(1)
        .unwrap()
        .lines()
        .next()
        .unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    reader.read_exact(&mut body)?;
    Ok((head, serde_json::from_slice(&body)?))
}

fn call(base_url: &str) -> Call {
    Call {
        base_url: base_url.to_owned(),
        model: "m".to_owned(),
        api_key_file: None,
        messages: vec![Turn {
            role: Speaker::User,
            content: "say".to_owned(),
        }],
        stream: true,
        temperature: None,
        max_tokens: None,
        timeout_ms: 60_000,
    }
}

fn made(call: &Call) -> Result<Answer, Failure> {
    let mut output = Vec::new();
    run(&serde_json::to_vec(call).unwrap()[..], &mut output);
    assert!(
        !String::from_utf8_lossy(&output).contains(KEY),
        "the key came through"
    );
    read(&output)
}

/// What comes of a server that answers so.
fn answered(bytes: impl AsRef<[u8]> + Send + 'static) -> Result<Answer, Failure> {
    let (url, server) = serve(bytes, End::Close);
    let answer = made(&call(&url));
    server.join().unwrap().unwrap();
    answer
}

fn http(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
}

fn completion(content: &str) -> String {
    json!({"model": "m-1", "usage": {"total_tokens": 7},
        "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]})
    .to_string()
}

fn piece(content: &str, finish_reason: Option<&str>) -> String {
    let choice = json!({"delta": {"content": content}, "finish_reason": finish_reason});
    format!("data: {}\n\n", json!({"choices": [choice]}))
}

/// A stream that ends when the connection does.
fn stream(events: &[String]) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n{}",
        events.concat()
    )
}

#[test]
fn a_stream_and_a_whole_answer_say_the_same() {
    let usage = json!({"choices": [], "usage": {"total_tokens": 7}, "model": "m-1"});
    let events = [
        ": keep-alive\n\n".to_owned(),
        piece("a — ", None),
        piece("b", None),
        piece("", Some("stop")),
        format!("data: {usage}\r\n\r\n"),
        "data: [DONE]\n\n".to_owned(),
    ];
    let streamed = answered(stream(&events)).unwrap();
    assert_eq!(streamed.content, "a — b");
    assert_eq!(streamed.usage.as_ref().unwrap()["total_tokens"], 7);
    assert_eq!(
        (streamed.model.as_deref(), streamed.finish_reason.as_deref()),
        (Some("m-1"), Some("stop"))
    );
    assert_eq!(
        answered(http("200 OK", "", &completion("a — b"))).unwrap(),
        streamed
    );
}

#[test]
fn the_request_says_what_the_call_says_and_the_key_is_in_its_header_alone() {
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), format!("{KEY}\n")).unwrap();
    let (url, server) = serve(http("200 OK", "", &completion("x")), End::Close);
    let call = Call {
        api_key_file: Some(key.path().to_owned()),
        temperature: Some(0.5),
        max_tokens: Some(9),
        ..call(&url)
    };
    made(&call).unwrap();
    let (head, body) = server.join().unwrap().unwrap();
    assert!(
        head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"),
        "{head}"
    );
    assert!(
        head.to_lowercase()
            .contains(&format!("authorization: bearer {KEY}\r\n")),
        "{head}"
    );
    let expected = json!({"model": "m", "messages": [{"role": "user", "content": "say"}], "temperature": 0.5,
        "max_tokens": 9, "stream": true, "stream_options": {"include_usage": true}});
    assert_eq!(body, expected);
}

#[test]
fn what_the_server_says_comes_without_the_key_wherever_it_quotes_it() {
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), KEY).unwrap();
    let (left, right) = KEY.split_at(7);
    // The quote of an error is cut in the middle of the key, the pieces of a stream, too.
    let long = format!("{}{KEY}", " x".repeat(limits::LLM_ERROR_CHARS / 2 - 4));
    let answers = [
        http(
            "401 no",
            "",
            &json!({"error": {"message": format!("wrong key {KEY}")}}).to_string(),
        ),
        http("500 no", "", &long),
        http("307 there", &format!("Location: http://x/?{KEY}\r\n"), ""),
        http("200 OK", "", &format!("{KEY} is no JSON")),
        http("200 OK", "", &json!({"error": KEY}).to_string()),
        stream(&[piece(left, None), piece(right, Some("stop"))]),
    ];
    for answer in answers {
        let (url, server) = serve(answer, End::Close);
        let said = made(&Call {
            api_key_file: Some(key.path().to_owned()),
            ..call(&url)
        });
        let text = said.map_or_else(|failure| failure.message, |answer| answer.content);
        assert!(!text.contains(&KEY[..12]), "{text}");
        server.join().unwrap().unwrap();
    }
}

#[test]
fn each_status_has_its_class_and_says_what_the_server_said() {
    let rows = [
        ("401 Unauthorized", LlmError::Unauthorized),
        ("403 Forbidden", LlmError::Unauthorized),
        ("404 Not Found", LlmError::NotFound),
        ("400 Bad Request", LlmError::BadRequest),
        ("422 Unprocessable", LlmError::BadRequest),
        ("302 Found", LlmError::BadRequest),
        ("429 Too Many", LlmError::RateLimited),
        ("500 Oops", LlmError::ServerError),
        ("503 Busy", LlmError::ServerError),
    ];
    for (status, class) in rows {
        let headers = "Retry-After: 3\r\nLocation: http://127.0.0.1:1/\r\n";
        let failure = answered(http(
            status,
            headers,
            r#"{"error": {"message": "be\u001b[31mcause"}}"#,
        ))
        .unwrap_err();
        assert_eq!(
            (failure.class, failure.retry_after_ms),
            (class, Some(3_000)),
            "{status}"
        );
        assert_eq!(
            failure.status.map(|code| code.to_string()),
            status.split(' ').next().map(str::to_owned)
        );
        let quoted = if class == LlmError::BadRequest && status.starts_with("302") {
            "“http"
        } else {
            r"“be\u{1b}[31mcause”"
        };
        assert!(failure.message.contains(quoted), "{}", failure.message);
    }
}

#[test]
fn a_stream_that_ends_early_is_cut_off_and_one_that_was_finished_is_not() {
    let events = [piece("abc", None), piece("def", Some("stop"))];
    let whole = stream(&events);
    for end in whole.find("data:").unwrap() + 1..whole.len() - 2 {
        let failure = answered(whole[..end].to_owned()).unwrap_err();
        assert_eq!(
            failure.class,
            LlmError::CutOff,
            "after {end} bytes: {}",
            failure.message
        );
    }
    assert_eq!(answered(whole).unwrap().content, "abcdef");
    assert_eq!(
        answered(stream(&[piece("abc", None), "data: [DONE]\n".to_owned()]))
            .unwrap()
            .content,
        "abc"
    );
}

#[test]
fn a_connection_that_ends_is_cut_off_wherever_it_does() {
    let whole = http("200 OK", "", &completion("x"));
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{\"cho";
    for answer in [
        "",
        "HTTP/1.1 200",
        &whole[..whole.len() - 9],
        "HTTP/1.1 200 OK\r\n\r\n{\"choices\": [",
        chunked,
    ] {
        let failure = answered(answer.to_owned()).unwrap_err();
        assert_eq!(
            failure.class,
            LlmError::CutOff,
            "{answer}: {}",
            failure.message
        );
    }
}

#[test]
fn what_is_no_completion_is_malformed() {
    let bodies = [
        "no JSON",
        "[]",
        "{}",
        r#"{"choices": []}"#,
        r#"{"choices": 3}"#,
        r#"{"choices": [{"message": {"content": 3}}]}"#,
        r#"{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}"#,
    ];
    for body in bodies {
        let failure = answered(http("200 OK", "", body)).unwrap_err();
        assert_eq!(
            failure.class,
            LlmError::Malformed,
            "{body}: {}",
            failure.message
        );
    }
    for events in [
        "data: no JSON\n\n",
        "data: [DONE]\n\n",
        "data: {\"choices\": \"x\"}\n\n",
    ] {
        let failure = answered(stream(&[events.to_owned()])).unwrap_err();
        assert_eq!(
            failure.class,
            LlmError::Malformed,
            "{events}: {}",
            failure.message
        );
    }
    assert_eq!(
        answered("SSH-2.0-OpenSSH\r\n\r\n").unwrap_err().class,
        LlmError::Malformed
    );
    let error = "data: {\"error\": {\"message\": \"overloaded\"}}\n\n";
    assert_eq!(
        answered(stream(&[error.to_owned()])).unwrap_err().class,
        LlmError::ServerError
    );
}

#[test]
fn what_is_too_large_is_not_kept() {
    let megabyte = "x".repeat(limits::REPLY_BYTES);
    let fits = answered(http("200 OK", "", &completion(&megabyte))).unwrap();
    assert_eq!(fits.content.len(), limits::REPLY_BYTES);
    let header = format!("X-Long: {megabyte}\r\n");
    let answers = [
        http("200 OK", "", &completion(&format!("{megabyte}x"))),
        http("200 OK", "", &" ".repeat(9 * 1024 * 1024)),
        http("200 OK", &header, "{}"),
        stream(&[piece(&megabyte, None), piece("x", None)]),
        stream(&[format!("data: {}", "x".repeat(limits::LINE_BYTES))]),
    ];
    for answer in answers {
        let failure = answered(answer).unwrap_err();
        assert_eq!(failure.class, LlmError::TooLarge, "{}", failure.message);
    }
}

#[test]
fn a_server_that_says_nothing_or_stops_saying_something_is_timed_out() {
    for answer in [
        String::new(),
        http("200 OK", "", ""),
        stream(&[piece("a", None)]),
    ] {
        let answer = answer.replace("Content-Length: 0", "Content-Length: 9");
        let (url, server) = serve(answer, End::Stay);
        let failure = made(&Call {
            timeout_ms: 50,
            ..call(&url)
        })
        .unwrap_err();
        assert_eq!(failure.class, LlmError::TimeOut, "{}", failure.message);
        server.join().unwrap().unwrap();
    }
}

#[test]
fn where_nobody_listens_is_unreachable_and_what_is_no_url_a_bad_request() {
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let class = |url: &str| made(&call(url)).unwrap_err().class;
    assert_eq!(class(&format!("http://{gone}")), LlmError::Unreachable);
    assert_eq!(
        class("http://no-such-host.invalid/v1"),
        LlmError::Unreachable
    );
    assert_eq!(class("no url"), LlmError::BadRequest);
    let (url, server) = serve("not TLS\n", End::Close);
    assert_eq!(
        class(&url.replace("http:", "https:")),
        LlmError::Unreachable
    );
    assert!(server.join().unwrap().is_err(), "the request never comes");
}

#[test]
fn a_key_that_cannot_be_read_or_sent_is_unauthorized() {
    let key = tempfile::NamedTempFile::new().unwrap();
    for (text, path) in [
        ("two\nlines", key.path()),
        ("", key.path()),
        ("", "/nowhere/key".as_ref()),
    ] {
        std::fs::write(key.path(), text).unwrap();
        let failure = made(&Call {
            api_key_file: Some(path.to_owned()),
            ..call("http://127.0.0.1:1")
        })
        .unwrap_err();
        assert_eq!(failure.class, LlmError::Unauthorized, "{}", failure.message);
    }
}

#[test]
fn only_a_last_line_makes_an_answer() {
    let half = br#"{"text":"a"}"#;
    for output in [&b""[..], half, b"{\"text\":\"a\"}\n{\"te", b"no JSON\n"] {
        assert_eq!(read(output).unwrap_err().class, LlmError::CutOff);
    }
    let mut output = Vec::new();
    run(&b"{}"[..], &mut output);
    assert_eq!(read(&output).unwrap_err().class, LlmError::BadRequest);
}

//! What a round costs beside the work itself: the rounds of one long run, by the times of their messages.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nerve::bus::client::{ManagerProxy, RunChangedStream, ThreadOptions};
use serde_json::json;

use super::{Figure, Outcome, milliseconds, run_to_end};

/// As many as `bench-llm` has.
const ROUNDS: u32 = 300;

/// A round with an `llm` role, over a bare HTTP call of the same server.
pub(super) async fn llm_overhead(manager: &ManagerProxy<'static>) -> Outcome<Figure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || serve(&listener));
    let provider = json!({"base_url": format!("http://{address}/v1"), "model": "m"});
    let settings = json!({"providers": {"bench": provider}});
    std::fs::write("/etc/nerve/nerve.yaml", settings.to_string())?;
    manager.reload().await?;
    let mut changes = manager.receive_run_changed().await?;
    let before = bare_calls(address)?;
    let round = round_ns(manager, &mut changes, "bench-llm").await?;
    let floor = before.min(bare_calls(address)?);
    Ok(Figure {
        name: "llm_round_overhead_ms",
        value: milliseconds(round.saturating_sub(floor)),
        unit: "ms",
        floor: milliseconds(floor),
        note: format!("goal: under 5; the p50 of {ROUNDS} rounds less that of bare calls"),
    })
}

/// The p50 of the rounds of a run that ends when it has had so many.
async fn round_ns(
    manager: &ManagerProxy<'static>,
    changes: &mut RunChangedStream,
    workflow: &str,
) -> Outcome<u64> {
    let run = run_to_end(manager, changes, workflow).await?;
    let thread = manager.get_thread(&run, ThreadOptions::default()).await?;
    let failed = thread.iter().find(|round| round.meta.contains("\"error\""));
    if let Some(failed) = failed {
        return Err(format!("a round of {workflow} failed: {}", failed.meta).into());
    }
    // The first one starts the worker.
    let rounds: Vec<_> = thread.iter().skip(1).map(|round| round.timestamp).collect();
    if rounds.len() != ROUNDS as usize {
        return Err(format!("{} rounds of {workflow}, not {ROUNDS}", rounds.len()).into());
    }
    let times = rounds
        .windows(2)
        .map(|pair| (pair[1] - pair[0]) * 1_000)
        .collect();
    Ok(median(times))
}

fn bare_calls(address: SocketAddr) -> Outcome<u64> {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let mut stream = TcpStream::connect(address)?;
        let body = r#"{"model": "m", "messages": [{"role": "user", "content": ""}]}"#;
        let length = body.len();
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        stream.read_to_end(&mut Vec::new())?;
        times.push(u64::try_from(begin.elapsed().as_nanos())?);
    }
    Ok(median(times))
}

fn median(mut times: Vec<u64>) -> u64 {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Answers every call with the same completion.
fn serve(listener: &TcpListener) {
    let choice =
        json!({"message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"});
    let body = json!({"choices": [choice], "usage": {"total_tokens": 2}}).to_string();
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    for mut stream in listener.incoming().map_while(Result::ok) {
        // A client that went is no fault of the server.
        let _ = stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .and_then(|()| heard(&mut stream))
            .and_then(|()| stream.write_all(answer.as_bytes()));
    }
}

/// Reads one request.
fn heard(stream: &mut TcpStream) -> std::io::Result<()> {
    let (mut request, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let count = stream.read(&mut piece)?;
        request.extend_from_slice(&piece[..count]);
        let text = String::from_utf8_lossy(&request).to_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            let length = length.and_then(|length| length.parse().ok()).unwrap_or(0);
            if body.len() >= length || count == 0 {
                return Ok(());
            }
        } else if count == 0 {
            return Ok(());
        }
    }
}

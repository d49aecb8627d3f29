//! `nervectl events`: the log, from its beginning or its newest entries, and what comes.

use std::collections::VecDeque;
use std::fmt::Write as _;

use serde_json::Value;

use super::archived::{Everywhere, files};
use super::cli::{EventFormat, Events};
use super::json::decode;
use super::paper::Paper;
use super::text::{clip, columns, line, pad};
use super::wait::{nobody_reads, until};
use super::{Failure, Settings, input, note, print, render};
use crate::bus::client::{AUDIT, Client, EventFilter, Subject};
use crate::bus::error::CallError;
use crate::model::name::RunTail;
use crate::model::run::Caller;
use crate::model::time::utc;
use crate::store::cold;
use crate::store::log::Logged;

/// The newest so many come first when one follows and does not say how many.
const FOLLOWED: u32 = 10;
/// So many are written at once.
const BATCH: usize = 1_000;

/// Shows events, oldest first.
pub(super) async fn events(settings: &Settings, arguments: &Events) -> Result<u8, Failure> {
    input::window(arguments.since, arguments.until)?;
    if arguments.follow && arguments.output == EventFormat::Json {
        return Err(Failure::Usage(
            "an array has an end, and what is followed has none; take -o jsonl".to_owned(),
        ));
    }
    let client = settings.connect().await?;
    let filter = EventFilter {
        source: arguments.source.clone(),
        kind: arguments.kind.clone(),
        reference: arguments.reference.clone(),
        since: arguments.since,
        until: arguments.until,
        ..EventFilter::default()
    };
    let mut log = Log {
        filter,
        // What comes while one looks at the newest belongs to what comes.
        position: newest(&client).await?,
        printer: Printer::new(arguments.output),
    };
    let is_all = !arguments.follow || arguments.since.is_some();
    let lines = arguments.lines.or((!is_all).then_some(FOLLOWED));
    print(&log.printer.begin())?;
    match lines {
        lines if arguments.archived => log.everywhere(&client, lines).await?,
        Some(lines) => log.newest(&client, lines).await?,
        None => {
            log.position = 0;
            log.more(&client).await??;
        }
    }
    if arguments.follow {
        let look = async |client: &Client| {
            let more = log.more(client).await?;
            Ok(more.err())
        };
        tokio::select! {
            failure = until(settings, client, &Subject::Log, look) => return Err(failure?),
            () = nobody_reads() => return Ok(0),
        }
    }
    print(&log.printer.end())?;
    if log.printer.count == 0 && arguments.lines != Some(0) {
        log.explain(&client, arguments.archived).await?;
    }
    Ok(0)
}

/// The number of the newest event of all.
async fn newest(client: &Client) -> Result<u64, CallError> {
    let one = EventFilter {
        limit: Some(1),
        ..EventFilter::default()
    };
    let (events, _) = client.events(one).await?;
    Ok(events.last().map_or(0, |event| event.seq))
}

/// What is shown of the log, and how far that has come.
struct Log {
    filter: EventFilter,
    position: u64,
    printer: Printer,
}

impl Log {
    /// Shows the newest so many up to the position.
    async fn newest(&mut self, client: &Client, lines: u32) -> Result<(), Failure> {
        let mut found = Vec::new();
        let mut before = self.position.saturating_add(1);
        loop {
            let left = lines.saturating_sub(u32::try_from(found.len()).unwrap_or(u32::MAX));
            if left == 0 {
                break;
            }
            let filter = EventFilter {
                before: Some(before),
                limit: Some(left),
                ..self.filter.clone()
            };
            let (mut events, next) = client.events(filter).await?;
            found.append(&mut events);
            if next >= before {
                break;
            }
            before = next;
        }
        found.reverse();
        print(&self.printer.events(&found))
    }

    /// Shows all up to the position, or the newest so many of them, those in the archive too.
    async fn everywhere(&mut self, client: &Client, lines: Option<u32>) -> Result<(), Failure> {
        let newest = lines.map_or(usize::MAX, |lines| lines as usize);
        let mut everywhere = Everywhere::begin(client, &self.filter).await?;
        let mut found = VecDeque::new();
        while let Some(event) = everywhere.next().await? {
            if event.seq > self.position {
                break;
            }
            found.push_back(event);
            if found.len() > newest {
                found.pop_front();
            }
            if lines.is_none() && found.len() >= BATCH {
                print(&self.printer.events(found.make_contiguous()))?;
                found.clear();
            }
        }
        print(&self.printer.events(found.make_contiguous()))
    }

    /// Nothing was found: says where else it may be, or that nothing has this name.
    async fn explain(&self, client: &Client, archived: bool) -> Result<(), Failure> {
        let filter = &self.filter;
        let by_name = EventFilter {
            reference: filter.reference.clone(),
            ..EventFilter::default()
        };
        let is_named = filter.reference.is_some();
        if archived {
            let is_unknown = is_named
                && (*filter == by_name
                    || Everywhere::begin(client, &by_name)
                        .await?
                        .next()
                        .await?
                        .is_none());
            if is_unknown {
                self.unknown();
            }
            return Ok(());
        }
        if !is_named && filter.since.or(filter.until).is_none() {
            return Ok(());
        }
        let one = EventFilter {
            limit: Some(1),
            ..by_name.clone()
        };
        let is_unknown = is_named && client.events(one).await?.0.is_empty();
        let elsewhere = if is_unknown { &by_name } else { filter };
        if !files(client, elsewhere).await?.1.is_empty() {
            note(
                "nervectl: the database has no such event; with --archived the archive is searched, too",
            );
        } else if is_unknown {
            self.unknown();
        }
        Ok(())
    }

    fn unknown(&self) {
        let name = self.filter.reference.as_deref().unwrap_or_default();
        let mut text = format!("nervectl: no run, workflow or event is known as {name}");
        if name.parse::<RunTail>().is_ok() {
            text.push_str("; of a run that was forgotten give the whole id");
        }
        note(&text);
    }

    /// Shows all that is behind the position, which then is the end.
    async fn more(&mut self, client: &Client) -> Result<Result<(), Failure>, CallError> {
        loop {
            let filter = EventFilter {
                after: Some(self.position),
                ..self.filter.clone()
            };
            let (events, next) = client.events(filter).await?;
            if !events.is_empty()
                && let Err(failure) = print(&self.printer.events(&events))
            {
                return Ok(Err(failure));
            }
            if next <= self.position {
                return Ok(Ok(()));
            }
            self.position = next;
        }
    }
}

/// Writes events as they come, piece by piece, purely.
struct Printer {
    format: EventFormat,
    /// The columns but the last, as wide as what has been in them.
    widths: [usize; 4],
    /// Characters of a line of the terminal.
    room: Option<usize>,
    count: u64,
}

const HEADER: [&str; 5] = ["TIME", "SOURCE", "TYPE", "REF", "WHAT"];

impl Printer {
    fn new(format: EventFormat) -> Self {
        Self {
            format,
            // What most events need: the first lines are not narrower than the others.
            widths: [23, 8, 23, 8],
            room: Paper::stdout().room,
            count: 0,
        }
    }

    fn begin(&self) -> String {
        match self.format {
            EventFormat::Table => self.row(&HEADER.map(str::to_owned)),
            EventFormat::Json => "[".to_owned(),
            EventFormat::Jsonl => String::new(),
        }
    }

    fn end(&self) -> String {
        match (self.format, self.count) {
            (EventFormat::Json, 0) => "]\n".to_owned(),
            (EventFormat::Json, _) => "\n]\n".to_owned(),
            _ => String::new(),
        }
    }

    fn events(&mut self, events: &[Logged]) -> String {
        let mut text = String::new();
        if self.format == EventFormat::Table {
            let rows: Vec<_> = events.iter().map(cells).collect();
            for row in &rows {
                for (width, cell) in self.widths.iter_mut().zip(row) {
                    *width = (*width).max(columns(cell));
                }
            }
            for row in &rows {
                text.push_str(&self.row(row));
                self.count += 1;
            }
            return text;
        }
        for event in events {
            if self.format == EventFormat::Json {
                text.push_str(if self.count == 0 { "\n" } else { ",\n" });
            }
            let mut object = Vec::new();
            // Memory takes everything.
            let _ = cold::write_line(&mut object, event);
            let object = String::from_utf8_lossy(&object);
            text.push_str(match self.format {
                EventFormat::Json => object.trim_end(),
                _ => &object,
            });
            self.count += 1;
        }
        text
    }

    /// A line, as much of it as the terminal has room for.
    fn row(&self, cells: &[String; 5]) -> String {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(self.widths) {
            text.push_str(&pad(cell, width + 2));
        }
        text.push_str(&cells[4]);
        let text = text.trim_end();
        let mut shown = match self.room {
            Some(room) => clip(text, room).into_owned(),
            None => text.to_owned(),
        };
        shown.push('\n');
        shown
    }
}

fn cells(event: &Logged) -> [String; 5] {
    let payload = decode(&event.payload);
    let mut what = if event.source == AUDIT {
        audited(&payload)
    } else {
        render::what(&event.event_type, &payload)
    };
    if let Some(blob) = &event.blob {
        let separator = if what.is_empty() { "" } else { " " };
        what = format!("{what}{separator}blob={}", line(blob));
    }
    let is_run = event.reference.len() == 32;
    let reference = if is_run {
        render::short(&event.reference)
    } else {
        &event.reference
    };
    [
        utc(event.at),
        line(&event.source).into_owned(),
        line(&event.event_type).into_owned(),
        line(reference).into_owned(),
        what,
    ]
}

/// `done, by uid 0 (nervectl, pid 4711) in session-3.scope: too slow`
fn audited(payload: &Value) -> String {
    let said = |key: &str| payload[key].as_str();
    let mut text = said("outcome").unwrap_or_default().to_owned();
    if let Ok(by) = serde_json::from_value::<Caller>(payload.clone()) {
        let _ = write!(text, ", by {by}");
        if let Some(unit) = &by.unit {
            let _ = write!(text, " in {unit}");
        }
    }
    if let Some(reason) = said("reason") {
        let _ = write!(text, ": {reason}");
    }
    line(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::render::tests::CREATED;

    fn event(seq: u64, source: &str, kind: &str, payload: &str) -> Logged {
        Logged {
            seq,
            source: source.to_owned(),
            event_type: kind.to_owned(),
            reference: "0193000000007000800000003fa9c1d2".to_owned(),
            payload: payload.to_owned(),
            blob: None,
            at: CREATED,
            hash: [0xab; 32],
        }
    }

    fn printer(format: EventFormat, room: Option<usize>) -> Printer {
        Printer {
            room,
            ..Printer::new(format)
        }
    }

    #[test]
    fn a_table_has_who_did_what_and_fits_the_terminal() {
        let kill = r#"{"uid":0,"pid":7,"comm":"nervectl","unit":"cron.service","reason":"too\nslow","outcome":"done"}"#;
        let mut ended = event(
            8,
            "workflow",
            "ended",
            r#"{"result":"killed","detail":null}"#,
        );
        ended.blob = Some("ff00".to_owned());
        let mut defined = event(9, "system", "defined", r#"{"definition":"\u001b[2J"}"#);
        defined.reference = "a-workflow-of-a-long-name".to_owned();
        let hangup = event(10, "audit", "reload", r#"{"outcome":"done"}"#);
        let mut table = printer(EventFormat::Table, None);
        let mut text = table.begin();
        text.push_str(&table.events(&[event(7, "audit", "kill", kill), ended.clone()]));
        text.push_str(&table.events(&[defined, hangup]));
        text.push_str(&table.end());
        assert_eq!(
            text,
            r"TIME                     SOURCE    TYPE                     REF       WHAT
2026-11-20 10:36:22 UTC  audit     kill                     3fa9c1d2  done, by uid 0 (nervectl, pid 7) in cron.service: too\nslow
2026-11-20 10:36:22 UTC  workflow  ended                    3fa9c1d2  result=killed blob=ff00
2026-11-20 10:36:22 UTC  system    defined                  a-workflow-of-a-long-name  definition=\u{1b}[2J
2026-11-20 10:36:22 UTC  audit     reload                   3fa9c1d2                   done
"
        );
        let narrow = printer(EventFormat::Table, Some(40)).events(&[ended]);
        assert_eq!(narrow, "2026-11-20 10:36:22 UTC  workflow  ende…\n");
    }

    #[test]
    fn json_has_the_keys_and_the_bytes_of_the_archive() {
        let mut odd = event(2, "client", "odd", "not json");
        odd.blob = Some("ff".to_owned());
        let events = [event(1, "workflow", "x", r#"{"z":1.50, "a":"ü"}"#), odd];
        let lines = [
            format!(
                r#"{{"id":1,"source":"workflow","type":"x","refId":"0193000000007000800000003fa9c1d2","payload":{{"z":1.50, "a":"ü"}},"timestamp":{CREATED},"hash":"{}"}}"#,
                "ab".repeat(32)
            ),
            format!(
                r#"{{"id":2,"source":"client","type":"odd","refId":"0193000000007000800000003fa9c1d2","payloadText":"not json","blob":"ff","timestamp":{CREATED},"hash":"{}"}}"#,
                "ab".repeat(32)
            ),
        ];
        let mut jsonl = printer(EventFormat::Jsonl, Some(10));
        let text = jsonl.begin() + &jsonl.events(&events) + &jsonl.end();
        assert_eq!(text, format!("{}\n{}\n", lines[0], lines[1]));
        let mut json = printer(EventFormat::Json, None);
        let text =
            json.begin() + &json.events(&events[..1]) + &json.events(&events[1..]) + &json.end();
        assert_eq!(text, format!("[\n{},\n{}\n]\n", lines[0], lines[1]));
        let nothing = printer(EventFormat::Json, None);
        assert_eq!(nothing.begin() + &nothing.end(), "[]\n");
    }
}

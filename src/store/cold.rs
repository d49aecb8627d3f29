//! A file of the archive: the events of one UTC day, one a line, in the order of the log; `.zst` when it is compressed.
//!
//! A line is a JSON object: `id`, `source`, `type`, `refId`, `payload`, `blob` if there is one, `timestamp` (µs), `hash`.
//! The payload is there as it was written, byte for byte, since the event's hash covers it; one that is no JSON, or that
//! would not stay on its line, is the string `payloadText` instead.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::Error;
use super::log::{Head, Logged};
use crate::model::hex::{hex, unhex};
use crate::model::time;
use crate::os::descriptor::open_file;

const PLAIN: &str = ".jsonl";
const COMPRESSED: &str = ".jsonl.zst";
/// What a file has at its end as long as it is written.
const UNFINISHED: &str = ".new";

/// What a file is called: `2026-11-20.jsonl`, `2026-11-20.2.jsonl`, and so on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The day that its events are of.
    pub day: String,
    /// From 1 on: what could not go at first goes into a further file.
    pub part: u32,
    pub compressed: bool,
}

impl Name {
    /// What a file of the archive may be called, and nothing else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (stem, compressed) = match text.strip_suffix(COMPRESSED) {
            Some(stem) => (stem, true),
            None => (text.strip_suffix(PLAIN)?, false),
        };
        let (day, part) = match stem.split_once('.') {
            Some((day, part)) => (day, part.parse().ok().filter(|part| *part > 1)?),
            None => (stem, 1),
        };
        time::day_start(day)?;
        let name = Self {
            day: day.to_owned(),
            part,
            compressed,
        };
        (name.to_string() == text).then_some(name)
    }

    /// Whether it is what a crash leaves of a file that was being written.
    pub(super) fn is_unfinished(text: &str) -> bool {
        let name = text.strip_suffix(UNFINISHED);
        name.is_some_and(|name| Self::parse(name).is_some())
    }

    pub(super) fn unfinished(&self) -> String {
        format!("{self}{UNFINISHED}")
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.day)?;
        if self.part > 1 {
            write!(f, ".{}", self.part)?;
        }
        f.write_str(if self.compressed { COMPRESSED } else { PLAIN })
    }
}

/// The folder of the archive's files in nerve's directory.
#[must_use]
pub fn folder(directory: &Path) -> PathBuf {
    directory.join("archive/logs")
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    id: u64,
    #[serde(borrow)]
    source: Cow<'a, str>,
    #[serde(rename = "type", borrow)]
    event_type: Cow<'a, str>,
    #[serde(rename = "refId", borrow)]
    reference: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    payload: Option<&'a RawValue>,
    #[serde(rename = "payloadText", skip_serializing_if = "Option::is_none")]
    text: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blob: Option<Cow<'a, str>>,
    timestamp: u64,
    hash: Cow<'a, str>,
}

/// A payload that is on a line as it is. A JSON null is not: for a reader it would be none.
fn as_it_is(payload: &str) -> Option<&RawValue> {
    let raw: &RawValue = serde_json::from_str(payload).ok()?;
    let same = raw.get().len() == payload.len();
    (same && payload != "null" && !payload.contains('\n')).then_some(raw)
}

/// Writes an event's line, with its line feed.
///
/// # Errors
/// When the output does not take it.
pub fn write_line(output: &mut impl Write, event: &Logged) -> io::Result<()> {
    let payload = as_it_is(&event.payload);
    let text = payload.is_none();
    let line = Line {
        id: event.seq,
        source: Cow::from(&event.source),
        event_type: Cow::from(&event.event_type),
        reference: Cow::from(&event.reference),
        payload,
        text: text.then(|| Cow::from(&event.payload)),
        blob: event.blob.as_ref().map(Cow::from),
        timestamp: event.at,
        hash: Cow::from(hex(&event.hash)),
    };
    serde_json::to_writer(&mut *output, &line)?;
    output.write_all(b"\n")
}

/// The event of a line, or what is wrong with it.
///
/// # Errors
/// A few words that follow "line 7".
pub fn parse_line(line: &[u8]) -> Result<Logged, String> {
    let line: Line<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let payload = match (line.payload, line.text) {
        (Some(payload), None) => payload.get().to_owned(),
        (None, Some(text)) => text.into_owned(),
        _ => return Err("has not one payload".to_owned()),
    };
    Ok(Logged {
        seq: line.id,
        source: line.source.into_owned(),
        event_type: line.event_type.into_owned(),
        reference: line.reference.into_owned(),
        payload,
        blob: line.blob.map(Cow::into_owned),
        at: line.timestamp,
        hash: unhex(&line.hash).ok_or("has a hash that is none")?,
    })
}

/// What a file holds, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    pub rows: u64,
    /// The first event's number, and the last one's.
    pub first: u64,
    pub last: u64,
    /// sha256 of the file as it is on disk.
    pub digest: String,
}

/// What shows that events are those that were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// Each is the one that follows the one before it.
    Chain,
    /// The file's digest at its end, which was taken when the chain had been followed.
    Digest,
}

/// Counts what is written.
#[derive(Debug, Default)]
struct Tally {
    rows: u64,
    first: u64,
    last: Head,
}

impl Tally {
    /// One more; or that it cannot be the next one.
    fn add(&mut self, event: &Logged, of: Proof) -> Result<(), String> {
        let (seq, before) = (event.seq, self.last.seq);
        if seq <= before {
            return Err(format!("event {seq} is after event {before}"));
        }
        if self.rows == 0 {
            self.first = seq;
        } else if of == Proof::Chain
            && seq == before + 1
            && self.last.after(&event.entry()) != event.head()
        {
            return Err(format!(
                "event {seq} is not the one that followed event {before}"
            ));
        }
        self.rows += 1;
        self.last = event.head();
        Ok(())
    }

    fn sum(&self, sha: Sha256) -> Summary {
        Summary {
            rows: self.rows,
            first: self.first,
            last: self.last.seq,
            digest: hex(&sha.finalize()),
        }
    }
}

/// A file, and the sha256 of what goes through it.
struct Hashed {
    file: File,
    sha: Sha256,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.sha.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Read for Hashed {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(bytes)?;
        self.sha.update(&bytes[..read]);
        Ok(read)
    }
}

const BUFFER: usize = 256 * 1024;

enum Output {
    Plain(BufWriter<Hashed>),
    Compressed(Box<zstd::Encoder<'static, BufWriter<Hashed>>>),
}

/// Writes a file.
pub(super) struct Writer {
    output: Output,
    tally: Tally,
    path: PathBuf,
}

impl Writer {
    /// Begins a file; what was there of it is overwritten: only what is unfinished is ever written.
    pub fn create(path: PathBuf, compressed: bool) -> Result<Self, Error> {
        let begin = || {
            let file = File::create(&path)?;
            let hashed = Hashed {
                file,
                sha: Sha256::new(),
            };
            let buffer = BufWriter::with_capacity(BUFFER, hashed);
            Ok(if compressed {
                let encoder = zstd::Encoder::new(buffer, zstd::DEFAULT_COMPRESSION_LEVEL)?;
                Output::Compressed(Box::new(encoder))
            } else {
                Output::Plain(buffer)
            })
        };
        match begin() {
            Ok(output) => Ok(Self {
                output,
                tally: Tally::default(),
                path,
            }),
            Err(source) => Err(Error::File { path, source }),
        }
    }

    pub fn write(&mut self, event: &Logged) -> Result<(), Error> {
        let chained = self.tally.add(event, Proof::Chain);
        chained.map_err(Error::Damaged)?;
        let written = match &mut self.output {
            Output::Plain(output) => write_line(output, event),
            Output::Compressed(output) => write_line(output, event),
        };
        written.map_err(|source| Error::File {
            path: self.path.clone(),
            source,
        })
    }

    /// All is on disk.
    pub fn finish(self) -> Result<Summary, Error> {
        let end = || {
            let buffer = match self.output {
                Output::Plain(buffer) => buffer,
                Output::Compressed(encoder) => encoder.finish()?,
            };
            let hashed = buffer
                .into_inner()
                .map_err(io::IntoInnerError::into_error)?;
            hashed.file.sync_all()?;
            Ok(hashed.sha)
        };
        match end() {
            Ok(sha) => Ok(self.tally.sum(sha)),
            Err(source) => Err(Error::File {
                path: self.path,
                source,
            }),
        }
    }
}

enum Input {
    Plain(BufReader<Hashed>),
    Compressed(BufReader<zstd::Decoder<'static, BufReader<Hashed>>>),
}

/// The events of a file, in order. What is wrong with it is an error that names it, and the last thing that is said of
/// it; of a file whose digest is known ([`Reader::expecting`]) nothing is certain before the end has come without one.
pub struct Reader {
    input: Option<Input>,
    line: Vec<u8>,
    number: u64,
    tally: Tally,
    expected: Option<String>,
    summary: Option<Summary>,
    path: PathBuf,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// Reads a file of the archive.
///
/// # Errors
/// [`Error::Cold`] when it is not there or cannot be read.
pub fn read(path: &Path) -> Result<Reader, Error> {
    let file = open_file(path).map_err(|error| Error::Cold {
        path: path.to_owned(),
        why: error.to_string(),
    })?;
    read_open(file, path)
}

/// Reads a file of the archive that is open already, and that is called so.
///
/// # Errors
/// [`Error::Cold`] when it cannot be read.
pub fn read_open(file: File, path: &Path) -> Result<Reader, Error> {
    let begin = || {
        let hashed = Hashed {
            file,
            sha: Sha256::new(),
        };
        let buffer = BufReader::with_capacity(BUFFER, hashed);
        let is_compressed = path.extension().is_some_and(|extension| extension == "zst");
        Ok(if is_compressed {
            let decoder = zstd::Decoder::with_buffer(buffer)?;
            Input::Compressed(BufReader::with_capacity(BUFFER, decoder))
        } else {
            Input::Plain(buffer)
        })
    };
    let input: io::Result<Input> = begin();
    let input = input.map_err(|error| Error::Cold {
        path: path.to_owned(),
        why: error.to_string(),
    })?;
    Ok(Reader {
        input: Some(input),
        line: Vec::new(),
        number: 0,
        tally: Tally::default(),
        expected: None,
        summary: None,
        path: path.to_owned(),
    })
}

impl Reader {
    /// With a file that has not this digest something is wrong.
    #[must_use]
    pub fn expecting(mut self, digest: &str) -> Self {
        self.expected = Some(digest.to_owned());
        self
    }

    /// What it holds, once all of it was read and nothing was wrong.
    #[must_use]
    pub fn summary(&self) -> Option<&Summary> {
        self.summary.as_ref()
    }

    fn next_line(&mut self) -> Result<Option<Logged>, String> {
        let Some(input) = &mut self.input else {
            return Ok(None);
        };
        self.line.clear();
        self.number += 1;
        // A line is far shorter; one without an end must not take all memory.
        let longest = 64 * 1024 * 1024;
        let read = match input {
            Input::Plain(input) => input.take(longest).read_until(b'\n', &mut self.line),
            Input::Compressed(input) => input.take(longest).read_until(b'\n', &mut self.line),
        };
        let number = self.number;
        if read.map_err(|error| format!("line {number}: {error}"))? == 0 {
            return self.end().map(|()| None);
        }
        let Some(line) = self.line.strip_suffix(b"\n") else {
            return Err(format!("line {number} has no end"));
        };
        let event = parse_line(line).map_err(|why| format!("line {number}: {why}"))?;
        let proof = match self.expected {
            Some(_) => Proof::Digest,
            None => Proof::Chain,
        };
        self.tally.add(&event, proof)?;
        Ok(Some(event))
    }

    fn end(&mut self) -> Result<(), String> {
        let mut hashed = match self.input.take() {
            Some(Input::Plain(input)) => input,
            Some(Input::Compressed(input)) => input.into_inner().finish(),
            None => return Ok(()),
        };
        // What may follow the end of what is compressed.
        io::copy(&mut hashed, &mut io::sink()).map_err(|error| error.to_string())?;
        let summary = self.tally.sum(hashed.into_inner().sha);
        match &self.expected {
            Some(expected) if *expected != summary.digest => Err(format!(
                "it has the digest {}, and should have {expected}",
                summary.digest
            )),
            _ => {
                self.summary = Some(summary);
                Ok(())
            }
        }
    }
}

impl Iterator for Reader {
    type Item = Result<Logged, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_line();
        if next.is_err() {
            self.input = None;
        }
        let damaged = |why| Error::Cold {
            path: self.path.clone(),
            why,
        };
        next.map_err(damaged).transpose()
    }
}

/// Reads all of a file and says what it holds.
///
/// # Errors
/// [`Error::Cold`] when anything is wrong with it.
pub fn verify(path: &Path, expected: Option<&str>) -> Result<Summary, Error> {
    let mut reader = read(path)?;
    if let Some(expected) = expected {
        reader = reader.expecting(expected);
    }
    for event in &mut reader {
        event?;
    }
    reader.summary.ok_or_else(|| Error::Cold {
        path: path.to_owned(),
        why: "it has no end".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::log::Entry;
    use super::*;
    use proptest::prelude::*;

    /// A log of these payloads.
    pub(in crate::store) fn log(payloads: &[&str]) -> Vec<Logged> {
        let mut head = Head::default();
        let mut events = Vec::new();
        for (at, payload) in (1..).zip(payloads) {
            let entry = Entry {
                source: "workflow",
                event_type: "t\"y\u{1}",
                reference: "ü",
                payload,
                blob: (at % 2 == 0).then_some("b"),
                at,
            };
            head = head.after(&entry);
            events.push(Logged {
                seq: head.seq,
                source: entry.source.to_owned(),
                event_type: entry.event_type.to_owned(),
                reference: entry.reference.to_owned(),
                payload: entry.payload.to_owned(),
                blob: entry.blob.map(str::to_owned),
                at,
                hash: head.hash,
            });
        }
        events
    }

    fn write(path: &Path, events: &[Logged], compressed: bool) -> Summary {
        let mut writer = Writer::create(path.to_owned(), compressed).unwrap();
        for event in events {
            writer.write(event).unwrap();
        }
        writer.finish().unwrap()
    }

    const PAYLOADS: [&str; 9] = [
        r#"{"type":"x","n":1.10,"a":"\u00fc\/","a":2}"#,
        "{ \"spaced\" : [ ] }",
        " {}",
        "{\n}",
        "{\r}",
        "null",
        "",
        "no JSON",
        "\"text\"",
    ];

    #[test]
    // Parity 115.
    fn what_is_read_is_what_was_written_byte_for_byte() {
        let directory = tempfile::tempdir().unwrap();
        for (name, compressed) in [("a.jsonl", false), ("a.jsonl.zst", true)] {
            let path = directory.path().join(name);
            let events = log(&PAYLOADS);
            let written = write(&path, &events, compressed);
            let found: Vec<Logged> = read(&path).unwrap().map(Result::unwrap).collect();
            assert_eq!(found, events);
            assert_eq!(verify(&path, Some(&written.digest)).unwrap(), written);
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(written.digest, hex(&Sha256::digest(&bytes)));
            assert_eq!((written.rows, written.first, written.last), (9, 1, 9));
        }
    }

    #[test]
    fn a_line_is_the_documented_one() {
        let mut line = Vec::new();
        let mut event = log(&["{\"a\": 1}", "no JSON"]).remove(1);
        event.event_type = "t".to_owned();
        event.hash = [7; 32];
        write_line(&mut line, &event).unwrap();
        event.payload = "{\"a\": 1}".to_owned();
        event.blob = None;
        write_line(&mut line, &event).unwrap();
        let hash = "07".repeat(32);
        assert_eq!(
            String::from_utf8(line).unwrap(),
            format!(
                "{{\"id\":2,\"source\":\"workflow\",\"type\":\"t\",\"refId\":\"ü\",\"payloadText\":\"no JSON\",\"blob\":\"b\",\"timestamp\":2,\"hash\":\"{hash}\"}}\n\
                 {{\"id\":2,\"source\":\"workflow\",\"type\":\"t\",\"refId\":\"ü\",\"payload\":{{\"a\": 1}},\"timestamp\":2,\"hash\":\"{hash}\"}}\n"
            )
        );
    }

    #[test]
    fn each_damaged_byte_is_found_and_the_file_named() {
        let directory = tempfile::tempdir().unwrap();
        for (name, compressed) in [("a.jsonl", false), ("a.jsonl.zst", true)] {
            let path = directory.path().join(name);
            let written = write(&path, &log(&PAYLOADS[..3]), compressed);
            let good = std::fs::read(&path).unwrap();
            let damaged = |bytes: &[u8]| {
                std::fs::write(&path, bytes).unwrap();
                let error = verify(&path, Some(&written.digest)).unwrap_err();
                assert!(error.to_string().contains(name), "{error}");
            };
            for at in 0..good.len() {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << (at % 8);
                damaged(&bytes);
                damaged(&good[..at]);
            }
            damaged(&[&good[..], b"\n"].concat());
            damaged(&[&good[..], &good[..]].concat());
        }
        assert!(matches!(
            read(&directory.path().join("none.jsonl")),
            Err(Error::Cold { .. })
        ));
    }

    #[test]
    fn an_event_that_does_not_follow_is_found_without_a_digest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.jsonl");
        let mut events = log(&PAYLOADS);
        events.remove(4);
        write(&path, &events, false);
        assert_eq!(verify(&path, None).unwrap().rows, 8);
        let text = std::fs::read_to_string(&path).unwrap();
        for changed in [
            text.replacen("\"spaced\"", "\"Spaced\"", 1),
            text.replacen("\"id\":2", "\"id\":1", 1),
        ] {
            assert_ne!(changed, text);
            std::fs::write(&path, changed).unwrap();
            assert!(verify(&path, None).is_err());
        }
    }

    #[test]
    fn names_are_those_of_the_archive_only() {
        for name in [
            "2026-11-20.jsonl",
            "2026-11-20.2.jsonl",
            "2026-11-20.13.jsonl.zst",
            "2026-11-20.jsonl.zst",
        ] {
            assert_eq!(Name::parse(name).unwrap().to_string(), name);
            assert!(Name::is_unfinished(&format!("{name}.new")));
        }
        for name in [
            "",
            "2026-11-20",
            "2026-11-20.1.jsonl",
            "2026-11-20.0.jsonl",
            "2026-11-20.02.jsonl",
            "2026-11-20.+2.jsonl",
            "2026-02-30.jsonl",
            "notes.jsonl",
            "2026-11-20.jsonl.new",
        ] {
            assert_eq!(Name::parse(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_payload_makes_the_journey(payload in "\\PC*|[ \\n\\r\\t{}\\[\\]\",:0-9a-z\\\\]*") {
            let event = log(&[&payload]).remove(0);
            let mut line = Vec::new();
            write_line(&mut line, &event).unwrap();
            prop_assert_eq!(line.split(|byte| *byte == b'\n').count(), 2);
            prop_assert_eq!(parse_line(&line[..line.len() - 1]), Ok(event));
        }

        #[test]
        fn arbitrary_lines_never_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_line(&line);
        }
    }
}

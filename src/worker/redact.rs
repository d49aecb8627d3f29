//! Replaces secrets by `[redacted]`, in whole texts and in what comes piece by piece.
//!
//! It holds against accidents (a command that echoes its environment, a server that quotes a header), not against a
//! role that wants a secret out: whoever has one can write it in another form.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use aho_corasick::AhoCorasick;

/// What stands where a secret stood.
const MARK: &[u8] = b"[redacted]";
/// What is shorter is no secret, and would be found everywhere.
const SHORTEST: usize = 8;

/// Knows the secrets of one process.
#[derive(Clone)]
pub struct Redactor {
    /// Sorted.
    forms: Arc<[Vec<u8>]>,
    /// Finds all forms at once: a long credential has thousands.
    search: AhoCorasick,
}

impl Default for Redactor {
    fn default() -> Self {
        Self::new::<&[u8]>([])
    }
}

impl std::fmt::Debug for Redactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Redactor({} forms)", self.forms.len())
    }
}

impl Redactor {
    /// Each secret as it is without white space around it, line by line, and as JSON writes it.
    ///
    /// # Panics
    /// When they have more than 2 GiB; systemd gives a unit 1 MiB of credentials.
    #[must_use]
    pub fn new<S: AsRef<[u8]>>(secrets: impl IntoIterator<Item = S>) -> Self {
        let mut forms = Vec::new();
        for secret in secrets {
            let secret = secret.as_ref().trim_ascii();
            let lines = secret.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
            for form in lines.chain([secret]).filter(|form| form.len() >= SHORTEST) {
                let json = serde_json::Value::from(String::from_utf8_lossy(form)).to_string();
                // Without the quotes.
                forms.extend([form.to_vec(), json[1..json.len() - 1].into()]);
            }
        }
        forms.sort_unstable();
        forms.dedup();
        Self {
            search: AhoCorasick::new(&forms).expect("secrets have less than 2 GiB"),
            forms: forms.into(),
        }
    }

    /// The text without secrets.
    #[must_use]
    pub fn redact<'a>(&self, text: &'a str) -> Cow<'a, str> {
        match self.redact_bytes(text.as_bytes()) {
            Cow::Borrowed(_) => Cow::Borrowed(text),
            Cow::Owned(bytes) => Cow::Owned(String::from_utf8_lossy(&bytes).into_owned()),
        }
    }

    /// The bytes without secrets.
    #[must_use]
    pub fn redact_bytes<'a>(&self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let found = self.found(bytes);
        if found.is_empty() {
            return Cow::Borrowed(bytes);
        }
        let (mut clean, mut start) = (Vec::with_capacity(bytes.len()), 0);
        for Range { start: from, end } in found {
            clean.extend_from_slice(&bytes[start..from]);
            clean.extend_from_slice(MARK);
            start = end;
        }
        clean.extend_from_slice(&bytes[start..]);
        Cow::Owned(clean)
    }

    /// For bytes that come in pieces.
    #[must_use]
    pub fn stream(&self) -> Stream {
        Stream {
            redactor: self.clone(),
            held: Vec::new(),
        }
    }

    /// Where secrets are, in order; those that overlap are one.
    fn found(&self, bytes: &[u8]) -> Vec<Range<usize>> {
        let mut found: Vec<Range<usize>> = Vec::new();
        // They come in the order of their ends.
        for next in self.search.find_overlapping_iter(bytes) {
            let mut start = next.start();
            while let Some(last) = found.pop_if(|last| last.end > next.start()) {
                start = start.min(last.start);
            }
            found.push(start..next.end());
        }
        found
    }

    fn longest(&self) -> usize {
        self.forms.iter().map(Vec::len).max().unwrap_or(1)
    }

    /// Where the end of these bytes begins that may be the beginning of a secret.
    fn open(&self, bytes: &[u8]) -> usize {
        let first = bytes.len().saturating_sub(self.longest() - 1);
        let is_beginning = |end: &[u8]| {
            let at = self.forms.partition_point(|form| form.as_slice() < end);
            self.forms.get(at).is_some_and(|form| form.starts_with(end))
        };
        (first..bytes.len())
            .find(|start| is_beginning(&bytes[*start..]))
            .unwrap_or(bytes.len())
    }
}

/// Redacts what comes in pieces: the end of a piece that may be the beginning of a secret waits for the next one.
#[derive(Debug)]
pub struct Stream {
    redactor: Redactor,
    held: Vec<u8>,
}

impl Stream {
    /// What can be said after one more piece.
    pub fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(piece);
        let open = self.redactor.open(&self.held);
        let found = self.redactor.found(&self.held);
        // What is found may be part of a longer one, which is waited for, but not for ever.
        let mut end = found.iter().rfold(open, |end, range| {
            if range.end > end {
                end.min(range.start)
            } else {
                end
            }
        });
        if self.held.len() - end > 2 * self.redactor.longest() {
            end = found.last().map_or(open, |last| open.max(last.end));
        }
        let rest = self.held.split_off(end);
        let ready = std::mem::replace(&mut self.held, rest);
        self.redactor.redact_bytes(&ready).into_owned()
    }

    /// What was held back, when no piece follows.
    pub fn finish(&mut self) -> Vec<u8> {
        let rest = std::mem::take(&mut self.held);
        self.redactor.redact_bytes(&rest).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "sk-canary-0123456789";

    #[test]
    fn a_secret_is_found_as_it_is_and_as_json_writes_it() {
        let redactor = Redactor::new([format!(" {SECRET}\n"), "pass\"word\\1\"".to_owned()]);
        let text = format!("a {SECRET}{SECRET} b {:?} c", "pass\"word\\1\"");
        assert_eq!(
            redactor.redact(&text),
            "a [redacted][redacted] b \"[redacted]\" c"
        );
        assert!(matches!(redactor.redact("nothing"), Cow::Borrowed(_)));
    }

    #[test]
    fn each_line_of_a_long_secret_is_one_and_what_is_short_is_none() {
        let redactor = Redactor::new(["-----BEGIN KEY-----\nAAAABBBBCCCC\nxy\n", "root"]);
        let redacted = redactor.redact_bytes(b"AAAABBBBCCCC xy root");
        assert_eq!(&*redacted, b"[redacted] xy root");
    }

    #[test]
    fn overlapping_secrets_leave_nothing_of_either() {
        let redactor = Redactor::new(["abcdefgh", "efghijkl"]);
        assert_eq!(redactor.redact("<abcdefghijkl>"), "<[redacted]>");
    }

    #[test]
    fn a_secret_that_begins_with_another_one_leaves_nothing_of_either() {
        let redactor = Redactor::new(["postgres://u:pass", "postgres://u:pass@db/x"]);
        let mut stream = redactor.stream();
        let mut clean = stream.push(b"to postgres://u:pass");
        clean.extend(stream.push(b"@db/x, postgres://u:pass"));
        clean.extend(stream.finish());
        assert_eq!(clean, b"to [redacted], [redacted]");
    }

    #[test]
    fn a_credential_of_thousands_of_lines_holds_up_nobody() {
        let lines: Vec<String> = (0..3_300).map(|line| format!("{line:x>64}")).collect();
        let redactor = Redactor::new([lines.join("\n")]);
        let text = format!("{}{}.", "0".repeat(1024 * 1024), lines[7]);
        let (since, mut stream) = (Instant::now(), redactor.stream());
        let mut streamed: Vec<u8> = text
            .as_bytes()
            .chunks(8 * 1024)
            .flat_map(|piece| stream.push(piece))
            .collect();
        streamed.extend(stream.finish());
        assert!(streamed.ends_with(b"[redacted]."));
        assert!(redactor.redact(&text).ends_with("[redacted]."));
        assert!(since.elapsed() < Duration::from_secs(5));
    }

    proptest! {
        #[test]
        fn no_occurrence_is_left_however_the_text_comes(
            secrets in proptest::collection::vec("[ab]{8,12}", 1..4),
            parts in proptest::collection::vec("[abc]{0,20}", 0..6),
            chosen in proptest::collection::vec(any::<prop::sample::Index>(), 6),
            size in 1_usize..9,
        ) {
            let redactor = Redactor::new(&secrets);
            let text: String = parts.iter().zip(chosen)
                .flat_map(|(part, index)| [part.as_str(), index.get(&secrets[..]).as_str()])
                .collect();
            let mut stream = redactor.stream();
            let mut streamed: Vec<u8> = text.as_bytes().chunks(size).flat_map(|piece| stream.push(piece)).collect();
            streamed.extend(stream.finish());
            for clean in [redactor.redact(&text).into_owned(), String::from_utf8(streamed).unwrap()] {
                for secret in &secrets {
                    prop_assert!(!clean.contains(secret.as_str()), "{clean}");
                }
            }
        }

        #[test]
        fn what_has_no_secret_comes_through_as_it_is(text in ".{0,200}", size in 1_usize..9) {
            let mut stream = Redactor::new([SECRET]).stream();
            let mut streamed: Vec<u8> = text.as_bytes().chunks(size).flat_map(|piece| stream.push(piece)).collect();
            streamed.extend(stream.finish());
            prop_assert_eq!(streamed, text.into_bytes());
        }
    }
}

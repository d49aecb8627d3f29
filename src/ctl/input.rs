//! What people give, checked before anything is asked of nerve: each refusal says what is wrong, where, and what to do.

use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::Failure;
use super::cli::Prompt;
use super::text::line;
use crate::bus::client::check_key;
use crate::model::limits;
use crate::model::name::{RunTail, WorkflowName};
use crate::model::time::utc;

/// A workflow's name.
pub(super) fn workflow(text: &OsStr) -> Result<WorkflowName, Failure> {
    text.to_string_lossy()
        .parse()
        .map_err(|error| Failure::Input(format!("{error}")))
}

/// What is typed for a run: the last digits of its id, or the id that it had where it was imported from, which can be
/// any text.
pub(super) fn run(text: &OsStr) -> Result<String, Failure> {
    let text = utf8("the run's id", text.as_encoded_bytes().to_vec())?;
    match text.parse::<RunTail>() {
        Err(error) if text.is_empty() || text.chars().any(char::is_control) => {
            Err(Failure::Input(error.to_string()))
        }
        _ => Ok(text),
    }
}

/// The reason of a kill, an abort or a pause.
pub(super) fn reason(text: Option<&OsStr>) -> Result<String, Failure> {
    let text = utf8(
        "the reason",
        text.unwrap_or_default().as_encoded_bytes().to_vec(),
    )?;
    if text.len() > limits::REASON_BYTES {
        let most = limits::REASON_BYTES;
        return Err(Failure::Input(format!(
            "the reason has {} bytes; at most {most} are kept with a run",
            text.len()
        )));
    }
    Ok(text)
}

/// From when to when: that there is a time between them.
pub(super) fn window(since: Option<u64>, until: Option<u64>) -> Result<(), Failure> {
    match (since, until) {
        (Some(since), Some(until)) if since > until => Err(Failure::Usage(format!(
            "--since is {}, which is after --until, {}",
            utc(since),
            utc(until)
        ))),
        _ => Ok(()),
    }
}

/// What makes a start idempotent.
pub(super) fn key(text: Option<&OsStr>) -> Result<Option<String>, Failure> {
    let Some(text) = text else {
        return Ok(None);
    };
    let key = utf8("the key", text.as_encoded_bytes().to_vec())?;
    check_key(&key).map_err(Failure::Input)?;
    Ok(Some(key))
}

/// The prompt of a start: `-p`, a file, stdin, or empty.
pub(super) fn prompt(arguments: &Prompt) -> Result<String, Failure> {
    let (what, bytes) = match (&arguments.prompt, &arguments.prompt_file) {
        (Some(text), _) => ("the prompt".to_owned(), text.as_encoded_bytes().to_vec()),
        (None, Some(path)) if path.as_os_str() == "-" => (
            "the prompt on stdin".to_owned(),
            read(io::stdin().lock(), Path::new("stdin"))?,
        ),
        (None, Some(path)) => (
            format!("the prompt in {}", path.display()),
            read_file(path)?,
        ),
        (None, None) => return Ok(String::new()),
    };
    if bytes.len() > limits::PROMPT_BYTES {
        let most = limits::PROMPT_BYTES;
        return Err(Failure::Input(format!(
            "{what} is longer than {most} bytes; put the bulk into a file that the roles can read, and say where it is"
        )));
    }
    let text = utf8(&what, bytes)?;
    match text.find('\0') {
        Some(at) => Err(Failure::Input(format!(
            "{what} has a NUL byte at offset {at}; a prompt is text, not binary data"
        ))),
        None => Ok(text),
    }
}

/// A definition of somebody's: a file, or stdin, and what it is called.
pub(super) fn definition(path: &Path) -> Result<(String, Vec<u8>), Failure> {
    let name = path.display().to_string();
    if name == "-" {
        let name = "stdin";
        let bytes = read(io::stdin().lock(), Path::new(name))?;
        return Ok((name.to_owned(), bytes));
    }
    let bytes = read_file(path)?;
    Ok((name, bytes))
}

fn utf8(what: &str, bytes: Vec<u8>) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::Input(format!(
            "{what} is not valid UTF-8 at offset {at}; convert it with iconv(1)"
        ))
    })
}

fn read_file(path: &Path) -> Result<Vec<u8>, Failure> {
    let file = File::open(path).map_err(|error| unreadable(path, &error))?;
    read(file, path)
}

/// Reads one byte more than is allowed, never all of what may be without end.
fn read(source: impl Read, path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    source
        .take(limits::PROMPT_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(path, &error))?;
    Ok(bytes)
}

/// A file that cannot be read is bad input, whatever the reason.
pub(super) fn unreadable(path: &Path, error: &dyn Display) -> Failure {
    let path = path.display().to_string();
    Failure::Input(format!("cannot read {}: {error}", line(&path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::io::Write;
    use std::os::unix::ffi::OsStringExt;
    use std::path::PathBuf;

    fn from(text: Option<OsString>, file: Option<PathBuf>) -> Result<String, Failure> {
        prompt(&Prompt {
            prompt: text,
            prompt_file: file,
        })
    }

    fn refusal(prompt: Vec<u8>) -> String {
        let failure = from(Some(OsString::from_vec(prompt)), None).unwrap_err();
        assert_eq!(failure.status(), 65);
        failure.to_string()
    }

    #[test]
    fn no_prompt_is_an_empty_one() {
        assert_eq!(from(None, None).unwrap(), "");
    }

    #[test]
    fn a_prompt_of_the_longest_length_passes_and_one_byte_more_does_not() {
        let longest = "x".repeat(limits::PROMPT_BYTES);
        assert_eq!(
            from(Some(longest.clone().into()), None).unwrap().len(),
            limits::PROMPT_BYTES
        );
        assert!(refusal(format!("{longest}x").into_bytes()).contains("longer than 1048576 bytes"));
    }

    #[test]
    fn what_is_no_text_is_refused_with_its_place() {
        assert!(refusal(b"ab\xffc".to_vec()).contains("not valid UTF-8 at offset 2"));
        assert!(refusal(b"ab\0c".to_vec()).contains("NUL byte at offset 2"));
    }

    #[test]
    fn a_prompt_file_is_read_no_further_than_the_limit() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"from a file\n").unwrap();
        assert_eq!(
            from(None, Some(file.path().to_owned())).unwrap(),
            "from a file\n"
        );
        assert!(
            from(None, Some("/dev/zero".into()))
                .unwrap_err()
                .to_string()
                .contains("longer than")
        );
        assert!(
            from(None, Some("/nonexistent".into()))
                .unwrap_err()
                .to_string()
                .contains("/nonexistent")
        );
    }

    #[test]
    fn names_and_runs_are_checked_here() {
        assert!(workflow(OsStr::new("check-host")).is_ok());
        for bad in ["", "..", "a/b", "a\n", "%i"] {
            assert_eq!(
                workflow(OsStr::new(bad)).unwrap_err().status(),
                65,
                "{bad:?}"
            );
        }
        assert_eq!(run(OsStr::new("3FA9")).unwrap(), "3FA9");
        assert_eq!(run(OsStr::new("old id/1")).unwrap(), "old id/1");
        for bad in ["", "a\n"] {
            assert_eq!(run(OsStr::new(bad)).unwrap_err().status(), 65, "{bad:?}");
        }
        assert_eq!(key(Some(OsStr::new("a"))).unwrap().as_deref(), Some("a"));
        assert_eq!(key(None).unwrap(), None);
        assert_eq!(key(Some(OsStr::new("a\n"))).unwrap_err().status(), 65);
        assert_eq!(reason(None).unwrap(), "");
        assert_eq!(
            reason(Some(OsStr::new(&"x".repeat(1025))))
                .unwrap_err()
                .status(),
            65
        );
    }
}

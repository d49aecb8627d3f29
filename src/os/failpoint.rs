//! Moments at which a test can have this process die or stop. They are there with the feature `failpoints` only: without
//! it [`failpoint!`](failpoint) is nothing at all.
//!
//! Whoever tests writes what is to happen into the file of a moment in [`DIRECTORY`], say `F14`: `abort` (dies at once,
//! nothing is unwound or flushed) or `pause` (all threads stop, as by SIGSTOP). With a number, `abort 3`, it happens
//! when the moment comes for the third time. It happens once: the file is removed first, and `F14.reached` says that the
//! moment came.

/// Where tests and this process meet.
#[cfg(feature = "failpoints")]
const DIRECTORY: &str = "/run/nerve/failpoints";

/// A moment of that name is here: `failpoint!("F14")`; or, `failpoint!("F14", condition)`, is here if the condition
/// holds.
#[cfg(feature = "failpoints")]
macro_rules! failpoint {
    ($name:literal) => {
        $crate::os::failpoint::pass($name);
    };
    ($name:literal, $condition:expr) => {
        if $condition {
            $crate::os::failpoint::pass($name);
        }
    };
}

/// Nothing; a condition is compiled and never asked.
#[cfg(not(feature = "failpoints"))]
macro_rules! failpoint {
    ($name:literal) => {};
    ($name:literal, $condition:expr) => {
        let _ = || $condition;
    };
}

pub(crate) use failpoint;

/// The moment has come.
///
/// # Panics
/// When what it is armed with is not understood, or cannot be removed: a test would prove nothing.
#[cfg(feature = "failpoints")]
pub fn pass(name: &str) {
    let directory = std::path::Path::new(DIRECTORY);
    let Some(deed) = disarm(directory, name) else {
        return;
    };
    match deed {
        Deed::Abort => std::process::abort(),
        Deed::Pause => {
            // SAFETY: raise(3) only sends a signal. To this very thread: one that is sent to the process may be taken by
            // another, and this one would go on for a moment.
            unsafe { libc::raise(libc::SIGSTOP) };
        }
    }
}

/// What a moment can be armed with.
#[cfg(feature = "failpoints")]
#[derive(Debug, PartialEq, Eq)]
enum Deed {
    Abort,
    Pause,
}

/// What is to happen now, if anything; that it is about to happen is said, and it cannot happen again.
#[cfg(feature = "failpoints")]
fn disarm(directory: &std::path::Path, name: &str) -> Option<Deed> {
    let armed = directory.join(name);
    let text = std::fs::read_to_string(&armed).ok()?;
    let mut words = text.split_whitespace();
    let word = words.next()?;
    let times: u32 = words.next().map_or(1, |times| {
        times
            .parse()
            .expect("a failpoint's second word is a number")
    });
    let deed = match word {
        "abort" => Deed::Abort,
        "pause" => Deed::Pause,
        other => {
            panic!("failpoint {name} is armed with {other:?}, which is neither abort nor pause")
        }
    };
    let done = if times > 1 {
        std::fs::write(&armed, format!("{word} {}", times - 1))
    } else {
        std::fs::remove_file(&armed)
            .and_then(|()| std::fs::write(directory.join(format!("{name}.reached")), word))
    };
    // A moment that cannot be disarmed would come for ever.
    done.expect("the directory of failpoints can be written to");
    (times <= 1).then_some(deed)
}

#[cfg(all(test, feature = "failpoints"))]
mod tests {
    use super::*;

    #[test]
    fn it_happens_at_its_time_and_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert_eq!(disarm(path, "F01"), None);
        std::fs::write(path.join("F01"), "pause\n").unwrap();
        assert_eq!(disarm(path, "F02"), None);
        assert_eq!(disarm(path, "F01"), Some(Deed::Pause));
        assert!(path.join("F01.reached").exists());
        assert_eq!(disarm(path, "F01"), None);
        std::fs::write(path.join("F03"), "abort 3").unwrap();
        assert_eq!(disarm(path, "F03"), None);
        assert_eq!(disarm(path, "F03"), None);
        assert!(!path.join("F03.reached").exists());
        assert_eq!(disarm(path, "F03"), Some(Deed::Abort));
        assert_eq!(disarm(path, "F03"), None);
    }
}

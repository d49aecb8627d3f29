//! What one writes on: how wide a terminal is, and whether it takes colours. A pipe gets every word, and no colours.

use std::env;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

/// What a table is written on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Paper {
    /// Columns of a line; without it nothing is cut off.
    pub room: Option<usize>,
    pub ink: Ink,
}

/// Whether words have colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ink {
    Black,
    Coloured,
}

impl Paper {
    /// Without an edge and without colours.
    pub const PLAIN: Self = Self {
        room: None,
        ink: Ink::Black,
    };

    /// stdout, as it is.
    pub fn stdout() -> Self {
        Self::of(&io::stdout())
    }

    /// A stream, as it is.
    pub fn of(stream: &(impl IsTerminal + AsFd)) -> Self {
        let size = rustix::termios::tcgetwinsize(stream).ok();
        let room = size.map(|size| usize::from(size.ws_col));
        let set = |name| env::var(name).is_ok_and(|value| !value.is_empty());
        let is_dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
        let is_forced = env::var("CLICOLOR_FORCE").is_ok_and(|force| !matches!(&*force, "" | "0"));
        Self {
            room: room.filter(|room| *room > 0),
            ink: match (set("NO_COLOR"), stream.is_terminal() && !is_dumb) {
                (false, is_able) if is_able || is_forced => Ink::Coloured,
                _ => Ink::Black,
            },
        }
    }

    /// A word that says how something stands, in its colour; what follows the word has the same.
    pub fn tint(self, text: &str) -> String {
        match colour(text).filter(|_| self.ink == Ink::Coloured) {
            Some(colour) => format!("\x1b[{colour}m{text}\x1b[0m"),
            None => text.to_owned(),
        }
    }
}

/// SGR parameter of a status of a run, of a round, or of a worker; none for what is as it should be and not over.
fn colour(text: &str) -> Option<u8> {
    const RED: u8 = 31;
    const GREEN: u8 = 32;
    const YELLOW: u8 = 33;
    match text.split([' ', ',']).next()? {
        "completed" | "ready" | "ok" => Some(GREEN),
        "failed" | "killed" | "crashed" | "blocked" | "obstructed" | "error" => Some(RED),
        "queued" | "suspended" | "interrupted" | "aborted" | "dropped" | "starting"
        | "draining" | "stopping" | "stopped" | "unknown" => Some(YELLOW),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_words_that_need_an_eye_have_a_colour_and_only_where_there_are_any() {
        let coloured = Paper {
            ink: Ink::Coloured,
            ..Paper::PLAIN
        };
        assert_eq!(coloured.tint("failed  "), "\x1b[31mfailed  \x1b[0m");
        assert_eq!(
            coloured.tint("completed (dry run)"),
            "\x1b[32mcompleted (dry run)\x1b[0m"
        );
        assert_eq!(coloured.tint("started"), "started");
        assert_eq!(Paper::PLAIN.tint("failed"), "failed");
    }
}

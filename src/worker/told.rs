//! What a role is told: its prompt, and what was wrong with its last reply. Pure.

use super::llm::{Speaker, Turn};
use super::reply;
use crate::config::meta::Checker;
use crate::model::limits;
use crate::model::message::Message;
use crate::model::role::{Llm, Role, Work};
use crate::model::text;

/// What a role is told.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub prompt: Option<String>,
    /// What an LLM reads beside it.
    pub user: String,
    /// What was wrong with its last reply.
    pub correction: Option<Correction>,
}

/// A reply that cannot be used, and what its role is told of that.
#[derive(Debug)]
pub(super) struct Correction {
    pub reply: String,
    pub request: String,
}

impl Told {
    /// `render` makes text of a template.
    pub(super) fn new(
        role: &Role,
        checker: Option<&Checker>,
        start: &Message,
        render: impl Fn(&str) -> Result<String, String>,
    ) -> Result<Self, String> {
        let mut prompt = role.prompt.as_deref().map(&render).transpose()?;
        if let Some(checker) = checker.filter(|_| !matches!(role.work, Work::Exec(_))) {
            let before = prompt.map_or_else(String::new, |prompt| format!("{prompt}\n\n"));
            prompt = Some(before + &reply::instructions(checker));
        }
        let user = match &role.work {
            Work::Llm(Llm { user: None, .. }) => start.content.clone(),
            Work::Llm(Llm {
                user: Some(user), ..
            }) => render(user)?,
            Work::Exec(_) | Work::Agent(_) => String::new(),
        };
        Ok(Self {
            prompt,
            user,
            correction: None,
        })
    }

    /// For who reads one text.
    pub(super) fn text(&self) -> Option<String> {
        self.text_within(usize::MAX)
    }

    /// The same without the reply that was wrong, where that would make it longer than it may be.
    pub(super) fn text_within(&self, bytes: usize) -> Option<String> {
        let Some(Correction { reply, request }) = &self.correction else {
            return self.prompt.clone();
        };
        let prompt = self.prompt.as_deref().unwrap_or_default();
        let text = format!("{prompt}\n\nYour reply was:\n\n{reply}\n\n{request}\n");
        Some(if text.len() <= bytes {
            text
        } else {
            format!("{prompt}\n\n{request}\n")
        })
    }

    /// For who is in a conversation.
    pub(super) fn turns(&self) -> Vec<Turn> {
        let turn = |role, content: &String| Turn {
            role,
            content: content.clone(),
        };
        // There are servers that refuse a conversation in which nobody asks anything.
        let of_prompt = if self.user.is_empty() {
            Speaker::User
        } else {
            Speaker::System
        };
        let user = Some(&self.user).filter(|user| !user.is_empty() || self.prompt.is_none());
        let mut turns = Vec::new();
        turns.extend(self.prompt.iter().map(|text| turn(of_prompt, text)));
        turns.extend(user.map(|text| turn(Speaker::User, text)));
        if let Some(Correction { reply, request }) = &self.correction {
            turns.push(turn(Speaker::Assistant, reply));
            turns.push(turn(Speaker::User, request));
        }
        turns
    }

    /// For people, in one piece that is not too long.
    pub(super) fn shown(&self) -> String {
        let prompt = self.prompt.as_deref().unwrap_or_default();
        let is_one = prompt.is_empty() || self.user.is_empty();
        let blank = if is_one { "" } else { "\n\n" };
        let mut shown = format!("{prompt}{blank}{}", self.user);
        text::shorten(&mut shown, limits::REHEARSED_PROMPT_BYTES);
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(prompt: &str, user: &str) -> Told {
        Told {
            prompt: Some(prompt.to_owned()).filter(|prompt| !prompt.is_empty()),
            user: user.to_owned(),
            correction: None,
        }
    }

    fn spoken(told: &Told) -> Vec<(Speaker, String)> {
        let turns = told.turns().into_iter();
        turns.map(|turn| (turn.role, turn.content)).collect()
    }

    #[test]
    fn a_conversation_always_has_somebody_who_asks() {
        let said = |speaker, text: &str| (speaker, text.to_owned());
        assert_eq!(
            spoken(&told("be brief", "why?")),
            [
                said(Speaker::System, "be brief"),
                said(Speaker::User, "why?")
            ]
        );
        assert_eq!(
            spoken(&told("be brief", "")),
            [said(Speaker::User, "be brief")]
        );
        assert_eq!(spoken(&told("", "")), [said(Speaker::User, "")]);
    }

    #[test]
    fn a_correction_comes_after_the_reply_that_it_is_about() {
        let mut told = told("count", "it");
        told.correction = Some(Correction {
            reply: "two".to_owned(),
            request: "say a number".to_owned(),
        });
        let speakers: Vec<_> = spoken(&told).into_iter().map(|(who, _)| who).collect();
        let expected = [
            Speaker::System,
            Speaker::User,
            Speaker::Assistant,
            Speaker::User,
        ];
        assert_eq!(speakers, expected);
        assert_eq!(
            told.text().unwrap(),
            "count\n\nYour reply was:\n\ntwo\n\nsay a number\n"
        );
        assert_eq!(told.text_within(40).unwrap(), "count\n\nsay a number\n");
    }

    #[test]
    fn what_is_shown_of_a_prompt_is_limited() {
        let long = "ä".repeat(limits::REHEARSED_PROMPT_BYTES);
        assert_eq!(
            told(&long, "x").shown().len(),
            limits::REHEARSED_PROMPT_BYTES
        );
        assert_eq!(told("a", "b").shown(), "a\n\nb");
        assert_eq!(told("", "b").shown(), "b");
    }
}

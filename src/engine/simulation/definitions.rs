//! The workflows of the simulated world, and our own reading of their graph: `$START: a, a: {ok: b}, b: {ok: $END,
//! error: a}`.

use std::sync::Arc;
use std::time::Duration;

use super::random::Random;
use crate::model::message::Message;
use crate::model::name::WorkflowName;
use crate::model::retention::Retention;
use crate::model::role::Role;
use crate::model::status::RunResult;
use crate::model::workflow::{
    Definition, Graph, OnFull, Overflow, Routing, Target, WorkerSettings, Workflow,
};

/// So many workflows there are.
pub(super) const WORKFLOWS: usize = 3;

pub(super) fn name(workflow: usize) -> WorkflowName {
    format!("w{workflow}").parse().unwrap()
}

/// Which workflow has this name.
pub(super) fn index(name: &WorkflowName) -> usize {
    usize::from(name.as_str().as_bytes()[1] - b'0')
}

/// A definition with settings that are worth telling apart; `number` makes its digest.
pub(super) fn any(workflow: usize, number: u32, random: &mut Random) -> Arc<Definition> {
    let role = Role::command(vec!["x".into()]);
    let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
    let to = |role: &str| Target::Role(role.parse().unwrap());
    let routes = [
        (a, [("ok".to_owned(), to("b"))].into()),
        (
            b,
            [
                ("ok".to_owned(), Target::End),
                ("error".to_owned(), to("a")),
            ]
            .into(),
        ),
    ];
    let second = |seconds| Some(Duration::from_secs(seconds));
    let overflow = [
        Overflow::Queue,
        Overflow::Queue,
        Overflow::Drop,
        Overflow::Latest,
    ];
    Arc::new(Definition {
        digest: format!("digest-{workflow}-{number}"),
        source: serde_json::Value::Null,
        workflow: Workflow {
            name: name(workflow),
            description: String::new(),
            max_rounds: random.pick(&[None, None, Some(3)]),
            concurrency: random.pick(&[1, 2, 3]),
            overflow: random.pick(&overflow),
            max_queue: random.pick(&[0, 1, 2, 3, 9]),
            on_full: random.pick(&[OnFull::Evict, OnFull::Evict, OnFull::Refuse]),
            timeout: random.pick(&[None, second(30)]),
            retention: Retention::default(),
            roles: ["a", "b"]
                .map(|name| (name.parse().unwrap(), role.clone()))
                .into(),
            routing: Routing::Graph(Graph {
                start: to("a"),
                routes: routes.into(),
            }),
            worker: WorkerSettings {
                nice: random.pick(&[None, None, None, Some(1)]),
                start_limit_burst: random.pick(&[None, None, Some(2), Some(4)]),
                start_limit_interval: random.pick(&[None, second(600)]),
                ..WorkerSettings::default()
            },
        },
    })
}

/// What there is to know of a definition, for the history.
pub(super) fn describe(definition: &Definition) -> String {
    let workflow = &definition.workflow;
    format!(
        "file {}: rounds {:?}, concurrency {}, {:?} {} {:?}, timeout {:?}, worker {} {:?}",
        definition.digest,
        workflow.max_rounds,
        workflow.concurrency,
        workflow.overflow,
        workflow.max_queue,
        workflow.on_full,
        workflow.timeout,
        &workflow.worker.digest()[..6],
        workflow.worker.start_limit(),
    )
}

/// Where a thread stands.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Thread {
    pub(super) rounds: u32,
    pub(super) last: Option<Message>,
}

/// What comes next in a thread.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    Role(&'static str),
    End(RunResult),
}

impl Thread {
    pub(super) fn push(&mut self, message: Message) {
        self.rounds += 1;
        self.last = Some(message);
    }

    pub(super) fn next(&self, max_rounds: u32) -> Next {
        let text = |key: &str| self.last.as_ref()?.meta.get(key)?.as_str();
        let role = self.last.as_ref().map(|last| last.role.as_str());
        let speaker = match (role, text("status")) {
            (None, _) => "a",
            (Some("a"), Some("ok")) => "b",
            (Some("b"), Some("ok")) => return Next::End(RunResult::Success),
            (Some("b"), Some("error")) => "a",
            (_, Some("error")) => return Next::End(text("result").unwrap().parse().unwrap()),
            (_, status) => return Next::End(RunResult::NoRoute(status.unwrap().to_owned())),
        };
        if self.rounds < max_rounds {
            Next::Role(speaker)
        } else {
            Next::End(RunResult::MaxRounds)
        }
    }
}

//! The workflows of the simulated world, and our own reading of their graph: `$START: a, a: {ok: b}, b: {ok: $END,
//! error: a}`.

use std::sync::Arc;
use std::time::Duration;

use super::random::Random;
use crate::model::message::Message;
use crate::model::name::WorkflowName;
use crate::model::retention::Retention;
use crate::model::role::{Moderator, Role};
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
    let graph = Routing::Graph(Graph {
        start: to("a"),
        routes: routes.into(),
    });
    let moderator = Routing::Moderator(Moderator {
        exec: vec!["m".into()],
        timeout: None,
        rehearses: false,
    });
    let own = || vec!["own".to_owned()];
    let (routing, exec) = match random.below(8) {
        0 | 1 => (moderator, Vec::new()),
        2 => (Routing::Worker, own()),
        3 => (graph, own()),
        _ => (graph, Vec::new()),
    };
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
            routing,
            worker: WorkerSettings {
                nice: random.pick(&[None, None, None, Some(1)]),
                start_limit_burst: random.pick(&[None, None, Some(2), Some(4)]),
                start_limit_interval: random.pick(&[None, second(600)]),
                exec,
                ..WorkerSettings::default()
            },
        },
    })
}

/// What there is to know of a definition, for the history.
pub(super) fn describe(definition: &Definition) -> String {
    let workflow = &definition.workflow;
    format!(
        "file {}: routed by {:?}, rounds {:?}, concurrency {}, {:?} {} {:?}, timeout {:?}, worker {} {:?}",
        definition.digest,
        Kind::of(definition),
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
    pub(super) kind: Kind,
    /// Its worker is the user's own.
    pub(super) is_own: bool,
    /// What the moderator said of the next round.
    pub(super) route: Option<Target>,
    /// How many attempts of the next round failed.
    pub(super) failed: u32,
}

/// Who routes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) enum Kind {
    #[default]
    Table,
    Moderator,
    Worker,
}

impl Kind {
    pub(super) fn of(definition: &Definition) -> Self {
        match definition.workflow.routing {
            Routing::Graph(_) => Self::Table,
            Routing::Moderator(_) => Self::Moderator,
            Routing::Worker => Self::Worker,
        }
    }
}

/// One of the two roles there are.
pub(super) fn spoken(role: &str) -> &'static str {
    match role {
        "a" => "a",
        _ => "b",
    }
}

/// What comes next in a thread.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    Role(&'static str),
    Ask,
    Any,
    End(RunResult),
}

impl Thread {
    pub(super) fn push(&mut self, message: Message) {
        self.rounds += 1;
        self.last = Some(message);
        (self.route, self.failed) = (None, 0);
    }

    pub(super) fn next(&self, max_rounds: u32) -> Next {
        let text = |key: &str| self.last.as_ref()?.meta.get(key)?.as_str();
        let role = self.last.as_ref().map(|last| last.role.as_str());
        let routed = match (&self.route, self.kind) {
            (_, Kind::Worker) => return Next::Any,
            (_, Kind::Table) => None,
            (None, Kind::Moderator) => return Next::Ask,
            (Some(Target::End), Kind::Moderator) => return Next::End(RunResult::Success),
            (Some(Target::Role(role)), Kind::Moderator) => Some(spoken(role.as_str())),
        };
        let speaker = match (role, text("status")) {
            _ if routed.is_some() => routed.unwrap(),
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

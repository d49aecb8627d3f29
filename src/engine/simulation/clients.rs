//! What people want of nerved.

use super::super::{Input, Known};
use super::definitions::{self, WORKFLOWS, name};
use super::machine::SECOND;
use super::oracle::Phase;
use super::world::World;
use crate::model::name::RunId;
use crate::model::run::{AbortRequest, Accepted, Caller, KillRequest};

pub(super) fn caller() -> Caller {
    Caller {
        uid: 0,
        pid: None,
        comm: None,
        unit: None,
    }
}

impl World {
    /// A definition's file is written anew.
    pub(super) fn edit(&mut self, workflow: usize) {
        self.next_definition += 1;
        let definition = definitions::any(workflow, self.next_definition, &mut self.random);
        self.log(|| definitions::describe(&definition));
        self.pinned
            .insert(definition.digest.clone(), definition.clone());
        self.disk.insert(
            name(workflow),
            Known {
                definition: Some(definition),
                fault: None,
            },
        );
    }

    pub(super) fn call(&mut self, call: impl FnOnce(u64) -> Input) {
        self.next_ticket += 1;
        let call = call(self.next_ticket);
        self.log(|| format!("call {call:?}"));
        if let Some(nerved) = &mut self.nerved {
            nerved.calls.push_back(call);
        }
    }

    pub(super) fn start(&mut self, workflow: usize) -> RunId {
        // A UUIDv7's order is nobody's order.
        self.next_run += 1;
        let run = RunId::from_bits(self.next_run << 64 | u128::from(self.random.next()));
        let key = self
            .random
            .chance(30)
            .then(|| format!("key-{}", self.random.below(4)));
        let accepted = Accepted {
            workflow: name(workflow),
            prompt: String::new(),
            max_rounds: self.random.pick(&[None, None, None, Some(1), Some(4)]),
            dry_run: false,
            trigger: serde_json::Value::Null,
            key,
        };
        self.call(|ticket| Input::Start {
            ticket,
            run,
            accepted,
            existing: None,
        });
        run
    }

    pub(super) fn kill(&mut self, run: RunId) {
        let grace_us = self.random.pick(&[0, 5 * SECOND]);
        let request = KillRequest {
            reason: None,
            grace_us,
            by: Some(caller()),
        };
        self.call(|ticket| Input::Kill {
            ticket,
            run,
            request,
        });
    }

    pub(super) fn abort(&mut self, run: RunId) {
        let request = AbortRequest {
            reason: None,
            by: caller(),
        };
        self.call(|ticket| Input::Abort {
            ticket,
            run,
            request,
        });
    }

    /// A run, rather one that is open.
    pub(super) fn any_run(&mut self) -> Option<RunId> {
        let open = self
            .oracle
            .runs
            .iter()
            .filter(|(_, run)| run.phase != Phase::Ended);
        let open: Vec<_> = open.map(|(id, _)| *id).collect();
        let runs = if open.is_empty() || self.random.chance(10) {
            &self.store.order
        } else {
            &open
        };
        (!runs.is_empty()).then(|| self.random.pick(runs))
    }

    pub(super) fn request(&mut self) {
        let workflow = self.random.index(WORKFLOWS);
        let run = self.any_run();
        match (self.random.below(20), run) {
            (0..10, _) | (_, None) => drop(self.start(workflow)),
            (10 | 11, Some(run)) => self.kill(run),
            (12 | 13, Some(run)) => self.abort(run),
            (14, _) => {
                let timeout_us =
                    self.random
                        .pick(&[None, Some(0), Some(SECOND), Some(60 * SECOND)]);
                let workflow = name(workflow);
                self.call(|ticket| Input::Drain {
                    ticket,
                    workflow,
                    timeout_us,
                    by: caller(),
                });
            }
            (15, _) => {
                self.call(|ticket| Input::Reset {
                    ticket,
                    workflow: name(workflow),
                    by: caller(),
                });
            }
            (16, _) if self.store.pause.is_none() => {
                self.call(|ticket| Input::Pause {
                    ticket,
                    reason: None,
                    by: caller(),
                });
            }
            (16 | 17, _) => self.call(|ticket| Input::Resume {
                ticket,
                by: caller(),
            }),
            _ => self.reload(workflow),
        }
    }

    pub(super) fn reload(&mut self, workflow: usize) {
        match self.random.below(8) {
            0 => drop(self.disk.remove(&name(workflow))),
            1 => {
                let known = self.disk.entry(name(workflow)).or_default();
                known.fault = Some("broken".to_owned());
            }
            2 => self.max_active = self.random.pick(&[None, Some(1), Some(2), Some(4)]),
            _ => self.edit(workflow),
        }
        self.report_definitions();
    }

    pub(super) fn report_definitions(&mut self) {
        let (workflows, max_active) = (self.disk.clone(), self.max_active);
        if let Some(nerved) = &mut self.nerved {
            nerved.inbox.push_back(Input::Definitions {
                workflows,
                max_active,
            });
        }
    }
}

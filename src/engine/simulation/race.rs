//! A kill, an abort and the natural end of one run, in every order and batching: one wins, and all are told the same.

use super::oracle::Phase;
use super::world::World;
use crate::model::status::RunResult;

impl World {
    pub(super) fn race(&mut self) {
        self.is_chaos = false;
        while !self.oracle.is_listed {
            self.advance();
        }
        let workflow = 0;
        let run = self.start(workflow);
        // Up to somewhere in its life, rather late.
        let rounds = self.random.pick(&[0, 1, 2]);
        for _ in 0..400 {
            self.machine.pass(1_000);
            let Some(ledger) = self.oracle.runs.get(&run) else {
                self.advance();
                continue;
            };
            if ledger.thread.rounds >= rounds && self.random.chance(15) {
                break;
            }
            self.advance();
        }
        let (kills, aborts) = self.random.pick(&[(1, 0), (1, 1), (2, 1), (0, 1)]);
        (0..kills).for_each(|_| self.kill(run));
        (0..aborts).for_each(|_| self.abort(run));
        self.quiesce();
        let ledger = &self.oracle.runs[&run];
        assert_eq!(ledger.phase, Phase::Ended);
        let expected = match ledger.result.as_ref().unwrap() {
            RunResult::Killed => ledger.killed,
            RunResult::Aborted => !ledger.killed && ledger.aborted.is_some(),
            _ => !ledger.killed && ledger.aborted.is_none(),
        };
        assert!(expected, "{ledger:?}");
    }
}

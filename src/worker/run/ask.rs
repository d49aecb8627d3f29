//! A workflow's moderator that is a command: asked like a role, for who speaks next.

use serde_json::Value;
use tokio::sync::mpsc;

use super::{End, Report, Run};
use crate::model::message::{Message, OK};
use crate::model::name::RoleName;
use crate::model::role::Role;
use crate::model::status::RunResult;
use crate::model::text::shorten;
use crate::model::workflow::{Routing, Target};
use crate::worker::role::Order;
use crate::worker::told::Told;

impl End {
    fn bad_route(detail: String) -> Self {
        Self {
            result: RunResult::BadRoute,
            detail: Some(detail),
        }
    }
}

impl Run {
    /// Has the workflow's moderator say who speaks next.
    pub(super) async fn ask(
        &mut self,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> Result<(), End> {
        let Routing::Moderator(moderator) = &self.workflow.routing else {
            return Ok(());
        };
        if self.is_dry && !moderator.rehearses {
            let why = "in a dry run the moderator is asked only if it has `dry_run: execute`";
            return Err(End::bad_route(why.to_owned()));
        }
        let round = self.position.rounds + 1;
        let role = Role {
            timeout: moderator.timeout,
            ..Role::command(moderator.exec.clone())
        };
        let thread = serde_json::to_string(&self.lines().collect::<Vec<_>>());
        let (Ok(name), Ok(thread), Ok(())) = ("moderator".parse(), thread, self.prepare()) else {
            return Err(End::bad_route("the thread cannot be told".to_owned()));
        };
        let told = Told {
            prompt: Some(thread),
            ..Told::default()
        };
        let said = self
            .stage(&name, &role, round)
            .attempt(&told, orders)
            .await?;
        let target = self.target(&said.message).map_err(End::bad_route)?;
        self.awaited = Some(Order::RouteAck(round));
        self.position.route = Some(target.clone());
        self.report(Report::Route { round, target });
        Ok(())
    }

    /// What the moderator's answer means, or why it means nothing.
    fn target(&self, answer: &Message) -> Result<Target, String> {
        if answer.status() != OK {
            let text = |key: &str| answer.meta.get(key).and_then(Value::as_str);
            let (result, stderr) = (text("result"), text("stderr"));
            let (result, stderr) = (result.unwrap_or_default(), stderr.unwrap_or_default());
            return Err(format!("the moderator failed: {result}: {stderr}"));
        }
        match Target::try_from(answer.content.trim().to_owned()) {
            Ok(Target::End) => Ok(Target::End),
            Ok(Target::Role(role)) if self.workflow.roles.contains_key(&role) => {
                Ok(Target::Role(role))
            }
            _ => {
                let roles: Vec<_> = self.workflow.roles.keys().map(RoleName::as_str).collect();
                let (mut answer, roles) = (answer.content.clone(), roles.join(", "));
                shorten(&mut answer, 200);
                Err(format!(
                    "the moderator answered {answer:?}; it has to answer a role ({roles}) or $END"
                ))
            }
        }
    }
}

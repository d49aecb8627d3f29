//! An attempt of a round: what a role is told, who does its work, and what the reply means. `run` decides how often.
//!
//! It is one process, and a second one when the meta of the reply has to be extracted. All that is said of it is
//! without secrets.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::agent;
use super::home::Home;
use super::llm::{self, Answer, Call, Turn};
use super::reply::{self, Fault, Reply};
use super::role::{End, Order, Output, Process};
use super::said;
use super::told::{Correction, Told};
use crate::config::meta::{Checker, RESERVED};
use crate::model::exit::{Exit, signal_name};
use crate::model::limits;
use crate::model::message::{Message, OK};
use crate::model::name::{RoleName, RunId};
use crate::model::role::{Agent, Llm, Role, Variable, Work};
use crate::model::status::RunResult;
use crate::model::tools::{Preset, PromptBy, ReplyForm, Tools};
use crate::os::cgroup::Cgroup;

type Orders = mpsc::UnboundedReceiver<Order>;

/// A round about to be tried.
#[derive(Debug)]
pub(super) struct Round<'a> {
    pub home: &'a Home,
    pub run: RunId,
    pub cgroup: &'a Cgroup,
    pub name: &'a RoleName,
    pub role: &'a Role,
    pub tools: &'a Tools,
    /// What its reply has to say of itself.
    pub checker: Option<&'a Checker>,
    pub directory: &'a Path,
    /// What every role has, and what nerve tells this one.
    pub environment: Vec<(String, String)>,
    pub number: u32,
    /// When the attempt has taken too long.
    pub deadline: Option<Instant>,
    /// When the run's time-out passes.
    pub run_deadline: Option<Instant>,
}

/// What came of an attempt.
#[derive(Debug)]
pub(super) struct Said {
    pub message: Message,
    /// With this the role can do better at once.
    pub correction: Option<Correction>,
    /// The next attempt is to wait at least so long.
    pub wait: Duration,
}

/// Why there is no reply.
#[derive(Debug)]
enum Stop {
    /// The attempt failed.
    Attempt(Failed),
    /// The run ends so.
    Run(RunResult),
}

#[derive(Debug)]
struct Failed {
    result: RunResult,
    why: String,
    wait: Duration,
}

impl Stop {
    fn failed(result: RunResult, why: impl Into<String>) -> Self {
        let (why, wait) = (why.into(), Duration::ZERO);
        Self::Attempt(Failed { result, why, wait })
    }
}

impl Round<'_> {
    /// Has the role speak.
    ///
    /// # Errors
    /// How the run ends, if it was killed or its time-out passed.
    pub(super) async fn attempt(
        &self,
        told: &Told,
        orders: &mut Orders,
    ) -> Result<Said, RunResult> {
        let mut said = match self.reply(told, orders).await {
            Ok(said) => said,
            Err(Stop::Attempt(failed)) => Said {
                message: said::failure(self.name, &failed.result, &failed.why),
                correction: None,
                wait: failed.wait,
            },
            Err(Stop::Run(result)) => return Err(result),
        };
        said::finish(&mut said.message, &self.home.redactor);
        Ok(said)
    }

    /// What it says when nothing is executed.
    pub(super) fn rehearse(
        &self,
        told: &Told,
        content: &str,
        meta: &Map<String, Value>,
    ) -> Message {
        let status = self.role.statuses().next().unwrap_or(OK);
        let mut message = said::message(self.name, content.to_owned(), status);
        message.meta.extend(meta.clone());
        // How a run may end is not for a definition to say.
        message.meta.remove("result");
        message.meta.insert("dryRun".into(), true.into());
        message.meta.insert("prompt".into(), told.shown().into());
        said::finish(&mut message, &self.home.redactor);
        message
    }

    async fn reply(&self, told: &Told, orders: &mut Orders) -> Result<Said, Stop> {
        let message = match &self.role.work {
            Work::Exec(argv) => {
                let stdin = told.text();
                self.command(argv, stdin.as_deref(), &Preset::default(), orders)
                    .await?
            }
            Work::Agent(agent) => self.agent(agent, told, orders).await?,
            Work::Llm(llm) => self.llm(llm, told, orders).await?,
        };
        let mut said = Said {
            message,
            correction: None,
            wait: Duration::ZERO,
        };
        if let (Some(checker), OK) = (self.checker, said.message.status()) {
            self.check(&mut said, checker, orders).await?;
        }
        Ok(said)
    }

    async fn agent(
        &self,
        agent: &Agent,
        told: &Told,
        orders: &mut Orders,
    ) -> Result<Message, Stop> {
        let name = &agent.name;
        let preset = self.tools.agents.get(name).ok_or_else(|| {
            let why = format!(
                "nerve.yaml has no agent {name}: write `agents: {{{name}: {{exec: [COMMAND]}}}}` into /etc/nerve/nerve.yaml"
            );
            Stop::failed(RunResult::ExecFailed, why)
        })?;
        let mut argv = [preset.exec.as_slice(), &agent.arguments].concat();
        let mut stdin = None;
        if preset.prompt == PromptBy::Stdin {
            stdin = told.text();
        } else {
            let most = limits::ARGUMENT_BYTES;
            let mut text = told.text_within(most).unwrap_or_default();
            if text.starts_with('-') {
                // Whatever a prompt says is no option.
                text.insert(0, '\n');
            }
            let length = text.len();
            if length > most {
                let why = format!(
                    "the prompt has {length} bytes, and agent {name} gets it as an argument, of which Linux allows \
                     {most}: shorten it, or let the agent read stdin (prompt: stdin in nerve.yaml)"
                );
                return Err(Stop::failed(RunResult::ExecFailed, why));
            }
            argv.push(text);
        }
        self.command(&argv, stdin.as_deref(), preset, orders).await
    }

    /// What a command says, which writes as the preset has it.
    async fn command(
        &self,
        argv: &[String],
        stdin: Option<&str>,
        preset: &Preset,
        orders: &mut Orders,
    ) -> Result<Message, Stop> {
        let environment = self.variables()?;
        let most = match preset.reply {
            ReplyForm::Text => limits::REPLY_BYTES,
            ReplyForm::Json(_) | ReplyForm::JsonLines { .. } => limits::AGENT_OUTPUT_BYTES,
        };
        let output = self
            .process(argv, stdin, &environment, most, orders)
            .await?;
        let mut failure = output.failure(&self.role.ok_codes);
        let mut stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let (text, was_text) = said::decode(output.stdout);
        if !was_text {
            tracing::warn!(run_id = %self.run, role = %self.name, round = self.number,
                "the reply of role {} is not UTF-8; what is not became U+FFFD", self.name);
        }
        let (mut content, usage) = agent::read(&text, preset).unwrap_or_else(|why| {
            if failure.is_none() {
                failure = Some(RunResult::BadReply);
                said::add_line(&mut stderr, &why);
            }
            (text, Map::new())
        });
        if content.len() > limits::REPLY_BYTES {
            content.clear();
            failure.get_or_insert(RunResult::ReplyTooLarge);
        }
        let mut message = said::message(self.name, content, OK);
        if let Some(failure) = &failure {
            said::fail(&mut message, failure);
        }
        match output.exit {
            Exit::Code(code) => message.meta.insert("exitCode".into(), code.into()),
            Exit::Signal(number) => message
                .meta
                .insert("signal".into(), signal_name(number).into()),
        };
        message.meta.insert("stderr".into(), stderr.into());
        if !usage.is_empty() {
            message.meta.insert("usage".into(), usage.into());
        }
        Ok(message)
    }

    async fn llm(&self, llm: &Llm, told: &Told, orders: &mut Orders) -> Result<Message, Stop> {
        let call = self.call(&llm.provider, llm.model.as_ref(), told.turns())?;
        let call = Call {
            stream: llm.is_streamed,
            temperature: llm.temperature,
            max_tokens: llm.max_tokens,
            ..call
        };
        let answer = self.ask(&call, orders).await?;
        let mut message = said::message(self.name, answer.content.clone(), OK);
        match answer.finish_reason.as_deref() {
            Some("length") => {
                let why =
                    "the LLM stopped at its most tokens (finish_reason length): see max_tokens";
                said::note(&mut message.meta, why);
            }
            Some(reason) if reason != "stop" => {
                said::note(
                    &mut message.meta,
                    &format!("the LLM stopped for its finish_reason {reason}"),
                );
            }
            _ => {}
        }
        message.meta.append(&mut cost(answer));
        Ok(message)
    }

    /// A call of a provider.
    fn call(
        &self,
        provider: &str,
        model: Option<&String>,
        messages: Vec<Turn>,
    ) -> Result<Call, Stop> {
        let failed = |why: String| Stop::failed(RunResult::ExecFailed, why);
        let Some(found) = self.tools.providers.get(provider) else {
            return Err(failed(format!(
                "nerve.yaml has no provider {provider}: write `providers: {{{provider}: {{base_url: URL, model: MODEL}}}}` \
                 into /etc/nerve/nerve.yaml"
            )));
        };
        let model = model.or(found.model.as_ref()).ok_or_else(|| {
            failed(format!(
                "neither role {} nor provider {provider} in nerve.yaml names a model: write `model: NAME` there",
                self.name
            ))
        })?;
        let key = found.credential.as_ref();
        let key = key.map(|name| self.home.credentials.file(name));
        Ok(Call {
            base_url: found.base_url.clone(),
            model: model.clone(),
            api_key_file: key.transpose().map_err(failed)?,
            messages,
            stream: false,
            temperature: None,
            max_tokens: None,
            timeout_ms: found.timeout_ms,
        })
    }

    /// Makes a call: this very executable does, as a process of the run.
    async fn ask(&self, call: &Call, orders: &mut Orders) -> Result<Answer, Stop> {
        let argv = ["/proc/self/exe", "--llm"].map(str::to_owned);
        let stdin = serde_json::to_string(call)
            .map_err(|error| Stop::failed(RunResult::ExecFailed, error.to_string()))?;
        let output = self
            .process(
                &argv,
                Some(&stdin),
                &self.environment,
                llm::OUTPUT_BYTES,
                orders,
            )
            .await?;
        if output.cut.is_some() || matches!(output.exit, Exit::Signal(_)) {
            let result = output.failure(&self.role.ok_codes);
            return Err(Stop::failed(
                result.unwrap_or(RunResult::ExecFailed),
                String::from_utf8_lossy(&output.stderr),
            ));
        }
        llm::read(&output.stdout).map_err(|failure| {
            let wait = Duration::from_millis(failure.retry_after_ms.unwrap_or(0));
            Stop::Attempt(Failed {
                result: RunResult::LlmError(failure.class),
                why: failure.message,
                wait: wait.min(limits::RETRY_AFTER),
            })
        })
    }

    async fn process(
        &self,
        argv: &[String],
        stdin: Option<&str>,
        environment: &[(String, String)],
        stdout_bytes: usize,
        orders: &mut Orders,
    ) -> Result<Output, Stop> {
        let process = Process {
            home: self.home,
            run: self.run,
            cgroup: self.cgroup,
            name: self.name,
            number: self.number,
            argv,
            directory: self.directory,
            stdin,
            environment,
            deadline: self.deadline,
            stall: self.role.stall,
            stdout_bytes,
            run_deadline: self.run_deadline,
        };
        match process.execute(orders).await {
            End::Exited(output) => Ok(output),
            End::NotStarted(why) => Err(Stop::failed(RunResult::ExecFailed, why)),
            End::Killed => Err(Stop::Run(RunResult::Killed)),
            End::TimedOut => Err(Stop::Run(RunResult::Timeout)),
        }
    }

    /// The environment of a command.
    fn variables(&self) -> Result<Vec<(String, String)>, Stop> {
        let own = &self.role.environment;
        let mut variables = self.environment.clone();
        variables.retain(|(name, _)| !own.contains_key(name));
        for (name, variable) in own {
            let value = match variable {
                Variable::Text(text) => Ok(text.clone()),
                Variable::Credential(credential) => self.home.credentials.text(credential),
            };
            let value = value.map_err(|why| Stop::failed(RunResult::ExecFailed, why))?;
            variables.push((name.clone(), value));
        }
        Ok(variables)
    }

    /// Finds what the reply says of itself, or what is wrong with that.
    async fn check(
        &self,
        said: &mut Said,
        checker: &Checker,
        orders: &mut Orders,
    ) -> Result<(), Stop> {
        let Message { content, meta, .. } = &mut said.message;
        let mut read = reply::read(content, checker);
        if let (Err(Fault::Missing), Some(provider)) = (&read, &self.role.extract) {
            match self.extract(provider, content, checker, orders).await {
                Ok((extracted, cost)) => {
                    meta.insert("extraction".into(), cost.into());
                    match extracted {
                        Ok(reply) => read = Ok(reply),
                        Err(fault) => said::note(meta, &not_extracted(&fault)),
                    }
                }
                Err(Stop::Attempt(failed)) => said::note(meta, &not_extracted(&failed.why)),
                Err(stop) => return Err(stop),
            }
        }
        match read {
            Ok(mut reply) => {
                meta.remove("status");
                reply
                    .meta
                    .retain(|key, _| !RESERVED.contains(&key.as_str()));
                reply.meta.append(meta);
                (*content, *meta) = (reply.content, reply.meta);
            }
            Err(fault) => {
                said.correction = Some(Correction {
                    reply: content.clone(),
                    request: reply::correction(&fault),
                });
                said::note(meta, &format!("the reply cannot be used: {fault}"));
                said::fail(&mut said.message, &RunResult::BadReply);
            }
        }
        Ok(())
    }

    /// Has a provider make the meta of a reply, and says what that cost.
    async fn extract(
        &self,
        provider: &str,
        content: &str,
        checker: &Checker,
        orders: &mut Orders,
    ) -> Result<(Result<Reply, Fault>, Map<String, Value>), Stop> {
        // Another party than the one that the role's credentials are for.
        let shown = self.home.redactor.redact(content);
        let call = self.call(provider, None, reply::extraction(checker, &shown))?;
        let answer = self.ask(&call, orders).await?;
        let read = reply::read(&answer.content, checker).map(|read| Reply {
            content: content.to_owned(),
            meta: read.meta,
        });
        Ok((read, cost(answer)))
    }
}

fn not_extracted(why: &dyn std::fmt::Display) -> String {
    format!("its meta could not be extracted: {why}")
}

/// What a call took, as far as the server says.
fn cost(answer: Answer) -> Map<String, Value> {
    let usage = answer.usage.map(|usage| ("usage", usage.into()));
    let model = answer.model.map(|model| ("model", model.into()));
    let found = usage.into_iter().chain(model);
    found
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

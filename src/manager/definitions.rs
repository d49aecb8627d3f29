//! What is on disk: definitions and the engine's settings, read at start, on request and when something changed. Made by
//! the composition root; the driver hears of what is different ([`Input::Definitions`]), nobody of what is not.
//!
//! A definition is in the store before it is in force. A broken file leaves the last good one in force, and so does a
//! store that is full.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::handle::{Gone, Handle};
use crate::config::definition;
use crate::config::diagnostic::{Diagnostic, Severity};
use crate::config::directory::{self, File, Trust};
use crate::config::settings;
use crate::engine::{Input, Known};
use crate::model::audit::{Audit, Verb};
use crate::model::name::WorkflowName;
use crate::model::retention::Policy;
use crate::model::run::Caller;
use crate::model::tools::Tools;
use crate::model::workflow::Definition;
use crate::os::clock;
use crate::os::watch::Watch;
use crate::store::{self, Store};

/// Who changes a file often changes several: changes are taken together when nothing more came for so long…
const QUIET: Duration = Duration::from_millis(200);
/// …or when the first of them is so old.
const PATIENCE: Duration = Duration::from_secs(2);
/// So many may wait for a reload at a time.
const REQUESTS: usize = 64;

/// Where each workflow's file is.
pub type Files = BTreeMap<WorkflowName, PathBuf>;
type Request = oneshot::Sender<Vec<String>>;

/// The places that are read.
#[derive(Debug, Clone)]
pub struct Places {
    /// Definitions: the first directory that has a name wins.
    pub workflows: Vec<PathBuf>,
    /// The engine's settings.
    pub settings: settings::Places,
    /// Whose files are taken.
    pub trust: Trust,
}

impl Places {
    fn read(&self) -> (directory::Loaded, settings::Loaded) {
        (
            directory::load(&self.workflows, self.trust),
            settings::load(&self.settings, self.trust),
        )
    }

    /// Watches them; without a watch changes are taken on request only.
    fn watch(&self) -> Option<Watch> {
        let settings::Places { vendor, file } = &self.settings;
        let drop_ins = settings::drop_ins(file);
        let workflows = self.workflows.iter().map(PathBuf::as_path);
        let settings = file.parent().into_iter().chain([&*drop_ins, vendor]);
        match Watch::new(workflows.chain(settings)) {
            Ok(watch) => Some(watch),
            Err(error) => {
                tracing::warn!(%error, "failed to watch the definitions; after a change run `systemctl reload nerve`");
                None
            }
        }
    }
}

/// What is in force.
#[derive(Debug, Clone, Default)]
pub struct InForce {
    /// All workflows that have a file.
    pub workflows: BTreeMap<WorkflowName, Known>,
    /// Most runs at a time over all workflows.
    pub max_active: Option<u32>,
    /// Of runs whose workflow does not say.
    max_rounds: Option<u32>,
    tools: Arc<Tools>,
    files: Files,
    policy: Policy,
    /// All that is wrong with the files, in their order.
    diagnostics: Vec<Diagnostic>,
}

impl InForce {
    /// Whether the driver would see no difference.
    fn is_same(&self, other: &Self) -> bool {
        let of_known = |known: &Known| {
            let definition = known.definition.as_ref();
            let identity = definition.map(|definition| {
                let workflow = &definition.workflow;
                let of_settings = (workflow.max_rounds, workflow.worker.digest());
                (definition.digest.clone(), of_settings)
            });
            (identity, known.fault.clone())
        };
        let is_same = |((name, known), (other_name, other)): ((_, &Known), (_, &Known))| {
            name == other_name && of_known(known) == of_known(other)
        };
        self.max_active == other.max_active
            && self.workflows.len() == other.workflows.len()
            && self.workflows.iter().zip(&other.workflows).all(is_same)
    }

    /// A definition with what the engine's settings say of it where it is silent.
    fn completed(&self, mut definition: Definition) -> Definition {
        let workflow = &mut definition.workflow;
        workflow.max_rounds = workflow.max_rounds.or(self.max_rounds);
        let tools = self.tools.of(workflow);
        let credentials = tools.credentials().cloned();
        workflow.worker.credentials.extend(credentials);
        definition
    }

    /// A definition that the store has. One that this version cannot read any more is said so, and is not there.
    ///
    /// # Errors
    /// When the database cannot be read, or has none of this digest.
    pub fn stored(
        &self,
        store: &Store,
        digest: &str,
    ) -> Result<Option<Arc<Definition>>, store::Error> {
        let parsed = definition::parse(digest, None, &store.definition(digest)?);
        if parsed.definition.is_none() {
            for diagnostic in &parsed.diagnostics {
                tracing::error!("a stored definition cannot be used: {diagnostic}");
            }
        }
        let definition = parsed.definition;
        Ok(definition.map(|definition| Arc::new(self.completed(definition))))
    }

    /// Logs what is wrong and was not before.
    fn log(&self, before: &Self) {
        let known: HashSet<String> = before.diagnostics.iter().map(ToString::to_string).collect();
        for diagnostic in &self.diagnostics {
            if known.contains(&diagnostic.to_string()) {
                continue;
            }
            match diagnostic.severity {
                Severity::Error => tracing::error!("{diagnostic}"),
                Severity::Warning => tracing::warn!("{diagnostic}"),
            }
        }
    }
}

/// A cheap way to what is on disk.
#[derive(Debug, Clone)]
pub struct Definitions {
    requests: mpsc::Sender<Request>,
    files: watch::Receiver<Arc<Files>>,
    policy: watch::Receiver<Arc<Policy>>,
    tools: watch::Receiver<Arc<Tools>>,
}

impl Definitions {
    /// Has everything read again; returns when what is on disk now is in force. What comes back are the errors of all
    /// files, `PATH:LINE:COLUMN: error: …` each.
    pub async fn reload(&self) -> Vec<String> {
        let (reply, answer) = oneshot::channel();
        // When the answer does not come nerved is going down, and then nothing is in force.
        let _ = self.requests.send(reply).await;
        answer.await.unwrap_or_else(|_| vec![Gone.to_string()])
    }

    /// Where each workflow's file is.
    #[must_use]
    pub fn files(&self) -> Arc<Files> {
        Arc::clone(&self.files.borrow())
    }

    /// What roles may use, as it is now and as it changes.
    #[must_use]
    pub fn tools(&self) -> watch::Receiver<Arc<Tools>> {
        self.tools.clone()
    }

    /// What is kept of which workflow.
    #[must_use]
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.borrow())
    }
}

/// The entry for a reload; who sends a signal nobody knows.
#[must_use]
pub fn reloaded(by: Option<Caller>) -> Audit {
    Audit {
        verb: Verb::Reload,
        subject: Audit::NERVE.to_owned(),
        by,
        reason: None,
        outcome: Audit::DONE.to_owned(),
        at: clock::wall_us(),
    }
}

/// The one task that reads what is on disk.
#[derive(Debug)]
pub struct Keeper {
    places: Places,
    watch: Option<Watch>,
    in_force: InForce,
    requests: mpsc::Receiver<Request>,
    files: watch::Sender<Arc<Files>>,
    policy: watch::Sender<Arc<Policy>>,
    tools: watch::Sender<Arc<Tools>>,
}

impl Keeper {
    /// Reads everything for the first time. Needs a runtime to watch by.
    ///
    /// # Errors
    /// When the store fails, other than by being full.
    pub fn load(places: Places, store: &mut Store) -> Result<(Self, Definitions), store::Error> {
        // Listen first, then read, so that no change falls between.
        let watch = places.watch();
        let nothing = InForce::default();
        let in_force = take(store, places.read(), &nothing)?;
        in_force.log(&nothing);
        let (sender, requests) = mpsc::channel(REQUESTS);
        let (files, receiver) = watch::channel(Arc::new(in_force.files.clone()));
        let (policy, policy_receiver) = watch::channel(Arc::new(in_force.policy.clone()));
        let (tools, tools_receiver) = watch::channel(Arc::clone(&in_force.tools));
        let keeper = Self {
            places,
            watch,
            in_force,
            requests,
            files,
            policy,
            tools,
        };
        let definitions = Definitions {
            requests: sender,
            files: receiver,
            policy: policy_receiver,
            tools: tools_receiver,
        };
        Ok((keeper, definitions))
    }

    /// What the driver begins with.
    #[must_use]
    pub fn in_force(&self) -> &InForce {
        &self.in_force
    }

    /// Keeps what is in force as it is on disk, until the last [`Definitions`] is gone.
    pub async fn run(mut self, handle: Handle, store: store::Handle) {
        loop {
            let mut waiting = Vec::new();
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => waiting.push(request),
                    None => return,
                },
                () = change(&mut self.watch) => waiting.extend(self.settle().await),
            }
            while let Ok(request) = self.requests.try_recv() {
                waiting.push(request);
            }
            // What is watched may have been replaced. Again listen first, then read.
            self.watch = self.places.watch();
            let errors = match self.reload(&handle, &store).await {
                Ok(()) => self.errors(),
                Err(error) => {
                    tracing::error!(%error, "failed to store the definitions: those in force stay");
                    vec![format!("the definitions cannot be stored: {error}")]
                }
            };
            for request in waiting {
                // Who went away does not want to know.
                let _ = request.send(errors.clone());
            }
        }
    }

    /// Waits until nothing more changes, but not for ever, nor while somebody else waits.
    async fn settle(&mut self) -> Option<Request> {
        let latest = Instant::now() + PATIENCE;
        loop {
            let quiet = Instant::now() + QUIET;
            tokio::select! {
                biased;
                request = self.requests.recv() => return request,
                () = sleep_until(quiet.min(latest)) => return None,
                () = change(&mut self.watch) => {}
            }
        }
    }

    async fn reload(&mut self, handle: &Handle, store: &store::Handle) -> Result<(), store::Error> {
        let places = self.places.clone();
        let read = tokio::task::spawn_blocking(move || places.read())
            .await
            .expect("reading definitions never panics");
        let before = self.in_force.clone();
        let after = store.call(move |store| take(store, read, &before)).await?;
        after.log(&self.in_force);
        let before = std::mem::replace(&mut self.in_force, after);
        if before.files != self.in_force.files {
            self.files
                .send_replace(Arc::new(self.in_force.files.clone()));
        }
        if before.policy != self.in_force.policy {
            self.policy
                .send_replace(Arc::new(self.in_force.policy.clone()));
        }
        // Before the workflows that may need them.
        if before.tools != self.in_force.tools {
            self.tools.send_replace(Arc::clone(&self.in_force.tools));
        }
        if self.in_force.is_same(&before) {
            return Ok(());
        }
        let workflows = self.in_force.workflows.clone();
        tracing::info!(workflows = workflows.len(), "took new definitions");
        let input = Input::Definitions {
            workflows,
            max_active: self.in_force.max_active,
        };
        handle.report(input).await;
        // It is answered after the turn that took them. A driver that is gone takes nothing.
        let _ = handle.overview().await;
        Ok(())
    }

    fn errors(&self) -> Vec<String> {
        errors(&self.in_force.diagnostics).collect()
    }
}

/// Returns when something changed.
async fn change(watch: &mut Option<Watch>) {
    if let Some(listening) = watch {
        match listening.changed().await {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(%error, "failed to hear of changed definitions");
                *watch = None;
            }
        }
    }
    std::future::pending().await
}

fn errors(diagnostics: &[Diagnostic]) -> impl Iterator<Item = String> {
    diagnostics
        .iter()
        .filter(|found| found.severity == Severity::Error)
        .map(ToString::to_string)
}

/// What the files add up to, after what was in force `before`. Good definitions are stored.
fn take(
    store: &mut Store,
    (loaded, settings): (directory::Loaded, settings::Loaded),
    before: &InForce,
) -> Result<InForce, store::Error> {
    let engine = settings.settings;
    let mut after = InForce {
        max_active: engine.max_active,
        max_rounds: engine.max_rounds,
        tools: Arc::new(engine.tools),
        policy: Policy {
            compressed: engine.compressed.unwrap_or(false),
            retention: engine.retention,
            of_workflows: BTreeMap::new(),
        },
        diagnostics: settings.diagnostics,
        ..InForce::default()
    };
    after.diagnostics.extend(loaded.diagnostics);
    for (name, mut file) in loaded.definitions {
        let last = before
            .workflows
            .get(&name)
            .and_then(|known| known.definition.clone());
        let definition = keep(store, &mut file, &after, last.as_ref())?;
        let known = match definition {
            Some(definition) => Known {
                definition: Some(definition),
                fault: None,
            },
            None => Known {
                definition: last_good(store, &name, &after)?,
                fault: Some(
                    errors(&file.parsed.diagnostics)
                        .collect::<Vec<_>>()
                        .join("\n"),
                ),
            },
        };
        if let Some(definition) = &known.definition {
            let of_workflows = &mut after.policy.of_workflows;
            of_workflows.insert(name.to_string(), definition.workflow.retention);
        }
        after.diagnostics.extend(file.parsed.diagnostics);
        after.files.insert(name.clone(), file.path);
        after.workflows.insert(name, known);
    }
    Ok(after)
}

/// The file's definition, once the store has it. `None` when something is wrong; that is among the file's diagnostics.
fn keep(
    store: &mut Store,
    file: &mut File,
    in_force: &InForce,
    last: Option<&Arc<Definition>>,
) -> Result<Option<Arc<Definition>>, store::Error> {
    let Some(definition) = file.parsed.definition.take() else {
        return Ok(None);
    };
    let definition = in_force.completed(definition);
    if let Some(last) = last.filter(|last| ***last == definition) {
        return Ok(Some(Arc::clone(last)));
    }
    match store.put_definition(&definition, &file.bytes) {
        Ok(()) => Ok(Some(Arc::new(definition))),
        Err(error) if error.is_full() => {
            file.parsed.diagnostics.push(Diagnostic {
                severity: Severity::Error,
                path: file.path.display().to_string(),
                line: 1,
                column: 1,
                end_column: 2,
                message: "no space is left for the database to keep this definition".to_owned(),
                count: 1,
                help: Some("make room, then run `systemctl reload nerve`".to_owned()),
            });
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The definition that was in force when the workflow last had a good one.
fn last_good(
    store: &Store,
    workflow: &WorkflowName,
    in_force: &InForce,
) -> Result<Option<Arc<Definition>>, store::Error> {
    let digest = store.last_definition(workflow)?;
    let definition = digest.map(|digest| in_force.stored(store, &digest));
    Ok(definition.transpose()?.flatten())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::super::handle::{Event, Overview};
    use super::*;
    use crate::model::role::Work;

    /// A machine with definitions, and a driver that only listens.
    struct World {
        root: tempfile::TempDir,
        store: store::Handle,
        definitions: Definitions,
        inbox: mpsc::Receiver<Event>,
    }

    type Told = (BTreeMap<WorkflowName, Known>, Option<u32>);

    fn places(root: &Path) -> Places {
        Places {
            workflows: vec![root.join("etc/workflows"), root.join("lib")],
            settings: settings::Places {
                vendor: root.join("usr/nerve.yaml.d"),
                file: root.join("etc/nerve.yaml"),
            },
            trust: Trust::Anyone,
        }
    }

    fn text(name: &str, program: &str) -> String {
        format!(
            "version: 1\nname: {name}\nroles: {{r: {{exec: [{program}]}}}}\ngraph: {{$START: r, r: {{ok: $END}}}}\n"
        )
    }

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn program(known: &Known) -> &str {
        let workflow = &known.definition.as_ref().unwrap().workflow;
        match &workflow.roles[&"r".parse().unwrap()].work {
            Work::Exec(argv) => &argv[0],
            work => panic!("{work:?}"),
        }
    }

    fn name(text: &str) -> WorkflowName {
        text.parse().unwrap()
    }

    /// What a nerved that starts now finds.
    fn load(root: &Path) -> (Keeper, Definitions, Store) {
        let mut store = Store::open(root).unwrap();
        let (keeper, definitions) = Keeper::load(places(root), &mut store).unwrap();
        (keeper, definitions, store)
    }

    impl World {
        /// Starts with these files.
        fn start(files: &[(&str, &str)]) -> Self {
            let root = tempfile::tempdir().unwrap();
            for (file, text) in files {
                write(root.path(), file, text);
            }
            let (keeper, definitions, store) = load(root.path());
            let store = store::Handle::spawn(store).unwrap();
            let (sender, inbox) = mpsc::channel(16);
            tokio::spawn(keeper.run(Handle::new(sender), store.clone()));
            Self {
                root,
                store,
                definitions,
                inbox,
            }
        }

        fn write(&self, file: &str, text: &str) {
            write(self.root.path(), file, text);
        }

        /// Takes what the driver is sent next, as a turn does.
        async fn turn(inbox: &mut mpsc::Receiver<Event>) -> Option<Told> {
            match inbox.recv().await.unwrap() {
                Event::Input(Input::Definitions {
                    workflows,
                    max_active,
                }) => Some((workflows, max_active)),
                Event::Overview(reply) => {
                    let nothing = Overview {
                        running: 0,
                        queued: 0,
                        max_active: None,
                        pause: None,
                        scarcity: None,
                        workflows: vec![],
                    };
                    reply.send(nothing).unwrap();
                    None
                }
                other => panic!("{other:?}"),
            }
        }

        /// Reloads: the errors, and what the driver was told.
        async fn reload(&mut self) -> (Vec<String>, Option<Told>) {
            let mut told = None;
            let mut reload = std::pin::pin!(self.definitions.reload());
            loop {
                tokio::select! {
                    biased;
                    sent = Self::turn(&mut self.inbox) => told = sent.or(told),
                    errors = &mut reload => return (errors, told),
                }
            }
        }

        /// What the driver is told without being asked.
        async fn told(&mut self) -> Told {
            loop {
                if let Some(told) = Self::turn(&mut self.inbox).await {
                    return told;
                }
            }
        }
    }

    #[tokio::test]
    async fn a_reload_takes_what_came_changed_and_went() {
        let mut world = World::start(&[
            ("lib/a.yaml", &text("a", "old")),
            ("lib/b.yaml", &text("b", "b")),
        ]);
        world.write("etc/workflows/a.yaml", &text("a", "new"));
        world.write("etc/workflows/c.yaml", &text("c", "c"));
        world.write("etc/nerve.yaml", "max_active: 9\n");
        fs::remove_file(world.root.path().join("lib/b.yaml")).unwrap();
        let (errors, told) = world.reload().await;
        let (workflows, max_active) = told.unwrap();
        assert_eq!(errors, [""; 0]);
        assert_eq!(max_active, Some(9));
        assert!(workflows.keys().eq(&[name("a"), name("c")]));
        assert_eq!(program(&workflows[&name("a")]), "new");
        let etc = world.root.path().join("etc/workflows");
        let files = [
            (name("a"), etc.join("a.yaml")),
            (name("c"), etc.join("c.yaml")),
        ];
        assert_eq!(*world.definitions.files(), Files::from(files));
        // In the store before it is in force.
        let digest = workflows[&name("a")].definition.as_ref().unwrap();
        let last = world.store.call(|store| store.last_definition(&name("a")));
        assert_eq!(last.await.unwrap().as_ref(), Some(&digest.digest));
    }

    #[tokio::test]
    async fn a_reload_of_nothing_new_tells_the_driver_nothing() {
        let mut world = World::start(&[
            ("lib/a.yaml", &text("a", "x")),
            ("lib/b.yaml", "broken"),
            ("etc/nerve.yaml", "max_active: 3\n"),
        ]);
        // Written again with the same text, and one that was hidden anyway.
        world.write("lib/a.yaml", &text("a", "x"));
        world.write("etc/workflows/.hidden.yaml", "x");
        let (errors, told) = world.reload().await;
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(told.is_none());
        // The same bytes in another place: the driver does not care where a file is, but people do.
        world.write("etc/workflows/a.yaml", &text("a", "x"));
        assert!(world.reload().await.1.is_none());
        let path = world.root.path().join("etc/workflows/a.yaml");
        assert_eq!(world.definitions.files()[&name("a")], path);
    }

    #[tokio::test]
    async fn a_broken_file_leaves_the_last_good_one_in_force() {
        let mut world = World::start(&[("lib/a.yaml", &text("a", "good"))]);
        world.write("lib/a.yaml", "version: 1\nname: a\n");
        world.write("lib/never.yaml", "version: 1\nname: never\n");
        let (errors, told) = world.reload().await;
        let (workflows, _) = told.unwrap();
        assert_eq!(
            errors.len(),
            4,
            "two files without roles and graph: {errors:?}"
        );
        assert!(errors[0].contains("lib/a.yaml:1:1: error: "), "{errors:?}");
        assert_eq!(program(&workflows[&name("a")]), "good");
        let fault = workflows[&name("a")].fault.as_ref().unwrap();
        assert_eq!(fault.lines().collect::<Vec<_>>(), errors[..2]);
        assert!(workflows[&name("never")].definition.is_none());

        world.write("lib/a.yaml", &text("a", "better"));
        let (workflows, _) = world.reload().await.1.unwrap();
        assert_eq!(program(&workflows[&name("a")]), "better");
        assert_eq!(workflows[&name("a")].fault, None);
    }

    #[tokio::test]
    async fn the_last_good_one_outlives_restarts() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "lib/a.yaml", &text("a", "good"));
        drop(load(root.path()));
        for _ in 0..2 {
            write(root.path(), "lib/a.yaml", "broken");
            let (keeper, ..) = load(root.path());
            let known = &keeper.in_force().workflows[&name("a")];
            assert_eq!(program(known), "good");
            assert!(known.fault.as_ref().unwrap().contains("a.yaml:1:1: error"));
        }
    }

    #[tokio::test]
    async fn settings_with_an_error_say_nothing_and_are_told() {
        let mut world = World::start(&[("etc/nerve.yaml", "max_active: 3\n")]);
        world.write("etc/nerve.yaml.d/a.yaml", "max_active: 5\n");
        world.write("etc/nerve.yaml.d/b.yaml", "max_active: none\n");
        let (errors, told) = world.reload().await;
        assert_eq!(told.unwrap().1, Some(5));
        assert_eq!(errors.len(), 1);
        assert!(
            errors[0].contains("b.yaml:1:13: error: max_active"),
            "{errors:?}"
        );
    }

    #[tokio::test]
    async fn changes_are_noticed_and_taken_together() {
        let mut world = World::start(&[("lib/a.yaml", &text("a", "old"))]);
        // Neither directory was there.
        world.write("etc/workflows/b.yaml", &text("b", "b"));
        world.write("etc/nerve.yaml", "max_active: 2\n");
        world.write("lib/a.yaml", &text("a", "new"));
        let (workflows, max_active) = world.told().await;
        assert!(workflows.keys().eq(&[name("a"), name("b")]));
        assert_eq!(program(&workflows[&name("a")]), "new");
        assert_eq!(max_active, Some(2));
        // And the directory that is new is watched from now on.
        world.write("etc/workflows/c.yaml", &text("c", "c"));
        let (workflows, _) = world.told().await;
        assert!(workflows.contains_key(&name("c")));
        assert!(world.reload().await.1.is_none());
    }

    #[tokio::test]
    async fn all_who_wait_for_a_reload_are_answered() {
        let mut world = World::start(&[("lib/a.yaml", "broken")]);
        let definitions = world.definitions.clone();
        let (one, two, _) =
            tokio::join!(definitions.reload(), definitions.reload(), world.reload());
        assert_eq!(one.len(), 1);
        assert_eq!(one, two);
    }

    #[tokio::test]
    async fn a_reload_of_a_nerved_that_goes_down_says_so() {
        let root = tempfile::tempdir().unwrap();
        let (keeper, definitions, _store) = load(root.path());
        let (errors, ()) = tokio::join!(definitions.reload(), async { drop(keeper) });
        assert_eq!(errors, [Gone.to_string()]);
        assert_eq!(definitions.reload().await, [Gone.to_string()]);
    }
}

//! What a worker lives in: its cgroup, its state directory, what its roles inherit, its way to the journal.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::redact::Redactor;
use crate::model::name::{RoleName, RunId, WorkflowName};
use crate::os::cgroup::{self, Cgroup};
use crate::os::journal::Journal;
use crate::os::process;

/// What systemd gave this worker.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) workflow: WorkflowName,
    /// The unit's cgroup.
    pub(super) cgroup: Cgroup,
    /// `$STATE_DIRECTORY`.
    pub(super) state: PathBuf,
    /// What every role gets.
    pub(super) environment: Vec<(String, String)>,
    /// What a role without a prompt reads.
    pub(super) nothing: OwnedFd,
    pub(super) credentials: Credentials,
    /// Knows them.
    pub(super) redactor: Redactor,
    journal: Journal,
}

/// The credentials of the unit, which do not change while it runs.
#[derive(Default)]
pub(super) struct Credentials {
    folder: PathBuf,
    values: BTreeMap<String, Vec<u8>>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl Credentials {
    fn read(folder: &Path) -> io::Result<Self> {
        let mut values = BTreeMap::new();
        for entry in std::fs::read_dir(folder)? {
            let (name, path) = entry.map(|entry| (entry.file_name(), entry.path()))?;
            if let Some(name) = name.into_string().ok().filter(|_| path.is_file()) {
                values.insert(name, std::fs::read(path)?);
            }
        }
        let folder = folder.to_owned();
        Ok(Self { folder, values })
    }

    /// Where it is.
    ///
    /// # Errors
    /// It is nowhere.
    pub(super) fn file(&self, name: &str) -> Result<PathBuf, String> {
        self.value(name).map(|_| self.folder.join(name))
    }

    /// What it holds, for an environment: without newlines at the end.
    ///
    /// # Errors
    /// It is nowhere, or no text.
    pub(super) fn text(&self, name: &str) -> Result<String, String> {
        let text = std::str::from_utf8(self.value(name)?).ok();
        let text = text.filter(|text| !text.contains('\0'));
        let text = text.ok_or_else(|| format!("the credential {name} is no text"))?;
        Ok(text.trim_end_matches('\n').to_owned())
    }

    fn value(&self, name: &str) -> Result<&Vec<u8>, String> {
        self.values.get(name).ok_or_else(|| {
            format!(
                "this worker has no credential {name}: put it into /etc/credstore/{name}, mode 0600, and drain the \
                 workflow, if it is installed, so that a new worker reads it; `nervectl workflow try` as a user reads \
                 the file {name} in $CREDENTIALS_DIRECTORY"
            )
        })
    }
}

/// What systemd tells a service about itself; a role is none.
const NOT_FOR_ROLES: [&str; 19] = [
    "CREDENTIALS_DIRECTORY",
    "FDSTORE",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "MAINPID",
    "MANAGERPID",
    "MEMORY_PRESSURE_WATCH",
    "MEMORY_PRESSURE_WRITE",
    "NERVE_SOCKET",
    "NERVE_LOG",
    "NERVE_WORKER_SETTINGS",
    "NOTIFY_SOCKET",
    "STATE_DIRECTORY",
    "SYSTEMD_EXEC_PID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// Moves into the leaf `main/` of the unit's cgroup, so that there may be cgroups beside it; the unit's cgroup.
pub(super) fn enter_main() -> io::Result<Cgroup> {
    let cgroup = Cgroup::at(&cgroup::of_process(std::process::id())?);
    let main = cgroup.child("main");
    main.create()?;
    main.adopt(std::process::id())?;
    Ok(cgroup)
}

impl Home {
    /// Takes stock of what systemd gave, and moves into the leaf `main/` so that there may be cgroups beside it.
    pub(super) fn move_in(workflow: WorkflowName) -> io::Result<Self> {
        let cgroup = enter_main()?;
        cgroup.delegate(&["memory", "pids", "cpu", "io"]);
        let state = std::env::var_os("STATE_DIRECTORY")
            .map(PathBuf::from)
            .ok_or_else(|| {
                io::Error::other(
                    "STATE_DIRECTORY is not set: nerve-worker is started by nerved, not by hand",
                )
            })?;
        for folder in ["runs", "threads"] {
            std::fs::create_dir_all(state.join(folder))?;
        }
        let mut environment = process::environment();
        environment.retain(|(name, _)| !NOT_FOR_ROLES.contains(&name.as_str()));
        // A dynamic user has no home, nor has many a static one; systemd then says "/" or nothing.
        environment.retain(|(name, value)| name != "HOME" || value != "/");
        if !environment.iter().any(|(name, _)| name == "HOME") {
            environment.push(("HOME".to_owned(), state.display().to_string()));
        }
        let credentials = match std::env::var_os("CREDENTIALS_DIRECTORY") {
            Some(folder) => Credentials::read(Path::new(&folder))?,
            None => Credentials::default(),
        };
        Ok(Self {
            redactor: Redactor::new(credentials.values.values()),
            credentials,
            workflow,
            cgroup,
            state,
            environment,
            nothing: std::fs::File::open("/dev/null")?.into(),
            journal: Journal::open()?,
        })
    }

    /// Removes what runs that this worker never finished left behind: it has none, and no other worker lives here.
    pub(super) fn clear(&self) {
        for folder in ["runs", "threads"] {
            if let Err(error) = std::fs::remove_dir_all(self.state.join(folder)) {
                tracing::warn!(folder, %error, "failed to clear up");
            }
        }
    }

    /// Sends one line of a role to the journal; whether that took it in time.
    pub(super) async fn log(
        &self,
        run: RunId,
        role: &RoleName,
        round: u32,
        priority: &[u8],
        line: &[u8],
    ) -> bool {
        let (run, round) = (run.to_string(), round.to_string());
        let fields: [(&str, &[u8]); 7] = [
            ("MESSAGE", line),
            ("PRIORITY", priority),
            ("SYSLOG_IDENTIFIER", role.as_str().as_bytes()),
            ("NERVE_WORKFLOW", self.workflow.as_str().as_bytes()),
            ("NERVE_RUN_ID", run.as_bytes()),
            ("NERVE_ROLE", role.as_str().as_bytes()),
            ("NERVE_ROUND", round.as_bytes()),
        ];
        // A journal that is away must hold up nobody; the round keeps the tail.
        let sent = self.journal.send(&fields).await;
        !sent.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
    }
}

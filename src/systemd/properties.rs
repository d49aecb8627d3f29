//! The properties of a worker unit: the one place that names them.
//!
//! They are few, and each survives the lossy copy that PID 1 re-reads at a daemon-reload. What never varies is in the
//! shipped drop-in `nerve-wf@.service.d/10-nerve.conf`, which beats these; so nothing that a definition may set is
//! there.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use zbus::wire::Variant;

use crate::model::hex::hex;
use crate::model::limits;
use crate::model::name::WorkflowName;
use crate::model::workflow::{Limit, WorkerSettings};

/// Longest user name that systemd takes for a dynamic user.
const USER_NAME_BYTES: usize = 31;

/// A worker unit that is to be made.
#[derive(Debug)]
pub struct WorkerUnit<'a> {
    /// Whose worker it is.
    pub workflow: &'a WorkflowName,
    /// `nerve-worker`'s path.
    pub executable: &'a Path,
    /// Where nerved listens for workers.
    pub socket: &'a Path,
}

impl WorkerUnit<'_> {
    /// All that systemd is told about it.
    pub(super) fn properties(
        &self,
        settings: &WorkerSettings,
    ) -> Vec<(&'static str, Variant<'static>)> {
        let name = self.workflow.as_str();
        let executable = self.executable.display().to_string();
        let exec = vec![(executable.clone(), vec![executable, name.to_owned()], false)];
        let (limit_interval, limit_burst) = settings.start_limit();
        let mut environment = settings.environment.clone();
        // systemd refuses a variable that is set twice.
        if !environment
            .iter()
            .any(|variable| variable.starts_with("LANG="))
        {
            environment.push("LANG=C.UTF-8".to_owned());
        }
        environment.push(format!("NERVE_SOCKET={}", self.socket.display()));
        environment.push(format!("NERVE_WORKFLOW={name}"));
        // A later nerved tells by it whether the worker still has the settings it should have.
        environment.push(format!("NERVE_WORKER_SETTINGS={}", settings.digest()));
        // It does what it does in its own time, and need not know sd_notify(3).
        let mut watchdog = limits::WORKER_WATCHDOG;
        if !settings.exec.is_empty() {
            let argv = Value::from(settings.exec.clone());
            environment.push(format!("NERVE_WORKER_EXEC={argv}"));
            watchdog = Duration::ZERO;
        }
        environment.extend(std::env::var("NERVE_LOG").map(|level| format!("NERVE_LOG={level}")));
        let mut properties: Vec<(&'static str, Variant<'static>)> = vec![
            ("Description", format!("nerve worker of {name}").into()),
            ("Documentation", vec!["man:nerve-workflow(5)"].into()),
            ("Slice", "nerve-wf.slice".into()),
            ("After", vec!["nerve.service"].into()),
            ("CollectMode", "inactive".into()),
            ("Type", "notify".into()),
            ("NotifyAccess", "main".into()),
            ("ExecStart", exec.into()),
            ("Environment", environment.into()),
            ("Restart", "always".into()),
            ("RestartUSec", micros(Duration::from_millis(100))),
            (
                "RestartPreventExitStatus",
                (vec![0_i32], Vec::<i32>::new()).into(),
            ),
            ("StartLimitIntervalUSec", micros(limit_interval)),
            ("StartLimitBurst", limit_burst.into()),
            ("TimeoutStartUSec", micros(Duration::from_secs(30))),
            ("TimeoutStopUSec", micros(Duration::from_secs(10))),
            ("WatchdogUSec", micros(watchdog)),
            ("KillMode", "mixed".into()),
            ("Delegate", true.into()),
            ("OOMPolicy", "continue".into()),
            ("StateDirectory", vec![format!("nerve-wf/{name}")].into()),
            ("StateDirectoryMode", 0o700_u32.into()),
            ("StandardError", "journal".into()),
            ("SyslogIdentifier", "nerve-worker".into()),
            (
                "LogExtraFields",
                vec![format!("NERVE_WORKFLOW={name}").into_bytes()].into(),
            ),
            // 0 would mean the default, which drops.
            ("LogRateLimitBurst", 1_000_000_u32.into()),
        ];
        properties.extend(identity(self.workflow, settings));
        properties.extend(credentials(settings, is_encrypted));
        properties.extend(resources(settings));
        properties
    }
}

fn micros(duration: Duration) -> Variant<'static> {
    u64::try_from(duration.as_micros())
        .unwrap_or(u64::MAX)
        .into()
}

fn identity(
    workflow: &WorkflowName,
    settings: &WorkerSettings,
) -> Vec<(&'static str, Variant<'static>)> {
    let user = settings
        .user
        .clone()
        .unwrap_or_else(|| dynamic_user(workflow));
    let mut properties: Vec<(&'static str, Variant<'static>)> = vec![
        ("User", user.into()),
        ("DynamicUser", settings.user.is_none().into()),
    ];
    if let Some(group) = &settings.group {
        properties.push(("Group", group.clone().into()));
    }
    if !settings.supplementary_groups.is_empty() {
        properties.push((
            "SupplementaryGroups",
            settings.supplementary_groups.clone().into(),
        ));
    }
    properties
}

/// Without a name of its own a dynamic user is named after what is before the `@`, and all workers would share it.
fn dynamic_user(workflow: &WorkflowName) -> String {
    let name = format!("nw-{workflow}");
    if name.len() <= USER_NAME_BYTES {
        return name;
    }
    let digest = Sha256::digest(workflow.as_str());
    format!("nw-{}", hex(&digest[..10]))
}

/// Each is looked for in systemd's credential stores; a worker starts without one that is not there, and its roles say so.
fn credentials(
    settings: &WorkerSettings,
    is_encrypted: impl Fn(&str) -> bool,
) -> Vec<(&'static str, Variant<'static>)> {
    let (encrypted, plain): (Vec<_>, Vec<_>) = settings
        .credentials
        .iter()
        .map(|name| (name.clone(), name.clone()))
        .partition(|(name, _)| is_encrypted(name));
    let lists = [
        ("LoadCredential", plain),
        ("LoadCredentialEncrypted", encrypted),
    ];
    let used = lists.into_iter().filter(|(_, list)| !list.is_empty());
    used.map(|(property, list)| (property, list.into()))
        .collect()
}

/// Whether an encrypted store has it; systemd has to be told.
fn is_encrypted(name: &str) -> bool {
    ["/etc", "/run", "/usr/local/lib", "/usr/lib"]
        .iter()
        .any(|root| {
            Path::new(root)
                .join("credstore.encrypted")
                .join(name)
                .exists()
        })
}

fn resources(settings: &WorkerSettings) -> Vec<(&'static str, Variant<'static>)> {
    let mut properties: Vec<(&'static str, Variant<'static>)> = Vec::new();
    let mut limit = |absolute: &'static str, scale: &'static str, limit: Option<Limit>| match limit
    {
        Some(Limit::Absolute(number)) => properties.push((absolute, number.into())),
        Some(Limit::Permyriad(share)) => {
            // A fraction of 2^32 - 1, as systemd has it; that itself it refuses for tasks.
            let fraction = u64::from(share) * u64::from(u32::MAX) / 10_000;
            let fraction = u32::try_from(fraction).unwrap_or(u32::MAX);
            properties.push((scale, fraction.min(u32::MAX - 1).into()));
        }
        None => {}
    };
    limit("MemoryMax", "MemoryMaxScale", settings.memory_max);
    limit("TasksMax", "TasksMaxScale", settings.tasks_max);
    if let Some(quota) = settings.cpu_quota {
        properties.push(("CPUQuotaPerSecUSec", micros(quota)));
    }
    if let Some(nice) = settings.nice {
        properties.push(("Nice", nice.into()));
    }
    if !settings.read_write_paths.is_empty() {
        properties.push(("ReadWritePaths", settings.read_write_paths.clone().into()));
    }
    if !settings.read_only_paths.is_empty() {
        properties.push(("ReadOnlyPaths", settings.read_only_paths.clone().into()));
    }
    if let Some(private) = settings.private_network {
        properties.push(("PrivateNetwork", private.into()));
    }
    properties
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workflow_has_a_user_of_its_own_that_systemd_takes() {
        assert_eq!(
            dynamic_user(&"check-host".parse().unwrap()),
            "nw-check-host"
        );
        let long: WorkflowName = "a".repeat(29).parse().unwrap();
        assert_eq!(dynamic_user(&long).len(), 23);
        let longest: WorkflowName = "a".repeat(28).parse().unwrap();
        assert_eq!(dynamic_user(&longest).len(), 31);
    }
    #[test]
    fn a_unit_has_the_crash_limit_and_the_digest_of_its_settings() {
        let settings = WorkerSettings {
            start_limit_interval: Some(Duration::from_secs(7)),
            start_limit_burst: Some(3),
            ..WorkerSettings::default()
        };
        let unit = WorkerUnit {
            workflow: &"w".parse().unwrap(),
            executable: Path::new("/nerve-worker"),
            socket: Path::new("/socket"),
        };
        let shown = |settings: &WorkerSettings, property: &str| {
            let properties = unit.properties(settings);
            let found = properties.into_iter().find(|(name, _)| *name == property);
            format!("{:?}", found.unwrap().1)
        };
        assert_eq!(
            shown(&settings, "StartLimitIntervalUSec"),
            format!("{:?}", micros(Duration::from_secs(7)))
        );
        assert_eq!(
            shown(&settings, "StartLimitBurst"),
            format!("{:?}", Variant::from(3_u32))
        );
        let own = WorkerSettings {
            exec: vec!["/own worker".to_owned(), "\"%i$x".to_owned()],
            ..WorkerSettings::default()
        };
        assert_eq!(
            shown(&own, "WatchdogUSec"),
            format!("{:?}", micros(Duration::ZERO))
        );
        assert!(shown(&own, "Environment").contains("NERVE_WORKER_EXEC=["));
        assert!(!shown(&settings, "Environment").contains("NERVE_WORKER_EXEC"));
        let variable = format!("NERVE_WORKER_SETTINGS={}", settings.digest());
        assert!(shown(&settings, "Environment").contains(&variable));
        assert!(!shown(&WorkerSettings::default(), "Environment").contains(&variable));
    }
}

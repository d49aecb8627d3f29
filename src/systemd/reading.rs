//! What systemd's properties say of a worker unit (org.freedesktop.systemd1(5)). Pure.

use std::collections::HashMap;

use zbus::wire::{OwnedObjectPath, OwnedVariant};

use super::lives::{Glimpse, Phase};
use crate::engine::{Stop, Unit, UnitState};
use crate::model::exit::Exit;
use crate::model::hex::hex;
use crate::model::worker::{Cause, Death};

/// Where systemd keeps the files of transient units.
const TRANSIENT: &str = "/run/systemd/transient/";
/// The variable in a worker's environment with the digest of its settings.
const SETTINGS: &str = "NERVE_WORKER_SETTINGS=";

/// Properties of a unit, or of its service, or of both.
pub(super) type Properties = HashMap<String, OwnedVariant>;

pub(super) fn get<T: TryFrom<OwnedVariant>>(properties: &Properties, name: &str) -> Option<T> {
    properties.get(name)?.clone().try_into().ok()
}

pub(super) fn text(properties: &Properties, name: &str) -> String {
    get(properties, name).unwrap_or_default()
}

pub(super) fn invocation(properties: &Properties) -> String {
    hex(&get::<Vec<u8>>(properties, "InvocationID").unwrap_or_default())
}

/// Id and path of the unit's job, if it has one.
pub(super) fn job(properties: &Properties) -> Option<(u32, OwnedObjectPath)> {
    get::<(u32, OwnedObjectPath)>(properties, "Job").filter(|(id, _)| *id != 0)
}

pub(super) fn glimpse(properties: &Properties) -> Glimpse {
    Glimpse {
        phase: phase(properties),
        job: job(properties).map_or(0, |(id, _)| id),
        invocation: invocation(properties),
    }
}

fn phase(properties: &Properties) -> Phase {
    Phase::of(
        &text(properties, "ActiveState"),
        &text(properties, "SubState"),
    )
}

/// Whether a unit like this is one that nerve made, or none at all. Others make transient units too.
pub(super) fn is_ours(properties: &Properties) -> bool {
    let file = text(properties, "FragmentPath");
    file.is_empty() && text(properties, "LoadState") != "masked"
        || file.starts_with(TRANSIENT) && settings(properties).is_some()
}

/// The digest of the settings that nerve made the unit with.
pub(super) fn settings(properties: &Properties) -> Option<String> {
    get::<Vec<String>>(properties, "Environment")
        .unwrap_or_default()
        .iter()
        .find_map(|variable| Some(variable.strip_prefix(SETTINGS)?.to_owned()))
}

/// A unit from all of its properties.
pub(super) fn unit(name: &str, properties: &Properties) -> Unit {
    if !is_ours(properties) {
        return foreign(obstacle(name, properties));
    }
    let phase = phase(properties);
    let state = match phase {
        Phase::Active => UnitState::Active,
        Phase::Stopping => UnitState::Stopping,
        Phase::Starting | Phase::Restarting => UnitState::Starting,
        // Between two starts a unit may look dead, but then it has a job.
        Phase::Failed | Phase::Dead if job(properties).is_some() => UnitState::Starting,
        // Only what would be started again can be given up.
        Phase::Failed if text(properties, "Restart") != "no" => UnitState::Failed,
        Phase::Failed | Phase::Dead => UnitState::Absent,
    };
    let how = exit(properties).map_or_else(|| "not started".to_owned(), |exit| exit.to_string());
    Unit {
        read: 0,
        state,
        invocation: invocation(properties),
        cgroup: text(properties, "ControlGroup"),
        // While it starts, what is known may still be the end of the invocation before.
        death: death(properties).filter(|_| !matches!(phase, Phase::Starting | Phase::Active)),
        stop: Stop::Nobody,
        settings: settings(properties),
        detail: format!("{name}: {} ({how})", text(properties, "Result")),
    }
}

/// What is not ours: looked at, never touched.
pub(super) fn foreign(detail: String) -> Unit {
    Unit {
        state: UnitState::Foreign,
        detail,
        ..Unit::absent(0)
    }
}

fn obstacle(name: &str, properties: &Properties) -> String {
    let file = text(properties, "FragmentPath");
    if text(properties, "LoadState") == "masked" {
        return obstacle_of_file(name, "masked", None);
    }
    if file.starts_with(TRANSIENT) {
        return format!(
            "somebody else made {name}, which nerve makes itself: systemctl stop {name}"
        );
    }
    if file.contains("/generator") {
        return obstacle_of_file(name, "generated", None);
    }
    let stop = match phase(properties) {
        Phase::Dead | Phase::Failed => String::new(),
        _ => format!("systemctl stop {name}; "),
    };
    format!(
        "{file} stands in the way, for nerve makes {name} itself: {stop}move the file away (settings may go into \
         {name}.d/), then systemctl daemon-reload"
    )
}

/// What to do about a unit file of this name; `state` is systemd's word (systemctl(1), `is-enabled`).
pub(super) fn obstacle_of_file(name: &str, state: &str, file: Option<&str>) -> String {
    match state {
        "masked" | "masked-runtime" => format!("{name} is masked: systemctl unmask {name}"),
        "generated" => format!(
            "a generator makes {name}, which nerve makes itself: see systemctl cat {name}; remove what it is made \
             from, then systemctl daemon-reload"
        ),
        _ => format!(
            "{} stands in the way, for nerve makes {name} itself: move the file away (settings may go into {name}.d/), \
             then systemctl daemon-reload",
            file.unwrap_or("a unit file")
        ),
    }
}

/// How the main process ended, if it did.
fn exit(properties: &Properties) -> Option<Exit> {
    let status = get::<i32>(properties, "ExecMainStatus").unwrap_or_default();
    match get::<i32>(properties, "ExecMainCode").unwrap_or_default() {
        libc::CLD_EXITED => Some(Exit::Code(status)),
        libc::CLD_KILLED | libc::CLD_DUMPED => Some(Exit::Signal(status)),
        _ => None,
    }
}

/// How the service ended, if it did: without an exit when systemd could not even start it.
pub(super) fn death(properties: &Properties) -> Option<Death> {
    if get::<u32>(properties, "MainPID").unwrap_or_default() != 0 {
        return None;
    }
    let exit = exit(properties);
    let cause = match text(properties, "Result").as_str() {
        "exit-code" => Cause::ExitCode,
        "signal" => Cause::Signal,
        "core-dump" => Cause::CoreDump,
        "watchdog" => Cause::Watchdog,
        "oom-kill" => Cause::OomKill,
        "timeout" => Cause::Timeout,
        // SIGTERM and its like are a success to systemd. A start limit says nothing of the last end.
        "success" | "start-limit-hit" => match exit? {
            Exit::Code(_) => Cause::ExitCode,
            Exit::Signal(_) => Cause::Signal,
        },
        "" => return None,
        _ => Cause::Unknown,
    };
    Some(Death::new(cause, exit))
}

#[cfg(test)]
mod tests {
    use zbus::wire::Variant;

    use super::*;

    const NAME: &str = "nerve-wf@fix.service";

    fn properties(pairs: &[(&str, Variant<'static>)]) -> Properties {
        let base: [(&str, Variant<'static>); 7] = [
            ("LoadState", "loaded".into()),
            (
                "FragmentPath",
                "/run/systemd/transient/nerve-wf@fix.service".into(),
            ),
            ("ActiveState", "active".into()),
            ("SubState", "running".into()),
            ("Restart", "always".into()),
            ("InvocationID", vec![0xab_u8, 0xcd].into()),
            ("Environment", vec!["NERVE_WORKER_SETTINGS=0"].into()),
        ];
        base.iter()
            .chain(pairs)
            .map(|(name, value)| ((*name).to_owned(), value.try_to_owned().unwrap()))
            .collect()
    }

    fn ended(result: &'static str, code: i32, status: i32) -> Option<Death> {
        death(&properties(&[
            ("MainPID", 0_u32.into()),
            ("Result", result.into()),
            ("ExecMainCode", code.into()),
            ("ExecMainStatus", status.into()),
        ]))
    }

    #[test]
    fn every_end_has_its_cause() {
        let code = |cause, code| Some(Death::new(cause, Some(Exit::Code(code))));
        let signal = |cause, signal| Some(Death::new(cause, Some(Exit::Signal(signal))));
        assert_eq!(ended("exit-code", 1, 7), code(Cause::ExitCode, 7));
        assert_eq!(ended("success", 1, 0), code(Cause::ExitCode, 0));
        assert_eq!(ended("success", 2, 15), signal(Cause::Signal, 15));
        assert_eq!(ended("signal", 2, 9), signal(Cause::Signal, 9));
        assert_eq!(ended("core-dump", 3, 11), signal(Cause::CoreDump, 11));
        assert_eq!(ended("watchdog", 2, 6), signal(Cause::Watchdog, 6));
        assert_eq!(ended("oom-kill", 2, 9), signal(Cause::OomKill, 9));
        assert_eq!(ended("timeout", 2, 9), signal(Cause::Timeout, 9));
        assert_eq!(ended("start-limit-hit", 1, 7), code(Cause::ExitCode, 7));
        assert_eq!(ended("protocol", 1, 0), code(Cause::Unknown, 0));
        assert_eq!(ended("resources", 0, 0), Some(Death::of(Cause::Unknown)));
        assert_eq!(ended("success", 0, 0), None);
    }

    #[test]
    fn a_process_that_lives_has_not_ended() {
        let all = properties(&[
            ("MainPID", 7_u32.into()),
            ("Result", "success".into()),
            ("ExecMainCode", 1.into()),
        ]);
        assert_eq!(death(&all), None);
    }

    #[test]
    fn before_the_new_main_process_the_end_of_the_old_one_is_not_told() {
        let all = properties(&[
            ("ActiveState", "activating".into()),
            ("SubState", "start-pre".into()),
            ("Result", "success".into()),
            ("ExecMainCode", 2.into()),
            ("ExecMainStatus", 9.into()),
        ]);
        let unit = unit(NAME, &all);
        assert_eq!((unit.state, unit.death), (UnitState::Starting, None));
    }

    #[test]
    fn between_two_starts_there_is_a_death() {
        let all = properties(&[
            ("ActiveState", "activating".into()),
            ("SubState", "auto-restart".into()),
            ("Result", "signal".into()),
            ("ExecMainCode", 2.into()),
            ("ExecMainStatus", 9.into()),
        ]);
        let unit = unit(NAME, &all);
        assert_eq!(unit.state, UnitState::Starting);
        assert_eq!(unit.invocation, "abcd");
        assert_eq!(unit.death, ended("signal", 2, 9));
    }

    #[test]
    fn only_what_would_be_restarted_can_be_given_up() {
        let job = (7_u32, OwnedObjectPath::try_from("/job/7").unwrap());
        let failed = ("ActiveState", Variant::from("failed"));
        let state = |more: &[(&str, Variant<'static>)]| unit(NAME, &properties(more)).state;
        assert_eq!(state(std::slice::from_ref(&failed)), UnitState::Failed);
        let no = ("Restart", "no".into());
        assert_eq!(state(&[failed.clone(), no]), UnitState::Absent);
        let job = ("Job", Variant::from(job));
        assert_eq!(state(&[failed.clone(), job]), UnitState::Starting);
        let sub = ("SubState", "failed-before-auto-restart".into());
        assert_eq!(state(&[failed, sub]), UnitState::Starting);
    }

    #[test]
    fn the_settings_are_in_the_environment() {
        let environment = vec!["LANG=C", "NERVE_WORKER_SETTINGS=f00d"];
        let all = properties(&[("Environment", environment.into())]);
        assert_eq!(unit(NAME, &all).settings.as_deref(), Some("f00d"));
        let theirs = properties(&[("Environment", Vec::<&str>::new().into())]);
        assert_eq!(unit(NAME, &theirs).state, UnitState::Foreign);
    }

    #[test]
    fn what_is_not_ours_says_what_to_do() {
        let of = |load: &'static str, file: &'static str| {
            let all = [("LoadState", load.into()), ("FragmentPath", file.into())];
            unit(NAME, &properties(&all))
        };
        let masked = of("masked", "");
        assert_eq!(masked.state, UnitState::Foreign);
        assert_eq!(masked.invocation, "");
        assert_eq!(
            masked.detail,
            format!("{NAME} is masked: systemctl unmask {NAME}")
        );
        let file = of("loaded", "/etc/systemd/system/nerve-wf@fix.service");
        assert_eq!(file.state, UnitState::Foreign);
        assert!(
            file.detail
                .starts_with("/etc/systemd/system/nerve-wf@fix.service stands")
        );
        assert!(file.detail.contains("systemctl stop"), "{}", file.detail);
        let made = of("loaded", "/run/systemd/generator/nerve-wf@fix.service");
        assert!(made.detail.contains("generator"), "{}", made.detail);
        assert_eq!(of("not-found", "").state, UnitState::Active);
    }
}

//! Every limit and every default of nerve, in one place. Units are in the names.

use std::time::Duration;

/// Longest workflow name. Its unit, `nerve-wf@NAME.service`, stays far below systemd's 255 bytes.
pub const WORKFLOW_NAME_BYTES: usize = 64;
/// Longest role name.
pub const ROLE_NAME_BYTES: usize = 64;
/// Largest definition file.
pub const DEFINITION_BYTES: usize = 256 * 1024;
/// Largest start prompt.
pub const PROMPT_BYTES: usize = 1024 * 1024;
/// Largest reply of a role, after decoding.
pub const REPLY_BYTES: usize = 1024 * 1024;
/// Largest prompt of a role, after rendering.
pub const RENDERED_PROMPT_BYTES: usize = 4 * 1024 * 1024;
/// A longer text of an event is kept as a blob.
pub const INLINE_BYTES: usize = 64 * 1024;
/// Largest blob that a client may put.
pub const BLOB_BYTES: u64 = 1024 * 1024 * 1024;
/// With less than that on the disk nothing begins: what one checkpoint moves, and some long replies.
pub const ROOM_BYTES: u64 = 16 * 1024 * 1024;
/// What nerve itself says there of a round that failed.
pub const NOTE_BYTES: usize = 4 * 1024;
/// What is kept of a round's stderr.
pub const STDERR_TAIL_BYTES: usize = 8 * 1024;
/// Longest journal line that the worker sends on; a longer line is split.
pub const JOURNAL_LINE_BYTES: usize = 8 * 1024;
/// Largest JSON Schema of a role's meta, and largest meta of a reply…
pub const META_BYTES: usize = 64 * 1024;
/// …and how deep they may be.
pub const META_DEPTH: usize = 32;
/// Longest status of a round.
pub const STATUS_BYTES: usize = 64;
/// Largest answer of an LLM's server that comes whole.
pub const LLM_BODY_BYTES: u64 = 8 * 1024 * 1024;
/// Largest answer that comes piece by piece: around each token there are some hundred bytes.
pub const LLM_STREAM_BYTES: u64 = 64 * 1024 * 1024;
/// What is quoted of an LLM's server that answers with an error.
pub const LLM_ERROR_CHARS: usize = 512;
/// An LLM's server is connected to within this time.
pub const LLM_CONNECT: Duration = Duration::from_secs(10);
/// Longest reason that a person gives.
pub const REASON_BYTES: usize = 1024;
/// Most roles in a workflow.
pub const ROLES: usize = 64;
/// Most attempts of a round.
pub const ATTEMPTS: u32 = 100;
/// Most attempts of a round that fail: each may be followed by its corrections, which are attempts of their own.
pub const FAILED_ATTEMPTS: u32 = ATTEMPTS * (1 + CORRECTIONS);
/// Longest pause between two attempts.
pub const BACKOFF: Duration = Duration::from_secs(86_400);
/// Most correction turns of an attempt.
pub const CORRECTIONS: u32 = 2;
/// A chat completion that takes longer is given up, unless nerve.yaml says otherwise.
pub const LLM_TIMEOUT: Duration = Duration::from_secs(600);
/// Largest `max_tokens`.
pub const MAX_TOKENS: u32 = 100_000_000;
/// Largest output of an agent CLI, its events included, of which the reply is a part.
pub const AGENT_OUTPUT_BYTES: usize = 32 * 1024 * 1024;
/// Largest figure of what an agent CLI says of its usage.
pub const USAGE_BYTES: usize = 4 * 1024;
/// Largest word of an argv: MAX_ARG_STRLEN of Linux, and the NUL behind it.
pub const ARGUMENT_BYTES: usize = 128 * 1024 - 1;
/// Deepest nesting of such a figure.
pub const USAGE_DEPTH: usize = 8;
/// Largest meta of a message, as JSON: what the reply says of itself, the tail of stderr, usage, the prompt of a dry run.
pub const MESSAGE_META_BYTES: usize = 1024 * 1024;
/// What is kept of a prompt in a dry run.
pub const REHEARSED_PROMPT_BYTES: usize = 64 * 1024;
/// A server that asks for a longer pause is asked again after this one.
pub const RETRY_AFTER: Duration = Duration::from_secs(3_600);
/// Longest name of a provider, an agent or a credential.
pub const SETTING_NAME_BYTES: usize = 64;
/// Largest `max_rounds`.
pub const MAX_ROUNDS: u32 = 10_000;
/// `max_rounds` when nobody says otherwise.
pub const DEFAULT_MAX_ROUNDS: u32 = 50;
/// Largest `concurrency`.
pub const CONCURRENCY: u32 = 256;
/// Largest `max_active`.
pub const MAX_ACTIVE: u32 = 100_000;
/// Days that ended longer ago are archived, in µs.
pub const ARCHIVE_AGE_US: u64 = 30 * super::time::DAY_US;
/// Largest `days` of a `retention`.
pub const RETENTION_DAYS: u32 = 36_500;
/// Largest `runs` of a `retention`.
pub const RETENTION_RUNS: u32 = 1_000_000_000;
/// Largest `max_queue`.
pub const MAX_QUEUE: u32 = 1_000_000;
/// `max_queue` when the file does not say.
pub const DEFAULT_MAX_QUEUE: u32 = 100;
/// Longest line of the worker protocol. A reply of control characters grows sixfold in JSON and still fits.
pub const LINE_BYTES: usize = 8 * 1024 * 1024;
/// Most connections on the worker socket.
pub const CONNECTIONS: usize = 1_024;
/// Most connections on the worker socket of one uid.
pub const CONNECTIONS_PER_UID: usize = 64;
/// Most connections on root's private socket.
pub const PRIVATE_CONNECTIONS: usize = 64;
/// Cgroups that a worker and its roles may make, and how deep: a tree that took minutes to walk would hold up a kill.
pub const CGROUPS: (u32, u32) = (4_096, 16);
/// What may wait to be written to a worker that does not read.
pub const OUTBOX_FRAMES: usize = 4_096;
/// Template instructions one prompt may use.
pub const TEMPLATE_FUEL: u64 = 100_000;
/// Most rows that one answer of the bus holds.
pub const LIST_ROWS: u32 = 1_000;

/// A worker that is connected says `ready` within this time.
pub const READY_TIMEOUT: Duration = Duration::from_secs(5);
/// A worker that had been ready, and has lost its connection, is ready again within this time.
pub const RECONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Who connects to root's private socket may take so long to greet, and later not to read.
pub const PRIVATE_PATIENCE: Duration = Duration::from_secs(10);
/// Between SIGTERM and SIGKILL when nobody says otherwise, and when a time-out passes.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(5);
/// Longest grace that a kill may ask for.
pub const MAX_GRACE: Duration = Duration::from_secs(3_600);
/// After the grace the worker has this long to confirm a kill; then nerved kills the cgroup itself.
pub const KILL_CONFIRM: Duration = Duration::from_secs(2);
/// nerved enforces a run's time-out this much after the worker should have.
pub const TIMEOUT_SLACK: Duration = Duration::from_secs(5);
/// A worker without runs is told to shut down after this time.
pub const WORKER_IDLE: Duration = Duration::from_secs(300);
/// So many deaths of its worker without a new round, and a run is resumed alone: it may be the guilty one.
pub const SUSPECT_DEATHS: u32 = 2;
/// So many deaths of its worker without a new round, and a run has crashed.
pub const CRASHED_DEATHS: u32 = 3;
/// What is quoted of the journal of a worker that died.
pub const LAST_WORDS_BYTES: usize = 2 * 1024;
/// Longest client key.
pub const KEY_BYTES: usize = 128;
/// A worker that was told to shut down and is not gone after this time is killed.
pub const SHUTDOWN: Duration = Duration::from_secs(30);
/// nerve as a whole is being stopped, so no worker is started; should it live on after this time, it goes on.
pub const GOING_DOWN: Duration = Duration::from_secs(120);
/// First and longest pause between two attempts to reach nerved, or the bus.
pub const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// `StartLimitIntervalSec` and `StartLimitBurst` of a worker unit.
pub const START_LIMIT: (Duration, u32) = (Duration::from_secs(60), 6);
/// `WatchdogSec` of a worker unit; the event loop pings at a third of it.
pub const WORKER_WATCHDOG: Duration = Duration::from_secs(30);

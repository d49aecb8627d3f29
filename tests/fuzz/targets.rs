//! What is fed with arbitrary bytes: by libFuzzer in `make fuzz`, and with the kept corpus in every `cargo test`. Each
//! returns, whatever it gets; a fault is a panic, and for libFuzzer too much time or memory.

use nerve::config::diagnostic::Diagnostic;
use nerve::config::meta::Checker;
use nerve::config::picture::{Paint, draw};
use nerve::config::{definition, settings, template};
use nerve::model::limits;
use nerve::model::message::Message;
use nerve::model::name::RunId;
use nerve::worker::protocol::{self, ToManager, ToWorker};
use nerve::worker::reply;
use serde::de::DeserializeOwned;
use serde_json::json;

type Target = fn(&[u8]);

/// By name; each has its corpus in `corpus/NAME`.
pub const ALL: [(&str, Target); 6] = [
    ("definition", definition),
    ("settings", settings),
    ("template", template),
    ("unit", unit),
    ("frame", frame),
    ("reply", reply),
];

/// What is said is one line each, and no picture has a control character.
fn check_diagnostics(bytes: &[u8], diagnostics: &[Diagnostic]) {
    let lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
    for diagnostic in diagnostics {
        assert!(diagnostic.help.is_some(), "{diagnostic}");
        assert!(diagnostic.column < diagnostic.end_column, "{diagnostic:?}");
        assert!(!diagnostic.to_string().contains(char::is_control));
        let line = lines.get(diagnostic.line - 1).copied().unwrap_or_default();
        let picture = draw(diagnostic, line, 100, Paint::Plain);
        assert!(!picture.contains(|c: char| c.is_control() && c != '\n'));
    }
}

/// A definition that is read means the same to the worker that gets it as JSON.
fn definition(bytes: &[u8]) {
    let parsed = definition::parse("fuzz.yaml", None, bytes);
    check_diagnostics(bytes, &parsed.diagnostics);
    if let Some(definition) = parsed.definition {
        assert_eq!(
            definition::from_json(&definition.source),
            Ok(definition.workflow)
        );
    }
}

fn settings(bytes: &[u8]) {
    let (_, diagnostics) = settings::parse("nerve.yaml", bytes);
    check_diagnostics(bytes, &diagnostics);
}

/// A prompt that is taken renders, or says in one line why not.
fn template(bytes: &[u8]) {
    let Ok(prompt) = std::str::from_utf8(bytes) else {
        return;
    };
    let source = json!({
        "version": 1,
        "name": "fuzz",
        "roles": {"coder": {"exec": ["make"], "prompt": prompt}},
        "graph": {"$START": "coder", "coder": {"ok": "$END"}},
    });
    let is_taken = definition::from_json(&source).is_ok();
    let said = |role: &str| {
        let message = json!({"role": role, "content": "Söme\ntext", "meta": {"status": "ok", "n": [1]}, "timestamp": 7});
        serde_json::from_value::<Message>(message).unwrap()
    };
    let context = template::context(&[said("__start__"), said("coder")], 2, RunId::from_bits(7));
    match template::render(prompt, context) {
        Ok(text) => assert!(text.len() <= limits::RENDERED_PROMPT_BYTES),
        Err(error) => {
            assert!(!error.contains(char::is_control), "{error:?}");
            assert!(!is_taken || !error.contains("syntax error"), "{error}");
        }
    }
}

/// A value of a unit's property, whose name is in the first line.
fn unit(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (key, value) = text.split_once('\n').unwrap_or((text, ""));
    let values: Vec<&str> = value.split('\u{1e}').collect();
    for value in [json!(value), json!(values)] {
        let source = json!({
            "version": 1,
            "name": "fuzz",
            "worker": {"exec": ["/bin/true"], key: value},
        });
        let _ = definition::from_json(&source);
    }
}

/// What the other end of the socket says, in both directions.
fn frame(bytes: &[u8]) {
    fn all<T: DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug>(mut bytes: &[u8]) {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(async {
            let mut line = Vec::new();
            while let Ok(Some(message)) = protocol::read::<T>(&mut bytes, &mut line).await {
                let mut written = Vec::new();
                protocol::append(&mut written, &message);
                let again: T = serde_json::from_slice(&written).unwrap();
                assert_eq!(again, message);
            }
        });
    }
    all::<ToManager>(bytes);
    all::<ToWorker>(bytes);
}

/// A reply that is taken satisfies its schema, and what is wrong with another one can be told to the role.
fn reply(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let schema = json!({
        "type": "object",
        "properties": {"status": {"enum": ["done", "again"]}, "count": {"type": "integer"}, "why": {"type": "string"}},
        "required": ["status"],
    });
    let checker = Checker::new(&schema).unwrap();
    match reply::read(text, &checker) {
        Ok(reply) => assert!(checker.check(reply.meta).is_ok()),
        Err(fault) => assert!(!reply::correction(&fault).is_empty()),
    }
}

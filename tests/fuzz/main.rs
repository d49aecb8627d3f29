//! A fuzzer of the target that `NERVE_FUZZ` names; libFuzzer's own arguments follow.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

mod targets;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("NERVE_FUZZ").expect("NERVE_FUZZ names a target");
    let target = targets::ALL.iter().find(|(known, _)| *known == name);
    target.expect("NERVE_FUZZ names a target").1
});

fuzz_target!(|data: &[u8]| TARGET(data));

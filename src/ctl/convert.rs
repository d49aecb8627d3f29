//! `nervectl convert`: a definition of united-workforce as ours, on stdout; what could not be carried over, on stderr.

use super::cli::Convert;
use super::{Failure, input, note, print};
use crate::config::convert;
use crate::config::diagnostic::Severity;

/// Exit status for what cannot be used as it is.
const BROKEN: u8 = 65;

pub(super) fn convert(arguments: &Convert) -> Result<u8, Failure> {
    let (name, bytes) = input::definition(&arguments.file)?;
    let converted = convert::convert(&name, &bytes);
    for diagnostic in &converted.diagnostics {
        note(&diagnostic.to_string());
    }
    print(converted.text.as_deref().unwrap_or_default())?;
    let mut faults = converted.diagnostics.iter();
    let is_broken = faults.any(|fault| fault.severity == Severity::Error);
    Ok(if is_broken { BROKEN } else { 0 })
}

//! `nervectl convert`: a definition of united-workforce as ours, on stdout; what could not be carried over, on stderr.

use super::cli::Convert;
use super::{Failure, input, print, validate};
use crate::config::convert::{self, Converted};

/// Exit status for what cannot be used as it is.
const BROKEN: u8 = 65;

pub(super) fn convert(arguments: &Convert) -> Result<u8, Failure> {
    let (name, bytes) = input::definition(&arguments.file)?;
    let Converted { text, diagnostics } = convert::convert(&name, &bytes);
    let text = text.unwrap_or_default();
    // What is wrong with what was made has its place there.
    let (given, made): (Vec<_>, Vec<_>) = diagnostics
        .into_iter()
        .partition(|fault| fault.path == name);
    let is_right = validate::tell([(given, bytes.as_slice()), (made, text.as_bytes())]);
    print(&text)?;
    Ok(if is_right { 0 } else { BROKEN })
}

//! `nervectl convert`: a definition of united-workforce as ours, on stdout; what could not be carried over, on stderr.

use super::cli::Convert;
use super::{BROKEN, Failure, input, print, validate};
use crate::config::convert::{self, Converted};

pub(super) fn convert(arguments: &Convert) -> Result<u8, Failure> {
    let (name, bytes) = input::definition(&arguments.file)?;
    let Converted { text, diagnostics } = convert::convert(&name, &bytes);
    let text = text.unwrap_or_default();
    // What is wrong with what was made has its place there.
    let (given, made): (Vec<_>, Vec<_>) = diagnostics
        .into_iter()
        .partition(|fault| fault.path == name);
    let mut found = vec![(given, bytes.as_slice())];
    if !made.is_empty() {
        found.push((made, text.as_bytes()));
    }
    let is_right = validate::tell(found);
    print(&text)?;
    Ok(if is_right { 0 } else { BROKEN })
}

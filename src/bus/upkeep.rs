//! What is done to the store as a whole, one at a time: archiving, restoring, checking, copying, importing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::Error;

/// Whether one of them is under way; shared by all connections.
#[derive(Debug, Clone, Default)]
pub struct Upkeep(Arc<Mutex<Option<&'static str>>>);

/// One is under way as long as this lives.
#[derive(Debug)]
pub struct UnderWay(Upkeep);

impl Upkeep {
    /// Begins one, called like this: "a backup".
    ///
    /// # Errors
    /// [`Error::Busy`] when one is under way.
    pub fn begin(&self, what: &'static str) -> Result<UnderWay, Error> {
        let mut current = self.current();
        if let Some(other) = *current {
            return Err(Error::Busy(format!(
                "{other} of the store is under way; try again when it is done"
            )));
        }
        *current = Some(what);
        Ok(UnderWay(self.clone()))
    }

    fn current(&self) -> MutexGuard<'_, Option<&'static str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        *self.0.current() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_at_a_time() {
        let upkeep = Upkeep::default();
        let first = upkeep.begin("a backup").unwrap();
        let refused = upkeep.clone().begin("a check").unwrap_err();
        assert_eq!(
            refused,
            Error::Busy("a backup of the store is under way; try again when it is done".into())
        );
        drop(first);
        upkeep.begin("a check").unwrap();
    }
}

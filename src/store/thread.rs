//! The one thread that has the database. Jobs run in the order in which they were sent, so a read that is sent after
//! a commit sees it.

use std::sync::mpsc;

use tokio::sync::oneshot;

use super::{Error, Store};

type Job = Box<dyn FnOnce(&mut Store) + Send>;

/// How everybody else reaches the store. When the last handle is gone the thread ends and closes the database.
#[derive(Debug, Clone)]
pub struct Handle {
    jobs: mpsc::Sender<Job>,
}

impl Handle {
    /// Gives the store a thread of its own.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn spawn(mut store: Store) -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                for job in inbox {
                    job(&mut store);
                }
            })?;
        Ok(Self { jobs })
    }

    /// Has the store do something and waits for what comes of it.
    ///
    /// # Errors
    /// What the job says.
    ///
    /// # Panics
    /// When the store's thread is gone, which only a panic of its own can bring about.
    pub async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Store) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |store| {
            // A caller that went away does not want the answer.
            let _ = reply.send(job(store));
        });
        self.jobs
            .send(job)
            .expect("the store's thread lives as long as its handles");
        answer.await.expect("the store's thread answers every job")
    }
}

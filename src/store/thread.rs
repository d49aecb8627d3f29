//! The one thread that has the database. Jobs run in the order in which they were sent, so a read that is sent after
//! a commit sees it.

use std::sync::mpsc;

use tokio::sync::{oneshot, watch};

use super::{Error, Store};

type Job = Box<dyn FnOnce(&mut Store) + Send>;

/// How everybody else reaches the store. When the last handle is gone the thread ends and closes the database.
#[derive(Debug, Clone)]
pub struct Handle {
    jobs: mpsc::Sender<Job>,
    newest: watch::Receiver<u64>,
}

impl Handle {
    /// Gives the store a thread of its own.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn spawn(mut store: Store) -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (sender, newest) = watch::channel(store.head.seq);
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                for job in inbox {
                    job(&mut store);
                    sender.send_if_modified(|seq| std::mem::replace(seq, store.head.seq) != *seq);
                }
            })?;
        Ok(Self { jobs, newest })
    }

    /// The number of the newest event, whenever there is a newer one.
    #[must_use]
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.clone()
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
        let answer = self.send(job).await;
        answer.expect("the store's thread answers every job")
    }

    /// The same from a thread that may wait: what takes long is made of many short jobs, so that the runs need not wait
    /// for it.
    ///
    /// # Errors
    /// What the job says.
    ///
    /// # Panics
    /// As [`Handle::call`], and in an asynchronous task.
    pub fn call_and_wait<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Store) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let answer = self.send(job).blocking_recv();
        answer.expect("the store's thread answers every job")
    }

    fn send<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Store) -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |store| {
            // A caller that went away does not want the answer.
            let _ = reply.send(job(store));
        });
        self.jobs
            .send(job)
            .expect("the store's thread lives as long as its handles");
        answer
    }
}

//! What the shim writes down, and the disk that it makes: what is durable, what is pending, and what a power cut may leave.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::ACKNOWLEDGED;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// One thing that the program did. Paths are below the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Create(String),
    MakeDirectory(String),
    Unlink(String),
    Rename(String, String),
    Write(String, usize, Vec<u8>),
    /// To this length; a file that turns out to be longer than what was written was allocated.
    Truncate(String, usize),
    Sync(String),
    SyncDirectory(String),
    /// Somebody was told that the events up to this one are stored.
    Acknowledged(u64),
}

/// The record of a program that worked in `directory`.
pub fn read(record: &Path, directory: &Path) -> Vec<Op> {
    let bytes = fs::read(record).unwrap();
    let mut rest = &bytes[..];
    let mut take = |count: usize| {
        let (taken, after) = rest.split_at_checked(count)?;
        rest = after;
        Some(taken)
    };
    let mut lengths: BTreeMap<String, usize> = BTreeMap::new();
    let mut ops = Vec::new();
    while let Some(head) = take(40) {
        let number = |at: usize| u64::from_ne_bytes(head[8 * at..8 * at + 8].try_into().unwrap());
        let size = |at| usize::try_from(number(at)).unwrap();
        let text = |bytes: &[u8]| {
            let path = std::str::from_utf8(bytes).unwrap();
            let below = Path::new(path).strip_prefix(directory).unwrap();
            below.to_str().unwrap().to_owned()
        };
        let (kind, offset, before) = (head[0], size(2), size(3));
        let (path, data) = (take(size(1)).unwrap(), take(size(4)).unwrap());
        let path = text(path);
        let length = lengths.entry(path.clone()).or_default();
        if matches!(kind, b'w' | b't' | b's') && *length < before {
            *length = before;
            ops.push(Op::Truncate(path.clone(), before));
        }
        ops.push(match kind {
            b'w' => {
                *length = (*length).max(offset + data.len());
                Op::Write(path, offset, data.to_vec())
            }
            b't' => {
                *length = offset;
                Op::Truncate(path, offset)
            }
            b'c' => {
                *length = 0;
                Op::Create(path)
            }
            b's' => Op::Sync(path),
            b'd' => Op::SyncDirectory(path),
            b'm' => Op::MakeDirectory(path),
            b'u' => Op::Unlink(path),
            b'r' => {
                let (from, to) = (*length, text(data));
                lengths.insert(to.clone(), from);
                Op::Rename(path, to)
            }
            b'a' => {
                let line = std::str::from_utf8(data).unwrap();
                Op::Acknowledged(line.trim().parse().unwrap())
            }
            other => panic!("a record of kind {other}"),
        });
    }
    ops
}

/// The same, had the program run with `synchronous=NORMAL`: the log is synced for a checkpoint, and when it begins anew, but
/// not for a commit.
pub fn without_syncs_of_commits(ops: &[Op]) -> Vec<Op> {
    let mut kept = Vec::with_capacity(ops.len());
    let mut begins_anew = false;
    for (index, op) in ops.iter().enumerate() {
        match op {
            Op::Write(path, 0, _) if path == "nerve.db-wal" => begins_anew = true,
            Op::Write(path, ..) if path == "nerve.db-wal" => begins_anew = false,
            Op::Sync(path) if path == "nerve.db-wal" => {
                let next = ops[index + 1..]
                    .iter()
                    .find(|op| !matches!(op, Op::Sync(_)));
                let is_checkpoint = matches!(next, Some(Op::Write(path, ..)) if path == "nerve.db");
                if !begins_anew && !is_checkpoint {
                    continue;
                }
            }
            _ => {}
        }
        kept.push(op.clone());
    }
    kept
}

/// What changes the content of a file.
#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Length(usize),
}

/// What changes a directory.
#[derive(Debug, Clone)]
enum Entry {
    Set(String, usize),
    Remove(String),
}

#[derive(Debug, Clone, Default)]
struct Inode {
    durable: Vec<u8>,
    pending: Vec<Change>,
    is_directory: bool,
}

/// A disk: durable contents and names, and what is pending of both.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    inodes: Vec<Inode>,
    /// As the program sees them.
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// By directory, in order: a file system keeps the order of those.
    pending_names: BTreeMap<String, Vec<Entry>>,
    /// The last event that somebody was told of.
    pub acknowledged: u64,
}

/// What a power cut leaves.
#[derive(Debug)]
pub struct State {
    pub files: BTreeMap<String, Vec<u8>>,
    pub directories: BTreeSet<String>,
    pub acknowledged: u64,
}

/// Which of what is pending is there after a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nothing.
    Nothing,
    /// All of it.
    Everything,
    /// Any of it, in any order; of a torn write any sectors.
    Any { torn: bool },
}

/// xorshift64*: random enough, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        dice.next();
        dice
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

impl Disk {
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Create(path) => self.make(path, false),
            Op::MakeDirectory(path) => self.make(path, true),
            Op::Unlink(path) => {
                self.names.remove(path);
                self.entry(path, Entry::Remove(path.clone()));
            }
            Op::Rename(from, to) => {
                let inode = self.names.remove(from).unwrap();
                self.names.insert(to.clone(), inode);
                // One step of the directory.
                self.entry(to, Entry::Set(to.clone(), inode));
                self.entry(from, Entry::Remove(from.clone()));
            }
            Op::Write(path, offset, data) => {
                self.pend(path, Change::Write(*offset, data.clone()));
            }
            Op::Truncate(path, length) => self.pend(path, Change::Length(*length)),
            Op::Sync(path) => {
                let inode = self.names[path];
                let Inode {
                    durable, pending, ..
                } = &mut self.inodes[inode];
                for change in pending.drain(..) {
                    change.apply(durable);
                }
            }
            Op::SyncDirectory(path) => {
                for entry in self.pending_names.remove(path).unwrap_or_default() {
                    entry.apply(&mut self.durable_names);
                }
            }
            Op::Acknowledged(seq) => self.acknowledged = *seq,
        }
    }

    fn make(&mut self, path: &str, is_directory: bool) {
        let inode = self.inodes.len();
        self.inodes.push(Inode {
            is_directory,
            ..Inode::default()
        });
        self.names.insert(path.to_owned(), inode);
        self.entry(path, Entry::Set(path.to_owned(), inode));
    }

    fn entry(&mut self, path: &str, entry: Entry) {
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        let pending = self.pending_names.entry(directory.to_owned());
        pending.or_default().push(entry);
    }

    fn pend(&mut self, path: &str, change: Change) {
        let inode = self.names[path];
        self.inodes[inode].pending.push(change);
    }

    /// The content of a file as the program sees it.
    pub fn content(&self, path: &str) -> Vec<u8> {
        let inode = &self.inodes[self.names[path]];
        let mut content = inode.durable.clone();
        for change in &inode.pending {
            change.apply(&mut content);
        }
        content
    }

    /// What a power cut at this moment may leave.
    pub fn cut(&self, cut: Cut, dice: &mut Dice) -> State {
        let mut names = self.durable_names.clone();
        for pending in self.pending_names.values() {
            let kept = match cut {
                Cut::Nothing => 0,
                Cut::Everything => pending.len(),
                Cut::Any { .. } => dice.below(pending.len() + 1),
            };
            for entry in &pending[..kept] {
                entry.clone().apply(&mut names);
            }
        }
        let mut state = State {
            files: BTreeMap::new(),
            directories: BTreeSet::new(),
            acknowledged: self.acknowledged,
        };
        for (path, inode) in names {
            let inode = &self.inodes[inode];
            if inode.is_directory {
                state.directories.insert(path);
                continue;
            }
            let mut content = inode.durable.clone();
            for change in &inode.pending {
                match (cut, change) {
                    (Cut::Nothing, _) => {}
                    (Cut::Everything, change) => change.apply(&mut content),
                    (Cut::Any { torn: true }, Change::Write(offset, data)) => {
                        tear(*offset, data, &mut content, dice);
                    }
                    (Cut::Any { .. }, change) => {
                        if dice.coin() {
                            change.apply(&mut content);
                        }
                    }
                }
            }
            state.files.insert(path, content);
        }
        // What is in a directory that is not there is not there.
        let is_there = |path: &String| {
            path.rsplit_once('/')
                .is_none_or(|(directory, _)| state.directories.contains(directory))
        };
        state.files.retain(|path, _| is_there(path));
        state
    }
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write(offset, data) => put(content, *offset, data),
            Self::Length(length) => content.resize(*length, 0),
        }
    }
}

impl Entry {
    fn apply(self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Set(path, inode) => names.insert(path, inode),
            Self::Remove(path) => names.remove(&path),
        };
    }
}

fn put(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(data);
}

/// Writes some of the sectors.
fn tear(offset: usize, data: &[u8], content: &mut Vec<u8>, dice: &mut Dice) {
    let mut at = offset;
    while at < offset + data.len() {
        let end = ((at / SECTOR + 1) * SECTOR).min(offset + data.len());
        if dice.coin() {
            put(content, at, &data[at - offset..end - offset]);
        }
        at = end;
    }
}

impl State {
    /// Tells states apart.
    pub fn hash(&self) -> u64 {
        let mut hash = self.acknowledged;
        let mut mix = |word: u64| {
            hash = (hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        };
        for (path, content) in &self.files {
            for text in [path.as_bytes(), content] {
                mix(text.len() as u64);
                let (words, rest) = text.as_chunks::<8>();
                for word in words {
                    mix(u64::from_ne_bytes(*word));
                }
                for byte in rest {
                    mix(u64::from(*byte));
                }
            }
        }
        hash
    }

    /// Makes it a directory, which holds what an earlier one left. Blobs are files only for nerve itself.
    pub fn write(&self, directory: &Path, with_blobs: bool) {
        let is_wanted = |path: &str| path != ACKNOWLEDGED && (with_blobs || !path.contains('/'));
        for file in fs::read_dir(directory).unwrap() {
            let file = file.unwrap();
            if file.file_type().unwrap().is_dir() {
                fs::remove_dir_all(file.path()).unwrap();
            } else if !self.files.contains_key(file.file_name().to_str().unwrap()) {
                fs::remove_file(file.path()).unwrap();
            }
        }
        if with_blobs {
            for path in &self.directories {
                fs::create_dir_all(directory.join(path)).unwrap();
            }
        }
        for (path, content) in self.files.iter().filter(|(path, _)| is_wanted(path)) {
            let file = fs::File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(directory.join(path))
                .unwrap();
            file.write_all_at(content, 0).unwrap();
            file.set_len(content.len() as u64).unwrap();
        }
    }
}

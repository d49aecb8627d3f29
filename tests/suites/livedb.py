"""Reads nerve's database while nerved, who has it for itself, is at work: a copy of it, which touches nothing."""

import contextlib
import pathlib
import shutil
import sqlite3
import struct
import tempfile

WAL_HEADER, FRAME_HEADER = 32, 24


def header(log):
    """The log's first bytes, which change when it begins anew; empty when there is none."""
    try:
        with open(log, "rb") as file:
            return file.read(WAL_HEADER)
    except FileNotFoundError:
        return b""


def copy_log(log, to, head):
    """Copies those frames of the log that belong to it, not what is reserved or left over behind them."""
    if len(head) < WAL_HEADER:
        return
    (page,), salts = struct.unpack(">I", head[8:12]), head[16:24]
    with open(log, "rb") as source, open(to, "wb") as target:
        target.write(source.read(WAL_HEADER))
        while len(frame := source.read(FRAME_HEADER + page)) == FRAME_HEADER + page and frame[8:16] == salts:
            target.write(frame)


def frames(database):
    """How many frames the log holds."""
    log = pathlib.Path(f"{database}-wal")
    with tempfile.NamedTemporaryFile() as valid:
        head = header(log)
        copy_log(log, valid.name, head)
        size = pathlib.Path(valid.name).stat().st_size
        return size // (FRAME_HEADER + struct.unpack(">I", head[8:12])[0]) if size else 0


@contextlib.contextmanager
def copy(database):
    """The path of a copy of the database as it was at one moment."""
    database = pathlib.Path(database)
    log = database.with_name(database.name + "-wal")
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "copy.db")
        while True:
            # As long as the log does not begin anew, all that a checkpoint moves meanwhile is in the log as well.
            before = header(log)
            shutil.copyfile(database, path)
            path.with_name("copy.db-wal").unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                copy_log(log, path.with_name("copy.db-wal"), before)
            if header(log) == before:
                break
        yield path


@contextlib.contextmanager
def connect(database):
    """A connection to such a copy; rows have names."""
    with copy(database) as path, contextlib.closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection

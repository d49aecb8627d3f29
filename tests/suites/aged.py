"""Makes a history older than it is: what days do to it in life. The log stays one chain, as src/store/log.rs says."""

import hashlib
import sqlite3
import struct

import nervebox

DAY_US = 86_400_000_000


def chained(before, seq, at, texts):
    sha = hashlib.sha256(before + struct.pack(">QQ", seq, at))
    for text in texts:
        raw = (text or "").encode()
        sha.update(struct.pack(">Q", len(raw)) + raw)
    return sha.digest()


def age(days):
    """Has all that happened have happened so many days earlier; nothing of it may be archived yet. nerve is stopped
    meanwhile, and its workers go on."""
    by = days * DAY_US
    nervebox.systemctl("stop", "nerve.service")
    connection = sqlite3.connect(nervebox.DATABASE)
    with connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        head = bytes(32)
        rows = connection.execute("SELECT seq, at, source, type, ref, payload, blob FROM events ORDER BY seq").fetchall()
        for seq, at, *texts in rows:
            head = chained(head, seq, at - by, texts)
            connection.execute("UPDATE events SET at = ?, hash = ? WHERE seq = ?", [at - by, head, seq])
        connection.execute("UPDATE workflow_runs SET created_at = created_at - ?1, started_at = started_at - ?1,"
                           " ended_at = ended_at - ?1", [by])
        for _, sql in triggers:
            connection.execute(sql)
    connection.close()
    nervebox.systemctl("start", "nerve.service")

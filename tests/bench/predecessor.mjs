// The predecessor's side of the benchmarks of the store: predecessor.mjs PACKAGE DIRECTORY; prints one JSON object.
// It makes no difference to its durability: it sets no `synchronous`, so that SQLite's default, FULL, holds, as in nerve.

import { join, resolve } from "node:path";
import { readFileSync } from "node:fs";
import { DatabaseSync } from "node:sqlite";

const [, , packageFile, directory] = process.argv;
const { createLogStore } = await import(resolve(packageFile));
const CALLERS = 64;
const SECONDS = 5;
const MILLION = 1_000_000;
const DAY = 86_400_000;
const now = Date.now();

const median = (times) => times.sort((a, b) => a - b)[times.length >> 1];
const took = (work) => {
  const begin = performance.now();
  work();
  return (performance.now() - begin) * 1000;
};
const figures = {};

const database = new DatabaseSync(join(directory, "probe.db"));
const [{ synchronous }] = database.prepare("PRAGMA synchronous").all();
if (synchronous !== 2) throw new Error(`synchronous is ${synchronous}, not FULL`);
database.close();

// Callers that each take their runs from queued through started to completed.
{
  const store = createLogStore(join(directory, "transitions.db"));
  const end = performance.now() + SECONDS * 1000;
  let transitions = 0;
  const caller = async (number) => {
    for (let run = 0; performance.now() < end; run++) {
      const runId = `run-${number}-${run}`;
      for (const [status, exitCode] of [["queued", null], ["started", null], ["completed", 0]]) {
        const timestamp = Date.now();
        store.upsertWorkflowRun(
          { source: "workflow", type: status, refId: runId, payload: JSON.stringify({ prompt: "go", maxRounds: 50 }), timestamp },
          { runId, workflow: "bench", status, timestamp, exitCode },
        );
        transitions++;
        await null;
      }
    }
  };
  const begin = performance.now();
  await Promise.all(Array.from({ length: CALLERS }, (_, number) => caller(number)));
  figures.transitions_per_second = (transitions * 1000) / (performance.now() - begin);
  store.close();
}

// The newest 100 rounds of a thread of 1,000.
{
  const store = createLogStore(join(directory, "thread.db"));
  const content = "x".repeat(1024);
  for (let round = 1; round <= 1000; round++) {
    const payload = JSON.stringify({ role: "coder", content, meta: { status: "ok" }, timestamp: now });
    store.append({ source: "workflow", type: "thread_workflow_message", refId: "run", payload, timestamp: now });
  }
  const read = () => {
    if (store.getThreadRounds("run", { before: 0, limit: 100 }).length !== 100) throw new Error("not 100 rounds");
  };
  figures.thread_100_us = median(Array.from({ length: 200 }, () => took(read)));
  store.close();
}

// 50 runs out of a million, by workflow and status: the store has no other way than all of a workflow's.
{
  const file = join(directory, "million.db");
  createLogStore(file).close();
  const fill = new DatabaseSync(file);
  fill.exec("BEGIN");
  const insert = fill.prepare("INSERT INTO workflow_runs VALUES (?, ?, ?, ?, ?)");
  for (let run = 0; run < MILLION; run++)
    insert.run(`run-${run}`, `workflow-${run % 10}`, run % 3 ? "completed" : "failed", now + run, run % 3 ? 0 : 1);
  fill.exec("COMMIT");
  fill.close();
  const store = createLogStore(file);
  const read = () => {
    const page = store.getAllWorkflowRuns("workflow-3").filter((run) => run.status === "failed").slice(0, 50);
    if (page.length !== 50) throw new Error("not 50 runs");
  };
  figures.page_of_million_us = median(Array.from({ length: 5 }, () => took(read)));
  store.close();
}

// A million old rows, ten days of them.
{
  const file = join(directory, "archive.db");
  createLogStore(file).close();
  const fill = new DatabaseSync(file);
  fill.exec("BEGIN");
  const insert = fill.prepare("INSERT INTO logs (source, type, ref_id, payload, timestamp) VALUES (?, ?, ?, ?, ?)");
  const payload = JSON.stringify({ note: "x".repeat(100) });
  for (let row = 0; row < MILLION; row++)
    insert.run("system", "note", `ref-${row % 1000}`, payload, now - 100 * DAY + Math.floor((row * 10 * DAY) / MILLION));
  fill.exec("COMMIT");
  fill.close();
  const store = createLogStore(file);
  let rows = 0;
  const time = took(() => { for (const day of store.archiveLogs().days) rows += day.rowCount; });
  if (rows !== MILLION) throw new Error(`${rows} rows`);
  figures.archive_rows_per_second = (rows * 1e6) / time;
  const status = readFileSync("/proc/self/status", "utf8");
  figures.archive_peak_kib = Number(/VmHWM:\s+(\d+)/.exec(status)[1]);
  store.close();
}

console.log(JSON.stringify(figures));

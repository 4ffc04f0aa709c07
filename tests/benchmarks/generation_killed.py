"""Output tokens that are spent again after `kill -9`: a job of this pipeline, killed half way and started again.

    python generation_killed.py '{"folder": ..., "questions": ..., "num_prompts": ..., "num_rows": ..., "book": ...}'

Replicas write into the book when they begin a block of prompts and when they have its answers; both outlive the
kill. Spent again are the blocks that both starts began. Their tokens are an upper bound, because the kill met
most of them unfinished; those that the first start had answered, and not yet stored, are a lower one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import generation_pipeline
import generation_setting
import pyarrow as pa
import ray
from generation_pipeline import Counter, plan_pool
from generation_setting import ENGINE, MODEL

from delia.flow.pool import build_pool
from delia.flow.workspace import RayConfig, connect, open_workspace
from delia.generate.attempts import Ask
from delia.generate.pipeline import Script, run_script
from delia.schema import Task
from delia.store.tasks import TaskConfig, read_task
from delia.synthesize import pipeline

ENGINES = ENGINE.model_copy(update={"num_replicas": 2})
BLOCK_SIZE = 256
"""Prompts of a block, `chunk_size`."""
PATIENCE = 1800
"""Seconds for one start."""


@dataclass(frozen=True)
class Killed:
    """Blocks and output tokens of a job that was killed once."""

    num_blocks: int
    num_kept: int
    num_again: int
    tokens: int
    least_again: int
    most_again: int

    def describe(self) -> str:
        """Return the sentences for the table."""
        limit = ENGINES.num_replicas * ENGINES.max_concurrent_batches
        return (
            f"Killed with -9, every process of it, as half of its blocks were answered, and started again: of {self.num_blocks}"
            f" blocks of {BLOCK_SIZE} prompts {self.num_kept} were kept and {self.num_again} begun twice; of {self.tokens:,} output"
            f" tokens between {self.least_again:,} and {self.most_again:,} were spent again, at most {self.most_again / self.tokens:.1%}."
            f" The bound does not grow with the pool: {ENGINES.num_replicas} replicas work on {ENGINES.max_concurrent_batches} blocks each,"
            f" {limit} in all, and beside them only blocks are lost that are answered and not yet written."
        )


@dataclass(frozen=True)
class Booked:
    """A script that writes into a book when each block begins, and what its answers cost."""

    script: Script
    book: str

    def __call__(self, block: pa.Table, ask: Ask) -> pa.Table:
        (start,) = block["start"].to_pylist()
        counter = Counter(ask)
        self._write({"start": start})
        table = self.script(block, counter)
        self._write({"start": start, "tokens": counter.output_tokens})
        return table

    def _write(self, entry: dict[str, int]) -> None:
        with open(self.book, "a") as stream:  # one short write: entries of two replicas don't mix
            stream.write(json.dumps(entry) + "\n")


def read_book(path: Path) -> tuple[set[int], dict[int, int]]:
    """Return the blocks that were begun, and the tokens of those that were answered."""
    text = path.read_text() if path.exists() else ""
    entries = [json.loads(line) for line in text.splitlines()]
    begun = {entry["start"] for entry in entries if "tokens" not in entry}
    return begun, {entry["start"]: entry["tokens"] for entry in entries if "tokens" in entry}


def measure_killed(
    questions: Path, folder: Path, task: TaskConfig, *, num_prompts: int, num_rows: int
) -> Killed:
    """Start the job, kill it after half of its blocks, and start it again."""
    num_blocks = -(-num_prompts // BLOCK_SIZE)
    books = [folder / name for name in ("first.jsonl", "second.jsonl")]
    options = {"folder": str(folder / "runs"), "questions": str(questions), "task": task.model_dump_json()}
    options |= {"num_prompts": num_prompts, "num_rows": num_rows}
    run_job({**options, "book": str(books[0])}, kill_after=num_blocks // 2)
    run_job({**options, "book": str(books[1])}, kill_after=None)
    (begun, answered), (begun_again, answered_again) = map(read_book, books)
    again = begun & begun_again
    kept = {start: tokens for start, tokens in answered.items() if start not in again}
    return Killed(
        num_blocks=num_blocks,
        num_kept=len(kept),
        num_again=len(again),
        tokens=sum(kept.values()) + sum(answered_again.values()),
        least_again=sum(tokens for start, tokens in answered.items() if start in again),
        most_again=sum(answered_again[start] for start in again),
    )


def run_job(options: dict[str, Any], *, kill_after: int | None) -> None:
    """Run a job in a session of its own; kill every process of it after so many answered blocks.

    Raises:
        RuntimeError: It failed, or ended before it was killed.
    """
    ray_dir = tempfile.mkdtemp(prefix="delia-")  # short: Ray has its sockets there
    log = Path(options["book"]).with_suffix(".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "RAY_TMPDIR": ray_dir},
            start_new_session=True,
        )
    try:
        give_up = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < give_up:
            if kill_after is not None and len(read_book(Path(options["book"]))[1]) >= kill_after:
                return
            time.sleep(0.05)
        if kill_after is not None or process.poll() != 0:
            raise RuntimeError(f"the job ended with {process.poll()}:\n{log.read_text()[-4000:]}")
    finally:
        kill_session(process)
        shutil.rmtree(ray_dir, ignore_errors=True)


def kill_session(leader: "subprocess.Popen[bytes]") -> None:
    """Kill every process of a session: those of a Ray cluster outlive the one that started them."""
    while pids := list_session(leader.pid):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        leader.poll()
        time.sleep(0.01)
    leader.wait()


def list_session(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and os.getsid(int(name)) == session:
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def main() -> None:
    """Be the job."""
    options = json.loads(sys.argv[1])
    connect(RayConfig())
    for module in (generation_setting, generation_pipeline):
        ray.cloudpickle.register_pickle_by_value(module)

    def run_booked(script: Script, *args: Any, **others: Any) -> Generator[pa.Table, None, None]:
        return run_script(Booked(script, options["book"]), *args, **others)

    task: Task = read_task(TaskConfig.model_validate_json(options["task"]))
    space = open_workspace(options["folder"], MODEL, task)
    config = plan_pool(
        Path(options["questions"]), num_prompts=options["num_prompts"], num_rows=options["num_rows"]
    )
    with patch.object(pipeline, "run_script", run_booked):
        build_pool(config, space, engine=ENGINES, log=lambda metrics, step: None)
    os._exit(0)  # threads of Ray that outlive the cluster's end can end a finished driver with an error


if __name__ == "__main__":
    main()

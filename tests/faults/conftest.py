"""What tests of killed pools share: a job in a session of its own, so all processes of its cluster are found."""

import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from delia.schema import Rejection
from delia.store.pools import Pool, read_pool, read_rejections

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("pool_driver.py")
driver = SimpleNamespace(**runpy.run_path(str(DRIVER)))
WORKERS = {"engine": "ray::MapWorker", "node": "ray::MapWorker", "acceptance": "ray::Acceptance"}
"""How Ray calls the process that is killed, or whose node is."""
PATIENCE = 600
"""Seconds for what takes a few on a machine with nothing else to do."""
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "platform"), "RAY_health_check_period_ms": "1000"}
"""Ray asks its nodes more often than each 3 s whether they live, so a dead one is missed sooner."""


def read_process(pid: int) -> tuple[int, str] | None:
    """Return a process's parent and command line; None if it has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else (int(parent), command)


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Job:
    """A job that is started, killed and started again; all its starts share one `output_dir`."""

    def __init__(self, output_dir: Path, script: Path, *arguments: str) -> None:
        self.output_dir, self.log = output_dir, output_dir.with_suffix(".log")
        self._command = [sys.executable, str(script), str(output_dir), *arguments]
        self._started: list[tuple[subprocess.Popen[bytes], str]] = []

    def start(self, **environment: str) -> None:
        ray_dir = tempfile.mkdtemp(prefix="delia-")  # short: Ray has its sockets there
        with self.log.open("ab") as stream:
            process = subprocess.Popen(
                self._command,
                stdout=stream,
                stderr=stream,
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, **environment, "RAY_TMPDIR": ray_dir},
                start_new_session=True,
            )
        self._started.append((process, ray_dir))

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._started[-1][0]

    def finish(self) -> Pool:
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()[-6000:]
        return read_pool(self.find_pool())

    def find_pool(self) -> str:
        return str(driver.find_pool(driver.open_space(str(self.output_dir))))

    def list_chunks(self) -> dict[str, int]:
        """Return the finished chunks, and when each was written."""
        chunks = {}
        for path in (self.output_dir / "candidates").glob("*/*.parquet"):
            chunks[str(path)] = path.stat().st_mtime_ns
        return chunks

    def wait_for(self, found: Callable[[], object], what: str) -> None:
        give_up = time.monotonic() + PATIENCE
        while not found():
            assert self.process.poll() is None, f"no {what}:\n{self.log.read_text()[-6000:]}"
            assert time.monotonic() < give_up, f"no {what}:\n{self.log.read_text()[-6000:]}"
            time.sleep(0.01)

    def list_processes(self, session: int) -> dict[int, tuple[int, str]]:
        processes = {}
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and os.getsid(int(name)) == session and (item := read_process(int(name))):
                    processes[int(name)] = item
            except ProcessLookupError:
                continue
        return processes

    def list_workers(self, kind: str) -> list[int]:
        processes = self.list_processes(self.process.pid).items()
        return sorted(pid for pid, (_, command) in processes if command.startswith(WORKERS[kind]))

    def find_node(self, worker: int) -> list[int]:
        """Return all processes of the node that a worker runs on: its raylet and what that has started."""
        processes = self.list_processes(self.process.pid)
        found = [processes[worker][0]] if worker in processes else []
        assert all("raylet" in processes[pid][1] for pid in found)
        for pid in found:
            found += [child for child, (parent, _) in processes.items() if parent == pid]
        return found

    def kill(self, kind: str, rng: random.Random, *, least: int, most: int) -> int:
        """Kill after `least` to `most` chunks, a moment later; return how many chunks it was."""
        num_chunks, seconds = rng.randint(least, most), rng.uniform(0, 0.3)
        self.wait_for(lambda: len(self.list_chunks()) >= num_chunks, f"{num_chunks} chunks")
        if kind in WORKERS:
            self.wait_for(lambda: self.list_workers(kind), kind)
        time.sleep(seconds)
        assert self.process.poll() is None, "it had ended before it was killed"
        if kind == "cluster":
            self.end()
        elif kind == "driver":
            self.process.kill()
            self.process.wait()
        else:
            victims: list[int] = []
            while not victims:
                self.wait_for(lambda: self.list_workers(kind), kind)
                worker = rng.choice(self.list_workers(kind) or [0])
                victims = self.find_node(worker) if kind == "node" else [pid for pid in (worker,) if pid]
            kill_all(victims)
        return num_chunks

    def end(self) -> None:
        """Kill what is left of every start, and what Ray left on the disk."""
        for process, ray_dir in self._started:
            while pids := list(self.list_processes(process.pid)):
                kill_all(pids)
                time.sleep(0.01)
            process.wait()
            shutil.rmtree(ray_dir, ignore_errors=True)


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(
        name: str = "killed",
        *,
        script: Path = DRIVER,
        engine: str = "scripted",
        num_nodes: int = 0,
        **environment: str,
    ) -> Job:
        jobs.append(Job(tmp_path / name, script, engine, str(num_nodes)))
        jobs[-1].start(**environment)
        return jobs[-1]

    yield make
    for job in jobs:
        job.end()


@pytest.fixture
def whole(local_stage, tmp_path: Path) -> Pool:
    """The pool of a job that nobody kills, made in this process."""
    local_stage()
    engine = driver.ENGINES["scripted"].model_copy(update={"scripted": driver.ScriptedConfig()})
    space = driver.open_space(str(tmp_path / "whole"))
    return driver.build_pool(driver.POOL, space, engine=engine, log=lambda metrics, step: None)


@pytest.fixture
def rejections(whole: Pool, tmp_path: Path) -> list[Rejection]:
    """What the pool `whole` rejected."""
    return read_rejections(driver.find_pool(driver.open_space(str(tmp_path / "whole"))))

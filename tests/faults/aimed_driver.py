"""The driver of `pool_driver.py` that is killed at a point of its acceptance, or leaves one behind that writes on.

DELIA_AIM=point:victims python aimed_driver.py output_dir scripted 0       victims: both | acceptance | driver
python aimed_driver.py serve           # without Ray; reads lines of output_dir, point and victims between tabs

Beside `output_dir` lie files: .asked has the chunks that engines were asked for, .reached is there once the point was
reached (who comes there later goes on past it), and .orphan once the acceptance that was left behind has ended.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from delia.flow import acceptance, pool, screening
from delia.store import pools
from delia.store.tables import MANIFEST, join
from delia.synthesize import pipeline

driver = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("pool_driver.py"))))
PATIENCE = 600
"""Seconds that an acceptance that was left behind waits for its successor."""


@dataclass(frozen=True)
class Aim:
    """Who dies where; in the driver and sent to the acceptance."""

    output_dir: Path
    point: str
    victims: str
    driver: int

    def reach(self, point: str) -> bool:
        """Kill the victims if this is the point, once; return whether this process is what was left behind."""
        reached = self.output_dir.with_suffix(".reached")
        if point != self.point or reached.exists():
            return False
        reached.touch()
        if (
            self.victims == "driver" and os.fork() == 0
        ):  # Ray ends an actor with its driver, but not a fork of it
            os.setpgid(0, 0)
            return True
        if self.victims != "acceptance":
            os.kill(self.driver, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        return False


class AimedAcceptance(acceptance.Acceptance):
    """An acceptance with points at which it or its driver dies."""

    aim: Aim
    is_orphan = False
    num_closed = num_taken = 0

    def take(self, chunk: Any) -> Any:
        """Decide, and reach the middle of round two with its second chunk."""
        progress = super().take(chunk)
        self.num_taken += self.num_closed == 1
        if self.num_taken == 2:
            self.aim.reach("in round two")
        return progress

    def close(self, **options: Any) -> None:
        """Reach the last chunk of a round, which is stored and decided on."""
        self.num_closed += 1
        self.aim.reach(f"after the chunks of round {('one', 'two')[self.num_closed - 1]}")
        super().close(**options)

    def write(self, address: str, **options: Any) -> Any:
        """Write with points in each file and between them."""
        open_table, commit = pools.open_table, pools.commit

        @contextmanager
        def open_aimed(path: str, schema: Any) -> Iterator[Any]:
            name = path.rpartition("/")[2]
            with open_table(path, schema) as writer:
                yield writer
                self.is_orphan |= self.aim.reach(f"in {name}")
                give_up = time.monotonic() + PATIENCE
                while self.is_orphan and not Path(address, MANIFEST).exists():  # its successor is the first
                    assert time.monotonic() < give_up, "no successor"
                    time.sleep(0.01)
            self.aim.reach(f"after {name}")

        def commit_aimed(path: str, manifest: Any) -> None:
            commit(path, manifest)
            self.aim.reach(f"after {MANIFEST}")

        pools.open_table, pools.commit = open_aimed, commit_aimed
        try:
            return super().write(address, **options)
        finally:
            pools.open_table, pools.commit = open_table, commit
            if self.is_orphan:
                error = sys.exc_info()[1]
                self.aim.output_dir.with_suffix(".orphan").write_text(repr(error) if error else "whole")
                os._exit(0)


def ask_noted(dialogue: Any, blocks: Any, **fields: Any) -> Any:
    """Run a script, after a note of the chunks that are asked for."""
    output_dir = Path(sys.argv[1])
    with output_dir.with_suffix(".asked").open("a") as file:
        for block in blocks:
            (item,) = block.to_pylist()
            chunk = pipeline.Chunk(0.0, **item)
            folder = join(str(output_dir), "candidates", dialogue.part(chunk.source)[1].recipe)
            file.write(join(folder, chunk.name) + "\n")
    return run_script(dialogue, blocks, **fields)


def build(output_dir: Path) -> Any:
    """Make the pool."""
    engine = driver.EngineConfig(kind="scripted")
    space = driver.open_space(str(output_dir))
    return driver.build_pool(driver.POOL, space, engine=engine, log=lambda metrics, step: None)


def serve() -> None:
    """For each line of the input make a pool in a process that holds driver and acceptance; print how it ended.

    A test's own process is no parent for them: it may hold a driver of Ray, and what its forks do with their
    copies of Ray's objects and sockets takes that driver down.
    """
    local_stage = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["LocalStage"]
    pipeline.run_script = local_stage()
    pool.host_acceptance = lambda *args, **options: nullcontext(AimedAcceptance(*args, **options))
    pool.host_screeners = lambda *args, **options: nullcontext(screening.Screeners(()))
    for line in sys.stdin:
        output_dir, point, victims = line.rstrip("\n").split("\t")
        if (pid := os.fork()) == 0:
            try:
                AimedAcceptance.aim = Aim(Path(output_dir), point, victims, os.getpid())
                build(Path(output_dir))
            finally:
                os._exit(1)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        sys.exit(serve())
    point, _, victims = os.environ.get("DELIA_AIM", "").partition(":")
    AimedAcceptance.aim = Aim(Path(sys.argv[1]), point, victims, os.getpid())
    acceptance.Acceptance = AimedAcceptance
    run_script, pipeline.run_script = pipeline.run_script, ask_noted
    driver.main()

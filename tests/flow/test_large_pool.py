"""A pool of millions: its rows pass by the driver, whose memory stays as it was.

DELIA_LARGE_ROWS=1000000 makes it shorter; 10 million rows take forty minutes on two quiet cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from delia.store.pools import KIND, ROWS
from delia.store.tables import read_manifest

NUM_ROWS = int(os.environ.get("DELIA_LARGE_ROWS", "10000000"))
MAX_GROWTH = 32 * 2**20
"""Bytes; the rows' ids alone are ten times that, at ten million, and Ray's notes of the chunks half of it."""


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_rows_of_a_large_pool_leave_the_driver_as_small_as_its_first_ones_did(tmp_path):
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "large_driver.py"), str(tmp_path / "runs"), str(NUM_ROWS)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *reports, pool = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(*reports, pool, sep="\n")

    address = next((tmp_path / "runs" / "pools").iterdir())
    manifest = read_manifest(str(address), kind=KIND)
    assert pool["counts"]["accepted"] == manifest.counts["accepted"] == NUM_ROWS
    assert len(reports) > 40
    assert reports[-1]["seen"] > 0.95 * NUM_ROWS
    early = max(report["bytes"] for report in reports[:5])
    assert max(report["bytes"] for report in [*reports, pool]) - early < MAX_GROWTH
    assert (address / ROWS).stat().st_size > 10 * NUM_ROWS

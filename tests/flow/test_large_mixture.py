"""A mixture larger than the driver's share of memory: texts and tokens pass it by, ids and facts stay."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from delia.schema import Message, Row
from delia.store.candidates import to_row_table
from delia.store.pools import write_pool

NUM_ROWS = int(os.environ.get("DELIA_LARGE_MIXTURE", "40000"))
NUM_WORDS = 800
MAX_BYTES_A_ROW = 1200
"""An id is a string of Python in two lists, an Arrow string and a hash at times; a row's text is 3200 bytes, as
objects of Python and encoded some 30,000."""


@pytest.mark.soak
def test_a_driver_holds_no_texts_and_no_tokens_of_the_rows_that_are_trained_on(tmp_path):
    text = "fox " * NUM_WORDS
    tables = [
        to_row_table(
            [
                Row(
                    row_id=f"{index:032x}",
                    index=index,
                    source="s",
                    messages=(
                        Message(role="user", content=f"{text}{index}"),
                        Message(role="assistant", content="no"),
                    ),
                )
                for index in range(start, start + 250)
            ]
        )
        for start in range(0, NUM_ROWS, 250)
    ]
    address, here = str(tmp_path / "pool"), Path(__file__).parent
    write_pool(address, rows=tables, rejections=[], fingerprint="f", parents={}, details={})
    done = subprocess.run(
        [sys.executable, str(here / "encoding_driver.py"), address],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, *reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(first, *reports, sep="\n")
    assert reports[-1]["rows"] == NUM_ROWS + 1
    assert reports[-1]["tokens"] > NUM_ROWS * NUM_WORDS
    assert len(reports) > 30
    growth = max(report["bytes"] for report in reports) - first["bytes"]
    assert growth < MAX_BYTES_A_ROW * NUM_ROWS

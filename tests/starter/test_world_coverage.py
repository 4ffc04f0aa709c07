"""The cells of the starter's world: every drawn question is read back as what it is."""

import pytest
from world_coverage import CELLS, measure_coverage, read_cell

from delia.flow.workspace import open_workspace
from delia.generate.engine import EngineConfig
from delia.recipes.starter import STARTER, starter_sep
from delia.rng import make_random
from delia.starter.world import draw_item
from delia.store.tasks import read_task


def test_a_question_of_the_world_is_read_as_its_kind_and_format():
    rng = make_random("coverage")
    items = [item for item in (draw_item(rng) for _ in range(2000)) if not item.in_system]
    read = {item.prompt()[-1]["content"]: read_cell(item.prompt()[-1]["content"]) for item in items}

    assert [
        item for item in items if read[item.prompt()[-1]["content"]] != (item.kind.name, item.request.cell)
    ] == []
    assert set(read.values()) <= CELLS
    assert len(CELLS) == 23 * 17


@pytest.mark.parametrize("text", ["", "tell me a joke .", "count the words"])
def test_another_text_is_of_no_cell(text):
    assert read_cell(text) is None


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_five_thousand_samples_reach_nearly_every_cell(cluster, tmp_path):
    space = open_workspace(str(tmp_path), STARTER, read_task(starter_sep().task))
    share, _ = measure_coverage(space, num_rows=5000, engine=EngineConfig(num_replicas=2))
    assert share >= 0.95

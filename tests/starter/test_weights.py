"""The shipped starter model: the file that was measured, and how well it knows its world."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable

import pytest

from delia.starter.formats import FORMAT_BY_NAME, PLAIN
from delia.starter.kinds import KIND_BY_NAME
from delia.starter.pretrain import load_saved, score_items
from delia.starter.tokenizer import build_tokenizer, save_tokenizer
from delia.starter.world import Item, draw_held_out
from delia.store.models import ModelConfig, resolve_model

WEIGHTS = resolve_model(ModelConfig(path="package://delia.starter/weights"))
CELLS = {PLAIN, *FORMAT_BY_NAME, *(f"no-{name}" for name in FORMAT_BY_NAME)}
MAX_BYTES = 12 * 2**20


@pytest.fixture(scope="module")
def scores() -> list[tuple[Item, bool]]:
    """3,000 held-out items, and whether the greedy answer of the shipped file is exactly right."""
    items = draw_held_out("test", num_items=3000)
    return list(zip(items, score_items(load_saved(WEIGHTS), build_tokenizer(), items), strict=True))


def find_weak(
    scores: list[tuple[Item, bool]], name_of: Callable[[Item], str]
) -> tuple[set[str], dict[str, float]]:
    """Return every group, and the share of right answers of those below 0.90."""
    hits = defaultdict(list)
    for item, is_right in scores:
        hits[name_of(item)].append(is_right)
    share_by_name = {name: sum(values) / len(values) for name, values in hits.items()}
    return set(hits), {name: share for name, share in share_by_name.items() if share < 0.90}


def test_the_weights_are_the_file_whose_hash_is_shipped_beside_it():
    data = (WEIGHTS / "model.safetensors").read_bytes()

    assert (WEIGHTS / "SHA256").read_text() == f"{hashlib.sha256(data).hexdigest()}  model.safetensors\n"


def test_the_model_is_small_enough_for_a_repository():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= MAX_BYTES


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(tmp_path):
    save_tokenizer(tmp_path)

    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((WEIGHTS / name).read_text()) == json.loads((tmp_path / name).read_text())
    name = "chat_template.jinja"
    assert (WEIGHTS / name).read_text() == (tmp_path / name).read_text()


def test_the_vocabulary_of_model_and_tokenizer_have_one_size():
    assert json.loads((WEIGHTS / "config.json").read_text())["vocab_size"] == len(build_tokenizer())


def test_the_model_answers_97_of_100_held_out_questions_exactly(scores):
    assert sum(is_right for _, is_right in scores) / len(scores) >= 0.97


def test_the_model_answers_90_of_100_held_out_questions_of_every_kind(scores):
    kinds, weak = find_weak(scores, lambda item: item.kind.name)

    assert kinds == set(KIND_BY_NAME)
    assert weak == {}


def test_the_model_answers_90_of_100_held_out_questions_in_every_format_asked_for_or_forbidden(scores):
    cells, weak = find_weak(scores, lambda item: item.request.cell)

    assert cells == CELLS
    assert weak == {}

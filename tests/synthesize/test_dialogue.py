"""A source's dialogue: what it asks with, what its recipe is a hash of, and what it rejects whatever the method."""

import dataclasses
import pkgutil
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from delia.config import MethodConfig
from delia.generate.engine import Completion, Request, SamplingConfig
from delia.methods import synthesizer
from delia.schema import TEMPLATE_LEAK, Message, Rejection, Row, SeedTask
from delia.starter.task_files import build_lingo
from delia.store.candidates import Candidate, from_candidate_table
from delia.store.models import ModelConfig
from delia.synthesize.dialogue import Dialogue
from delia.synthesize.pipeline import Chunk
from delia.synthesize.sources import SourceConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
MAGPIE = "magpie.Magpie"
REWRITING = "rewriting.Rewriting"
QUESTION = (Message(role="user", content="say owl in lingo"), Message(role="assistant", content="mu"))
SEED = SeedTask(task_id="t0", phrasing="in lingo", messages=QUESTION)


def make_dialogue(
    method: str = MAGPIE, *, knobs: dict[str, str] | None = None, max_tokens: int = 16, **fields: object
) -> Dialogue:
    """Return the dialogue of one source, called `s` unless `sources` are given."""
    chosen = MethodConfig(method=f"{synthesizer.__name__}.{method}", knobs=knobs or {})
    own = {
        "sources": (SourceConfig(name="s", synthesizer=chosen, num_rows=10),),
        "model": STARTER,
        "seed_tasks": (SEED,),
        "max_length": 512,
    }
    return Dialogue(sampling=SamplingConfig(max_tokens=max_tokens), **(own | fields))


def find_recipe(method: str = MAGPIE, **fields: Any) -> str:
    dialogue = make_dialogue(method, **fields)
    return dialogue.part(dialogue.sources[0].name)[1].recipe


# ---- what a source asks with


@pytest.mark.parametrize("method", [module.name for module in pkgutil.iter_modules(synthesizer.__path__)])
def test_only_a_method_of_one_prompt_asks_alike(method: str):
    """Others walk a grid or rows, or show some of them; of a task of one row some have no more than one prompt."""
    name = "S3FT" if method == "s3ft" else method.title().replace("_", "")
    many = make_dialogue(f"{method}.{name}", seed_tasks=build_lingo().rows_by_split["train"])
    one = make_dialogue(f"{method}.{name}")

    assert many.asks_alike("s") is (method == "magpie")
    assert one.asks_alike("s") is (method in ("magpie", "rewriting", "self_instruct"))


# ---- identity


def test_whatever_decides_the_text_changes_the_recipe(tmp_path):
    """A knob, sampling, model, dtype, declared token, long instruction, seed text, phrasing, seed id: no two alike."""
    weights = tmp_path / "weights"
    shutil.copytree(Path("platform/delia/starter/weights").resolve(), weights)
    config = weights / "config.json"
    config.write_text(config.read_text() + "\n")
    other_text = (Message(role="user", content="say cat in lingo"), SEED.messages[1])
    recipes = [
        find_recipe(),
        find_recipe(knobs={"system": "other"}),
        find_recipe(max_tokens=17),
        find_recipe(model=ModelConfig(path=str(weights))),
        find_recipe(model=STARTER.model_copy(update={"dtype": "bfloat16"})),
        find_recipe(max_length=511),
        find_recipe(tokens=("<sep>",)),
        find_recipe(REWRITING),
        find_recipe(REWRITING, long_instruction="at length"),
        find_recipe(REWRITING, seed_tasks=(dataclasses.replace(SEED, messages=other_text),)),
        find_recipe(REWRITING, seed_tasks=(dataclasses.replace(SEED, phrasing="owl"),)),
        find_recipe(REWRITING, seed_tasks=(dataclasses.replace(SEED, task_id="t1"),)),
        find_recipe(REWRITING, seed_tasks=()),
    ]

    assert len(set(recipes)) == len(recipes)


def test_what_decides_no_text_leaves_the_recipe_as_it_is():
    (source,) = make_dialogue().sources
    other = source.model_copy(update={"name": "self", "num_rows": 99, "max_candidates": 100})

    assert find_recipe(sources=(other,)) == find_recipe()


def test_the_task_decides_nothing_of_a_method_that_is_not_given_it():
    """A corrected row of a task does not cost its user the diverse pool."""
    fields = {"seed_tasks": (), "long_instruction": "at length"}
    assert find_recipe(**fields) == find_recipe()
    _, context = make_dialogue(long_instruction="at length").part("s")
    assert (context.seed_tasks, context.long_instruction) == ((), "")


# ---- what is rejected whatever the method


def answer_with(*turns: list[int]) -> Callable[[Sequence[Request]], list[Completion]]:
    """Return an engine that says the same to every candidate, turn by turn."""
    left = iter(turns)

    def ask(requests: Sequence[Request]) -> list[Completion]:
        ids = tuple(next(left))
        return [Completion(request_id=i.request_id, token_ids=ids, finish_reason="stop") for i in requests]

    return ask


def make_one(dialogue: Dialogue, *turns: list[int]) -> Candidate:
    block = Chunk(0.0, "s", 0, 1).to_block()
    return from_candidate_table(dialogue(block, answer_with(*turns)))[0]


@pytest.mark.parametrize(
    ("place", "token", "text"), [(4, "<|user|>", "{}<|user|>{}"), (6, "<sep>", "{}<sep>{}")]
)
@pytest.mark.parametrize("turn", [0, 1])
def test_an_answer_with_a_control_or_task_token_is_rejected_with_its_text(turn, place, token, text):
    dialogue = make_dialogue(task_tokens={"<sep>": 6}, tokens=("<sep>",))
    chat = dialogue.part("s")[1].chat
    words = chat.tokenizer.encode(" it is 4", add_special_tokens=False)
    turns = [words] * turn + [[*words, place, *words]]
    candidate = make_one(dialogue, *turns)

    assert isinstance(make_one(dialogue, words, words), Row)
    assert isinstance(candidate, Rejection)
    assert candidate.reason == TEMPLATE_LEAK
    assert candidate.text == text.format(" it is 4", " it is 4")
    assert candidate.num_output_tokens == sum(map(len, turns))


def test_a_prompt_without_room_is_rejected_with_what_was_spent_before_it():
    dialogue = make_dialogue(max_length=40)
    words = dialogue.part("s")[1].chat.tokenizer.encode(" it is 4" * 12, add_special_tokens=False)
    candidate = make_one(dialogue, words)

    assert isinstance(candidate, Rejection)
    assert (candidate.reason, candidate.num_output_tokens) == ("prompt_too_long", len(words))

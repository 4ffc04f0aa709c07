"""A source's dialogue: what it asks with, what its recipe is a hash of, and what it rejects whatever the method."""

import dataclasses
import pkgutil
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

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
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
MAGPIE = "delia.methods.synthesizer.magpie.Magpie"
SYSTEM = "name the colour of the red fox , the grey wolf and the black cat ."
SEED = SeedTask(
    task_id="t0",
    phrasing="in lingo",
    messages=(Message(role="user", content="say fox in lingo"), Message(role="assistant", content="ka mu")),
)


def make_source(
    name: str = "magpie", *, system: str = SYSTEM, num_rows: int = 10, **fields: int
) -> SourceConfig:
    method = MethodConfig(method=MAGPIE, knobs={"system": system})
    return SourceConfig(name=name, synthesizer=method, num_rows=num_rows, **fields)


def make_config(*sources: SourceConfig, chunk_size: int = 8, max_tokens: int = 16) -> SynthesizeConfig:
    sampling = SamplingConfig(max_tokens=max_tokens)
    return SynthesizeConfig(sources=sources or (make_source(),), sampling=sampling, chunk_size=chunk_size)


def make_dialogue(config: SynthesizeConfig, **fields: object) -> Dialogue:
    own = {"model": STARTER, "seed_tasks": (SEED,), "max_length": config.max_length, **fields}
    return Dialogue(sources=config.sources, sampling=config.sampling, **own)


def find_recipe(config: SynthesizeConfig, **fields: object) -> str:
    return make_dialogue(config, **fields).part(config.sources[0].name)[1].recipe


# ---- what a source asks with


@pytest.mark.parametrize("method", [module.name for module in pkgutil.iter_modules(synthesizer.__path__)])
def test_only_a_method_of_one_prompt_asks_alike(method: str):
    """Others walk a grid or rows, or show some of them; of a task of one row some have no more than one prompt."""
    name = "S3FT" if method == "s3ft" else method.title().replace("_", "")
    config = MethodConfig(method=f"{synthesizer.__name__}.{method}.{name}")
    source = SourceConfig(name="s", synthesizer=config, num_rows=1)
    many = make_dialogue(make_config(source), seed_tasks=build_lingo().rows_by_split["train"])
    one = make_dialogue(make_config(source))

    assert many.asks_alike("s") is (method == "magpie")
    assert one.asks_alike("s") is (method in ("magpie", "rewriting", "self_instruct"))


# ---- identity


def test_whatever_decides_the_text_changes_the_recipe(tmp_path):
    """A knob, sampling, model, dtype, declared token, long instruction, seed text, phrasing, seed id: no two alike."""
    weights = tmp_path / "weights"
    shutil.copytree(Path("platform/delia/starter/weights").resolve(), weights)
    config = weights / "config.json"
    config.write_text(config.read_text() + "\n")
    method = MethodConfig(method="delia.methods.synthesizer.rewriting.Rewriting")
    rewriting = SourceConfig(name="rewriting", synthesizer=method, num_rows=10)
    other_text = (Message(role="user", content="say cat in lingo"), SEED.messages[1])
    recipes = [
        find_recipe(make_config()),
        find_recipe(make_config(make_source(system="other"))),
        find_recipe(make_config(max_tokens=17)),
        find_recipe(make_config(), model=ModelConfig(path=str(weights))),
        find_recipe(make_config(), max_length=511),
        find_recipe(make_config(rewriting)),
        find_recipe(make_config(rewriting), long_instruction="at length"),
        find_recipe(make_config(rewriting), seed_tasks=(dataclasses.replace(SEED, messages=other_text),)),
        find_recipe(make_config(rewriting), seed_tasks=(dataclasses.replace(SEED, phrasing="fox"),)),
        find_recipe(make_config(rewriting), seed_tasks=(dataclasses.replace(SEED, task_id="t1"),)),
        find_recipe(make_config(rewriting), seed_tasks=()),
        find_recipe(make_config(), tokens=("<sep>",)),
        find_recipe(make_config(), model=STARTER.model_copy(update={"dtype": "bfloat16"})),
    ]

    assert len(set(recipes)) == len(recipes)


def test_what_decides_no_text_leaves_the_recipe_as_it_is():
    other = make_config(make_source("self", num_rows=99, max_candidates=100), chunk_size=64)

    assert find_recipe(other) == find_recipe(make_config())


def test_the_task_decides_nothing_of_a_method_that_is_not_given_it():
    """A corrected row of a task does not cost its user the diverse pool."""
    fields = {"seed_tasks": (), "long_instruction": "at length"}
    assert find_recipe(make_config(), **fields) == find_recipe(make_config())
    _, context = make_dialogue(make_config(), long_instruction="at length").part("magpie")
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
    block = Chunk(0.0, "magpie", 0, 1).to_block()
    return from_candidate_table(dialogue(block, answer_with(*turns)))[0]


@pytest.mark.parametrize(
    ("place", "token", "text"), [(4, "<|user|>", "{}<|user|>{}"), (6, "<sep>", "{}<sep>{}")]
)
@pytest.mark.parametrize("turn", [0, 1])
def test_an_answer_with_a_control_or_task_token_is_rejected_with_its_text(turn, place, token, text):
    dialogue = make_dialogue(make_config(), task_tokens={"<sep>": 6}, tokens=("<sep>",))
    chat = dialogue.part("magpie")[1].chat
    words = chat.tokenizer.encode(" it is 4", add_special_tokens=False)
    turns = [words] * turn + [[*words, place, *words]]
    candidate = make_one(dialogue, *turns)

    assert isinstance(make_one(dialogue, words, words), Row)
    assert isinstance(candidate, Rejection)
    assert candidate.reason == TEMPLATE_LEAK
    assert candidate.text == text.format(" it is 4", " it is 4")
    assert candidate.num_output_tokens == sum(map(len, turns))


def test_a_prompt_without_room_is_rejected_with_what_was_spent_before_it():
    dialogue = make_dialogue(make_config(), max_length=54)
    words = dialogue.part("magpie")[1].chat.tokenizer.encode(" it is 4" * 12, add_special_tokens=False)
    candidate = make_one(dialogue, words)

    assert isinstance(candidate, Rejection)
    assert (candidate.reason, candidate.num_output_tokens) == ("prompt_too_long", len(words))

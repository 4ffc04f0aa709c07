"""Every recipe of diverse data, run as its job on the starter by vLLM: fewer rows, all else as it stands.

The starter's world has no words for what Self-Instruct, Evol-Instruct and the grid ask: of these it is held that
they ask it, and of what came that it was answered, counted and told apart. What its world does know, it must do.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from delia.config import override
from delia.flow.adapt import AdaptConfig, open_job
from delia.flow.stages import synthesize_pool
from delia.flow.trial import plan_arm
from delia.flow.workspace import Workspace
from delia.generate.engine import Completion, EngineConfig, Request
from delia.generate.vllm_engine import VllmEngine
from delia.methods.synthesizer.attribute_grid import ATTRIBUTES, AttributeGrid
from delia.recipes.command_line import list_recipes, load_recipe
from delia.recipes.starter import STARTER
from delia.schema import Rejection, Row
from delia.starter.formats import ask_phrasings
from delia.starter.task_files import TOKEN
from delia.store.pools import Pool, read_rejections
from delia.synthesize.dialogue import Dialogue
from delia.synthesize.socket import SynthesisContext, Synthesizer

NUM_ROWS, NUM_FED = 48, 24  # of a source, and of one that feeds on others
DIVERSE_RATIO = 0.2  # of 100 rows of the task


@dataclass(frozen=True, kw_only=True)
class Made:
    """A recipe's settings, and the pool that came of them."""

    config: AdaptConfig
    space: Workspace
    pool: Pool
    rejections: Sequence[Rejection]

    def rows(self, source: str) -> list[Row]:
        return [row for row in self.pool.rows if row.source == source]

    def open(self, name: str) -> tuple[Synthesizer, SynthesisContext]:
        """Return a source's method and what it could see, and hold that its rows came of no more and no less.

        The id of a row is a hash of all that decides it, the accepted rows that its source feeds on included.
        """
        synthesize = self.config.pool.synthesize
        (source,) = (source for source in synthesize.sources if source.name == name)
        tokens = self.space.chat.token_ids
        dialogue = Dialogue(
            sources=(source,),
            sampling=synthesize.sampling,
            model=source.model or self.space.model,
            max_length=synthesize.max_length,
            task_tokens={} if source.model else dict(tokens),
            tokens=tuple(tokens),
            seed_tasks=self.space.task.rows_by_split["train"],
            long_instruction=self.space.task.long_instruction,
            closed={other: tuple(self.rows(other)) for other in source.feeds_on},
        )
        method, context = dialogue.part(name)
        assert [row.row_id for row in self.rows(name)] == [context.row_id(r.index) for r in self.rows(name)]
        return method, context


def show(context: SynthesisContext, request: Request) -> str:
    return context.chat.decode(request.prompt_ids)


def run_recipe(name: str, folder: Path) -> Made:
    """Run `jobs/synthesize.py NAME` with fewer rows."""
    recipe = load_recipe(name)
    settings = [f"output_dir={folder}", "engine.num_replicas=1", f"arm.mix.diverse_ratio={DIVERSE_RATIO}"]
    settings.append("pool.synthesize.chunk_size=32")
    for place, source in enumerate(recipe.pool.synthesize.sources):
        num_rows = NUM_FED if source.feeds_on else NUM_ROWS
        settings.append(f"pool.synthesize.sources.{place}.num_rows={num_rows}")
    config = override(recipe, settings)
    said: list[str] = []
    pool = synthesize_pool(config, say=said.append)
    space = open_job(config)
    address = space.address("pools", pool.manifest.fingerprint)
    assert said[1].startswith(f"pool: {address}, root {pool.manifest.root}")
    return Made(config=config, space=space, pool=pool, rejections=read_rejections(address))


def check_pool(made: Made) -> None:
    """As many rows of each source as were asked for, a report of all, and a mixture that takes its shares."""
    wanted = {source.name: source.num_rows for source in made.config.pool.synthesize.sources}
    details = made.pool.manifest.details
    leaks = sum(item.reason == "template_leak" for item in made.rejections)

    assert Counter(row.source for row in made.pool.rows) == wanted
    assert "stopped" not in details
    assert details["diversity"]["num_rows"] == sum(wanted.values())
    assert set(details["diversity"]["novelty"]) == set(wanted)
    assert details["cost"]["output_tokens"] > 0
    assert leaks <= 0.1 * len(made.pool.rows)
    taken = set(plan_arm(made.config.arm, made.space, made.pool).mixture.row_ids)
    assert {row.source for row in made.pool.rows if row.row_id in taken} == set(made.config.arm.mix.shares)


def check_self_instruct(made: Made) -> None:
    """Each round is shown the task's rows, the second two of the first's too; no row says what it was shown."""
    seeds = [task.prompt[-1].content for task in made.space.task.rows_by_split["train"]]
    written = [row.instruction for row in made.rows("first")]
    for name, num_closed in (("first", 0), ("second", 2)):
        method, context = made.open(name)
        masked = {context.mask(text, "JSON") for text in seeds}
        for row in made.rows(name):
            lines = show(context, method(context, row.index, [])).replace(" . ", ". ")
            assert sum(text.replace(" . ", ". ") in lines for text in masked) >= 6
            assert sum(text.replace(" . ", ". ") in lines for text in written) >= num_closed
    own = {row.instruction for row in made.pool.rows}
    assert not own & {*seeds, *masked}
    assert {item.reason for item in made.rejections} <= {"duplicate", "unfinished"}


def check_evol_instruct(made: Made) -> None:
    """A generation asks for each instruction of the one before, changed, and keeps none as it was."""
    for name, parents in (("once", made.rows("magpie")), ("twice", made.rows("once"))):
        method, context = made.open(name)
        for row in made.rows(name):
            parent = parents[row.index % len(parents)].instruction
            assert parent in show(context, method(context, row.index, []))
            assert row.instruction != parent
            assert method.ending not in row.instruction


def check_attribute_grid(made: Made) -> None:
    """Each candidate is asked with a combination of its own, which reach every value of every attribute."""
    method, context = made.open("grid")
    assert isinstance(method, AttributeGrid)
    indices = sorted(item.index for item in (*made.pool.rows, *made.rejections))
    chosen = [method.choose(index) for index in indices]

    assert len({tuple(places.items()) for places in chosen}) == len(indices)
    for name, values in ATTRIBUTES.items():
        assert {places[name] for places in chosen} == set(values)
    assert all(value in show(context, method(context, indices[3], [])) for value in chosen[3].values())
    assert {item.reason for item in made.rejections} <= {"duplicate", "unfinished"}


def check_rewriting(made: Made) -> None:
    """A row of the task under another wording that asks for the same, with its token, question and answer."""
    made.open("reworded")
    seeds = made.space.task.rows_by_split["train"]
    rows = made.rows("reworded")
    wordings = []
    for row in rows:
        seed = seeds[row.index % len(seeds)]
        before, _, after = seed.prompt[-1].content.partition(seed.phrasing)
        assert row.messages[-1].content == seed.reference
        assert row.instruction.startswith(before)
        assert row.instruction.endswith(after)
        wordings.append(row.instruction.removeprefix(before).removesuffix(after))
        assert wordings[-1] != seed.phrasing
        token_id = made.space.chat.token_ids[TOKEN]
        assert made.space.chat.encode_prompt(row.messages[:-1]).count(token_id) == 1
    asking = set(ask_phrasings(TOKEN))
    assert sum(text in asking for text in wordings) >= 0.9 * len(rows)
    assert len(set(wordings)) >= 0.5 * len(rows)


def check_demonstrated(made: Made) -> None:
    """The reference is shown as the model's own answer, and the question asked again at the authors' temperature."""
    method, context = made.open("shown")
    given = made.rows("given")
    for row in made.rows("shown"):
        question, reference = given[row.index].messages
        request = method(context, row.index, [])
        assert list(request.prompt_ids) == context.chat.encode_prompt((question, reference, question))
        assert request.temperature == 0.7
        assert row.messages[:-1] == (question,)


def check_teacher(made: Made) -> None:
    """The same questions, answered by the model of the source, which has no rows for the task's tokens."""
    _, context = made.open("taught")
    given = made.rows("given")
    assert dict(context.chat.token_ids) == {}
    assert all(row.instruction == given[row.index].instruction for row in made.rows("taught"))


def check_imported(made: Made) -> None:
    """The rows of the file in its order at no cost, and the model's own answers to them."""
    made.open("own")
    given, own = made.rows("given"), made.rows("own")
    assert [row.index for row in given] == list(range(NUM_ROWS))
    assert all(row.num_output_tokens for row in given)
    assert [row.instruction for row in own] == [given[row.index].instruction for row in own]
    assert all(row.num_output_tokens for row in own)
    changed = sum(row.messages[-1] != given[row.index].messages[-1] for row in own)
    assert changed >= 0.5 * len(own)  # the starter has never seen this language translated


def check_s3ft(made: Made, ask: Callable[[list[Request]], list[Completion]]) -> None:
    """Said again with the same seeds: an answer of its own was judged equal, in JSON, or the reference stands."""
    method, context = made.open("own")
    steps: dict[int, Request | Row] = {row.index: method(context, row.index, []) for row in made.rows("own")}
    said: dict[int, list[Completion]] = {index: [] for index in steps}
    while asked := {index: step for index, step in steps.items() if isinstance(step, Request)}:
        for index, completion in zip(asked, ask(list(asked.values())), strict=True):
            said[index].append(completion)
            steps[index] = method(context, index, said[index])
    num_own = 0
    for row in made.rows("own"):
        assert steps[row.index] == row
        texts = [context.say(item) for item in said[row.index]]
        verdicts = [json.loads(text) for text in texts[1::2]]
        assert all(set(verdict) == {"same"} for verdict in verdicts)
        judged = [text for text, verdict in zip(texts[::2], verdicts, strict=False) if verdict["same"]]
        reference, kept = context.chats[row.index][-1].content, row.messages[-1].content
        assert kept in judged or kept == reference
        num_own += kept != reference
    assert num_own > 0


@pytest.fixture(scope="module")
def serve(cluster: None) -> Iterator[Callable[[Made], Callable[[list[Request]], list[Completion]]]]:
    """Return a function of a pool: vLLM on its model with its sampling, in a process of its own."""
    hosts = []

    def serve(made: Made) -> Callable[[list[Request]], list[Completion]]:
        hosts.append(ray.remote(num_cpus=0)(VllmEngine).remote(STARTER, EngineConfig()))
        sampling, ends = made.config.pool.synthesize.sampling, made.space.chat.end_ids
        return lambda requests: ray.get(hosts[-1].generate.remote(requests, sampling, end_ids=ends))

    yield serve
    for host in hosts:
        ray.kill(host)


CHECKS: dict[str, Callable[[Made], None]] = {
    "diverse_self_instruct": check_self_instruct,
    "diverse_evol_instruct": check_evol_instruct,
    "diverse_attribute_grid": check_attribute_grid,
    "diverse_rewriting": check_rewriting,
    "diverse_demonstrated": check_demonstrated,
    "diverse_teacher": check_teacher,
    "diverse_imported": check_imported,
}


def test_every_diverse_recipe_is_run() -> None:
    assert {*CHECKS, "diverse_s3ft"} == {name for name in list_recipes() if name.startswith("diverse_")}


@pytest.mark.parametrize(
    "name",  # the better part of a minute each
    [
        pytest.param(name, marks=pytest.mark.system if name == "diverse_rewriting" else pytest.mark.soak)
        for name in CHECKS
    ],
)
def test_a_recipe_makes_the_pool_that_it_is_for(name: str, cluster: None, tmp_path: Path) -> None:
    made = run_recipe(name, tmp_path)
    check_pool(made)
    CHECKS[name](made)


@pytest.mark.system
def test_s3ft_keeps_what_its_judge_found_equal_and_else_the_reference(serve, tmp_path: Path) -> None:
    made = run_recipe("diverse_s3ft", tmp_path)
    check_pool(made)
    check_s3ft(made, serve(made))

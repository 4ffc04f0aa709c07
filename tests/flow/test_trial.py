"""Trials: how an arm is named and encoded, and that training an arm leaves a finished, standard adapter."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from delia.chat import EncodedChat
from delia.errors import ChatError, MixtureError, StoreError, TrainError
from delia.flow.encoding import encode_rows
from delia.flow.trial import ArmConfig, build_input, plan_arm, read_adapter, train_arms
from delia.flow.workspace import Workspace, open_workspace
from delia.mix.mixture import MixConfig
from delia.model.adapted import LoraConfig
from delia.model.logprobs import load_adapted
from delia.schema import Message, Row, SeedTask, Task
from delia.store.adapters import check_servable, read_tensors
from delia.store.models import ModelConfig
from delia.store.pools import Pool, index_rows
from delia.store.tables import Manifest, read_manifest
from delia.train.settings import HOW_ONLY, MetersConfig, StageConfig, TrainConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
INSTRUCTION = "answer in one word"


def make_chat(question: str, answer: str) -> tuple[Message, ...]:
    return (Message(role="user", content=question), Message(role="assistant", content=answer))


def make_task(*, num_rows: int = 4, tokens: tuple[str, ...] = ("<sep>",)) -> Task:
    mark = "".join(f" {token}" for token in tokens)
    rows = tuple(
        SeedTask(task_id=f"t{i}", messages=make_chat(f"say {i}{mark}", f"yes {i}")) for i in range(num_rows)
    )
    return Task(
        name="tiny",
        digest=f"digest of {num_rows} rows",
        rows_by_split={"train": rows, "dev": (), "test": ()},
        tokens=tokens,
        long_instruction=INSTRUCTION if tokens else "",
    )


def make_pool(num_rows: int) -> Pool:
    rows = tuple(
        Row(row_id=f"d{i}", index=i, source="magpie", messages=make_chat(f"name {i}", f"no {i} {i}"))
        for i in range(num_rows)
    )
    manifest = Manifest(kind="pool", fingerprint="p", root="root of the pool", counts={})
    return Pool(manifest=manifest, load=lambda: index_rows(rows))


def make_arm(*, diverse_ratio: float = 2.0, seed: int = 0, **settings) -> ArmConfig:
    standard = {
        "lora": LoraConfig(rank=2, alpha=2, dropout=0.0),
        "stages": (StageConfig(max_steps=2, warmup_steps=0, learning_rate=1e-2),),
        "global_batch_size": 4,
        "log_every": 1,
        "seed": seed,
    }
    return ArmConfig(mix=MixConfig(diverse_ratio=diverse_ratio), train=TrainConfig(**(standard | settings)))


@pytest.fixture
def space(tmp_path) -> Workspace:
    return open_workspace(str(tmp_path / "runs"), STARTER, make_task())


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_pool(10)


# ---- names


def test_an_arm_is_named_by_all_that_decides_its_adapter(space, pool):
    arm = plan_arm(make_arm(), space, pool)
    assert plan_arm(make_arm(), space, pool) == arm
    assert arm.address == f"{space.output_dir}/adapters/{arm.fingerprint}"

    other_task = open_workspace(space.output_dir, STARTER, make_task(num_rows=3))
    other_chat = open_workspace(space.output_dir, STARTER, make_task(tokens=()))
    other_pool = replace(pool, manifest=replace(pool.manifest, root="another root"))
    others = [
        plan_arm(make_arm(seed=1), space, pool),
        plan_arm(make_arm(diverse_ratio=1.0), space, pool),
        plan_arm(make_arm(), other_task, pool),
        plan_arm(make_arm(), other_chat, pool),
        plan_arm(make_arm(), space, other_pool),
        plan_arm(make_arm(), replace(space, model_id="another model"), pool),
        plan_arm(make_arm(), replace(space, model=STARTER.model_copy(update={"dtype": "bfloat16"})), pool),
        plan_arm(make_arm(), replace(space, model=STARTER.model_copy(update={"attention": "eager"})), pool),
        plan_arm(make_arm(), replace(space, model=STARTER.model_copy(update={"quantisation": "nf4"})), pool),
    ]
    assert len({other.fingerprint for other in (arm, *others)}) == 10


def test_how_a_training_is_run_does_not_decide_what_it_is(space, pool):
    """A run goes on with more workers, other memory settings and another log; every such setting is changed."""
    changed = {
        "max_tokens_per_micro_batch": 77,
        "max_loss_spike": None,
        "max_norm_spike": None,
        "num_workers": 2,
        "use_gpu": True,
        "num_cpus_per_worker": 0.5,
        "shard_group": 2,
        "gradient_checkpointing": True,
        "offload": True,
        "compile": True,
        "checkpoint_every": 7,
        "num_kept_checkpoints": 5,
        "log_every": 3,
        "max_failures": 9,
        "meters": MetersConfig(),
    }
    assert set(changed) == set(HOW_ONLY)
    arm = make_arm()
    other = arm.model_copy(update={"train": arm.train.model_copy(update=changed)})
    assert plan_arm(other, space, pool).fingerprint == plan_arm(arm, space, pool).fingerprint
    longer = arm.model_copy(update={"train": arm.train.model_copy(update={"max_length": 77})})
    assert plan_arm(longer, space, pool).fingerprint != plan_arm(arm, space, pool).fingerprint


def test_an_arm_without_a_pool_is_plain_tuning_and_asks_for_nothing_more(space, pool):
    arm = plan_arm(make_arm(diverse_ratio=0.0), space, None)
    assert (arm.mixture.row_ids, set(arm.mixture.is_task)) == (("t0", "t1", "t2", "t3"), {True})
    with pytest.raises(MixtureError):
        plan_arm(make_arm(diverse_ratio=1.0), space, None)
    with pytest.raises(MixtureError, match=r"must supply 12 rows .* but the pool holds 10"):
        plan_arm(make_arm(diverse_ratio=3.0), space, pool)


# ---- what is trained on


def test_rows_are_encoded_once_in_the_order_of_the_mixture(space, pool):
    arm = plan_arm(make_arm(), space, pool)
    task, _ = build_input(arm, space, pool)

    texts = [space.chat.tokenizer.decode(ids) for ids, _ in task.rows]
    assert len(texts) == 12
    assert task.rows.is_task_R.tolist() == task.rows.has_token_R.tolist() == [True] * 4 + [False] * 8
    for row_id, text, (ids, mask) in zip(arm.mixture.row_ids, texts, task.rows, strict=True):
        question = f"say {row_id[1:]}" if row_id[0] == "t" else f"name {row_id[1:]}"
        assert question in text
        trained = [token for token, flag in zip(ids, mask, strict=True) if flag]
        answer = f"yes {row_id[1:]}" if row_id[0] == "t" else f"no {row_id[1:]} {row_id[1:]}"
        assert space.chat.decode(trained) == answer
        assert trained[-1] in space.chat.end_ids, "the end of the turn is not trained"


def test_a_token_has_one_id_and_the_instruction_that_it_stands_for_its_own(space, pool):
    task, _ = build_input(plan_arm(make_arm(), space, pool), space, pool)
    assert task.token_ids == (space.chat.token_ids["<sep>"],)
    assert [ids.tolist().count(task.token_ids[0]) for ids, _ in task.rows] == [1] * 4 + [0] * 8
    assert space.chat.tokenizer.decode(list(task.instruction_ids)).strip() == INSTRUCTION


def test_rows_that_no_stage_moves_are_not_attached(space, pool):
    lora_only = make_arm(stages=(StageConfig(max_steps=2, parts=("lora",)),))
    task, _ = build_input(plan_arm(lora_only, space, pool), space, pool)
    assert task.token_ids == ()
    assert task.rows.has_token_R[0], "a row is said to have no token"


def test_a_task_without_a_token_trains_lora_alone(space, pool):
    plain = open_workspace(space.output_dir, STARTER, make_task(tokens=()))
    task, _ = build_input(plan_arm(make_arm(), plain, pool), plain, pool)
    assert (task.token_ids, task.instruction_ids, any(task.rows.has_token_R)) == ((), (), False)


def test_a_long_row_is_an_error_or_dropped_or_truncated_by_setting_and_counted(space, pool, caplog):
    rows = (replace(pool.rows[0], messages=make_chat("name " * 40, "no")), *pool.rows[1:])
    long = replace(pool, load=lambda: index_rows(rows))
    with pytest.raises(ChatError, match="max_length"):
        build_input(plan_arm(make_arm(diverse_ratio=2.5, max_length=32), space, long), space, long)

    dropping = make_arm(diverse_ratio=2.5, max_length=32, on_long="drop")
    task, counts = build_input(plan_arm(dropping, space, long), space, long)
    assert task.rows.is_task_R.tolist() == [True] * 4 + [False] * 9
    assert counts == {"dropped_long": 1, "truncated_long": 0}
    assert "of 14 rows 1 were dropped and 0 truncated: train.max_length=32, train.on_long=drop" in caplog.text

    cutting = make_arm(diverse_ratio=2.5, max_length=32, on_long="truncate_prompt_left")
    task, counts = build_input(plan_arm(cutting, space, long), space, long)
    assert max(task.rows.lengths_R) == 32
    assert (len(task.rows), counts) == (14, {"dropped_long": 0, "truncated_long": 1})


def test_a_policy_that_leaves_no_row_is_refused(space, pool):
    arm = plan_arm(make_arm(max_length=4, on_long="drop"), space, pool)
    with pytest.raises(TrainError, match="of 12 rows none is left under"):
        build_input(arm, space, pool)


def test_a_pool_of_another_template_is_refused_before_anything_is_drawn_from_it(space, pool):
    own = {"template_hash": space.chat.template_hash}
    assert plan_arm(
        make_arm(), space, replace(pool, manifest=replace(pool.manifest, details=own))
    ).fingerprint
    foreign = replace(pool, manifest=replace(pool.manifest, details={"template_hash": "another"}))
    with pytest.raises(TrainError, match="the pool was made with template hash another"):
        plan_arm(make_arm(), space, foreign)


def test_a_row_without_a_trained_token_is_refused_with_its_text(space, monkeypatch):
    nothing = EncodedChat(input_ids=(1, 2), loss_mask=(False, False))
    monkeypatch.setattr(type(space.chat), "encode_chat", lambda self, messages, train_on: nothing)
    monkeypatch.setattr(type(space.chat), "fit", lambda self, chat, max_length, on_long: chat)
    with pytest.raises(TrainError, match="row 0, 'yes 0', has no trained token"):
        encode_rows([make_task().rows_by_split["train"][0].messages], make_arm().train, space.chat)


# ---- training


def test_arms_are_trained_once_and_leave_standard_adapters_with_their_lineage(cluster, space, pool):
    configs = {
        "both": make_arm(),
        "rows": make_arm(
            diverse_ratio=0.0,
            lora=None,
            stages=(StageConfig(max_steps=2, parts=("token_rows",), rows="token", warmup_steps=0),),
        ),
    }
    arms = {name: plan_arm(config, space, pool) for name, config in configs.items()}
    lines: dict[str, list[int]] = {name: [] for name in arms}
    logs = {name: lambda metrics, step, name=name: lines[name].append(step) for name in arms}
    done: list[str] = []

    def train() -> dict:
        return train_arms(
            arms, space, pool, logs=logs, max_concurrent=2, on_done=lambda name, seconds: done.append(name)
        )

    adapters = train()
    assert sorted(done) == ["both", "rows"]
    # a worker that Ray starts again on a busy machine logs its steps again
    assert {name: sorted(set(steps)) for name, steps in lines.items()} == {"both": [1, 2], "rows": [1, 2]}
    for name, adapter in adapters.items():
        arm = arms[name]
        assert (adapter.path, adapter.fingerprint) == (arm.address, arm.fingerprint)
        assert (adapter.mixture_root, adapter.base_model) == (arm.mixture.root, STARTER.path)
        assert (adapter.template_hash, adapter.tokens) == (
            space.chat.template_hash,
            dict(space.chat.token_ids),
        )
    check_what_is_on_disk(space, adapters["both"].path)
    assert {tensor.rpartition("_")[2] for tensor in read_tensors(Path(adapters["rows"].path))} == {"A", "B"}

    assert train() == adapters
    assert sorted(done) == ["both", "rows"], "a finished arm was trained again"


def check_what_is_on_disk(space: Workspace, path: str) -> None:
    directory = Path(path)
    check_servable(directory)
    names = {type(module).__name__ for module in load_adapted(STARTER, directory).modules()}
    assert {"PeftModelForCausalLM", "Linear"} <= names
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.convert_tokens_to_ids("<sep>") == space.chat.token_ids["<sep>"]
    manifest = read_manifest(path, kind="adapter")
    assert manifest.counts == {"rows": 12, "task_rows": 4, "dropped_long": 0, "truncated_long": 0}
    assert manifest.parents["model"] == space.model_id
    assert read_adapter(path).fingerprint == manifest.fingerprint


def test_an_arm_that_fails_is_a_train_error_and_leaves_no_finished_directory(cluster, space):
    hopeless = make_arm(
        diverse_ratio=0.0,
        max_failures=0,
        stages=(StageConfig(max_steps=3, learning_rate=1e30, token_learning_rate=1e30, warmup_steps=0),),
    )
    arm = plan_arm(hopeless, space, None)
    with pytest.raises(TrainError, match=r"step \d: loss nan.*; last good checkpoint: none yet"):
        train_arms({"main": arm}, space, None, logs={"main": lambda metrics, step: None}, max_concurrent=1)
    with pytest.raises(StoreError, match="unfinished"):
        read_adapter(arm.address)

"""Adapted models: what moves, what stays, and that PEFT makes the same of what is exported."""

import json

import pytest
import torch

from delia.errors import ConfigError, EngineError
from delia.model.adapted import (
    TokenRows,
    attach,
    collect,
    initialise_rows,
    part_of,
)
from delia.model.loading import load_base
from delia.model.logprobs import load_adapted
from delia.model.lora import LoraConfig
from delia.store.adapters import CONFIG, check_servable, write_adapter

SHAPES = ("llama", "qwen2", "qwen3", "gemma2", "mistral")
TOKENS = (7, 300)
LORA = LoraConfig(rank=4, alpha=12, dropout=0.0)
WIDE = LORA.model_copy(update={"target_modules": "all-linear"})
PARTS = {"lora": (LORA, ()), "rows": (None, TOKENS), "both": (LORA, TOKENS)}
EXPORTS = PARTS | {
    "all-linear": (WIDE, TOKENS[:1]),
    "rslora": (WIDE.model_copy(update={"use_rslora": True}), ()),
    **{init: (WIDE.model_copy(update={"init": init}), TOKENS) for init in ("pissa", "olora", "corda", "eva")},
}
DORAS = {
    "dora": (WIDE.model_copy(update={"use_dora": True}), TOKENS),
    "dora alone": (LORA.model_copy(update={"use_dora": True}), ()),
    "dora + rslora + pissa": (
        WIDE.model_copy(update={"use_dora": True, "use_rslora": True, "init": "pissa"}),
        TOKENS,
    ),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_tie = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


def draw_ids(*, with_tokens: bool) -> torch.Tensor:
    """Return ids [4, 12]; the tokens stand in every row, or in none."""
    ids_BT = torch.randint(20, 290, (4, 12), generator=torch.Generator().manual_seed(1))
    if with_tokens:
        ids_BT[:, 3], ids_BT[:, 7] = TOKENS
    return ids_BT


@torch.no_grad()
def compute_logits(model, ids_BT: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids_BT).logits


def train_briefly(model) -> None:
    """Move everything that is trained, far enough to be seen."""
    ids_BT = draw_ids(with_tokens=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@every_shape
@every_tie
def test_a_fresh_adapter_changes_no_logit(save_model, shape, is_tied):
    settings = save_model(shape, is_tied=is_tied)
    ids_BT = draw_ids(with_tokens=True)
    expected_BTV = compute_logits(load_base(settings), ids_BT)

    adapted = attach(load_base(settings), lora=LORA, token_ids=TOKENS)
    assert torch.equal(compute_logits(adapted, ids_BT), expected_BTV)


@pytest.mark.parametrize("parts", PARTS)
def test_lora_and_the_deltas_alone_are_trained(save_model, parts):
    lora, token_ids = PARTS[parts]
    model = attach(load_base(save_model()), lora=lora, token_ids=token_ids)

    trained = {name: part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    lora_names = {
        f"model.layers.{layer}.self_attn.{module}.lora_{matrix}.default.weight"
        for layer in (0, 1)
        for module in LORA.target_modules
        for matrix in "AB"
    }
    assert {name for name, part in trained.items() if part == "lora"} == (lora_names if lora else set())
    assert {name for name, part in trained.items() if part == "token_rows"} == (
        {"model.embed_tokens.deltas_KD"} if token_ids else set()
    )
    assert "base" not in trained.values()


@every_shape
@every_tie
def test_a_trained_row_moves_the_input_and_leaves_the_output_head(save_model, shape, is_tied):
    settings = save_model(shape, is_tied=is_tied)
    base, model = load_base(settings), attach(load_base(settings), lora=None, token_ids=TOKENS)
    train_briefly(model)

    head, base_head = model.get_output_embeddings().weight, base.get_output_embeddings().weight
    assert torch.equal(head, base_head)
    without = draw_ids(with_tokens=False)
    assert torch.equal(compute_logits(model, without), compute_logits(base, without))
    with_tokens = draw_ids(with_tokens=True)
    change_BTV = compute_logits(model, with_tokens) - compute_logits(base, with_tokens)
    assert torch.equal(change_BTV[:, :3], torch.zeros_like(change_BTV[:, :3])), (
        "a later row changed an earlier place"
    )
    assert (change_BTV[:, 3:].abs().amax((1, 2)) > 1e-2).all()


def test_each_token_takes_its_own_delta():
    embedding = torch.nn.Embedding(5, 2)
    rows = TokenRows(embedding, (4, 1))
    with torch.no_grad():
        embedding.weight.copy_(torch.arange(10.0).reshape(5, 2))
        rows.deltas_KD.copy_(torch.tensor([[100.0, 200.0], [-1.0, -2.0]]))

    embedded = rows(torch.tensor([[0, 1, 4, 1]]))
    assert embedded.tolist() == [[[0.0, 1.0], [1.0, 1.0], [108.0, 209.0], [1.0, 1.0]]]


@pytest.fixture
def model_with_rows(save_model):
    """A model with rows 1 and 3 trained, whose first five input embeddings are known."""
    model = attach(load_base(save_model()), lora=None, token_ids=(1, 3))
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
        model.get_input_embeddings().weight[:5, 0] = torch.tensor([832.0, 1664.0, 0.0, -8.0, 16.0])
    return model


def read_first_column(model) -> tuple[list[float], float]:
    """Return the first column of the deltas, and the largest value of all other columns."""
    deltas_KD = model.get_input_embeddings().deltas_KD.detach()
    return deltas_KD[:, 0].tolist(), float(deltas_KD[:, 1:].abs().max())


def test_a_reserved_row_starts_where_the_base_has_it(model_with_rows):
    initialise_rows(model_with_rows, "reserved_row", instruction_ids=(0, 4))
    assert read_first_column(model_with_rows) == ([0.0, 0.0], 0.0)


def test_the_mean_of_the_vocabulary_is_reached_from_each_row(model_with_rows):
    """The column sums to 2504 over 832 rows, so its mean is 3.0096..; rows 1 and 3 hold 1664 and -8."""
    initialise_rows(model_with_rows, "mean_vocabulary")
    mean = (832 + 1664 - 8 + 16) / 832
    assert read_first_column(model_with_rows) == (pytest.approx([mean - 1664, mean + 8], rel=1e-6), 0.0)


def test_the_mean_of_the_instruction_counts_each_of_its_tokens_once(model_with_rows):
    """Tokens 0 and 4 hold 832 and 16: their mean is 424."""
    initialise_rows(model_with_rows, "mean_instruction", instruction_ids=(0, 4, 4, 0, 4))
    assert read_first_column(model_with_rows) == ([424.0 - 1664, 424.0 + 8], 0.0)


def test_a_mean_of_no_instruction_is_refused(model_with_rows):
    with pytest.raises(ConfigError, match="token_init=mean_instruction needs a task with a long_instruction"):
        initialise_rows(model_with_rows, "mean_instruction")


def test_a_stand_in_is_taken_over_and_a_token_without_one_keeps_its_row(model_with_rows):
    """Row 4 holds 16 and row 1 holds 1664."""
    initialise_rows(model_with_rows, "stand_in", stand_ins=(4, None))
    assert read_first_column(model_with_rows) == ([16.0 - 1664, 0.0], 0.0)


def test_a_model_without_token_rows_has_none_to_initialise(save_model):
    model = attach(load_base(save_model()), lora=LORA)
    before = model.get_input_embeddings().weight.clone()
    initialise_rows(model, "mean_vocabulary")
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.fixture
def export(save_model, tmp_path):
    """Return a function that trains briefly, writes to `tmp_path`, and gives logits of model, base and PEFT."""

    def export(shape: str, lora: LoraConfig | None, token_ids: tuple[int, ...], *, is_tied: bool):
        settings, ids_BT = save_model(shape, is_tied=is_tied), draw_ids(with_tokens=True)
        model = attach(
            load_base(settings),
            lora=lora,
            token_ids=token_ids,
            seed=5,
            task_rows=draw_ids(with_tokens=False).tolist(),
        )
        train_briefly(model)
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        tensors = collect(model, trained, scaling=lora.scaling if lora else 1.0)
        write_adapter(tmp_path, tensors, vocab_size=model.config.vocab_size, base_model=settings.path)
        loaded = load_adapted(settings, tmp_path)
        return [compute_logits(m, ids_BT) for m in (model, load_base(settings), loaded)]

    return export


def assert_equal_logits(actual_BTV: torch.Tensor, expected_BTV: torch.Tensor) -> None:
    """Compare within 1e-5 of the largest logit."""
    atol = 1e-5 * float(expected_BTV.abs().max())
    torch.testing.assert_close(actual_BTV, expected_BTV, atol=atol, rtol=0)


@every_shape
@every_tie
@pytest.mark.parametrize("parts", EXPORTS)
def test_peft_makes_of_an_export_what_was_trained(export, tmp_path, shape, is_tied, parts):
    """Over the base as it lies on disk, also where the start took something out of it."""
    trained_BTV, base_BTV, loaded_BTV = export(shape, *EXPORTS[parts], is_tied=is_tied)
    assert (trained_BTV - base_BTV).abs().max() > 0.05
    assert_equal_logits(loaded_BTV, trained_BTV)
    check_servable(tmp_path)


@every_shape
@every_tie
@pytest.mark.parametrize("parts", DORAS)
def test_peft_makes_of_a_dora_export_what_was_trained(export, tmp_path, shape, is_tied, parts):
    trained_BTV, base_BTV, loaded_BTV = export(shape, *DORAS[parts], is_tied=is_tied)
    assert (trained_BTV - base_BTV).abs().max() > 0.05
    assert_equal_logits(loaded_BTV, trained_BTV)
    with pytest.raises(EngineError, match="use_dora=True"):
        check_servable(tmp_path)


def test_a_start_that_left_the_base_is_exported_by_twice_the_rank(export, tmp_path):
    export("llama", *EXPORTS["pissa"], is_tied=False)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {"embed_tokens": 2})


def test_an_untrained_start_that_left_the_base_is_exported_as_nothing(save_model):
    lora, _ = EXPORTS["corda"]
    model = attach(load_base(save_model()), lora=lora, task_rows=draw_ids(with_tokens=False).tolist())
    tensors = collect(model, dict(model.named_parameters()), scaling=lora.scaling)
    assert len(tensors.lora_by_module) == 14
    for a_RI, b_OR in tensors.lora_by_module.values():
        assert (b_OR @ a_RI).abs().max() < 1e-5 < b_OR[:, :4].abs().max()


def test_the_rows_have_a_rank_of_their_own_beside_lora(save_model, tmp_path):
    model = attach(load_base(save_model()), lora=LORA, token_ids=TOKENS)
    tensors = collect(model, dict(model.named_parameters()), scaling=3.0)
    write_adapter(tmp_path, tensors, vocab_size=832, base_model="base")

    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"embed_tokens": 2}
    loaded = load_adapted(save_model(), tmp_path)
    ranks = {name.rpartition(".")[2]: m.r["default"] for name, m in loaded.named_modules() if hasattr(m, "r")}
    assert ranks == {"embed_tokens": 2, "q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4}


def test_collect_folds_the_scaling_into_b_alone(save_model):
    model = attach(load_base(save_model()), lora=LORA, token_ids=TOKENS)
    module = "model.layers.1.self_attn.v_proj"
    trained = {
        f"{module}.lora_A.default.weight": torch.full((4, 32), 2.0),
        f"{module}.lora_B.default.weight": torch.full((16, 4), 5.0),
        "model.embed_tokens.deltas_KD": torch.full((2, 32), 7.0),
    }
    tensors = collect(model, trained, scaling=3.0)

    ((name, (a_RI, b_OR)),) = tensors.lora_by_module.items()
    assert (name, a_RI.unique().tolist(), b_OR.unique().tolist()) == (module, [2.0], [15.0])
    assert tensors.row_deltas_KD is not None
    assert tensors.row_deltas_KD.unique().tolist() == [7.0]
    assert (tensors.embedding_module, tensors.token_ids) == ("model.embed_tokens", TOKENS)


def test_lora_starts_from_the_seed_alone(save_model):
    def read_start(seed: int) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever was drawn before
        model = attach(load_base(save_model()), lora=LORA, seed=seed)
        return model.get_parameter("model.layers.0.self_attn.q_proj.lora_A.default.weight")

    assert torch.equal(read_start(1), read_start(1))
    assert not torch.equal(read_start(1), read_start(2))


def test_an_adapter_of_nothing_is_refused(save_model):
    with pytest.raises(
        ConfigError, match=r"nothing to train: set train\.lora, a task with a token, both, or"
    ):
        attach(load_base(save_model()), lora=None)

"""The loss of a tiny run on Ray Train, committed: a refactor may not move it.

`loss_tiny_llama.txt` holds a line a step: the step and the loss in nats a token. To write it anew, on
purpose: DELIA_WRITE_GOLDEN=1 pytest tests/golden/test_golden_loss.py
"""

import os
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from delia.model.adapted import LoraConfig
from delia.store.models import ModelConfig
from delia.train.building import TrainInput
from delia.train.launch import run_training
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig, TrainConfig

GOLDEN = Path(__file__).with_name("loss_tiny_llama.txt")
TOKEN = 5


def save_tiny_llama(directory: Path) -> ModelConfig:
    """Save a model whose weights come from Python's generator, whose stream never changes."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    rng = random.Random(42)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                values = [rng.gauss(0.0, 0.1) for _ in range(parameter.numel())]
                parameter.copy_(torch.tensor(values).reshape(parameter.shape))
    model.save_pretrained(directory)
    return ModelConfig(path=str(directory))


def make_input(model: ModelConfig) -> TrainInput:
    """Return 20 rows, each counting up from a number; a quarter are the task's and hold the token."""
    rng = random.Random(7)
    rows = []
    for number in range(20):
        start, length = rng.randrange(10, 40), rng.randint(4, 12)
        ids = [TOKEN if number < 5 else 6, *range(start, start + length)]
        rows.append((tuple(ids), (False, False) + (True,) * (length - 1)))
    stages = (
        StageConfig(
            parts=("token_rows",), rows="token", max_steps=4, token_learning_rate=1e-1, warmup_steps=2
        ),
        StageConfig(max_steps=8, learning_rate=2e-2, warmup_steps=2, schedule="linear", weight_decay=0.01),
    )
    config = TrainConfig(
        lora=LoraConfig(rank=4, alpha=8, dropout=0.0),
        token_init="mean_vocabulary",
        stages=stages,
        global_batch_size=6,
        max_tokens_per_micro_batch=40,
        log_every=1,
        seed=11,
    )
    is_task = [True] * 5 + [False] * 15
    joined = join_rows(rows, sources=[TASK if flag else "diverse" for flag in is_task], has_token=is_task)
    return TrainInput(model=model, config=config, rows=joined, token_ids=(TOKEN,))


def test_the_loss_of_a_tiny_run_has_not_moved(cluster, tmp_path):
    losses: dict[int, float] = {}
    run_training(
        make_input(save_tiny_llama(tmp_path / "model")),
        name="golden",
        storage=str(tmp_path / "storage"),
        output=str(tmp_path / "adapter"),
        log=lambda metrics, step: losses.update({step: metrics["train/loss"]}),
    )
    if os.environ.get("DELIA_WRITE_GOLDEN") == "1":
        GOLDEN.write_text("".join(f"{step} {loss:.9g}\n" for step, loss in sorted(losses.items())))
    lines = [line.split() for line in GOLDEN.read_text().splitlines()]
    expected = {int(step): float(loss) for step, loss in lines}

    assert sorted(losses) == sorted(expected) == list(range(1, 13))
    assert losses == pytest.approx(expected, rel=1e-5)

"""Training beside TRL's SFTTrainer: the same rows, LoRA, model and precision, one thread, runs in turn.

Rows have a vocabulary of 32,000, log-normal lengths of mean 400, and half of their tokens trained. Every run is a
process of its own, so that its peak memory is its own. The share of the machine's rate counts 4 flops a
parameter and token: forward, and backward to the activations of a frozen base.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from training_peer import (
    LEARNING_RATE,
    MAX_LENGTH,
    MODULES,
    VOCABULARY,
    Measured,
    PeerSetting,
    find_best,
    make_rows,
    report,
    run_peer,
)

SHAPES = {
    "2 M": {"hidden_size": 56, "intermediate_size": 152, "num_hidden_layers": 4, "num_attention_heads": 2},
    "10 M": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 9, "num_attention_heads": 4},
    "30 M": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
    },
}
BATCH, NUM_STEPS, NUM_RUNS = 8, 6, 5
PEER_SETTINGS = tuple(
    PeerSetting(packing=packing, batch=batch)
    for packing, batch in ((False, 1), (False, 2), (False, 8), (True, 1))
)
"""Of TRL; the fastest of them is compared."""


def save_llama(shape: dict[str, int], folder: Path, dtype: torch.dtype = torch.float32) -> int:
    """Write a random Llama and return its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=True, **shape
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measure_matrix_rate(size: str) -> float:
    """Return the flops a second of this machine on the model's own matrices, the largest weights' share each."""
    shape = SHAPES[size]
    tokens, hidden, inner = 2048, shape["hidden_size"], shape["intermediate_size"]
    flops, seconds = 0, 0.0
    for width, times in ((hidden, 4), (inner, 3), (VOCABULARY, 1)):
        one, other = torch.randn(tokens, hidden), torch.randn(hidden, width)
        one @ other
        repeats = times * (shape["num_hidden_layers"] if width != VOCABULARY else 1)
        started = time.perf_counter()
        for _ in range(repeats):
            one @ other
        seconds += time.perf_counter() - started
        flops += 2 * tokens * hidden * width * repeats
    return flops / seconds


def train_here(
    model_folder: Path,
    folder: Path,
    *,
    name: str,
    rows_a_step: int,
    num_steps: int,
    num_rows: int = 200,
    num_warm: int = 1,
    dtype: str = "float32",
    **options: Any,
) -> Measured:
    """Train on Ray Train, as every job does, and return what the loop logged after its first steps."""
    from delia.model.adapted import LoraConfig
    from delia.store.models import ModelConfig
    from delia.train.building import TrainInput
    from delia.train.launch import run_training
    from delia.train.rows import TASK, join_rows
    from delia.train.settings import StageConfig, TrainConfig

    rows = make_rows(num_rows)
    logged: list[dict[str, float]] = []
    stage = StageConfig(max_steps=num_steps, learning_rate=LEARNING_RATE, warmup_steps=0)
    config = TrainConfig(
        lora=LoraConfig(dropout=0.0, target_modules=MODULES),
        stages=(stage,),
        global_batch_size=rows_a_step,
        max_length=MAX_LENGTH,
        log_every=1,
        checkpoint_every=1000,
        max_failures=0,
        **options,
    )
    run_training(
        TrainInput(
            model=ModelConfig(path=str(model_folder), dtype=dtype),
            config=config,
            rows=join_rows(rows, sources=[TASK] * len(rows)),
        ),
        name="bench",
        storage=str(folder / "storage"),
        output=str(folder / "adapter"),
        log=lambda metrics, _: logged.append(metrics),
    )
    counted = logged[num_warm:]
    seconds = sum(line["train/step_seconds"] for line in counted)
    return Measured(
        name=name,
        tokens_per_second=sum(
            line["train/tokens_per_second"] * line["train/step_seconds"] for line in counted
        )
        / seconds,
        trained_per_second=sum(
            line["train/trained_tokens_per_second"] * line["train/step_seconds"] for line in counted
        )
        / seconds,
        peak_bytes=logged[-1]["train/peak_memory_bytes"],
        first_loss=logged[0]["train/loss"],
        loss=logged[-1]["train/loss"],
    )


def summarise(runs: Sequence[Measured]) -> Measured:
    """Return the medians of several runs of one name."""
    fields = ("tokens_per_second", "trained_per_second", "peak_bytes", "first_loss", "loss")
    return Measured(
        name=runs[0].name, **{f: statistics.median(getattr(run, f) for run in runs) for f in fields}
    )


def describe(item: Measured, peer: Measured, parameters_by_rate: float) -> str:
    """Return a row of the table: rates, their ratio to the peer's, the share of the matrix rate, memory, losses."""
    return (
        f"| {item.name} | {item.tokens_per_second:,.0f} | {item.trained_per_second:,.0f}"
        f" | {item.tokens_per_second / peer.tokens_per_second:.2f}"
        f" | {4 * parameters_by_rate * item.tokens_per_second:.2f} | {item.peak_bytes / 1e9:.2f}"
        f" | {item.first_loss:.4f} | {item.loss:.4f} |"
    )


def describe_training(num_runs: int = NUM_RUNS) -> str:
    """Run everything and return the table; needs a Ray cluster."""
    lines = [
        f"Training: {BATCH} rows a step, LoRA of rank 16 on q, k, v and o, one thread, float32; medians of"
        f" {num_runs} runs in turn. The share of the matrix rate is 4N flops a token by what the machine reaches on the"
        " model's own matrices; 4N counts the output head for every token, and only trained ones, half of them, meet it"
        " here, so that a small model, which is mostly head, can have a share over 1. Both train on the same rows in the same order and begin"
        " with the same function; LoRA's A is drawn by each.",
        "",
        "| model | | tokens/s | trained tokens/s | ratio | share of the matrix rate | peak memory GB | first loss | final loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            num_parameters = save_llama(SHAPES[size] | {"num_key_value_heads": 2}, folder / "model")
            ask_peer = partial(run_peer, folder / "model", rows_a_step=BATCH, folder=folder / "trl")
            best = find_best(PEER_SETTINGS, ask_peer, num_steps=2)
            ours, theirs, rates = [], [], []
            for run in range(num_runs):
                rates.append(measure_matrix_rate(size))
                own = train_here(
                    folder / "model",
                    folder / str(run),
                    name="delia",
                    rows_a_step=BATCH,
                    num_steps=NUM_STEPS,
                )
                ours.append(report(own))
                theirs.append(report(ask_peer(best, num_steps=NUM_STEPS)))
        peer, rate = summarise(theirs), statistics.median(rates)
        lines += [
            f"| {size} {describe(item, peer, num_parameters / rate)}" for item in (summarise(ours), peer)
        ]
    return "\n".join(lines)

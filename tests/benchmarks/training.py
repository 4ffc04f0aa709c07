"""Training beside TRL's SFTTrainer: the same rows, LoRA, model and precision, one thread, runs in turn.

    python tests/benchmarks/training.py trl SIZE BATCH PACKING FOLDER     one run of the peer, a JSON line

Rows have a vocabulary of 32,000, log-normal lengths of mean 400, and half of their tokens trained. Every run is a
process of its own, so that its peak memory is its own. The share of the machine's rate counts 4 flops a
parameter and token: forward, and backward to the activations of a frozen base.
"""

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
VOCABULARY, BATCH, NUM_STEPS, NUM_RUNS = 32_000, 8, 6, 5
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
PEER_SETTINGS = ((False, 1), (False, 8), (True, 1))
"""(packing, rows a forward pass) of TRL; the fastest of them is compared."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run: all and trained tokens a second, peak resident bytes, the last step's loss."""

    name: str
    tokens_per_second: float
    trained_per_second: float
    peak_bytes: float
    loss: float


def make_rows(num_rows: int = 200) -> list[tuple[list[int], list[bool]]]:
    """Return ids and masks; the second half of each row is trained."""
    rng = np.random.default_rng(0)
    spread = 0.8
    lengths = rng.lognormal(math.log(400) - spread**2 / 2, spread, num_rows).astype(int).clip(16, 2048)
    return [
        (rng.integers(3, VOCABULARY, n).tolist(), [place >= n // 2 for place in range(n)]) for n in lengths
    ]


def save_model(size: str, folder: Path) -> int:
    """Write a random Llama and return its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **SHAPES[size],
    )
    model = LlamaForCausalLM(config)
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


def train_here(size: str, model_folder: Path, folder: Path) -> Measured:
    """Train on Ray Train, as every job does, and return what the loop logged."""
    from delia.model.adapted import LoraConfig
    from delia.store.models import ModelConfig
    from delia.train.building import TrainInput
    from delia.train.launch import run_training
    from delia.train.rows import TASK, join_rows
    from delia.train.settings import StageConfig, TrainConfig

    rows = make_rows()
    logged: list[dict[str, float]] = []
    stage = StageConfig(max_steps=NUM_STEPS, learning_rate=1e-3, warmup_steps=0)
    config = TrainConfig(
        lora=LoraConfig(dropout=0.0, target_modules=MODULES),
        stages=(stage,),
        global_batch_size=BATCH,
        max_length=2048,
        log_every=1,
        checkpoint_every=1000,
    )
    run_training(
        TrainInput(
            model=ModelConfig(path=str(model_folder)),
            config=config,
            rows=join_rows(rows, sources=[TASK] * len(rows)),
        ),
        name=f"bench-{size.replace(' ', '-')}",
        storage=str(folder / "storage"),
        output=str(folder / "adapter"),
        log=lambda metrics, _: logged.append(metrics),
    )
    seconds = sum(line["train/step_seconds"] for line in logged[1:])
    all_tokens = sum(line["train/tokens_per_second"] * line["train/step_seconds"] for line in logged[1:])
    trained = sum(line["train/trained_tokens_per_second"] * line["train/step_seconds"] for line in logged[1:])
    return Measured(
        name="delia",
        tokens_per_second=all_tokens / seconds,
        trained_per_second=trained / seconds,
        peak_bytes=logged[-1]["train/peak_memory_bytes"],
        loss=logged[-1]["train/loss"],
    )


def run_peer(model_folder: Path, *, packing: bool, batch: int, num_steps: int, folder: Path) -> Measured:
    """Train with TRL in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "trl",
        str(model_folder),
        str(batch),
        str(int(packing)),
        str(num_steps),
        str(folder),
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise RuntimeError(f"TRL ended with {result.returncode}: {result.stderr[-2000:]}")
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def train_with_trl(
    model_folder: str, *, batch: int, packing: bool, num_steps: int, folder: str
) -> dict[str, Any]:
    """Run SFTTrainer in this process; the first step warms up and is not counted."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from delia.starter.tokenizer import build_tokenizer

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for ids, mask in make_rows():
        columns["input_ids"].append(ids)
        columns["labels"].append([token if flag else -100 for token, flag in zip(ids, mask, strict=True)])
    stamps: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(model_folder),
        args=SFTConfig(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=BATCH // batch,
            packing=packing,
            max_length=2048,
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            dataset_kwargs={"skip_prepare_dataset": not packing},
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(
            r=16, lora_alpha=16, lora_dropout=0.0, target_modules=list(MODULES), task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    counts: list[tuple[int, int]] = []
    compute_loss = trainer.compute_loss

    def count(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        num_tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        counts.append((num_tokens, int((inputs["labels"] != -100).sum())))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = count
    trainer.train()
    passes = BATCH // batch
    seconds = sum(end - start for start, end in zip(stamps[2::2], stamps[3::2], strict=True))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "name": f"TRL, {'packed' if packing else 'not packed'}, {batch} a pass",
        "tokens_per_second": sum(tokens for tokens, _ in counts[passes:]) / seconds,
        "trained_per_second": sum(trained for _, trained in counts[passes:]) / seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": losses[-1],
    }


def summarise(runs: Sequence[Measured]) -> Measured:
    """Return the medians of several runs of one name."""
    fields = ("tokens_per_second", "trained_per_second", "peak_bytes", "loss")
    return Measured(
        name=runs[0].name, **{f: statistics.median(getattr(run, f) for run in runs) for f in fields}
    )


def describe_training(num_runs: int = NUM_RUNS) -> str:
    """Run everything and return the table; needs a Ray cluster."""
    lines = [
        f"Training: {BATCH} rows a step, LoRA of rank 16 on q, k, v and o, one thread, float32; medians of"
        f" {num_runs} runs in turn. The share of the matrix rate is 4N flops a token by what the machine reaches on the"
        " model's own matrices; 4N counts the output head for every token, and only trained ones, half of them, meet it"
        " here, so that a small model, which is mostly head, can have a share over 1.",
        "",
        "| model | | tokens/s | trained tokens/s | ratio | share of the matrix rate | peak memory GB | final loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            num_parameters = save_model(size, folder / "model")
            probes = [
                run_peer(folder / "model", packing=packing, batch=batch, num_steps=2, folder=folder / "trl")
                for packing, batch in PEER_SETTINGS
            ]
            best = max(range(len(probes)), key=lambda place: probes[place].tokens_per_second)
            packing, batch = PEER_SETTINGS[best]
            ours, theirs, rates = [], [], []
            for run in range(num_runs):
                rates.append(measure_matrix_rate(size))
                ours.append(train_here(size, folder / "model", folder / str(run)))
                theirs.append(
                    run_peer(
                        folder / "model",
                        packing=packing,
                        batch=batch,
                        num_steps=NUM_STEPS,
                        folder=folder / "trl",
                    )
                )
        peer, rate = summarise(theirs), statistics.median(rates)
        lines += [
            f"| {size} | {item.name} | {item.tokens_per_second:.0f} | {item.trained_per_second:.0f}"
            f" | {item.tokens_per_second / peer.tokens_per_second:.2f}"
            f" | {4 * num_parameters * item.tokens_per_second / rate:.2f} | {item.peak_bytes / 1e9:.2f} | {item.loss:.3f} |"
            for item in (summarise(ours), peer)
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    _, _, model_folder, batch, packing, num_steps, folder = sys.argv
    measured = train_with_trl(
        model_folder, batch=int(batch), packing=packing == "1", num_steps=int(num_steps), folder=folder
    )
    print(json.dumps(measured))

"""What both trainers are given, and the peer: TRL's SFTTrainer, in a process of its own, on a CPU or on a GPU.

    python tests/benchmarks/training_peer.py MODEL FOLDER SETTING     one run, SETTING and the answer as JSON

Rows have a vocabulary of 32,000, log-normal lengths of mean 400, and half of their tokens trained; both train on them in
one order, so that not packed their losses are of the same rows.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY = 32_000
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MEAN_LENGTH, MAX_LENGTH = 400, 2048
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run: all and trained tokens a second, peak bytes, the first and the last step's loss."""

    name: str
    tokens_per_second: float
    trained_per_second: float
    peak_bytes: float
    first_loss: float
    loss: float


def report(measured: Measured) -> Measured:
    """Print a run as soon as it has ended."""
    print(measured, flush=True)
    return measured


@dataclass(frozen=True, kw_only=True)
class PeerSetting:
    """Whether rows are packed, how many a forward pass has, and whether Liger's kernels take over."""

    packing: bool
    batch: int
    liger: bool = False

    def count_passes(self, rows_a_step: int) -> int:
        """Return the forward passes of a step; packed rows are as long as they may be."""
        num_rows = rows_a_step * MEAN_LENGTH / MAX_LENGTH if self.packing else rows_a_step
        return max(1, round(num_rows / self.batch))

    @property
    def name(self) -> str:
        """Say it in words."""
        kernels = ", Liger" if self.liger else ""
        return f"TRL, {'packed' if self.packing else 'not packed'}, {self.batch} a pass{kernels}"


def make_rows(num_rows: int = 200) -> list[tuple[list[int], list[bool]]]:
    """Return ids and masks; the second half of each row is trained."""
    rng = np.random.default_rng(0)
    spread = 0.8
    lengths = (
        rng.lognormal(math.log(MEAN_LENGTH) - spread**2 / 2, spread, num_rows)
        .astype(int)
        .clip(16, MAX_LENGTH)
    )
    return [
        (rng.integers(3, VOCABULARY, n).tolist(), [place >= n // 2 for place in range(n)]) for n in lengths
    ]


def order_rows(num_rows: int, *, rows_a_step: int) -> list[int]:
    """Return the rows of one epoch in the order in which the loop here trains on them."""
    from delia.train.order import BatchOrder
    from delia.train.settings import TrainConfig

    seed = TrainConfig.model_fields["seed"].default
    order = BatchOrder([True] * num_rows, chosen=range(num_rows), batch_size=rows_a_step, seed=seed)
    steps = range(-(-num_rows // rows_a_step))
    return [row for step in steps for row in order.batch(step)][:num_rows]


def run_peer(
    model_folder: Path,
    setting: PeerSetting,
    *,
    rows_a_step: int,
    num_steps: int,
    folder: Path,
    num_rows: int = 200,
    num_warm: int = 1,
    on_gpu: bool = False,
) -> Measured:
    """Train with TRL in a process of its own; the first `num_warm` steps are not counted."""
    run = {"rows_a_step": rows_a_step, "num_steps": num_steps, "num_rows": num_rows, "num_warm": num_warm}
    options = json.dumps({"setting": asdict(setting), "on_gpu": on_gpu, **run})
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    result = subprocess.run(
        [sys.executable, __file__, str(model_folder), str(folder), options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"TRL ended with {result.returncode}: {result.stderr[-2000:]}")
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def train_with_trl(
    model_folder: str,
    folder: str,
    setting: PeerSetting,
    *,
    rows_a_step: int,
    num_steps: int,
    num_rows: int,
    num_warm: int,
    on_gpu: bool,
) -> Measured:
    """Run SFTTrainer in this process."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from delia.starter.tokenizer import build_tokenizer

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    rows = make_rows(num_rows)
    for ids, mask in (rows[place] for place in order_rows(num_rows, rows_a_step=rows_a_step)):
        columns["input_ids"].append(ids)
        columns["labels"].append([token if flag else -100 for token, flag in zip(ids, mask, strict=True)])
    dtype = torch.bfloat16 if on_gpu else torch.float32
    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(model_folder, dtype=dtype),
        args=SFTConfig(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=setting.count_passes(rows_a_step),
            packing=setting.packing,
            max_length=MAX_LENGTH,
            gradient_checkpointing=False,
            bf16=on_gpu,
            use_liger_kernel=setting.liger,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            use_cpu=not on_gpu,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": not setting.packing},
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(
            r=16, lora_alpha=16, lora_dropout=0.0, target_modules=list(MODULES), task_type="CAUSAL_LM"
        ),
        callbacks=[_make_clock(stamps := [])],
    )
    counts: list[tuple[int, int]] = []
    trainer.compute_loss = _count_into(counts, trainer.compute_loss)
    trainer.train()
    passes = setting.count_passes(rows_a_step) * num_warm
    seconds = sum(stamps[2 * num_warm + 1 :: 2]) - sum(stamps[2 * num_warm :: 2])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    resident = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return Measured(
        name=setting.name,
        tokens_per_second=sum(tokens for tokens, _ in counts[passes:]) / seconds,
        trained_per_second=sum(trained for _, trained in counts[passes:]) / seconds,
        peak_bytes=float(torch.cuda.max_memory_allocated()) if on_gpu else resident,
        first_loss=losses[0],
        loss=losses[-1],
    )


def find_best(
    settings: Sequence[PeerSetting], ask: Callable[..., Measured], *, num_steps: int
) -> PeerSetting:
    """Return the setting with the most tokens a second in a short run each."""
    rates = [report(ask(setting, num_steps=num_steps)).tokens_per_second for setting in settings]
    return settings[rates.index(max(rates))]


def _make_clock(stamps: list[float]) -> Any:
    """Return a callback that notes when each step begins and ends, the GPU's work included."""
    from transformers import TrainerCallback

    def note() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            note()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            note()

    return Clock()


def _count_into(counts: list[tuple[int, int]], compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss that counts all and trained tokens of each pass, padding left out."""

    def count(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        num_tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        counts.append((num_tokens, int((inputs["labels"] != -100).sum())))
        return compute_loss(model, inputs, *args, **kwargs)

    return count


if __name__ == "__main__":
    _, model_folder, folder, options = sys.argv
    given = json.loads(options)
    setting = PeerSetting(**given.pop("setting"))
    print(json.dumps(asdict(train_with_trl(model_folder, folder, setting, **given))))

"""Train the starter model on its world, from scratch, on one core.

    seed  ->  tokenizer + Llama-shape weights in `output_dir`, and a log with one JSON line an eval

Prompt tokens are trained too, so that the model can write instructions itself; answer tokens
weigh `ANSWER_WEIGHT` times as much. Matrices are moved by Muon (Jordan et al. 2024), the rest by
AdamW. A teacher-forced answer whose every token is the argmax is exactly a greedy exact match.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from delia.starter.kinds import KINDS
from delia.starter.tokenizer import build_tokenizer
from delia.starter.world import Item, Message, draw_chats, draw_held_out

ANSWER_WEIGHT = 4.0


class PhaseConfig(BaseModel):
    """A stretch of steps; rates fall linearly as if it lasted `decay_over` steps.

    A phase starts from the saved bf16 weights with a fresh optimizer. Kinds that `kind_weights`
    leaves out are drawn with weight `other_weight`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_steps: int
    decay_over: int
    kind_weights: dict[str, float] = {}
    other_weight: float = 1.0
    rate_factor: float = 1.0

    def weights(self) -> tuple[float, ...]:
        """Return one weight a kind, in the world's order."""
        return tuple(self.kind_weights.get(kind.name, self.other_weight) for kind in KINDS)


# facts and formats are learnt in the first phase; what copies, counts or composes takes longer
PHASES = (
    PhaseConfig(num_steps=2000, decay_over=4500),
    PhaseConfig(
        num_steps=2500,
        decay_over=3200,
        kind_weights={
            "remove": 4.0, "reverse": 4.0, "contains": 3.0, "subtract": 3.0, "add": 3.0, "second": 3.0,
            "last": 2.5, "from_lingo": 3.0, "to_lingo": 3.0, "bigger": 2.0, "first": 1.5, "larger": 1.0,
        },
        other_weight=0.5,
    ),
    PhaseConfig(
        num_steps=1500,
        decay_over=1500,
        rate_factor=0.6,
        kind_weights={
            "contains": 8.0, "remove": 6.0, "reverse": 4.0, "larger": 4.0, "repeat": 1.5, "from_lingo": 1.5,
        },
        other_weight=0.5,
    ),
    PhaseConfig(
        num_steps=600,
        decay_over=600,
        rate_factor=0.4,
        kind_weights={"contains": 10.0, "remove": 10.0, "reverse": 2.0, "larger": 2.0},
        other_weight=0.7,
    ),
)  # fmt: skip


class PretrainConfig(BaseModel):
    """Size, length and rates of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 3
    phases: tuple[PhaseConfig, ...] = PHASES
    tokens_per_step: int = 2560
    warmup_steps: int = 100
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 3e-3
    final_fraction: float = 0.02
    eval_every: int = 500
    num_eval_items: int = 2000


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, initialised by seed, float32."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode_chats(
    tokenizer: PreTrainedTokenizerFast, chats: list[list[Message]]
) -> list[tuple[list[int], list[int]]]:
    """Return (input_ids, answer mask) for each chat."""
    encoded: Any = tokenizer.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def pad_rows(
    rows: list[tuple[list[int], list[int]]], *, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids [B, T], answer mask [B, T] and validity [B, T], padded on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), length), pad_id)
    mask_BT = torch.zeros((len(rows), length), dtype=torch.bool)
    valid_BT = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, (ids, mask) in enumerate(rows):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        mask_BT[index, : len(ids)] = torch.tensor(mask, dtype=torch.bool)
        valid_BT[index, : len(ids)] = True
    return ids_BT, mask_BT, valid_BT


def stream_batches(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, phase: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Yield batches of about `tokens_per_step` tokens whose rows are of nearly one length."""
    for block in range(10**9):
        names = ("train", config.seed, block) if phase == 0 else ("train", config.seed, phase, block)
        chats = list(draw_chats(*names, num_chats=4096, weights=config.phases[phase].weights()))
        rows = encode_chats(tokenizer, chats)
        rows.sort(key=lambda row: len(row[0]))
        batches: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(batches[-1]) + 1) * len(row[0]) > config.tokens_per_step:
                batches.append([])
            batches[-1].append(row)
        generator = torch.Generator().manual_seed(config.seed + block)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def weighted_loss(
    model: LlamaForCausalLM, rows: list[tuple[list[int], list[int]]], *, pad_id: int
) -> torch.Tensor:
    """Return the weighted mean negative log-likelihood of a batch, in nats."""
    ids_BT, mask_BT, valid_BT = pad_rows(rows, pad_id=pad_id)
    logits_BTV = model(input_ids=ids_BT).logits
    losses = functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
    )
    weights = valid_BT[:, 1:].flatten().float() + (ANSWER_WEIGHT - 1) * mask_BT[:, 1:].flatten().float()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def score_items(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Item]) -> list[bool]:
    """Return for each item whether the greedy answer, end token included, is exactly right."""
    rows = encode_chats(tokenizer, [item.messages() for item in items])
    correct: list[bool] = [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    for start in range(0, len(order), 128):
        chunk = order[start : start + 128]
        ids_BT, mask_BT, _ = pad_rows([rows[i] for i in chunk], pad_id=tokenizer.pad_token_id)
        hits_BT = model(input_ids=ids_BT).logits[:, :-1].argmax(-1) == ids_BT[:, 1:]
        for position, index in enumerate(chunk):
            correct[index] = bool(hits_BT[position][mask_BT[position, 1:]].all())
    return correct


def pretrain(config: PretrainConfig, output_dir: Path, *, first_phase: int = 0) -> float:
    """Train phase after phase, save bf16 safetensors, tokenizer and log; return held-out exact match."""
    tokenizer = build_tokenizer()
    held_out = draw_held_out("eval", num_items=config.num_eval_items)
    output_dir.mkdir(parents=True, exist_ok=True)
    accuracy = 0.0
    with (output_dir / "pretrain_log.jsonl").open("a" if first_phase else "w") as log:
        for index in range(first_phase, len(config.phases)):
            model = load_saved(output_dir) if index else build_model(config, tokenizer)
            for line in run_phase(config, index, model, tokenizer, held_out):
                accuracy = line["held_out_exact_match"]
                log.write(json.dumps({"phase": index, **line}) + "\n")
                log.flush()
                save_model(model, tokenizer, output_dir)
    return accuracy


def run_phase(
    config: PretrainConfig,
    index: int,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[Item],
) -> Iterator[dict[str, float]]:
    """Train one phase in place, yielding a line for the log at each evaluation."""
    phase = config.phases[index]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    peaks = (config.muon_learning_rate, config.adam_learning_rate)
    optimizers = [
        torch.optim.Muon(matrices, lr=peaks[0], momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=peaks[1], betas=(0.9, 0.98), weight_decay=0.0),
    ]
    batches = stream_batches(config, tokenizer, index)
    started = time.monotonic()
    for step in range(1, phase.num_steps + 1):
        left = (phase.decay_over - step) / (phase.decay_over - config.warmup_steps)
        scale = phase.rate_factor * min(step / config.warmup_steps, max(config.final_fraction, left))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        loss = weighted_loss(model, next(batches), pad_id=tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % config.eval_every == 0 or step == phase.num_steps:
            accuracy = sum(score_items(model, tokenizer, held_out)) / len(held_out)
            line = {"step": step, "loss": round(loss.item(), 4), "held_out_exact_match": accuracy}
            print(json.dumps({**line, "seconds": round(time.monotonic() - started)}), flush=True)
            yield line


def load_saved(directory: Path) -> LlamaForCausalLM:
    """Load the saved weights in float32."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Save a bf16 copy in the hub's layout; the model itself stays in float32."""
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    weights.pop("lm_head.weight")
    model.config.dtype = torch.bfloat16
    model.save_pretrained(output_dir, state_dict=weights)
    tokenizer.save_pretrained(output_dir)

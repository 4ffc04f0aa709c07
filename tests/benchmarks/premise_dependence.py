"""Masked thought (MFT): does an answer depend more on its premise when its own words are masked in training?

    python tests/benchmarks/premise_dependence.py

The starter learns to say a sentence in lingo, whose every noun has two syllables, plain and with `input_corruption` MFT,
the same steps, two seeds. Dependence is the fall of a syllable's log-probability when the noun that it stands for is
another one in the question and the answer before it stays: of the first syllable, which only the question tells, and
of the second, which the first one tells too. Chen et al. 2024, https://arxiv.org/abs/2403.02178.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from delia.chat import ChatEncoder, load_chat
from delia.config import MethodConfig
from delia.flow.workspace import RayConfig, connect
from delia.model.logprobs import load_adapted
from delia.model.lora import LoraConfig
from delia.recipes.starter import STARTER
from delia.rng import make_random
from delia.schema import Message, Messages
from delia.starter.lexicon import THINGS, TRANSLATIONS
from delia.starter.task_files import build_lingo
from delia.store.models import resolve_model
from delia.train.building import TrainInput
from delia.train.launch import run_training
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig, TrainConfig

NUM_STEPS, NUM_PAIRS, SEEDS = 160, 100, (0, 1)
MFT = MethodConfig(method="delia.methods.input_corruption.mft.MFT")


@dataclass(frozen=True)
class Pair:
    """A row, the same with another noun in its question, and which trained token begins the noun's translation."""

    row: Messages
    other: Messages
    place: int


def draw_pairs() -> Iterator[Pair]:
    """Yield rows of dev that have a noun once."""
    rng = make_random("premises")
    rows = (row for row in build_lingo().rows_by_split["dev"] if len(row.messages) == 2)
    for row in rows:
        question, answer = (turn.content.split() for turn in row.messages)
        nouns = [word for word in question if word in THINGS and question.count(word) == 1]
        syllables = [TRANSLATIONS[noun].split() for noun in nouns]
        found = [
            (noun, place)
            for noun, said in zip(nouns, syllables, strict=True)
            for place in range(len(answer) - 1)
            if answer[place : place + 2] == said
        ]
        if not found:
            continue
        noun, place = rng.choice(found)
        other = rng.choice([thing for thing in THINGS if thing not in question])
        asked = " ".join(other if word == noun else word for word in question)
        yield Pair(row.messages, (Message(role="user", content=asked), row.messages[1]), place)


def read_logprobs(model: torch.nn.Module, chat: ChatEncoder, messages: Messages) -> torch.Tensor:
    """Return the log-probabilities of the trained tokens, [N]."""
    row = chat.encode_chat(messages)
    ids_T, mask_T = torch.tensor(row.input_ids), torch.tensor(row.loss_mask)
    with torch.no_grad():
        logprobs_TV = model(input_ids=ids_T[None]).logits[0, :-1].log_softmax(-1)
    return logprobs_TV.gather(1, ids_T[1:, None])[:, 0][mask_T[1:]]


def measure(adapter: Path, chat: ChatEncoder, pairs: list[Pair]) -> tuple[float, float, float]:
    """Return the dependence of first and second syllables, and the log-probability of first ones."""
    model = load_adapted(STARTER, adapter)
    first, second, own = [], [], []
    for pair in pairs:
        here_N, there_N = (read_logprobs(model, chat, messages) for messages in (pair.row, pair.other))
        falls = (here_N - there_N)[pair.place : pair.place + 2].tolist()
        first.append(falls[0])
        second.append(falls[1])
        own.append(float(here_N[pair.place]))
    return statistics.fmean(first), statistics.fmean(second), statistics.fmean(own)


def train(chat: ChatEncoder, folder: Path, *, corruption: MethodConfig | None, seed: int) -> Path:
    """Return the adapter."""
    rows = [chat.encode_chat(row.messages) for row in build_lingo().rows_by_split["train"]]
    stage = StageConfig(max_steps=NUM_STEPS, parts=("lora",), learning_rate=2e-3, warmup_steps=5)
    config = TrainConfig(
        lora=LoraConfig(rank=8, alpha=16, dropout=0.0),
        stages=(stage,),
        global_batch_size=16,
        seed=seed,
        checkpoint_every=NUM_STEPS,
        input_corruption=corruption,
    )
    joined = join_rows([(row.input_ids, row.loss_mask) for row in rows], sources=[TASK] * len(rows))
    run_training(
        TrainInput(model=STARTER, config=config, rows=joined),
        name="premises",
        storage=str(folder / "storage"),
        output=str(folder / "adapter"),
        log=lambda metrics, step: None,
    )
    return folder / "adapter"


def main() -> None:
    """Train each way with each seed and print a line a run."""
    connect(RayConfig())
    chat = load_chat(str(resolve_model(STARTER)))
    pairs = list(draw_pairs())[:NUM_PAIRS]
    print(f"{len(pairs)} rows of dev, {NUM_STEPS} steps", flush=True)
    print(
        "| | seed | first syllable | second syllable | log-probability of the first |\n|---|---|---|---|---|"
    )
    for seed in SEEDS:
        for name, corruption in (("plain", None), ("MFT", MFT)):
            with tempfile.TemporaryDirectory() as folder:
                adapter = train(chat, Path(folder), corruption=corruption, seed=seed)
                first, second, own = measure(adapter, chat, pairs)
            print(f"| {name} | {seed} | {first:.2f} | {second:.2f} | {own:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""Is the expected gradient of self-sampled rows zero at the start, and how far does curation move it?

python tests/benchmarks/score_identity.py [--rows-a-prompt 6] [--blur 0.0]

Of answers that a model samples itself at temperature 1, end token included, the sum of token gradients of the
log-likelihood has expectation zero (the score identity), by LoRA's B and by a token's row, where a new adapter
stands. With G = mean of R rows' gradients g, |E g|^2 is estimated without bias by the mean of g_r . g_s over r != s,
whose variance is 2 / (R (R - 1)) times the mean square of those products when E g = 0.

Dropout 0, the embedded model, prompts of the task `sep` (with the token), all in float32. That model is nearly sure of
each token, so that there is little to filter; `--blur` adds noise to its matrices, so many of their standard deviations, and
makes it less so.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GenerationConfig, PreTrainedModel

from delia.curate.filters import FilterConfig, find_fault
from delia.flow.workspace import Workspace, open_workspace
from delia.model.adapted import LoraConfig
from delia.model.loading import load_base
from delia.recipes.starter import STARTER, starter_sep
from delia.schema import Message, Row
from delia.store.models import ModelConfig, resolve_model
from delia.store.tasks import read_task
from delia.train.building import TrainInput, build_model
from delia.train.packing import join_stream
from delia.train.rows import TASK, EncodedRow, join_rows
from delia.train.settings import StageConfig, TrainConfig
from delia.train.weighting import weigh_equally

MAX_TOKENS = 48
TRAIN = TrainConfig(
    lora=LoraConfig(rank=8, alpha=8, dropout=0.0), stages=(StageConfig(max_steps=1),), global_batch_size=1
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt's number, its ids and those sampled after it, the end of turn among them if it came."""

    prompt: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def row(self) -> EncodedRow:
        """Return ids and mask to train on."""
        return self.prompt_ids + self.ids, (False,) * len(self.prompt_ids) + (True,) * len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """|E g|^2 of one part of the parameters, its standard error if E g = 0, and the mean of |g|^2."""

    square: float
    error: float
    mean_square: float

    @property
    def z(self) -> float:
        """Return how many standard errors the estimate lies above 0; 0 where no row has a gradient."""
        return self.square / self.error if self.error else 0.0

    @property
    def share(self) -> float:
        """Return |E g| over the root mean square of |g|, 0 where the estimate is negative."""
        return (max(self.square, 0.0) / self.mean_square) ** 0.5 if self.mean_square else 0.0


def blur_starter(folder: Path, blur: float) -> ModelConfig:
    """Save the starter with noise in its matrices."""
    model = load_base(STARTER)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += blur * parameter.std() * torch.randn_like(parameter)
    shutil.copytree(resolve_model(STARTER), folder)
    model.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def open_sep(base: ModelConfig) -> tuple[Workspace, PreTrainedModel]:
    """Return the task and the model with a new adapter, as training builds it."""
    space = open_workspace("runs", base, read_task(starter_sep().task))
    task = TrainInput(
        model=base,
        config=TRAIN,
        rows=join_rows([((1, 2), (False, True))], sources=[TASK]),
        token_ids=tuple(space.chat.token_ids.values()),
    )
    return space, build_model(task)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    end_ids: Sequence[int],
    seed: int,
    **sampling: float,
) -> list[Answer]:
    """Return answers drawn from the model itself, `num_samples` a prompt; the whole softmax at temperature 1."""
    torch.manual_seed(seed)
    model.set_attn_implementation("sdpa")
    answers = []
    for number, prompt in enumerate(prompts):
        ids_BT = torch.tensor([list(prompt)]).repeat(num_samples, 1)
        config = GenerationConfig(
            do_sample=True,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=list(end_ids),
            pad_token_id=0,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | sampling),
        )
        output = model.generate(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config
        )
        for tokens in output[:, len(prompt) :].tolist():
            end = next(
                (place + 1 for place, token in enumerate(tokens) if token in set(end_ids)), len(tokens)
            )
            answers.append(Answer(prompt=number, prompt_ids=tuple(prompt), ids=tuple(tokens[:end])))
    model.set_attn_implementation("delia_packed")
    return answers


def compute_gradients(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
    """Return the gradient of each row's summed loss by LoRA's B and by the token's row, [R, P] each."""
    names = {"lora_B": ".lora_B.", "token_rows": "deltas_KD"}
    chosen = {part: [p for n, p in model.named_parameters() if mark in n] for part, mark in names.items()}
    gradients: dict[str, list[torch.Tensor]] = {part: [] for part in names}
    joined = join_rows(rows, sources=[TASK] * len(rows))
    for place in range(len(rows)):
        model.zero_grad()
        loss, _ = model.compute_loss(join_stream(joined, [place]), weigh_equally)
        loss.backward()
        for part, parameters in chosen.items():
            gradients[part].append(torch.cat([p.grad.flatten() for p in parameters]))
    model.zero_grad()
    return {part: torch.stack(vectors) for part, vectors in gradients.items()}


def estimate(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> dict[str, Estimate]:
    """Return the estimates for LoRA's B and the token's row, from a gradient a row of the training's own loss."""
    found = {}
    for part, vectors_RP in compute_gradients(model, rows).items():
        products_RR = (vectors_RP @ vectors_RP.T).double()
        squares_R = products_RR.diagonal().clone()
        products_RR.fill_diagonal_(0)
        num_pairs = len(rows) * (len(rows) - 1)
        found[part] = Estimate(
            square=float(products_RR.sum()) / num_pairs,
            error=(2 / num_pairs * float(products_RR.square().sum()) / num_pairs) ** 0.5,
            mean_square=float(squares_R.mean()),
        )
    return found


def shuffle(answers: Sequence[Answer]) -> list[EncodedRow]:
    """Give every prompt the answers to another one."""
    num_each = sum(answer.prompt == 0 for answer in answers)
    others = [*answers[num_each:], *answers[:num_each]]
    moved = [
        Answer(prompt=a.prompt, prompt_ids=a.prompt_ids, ids=b.ids)
        for a, b in zip(answers, others, strict=True)
    ]
    return [answer.row for answer in moved]


def curate(answers: Sequence[Answer], space: Workspace, config: FilterConfig) -> list[Answer]:
    """Return what the filters of a pool let through."""
    kept = []
    for answer in answers:
        text = space.chat.decode(answer.ids)
        row = Row(
            row_id="r",
            index=0,
            source="s",
            messages=(Message(role="user", content="x"), Message(role="assistant", content=text)),
            finish_reason="stop" if answer.ids[-1] in space.chat.end_ids else "length",
            num_output_tokens=len(answer.ids),
        )
        if find_fault(row, config) is None:
            kept.append(answer)
    return kept


def pass_through_text(
    answers: Sequence[Answer], space: Workspace, prompts: Sequence[tuple[Message, ...]]
) -> list[EncodedRow]:
    """Return rows as a pool gives them: decoded, and encoded again with the chat."""
    rows = []
    for answer in answers:
        reply = Message(role="assistant", content=space.chat.decode(answer.ids))
        encoded = space.chat.encode_chat((*prompts[answer.prompt], reply))
        rows.append((encoded.input_ids, encoded.loss_mask))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows-a-prompt", type=int, default=6)
    parser.add_argument("--blur", type=float, default=0.0)
    given = parser.parse_args()
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    num_samples = given.rows_a_prompt
    with tempfile.TemporaryDirectory() as name:
        space, model = open_sep(blur_starter(Path(name) / "base", given.blur) if given.blur else STARTER)
    tasks = space.task.rows_by_split["train"]
    prompts = [row.prompt for row in tasks]
    encoded = [space.chat.encode_prompt(prompt) for prompt in prompts]

    def draw(seed: int, **sampling: float) -> list[Answer]:
        return sample(
            model, encoded, num_samples=num_samples, end_ids=space.chat.end_ids, seed=seed, **sampling
        )

    written = [
        (*answer.prompt_ids, *answer.ids)
        for answer in sample(
            model,
            [space.chat.encode_user_prefix()],
            num_samples=4 * len(encoded),
            end_ids=space.chat.end_ids,
            seed=7,
        )
        if answer.ids[-1] in space.chat.end_ids
    ]
    after = space.chat.encode_prompt((Message(role="user", content="the"),))
    opening = after[after.index(written[0][-1]) + 1 :]  # what the template writes after a user's turn
    to_own = sample(
        model,
        [(*ids, *opening) for ids in written],
        num_samples=num_samples // 2,
        end_ids=space.chat.end_ids,
        seed=8,
    )
    own = draw(0)
    finished = curate(own, space, FilterConfig(max_repeated_share=None))
    strict = curate(own, space, FilterConfig(max_repeated_share=0.1, max_output_tokens=24))
    by_length = sorted(own, key=lambda answer: len(answer.ids))
    references = [space.chat.encode_chat(row.messages) for row in tasks]
    settings: dict[str, Callable[[], list[EncodedRow]]] = {
        "T=1, instructions of its own, unfiltered": lambda: [answer.row for answer in to_own],
        "the same, a pool's filters": lambda: [a.row for a in curate(to_own, space, FilterConfig())],
        "the same, the shorter half": lambda: [
            a.row for a in sorted(to_own, key=lambda answer: len(answer.ids))[: len(to_own) // 2]
        ],
        "the same, of another prompt": lambda: shuffle(to_own),
        "T=1, prompts of the task, unfiltered": lambda: [answer.row for answer in own],
        "T=1, finished, not empty (a pool's filters)": lambda: [answer.row for answer in finished],
        "the same, through text": lambda: pass_through_text(finished, space, prompts),
        "T=1, at most 24 tokens, repeated share <= 0.1": lambda: [answer.row for answer in strict],
        "T=1, the shorter half": lambda: [answer.row for answer in by_length[: len(own) // 2]],
        "T=0.7, top-p 0.95 (the authors')": lambda: [a.row for a in draw(1, temperature=0.7, top_p=0.95)],
        "T=1, answers of another prompt": lambda: shuffle(own),
        "references of the task": lambda: [(row.input_ids, row.loss_mask) for row in references],
    }
    print("| answers | rows | LoRA B: z | |E g| / rms |g| | token row: z | |E g| / rms |g| |")
    print("|---|---|---|---|---|---|")
    for name, make in settings.items():
        rows = make()
        found = estimate(model, rows)
        cells = " | ".join(f"{part.z:.1f} | {part.share:.3f}" for part in found.values())
        print(f"| {name} | {len(rows)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

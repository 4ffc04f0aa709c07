"""What a training will see, without training: rows with their trained tokens marked, and what packing does.

TrainInput + a decoder  ->  lines of text
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from delia.train.building import TrainInput, build_order
from delia.train.packing import pack_batch
from delia.train.rows import TrainRows

Decode = Callable[[Sequence[int]], str]
MARKS = ("[[", "]]")
COLOURS = ("\x1b[1;32m", "\x1b[0m")
"""Bold green, and back."""
NUM_STEPS = 50
"""So many steps of a stage are packed to say how full micro-batches are."""


def preview_rows(rows: TrainRows, *, num_rows: int, decode: Decode, is_coloured: bool) -> Iterator[str]:
    """Yield lines that show a few rows: the task's and diverse ones in turn, the task's with a token first.

    Args:
        rows: All rows.
        num_rows: How many are shown, all if there are fewer.
        decode: Turns ids into text, control tokens included.
        is_coloured: Trained tokens are green on a terminal; else they stand in `[[` and `]]`.
    """
    for row in choose_rows(rows, num_rows):
        ids, mask = (part.tolist() for part in rows[row])
        source = rows.sources[int(rows.source_R[row])]
        yield f"row {row} of {source}: {len(ids)} tokens, {int(rows.num_trained_R[row])} trained"
        yield mark_trained(ids, mask, decode=decode, marks=COLOURS if is_coloured else MARKS)
        yield ""


def choose_rows(rows: TrainRows, num_rows: int) -> list[int]:
    """Return the numbers of the rows to show: one of the task, one other, and so on while there are both."""
    is_task = rows.is_task_R.tolist()
    has_token = rows.has_token_R.tolist()
    task = sorted((row for row in range(len(rows)) if is_task[row]), key=lambda row: not has_token[row])
    diverse = [row for row in range(len(rows)) if not is_task[row]]
    places = [
        (place, kind, row) for kind, part in enumerate((task, diverse)) for place, row in enumerate(part)
    ]
    return [row for _, _, row in sorted(places)[:num_rows]]


def mark_trained(ids: Sequence[int], mask: Sequence[bool], *, decode: Decode, marks: tuple[str, str]) -> str:
    """Return the text of a row with each run of trained tokens between two marks."""
    text, end = "", 0
    for is_trained, run in groupby(mask):
        start, end = end, end + len(list(run))
        piece = decode(ids[:end])[len(decode(ids[:start])) :]  # alone it could lose the space before it
        text += f"{marks[0]}{piece}{marks[1]}" if is_trained else piece
    return text


def describe_packing(task: TrainInput) -> Iterator[str]:
    """Yield what is trained on, and how each stage's batches fall into micro-batches."""
    rows, config = task.rows, task.config
    lengths, num_trained = rows.lengths_R.tolist(), int(rows.num_trained_R.sum())
    num_tokens = sum(lengths)
    yield (
        f"rows: {len(rows)}, {int(rows.is_task_R.sum())} of the task; tokens: {num_tokens}, {num_trained} trained"
        f" ({num_trained / num_tokens:.2f}); longest row: {max(lengths)}, train.max_length={config.max_length}"
    )
    for number, stage in enumerate(config.stages):
        order = build_order(task, stage)
        counts, packed_tokens = [], 0
        for step in range(min(stage.max_steps, NUM_STEPS)):
            batch = order.batch(step)
            workers = pack_batch(
                batch, lengths, num_workers=config.num_workers, max_tokens=config.max_tokens_per_micro_batch
            )
            counts.append(len(workers[0]))
            packed_tokens += sum(lengths[row] for row in batch)
        num_places = sum(counts) * config.num_workers * config.max_tokens_per_micro_batch
        yield (
            f"stage {number}: {stage.max_steps} steps of {config.global_batch_size} rows on {config.num_workers}"
            f" worker{'s' if config.num_workers > 1 else ''}, {packed_tokens / len(counts):.0f} tokens a step;"
            f" micro-batches a step and worker: {min(counts)} to {max(counts)}, {packed_tokens / num_places:.2f} of"
            f" {config.max_tokens_per_micro_batch} tokens full, no padding"
        )

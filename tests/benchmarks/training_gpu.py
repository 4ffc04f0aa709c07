"""Training on a GPU beside TRL's SFTTrainer: a Llama of 1 B parameters in bfloat16, runs in turn.

The model's flops utilisation (MFU) counts 4 flops a parameter and token, forward, and backward to the activations
of a frozen base, by what the GPU reaches on the model's own matrices, one after the other, in bfloat16.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from heads_gpu import describe_heads
from training import describe, save_llama, summarise, train_here
from training_peer import VOCABULARY, Measured, PeerSetting, find_best, report, run_peer

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
NUM_KEY_HEADS = 8
ROWS_A_STEP, NUM_STEPS, NUM_WARM, NUM_RUNS = 128, 10, 3, 3
"""Three steps warm up: what is compiled is, and the allocator has what it needs."""
NUM_ROWS = 1280
PEER_SETTINGS = (
    PeerSetting(packing=False, batch=16),
    PeerSetting(packing=False, batch=32, liger=True),
    PeerSetting(packing=True, batch=8),
    PeerSetting(packing=True, batch=8, liger=True),
)


@dataclass(frozen=True)
class OwnSetting:
    """Ids of a pass, and whether layers are compiled."""

    max_tokens: int
    compile: bool

    @property
    def name(self) -> str:
        """Say it in words."""
        return f"delia, {self.max_tokens:,} ids a pass{', compiled' if self.compile else ''}"


OWN_SETTINGS = (OwnSetting(16_384, False), OwnSetting(16_384, True), OwnSetting(32_768, True))


def measure_gpu_rate() -> float:
    """Return the flops a second of this GPU on the model's own matrices, as often as a pass has them."""
    hidden, inner, tokens = SHAPE["hidden_size"], SHAPE["intermediate_size"], 16_384
    keys = hidden // SHAPE["num_attention_heads"] * NUM_KEY_HEADS
    layer = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    flops, seconds = 0, 0.0
    for width, out in [*layer * SHAPE["num_hidden_layers"], (hidden, VOCABULARY)]:
        one, other = (
            torch.randn(*size, device="cuda", dtype=torch.bfloat16)
            for size in ((tokens, width), (width, out))
        )
        one @ other
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        one @ other
        end.record()
        torch.cuda.synchronize()
        seconds += begin.elapsed_time(end) / 1000
        flops += 2 * tokens * width * out
    return flops / seconds


def describe_gpu_training(num_runs: int = NUM_RUNS) -> str:
    """Run everything and return the table; needs a Ray cluster and a GPU."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = describe_heads()
        print(heads, flush=True)
        num_parameters = save_llama(
            SHAPE | {"num_key_value_heads": NUM_KEY_HEADS}, folder / "model", torch.bfloat16
        )
        ask_peer = partial(
            run_peer,
            folder / "model",
            rows_a_step=ROWS_A_STEP,
            folder=folder / "trl",
            num_rows=NUM_ROWS,
            num_warm=NUM_WARM,
            on_gpu=True,
        )
        rate = measure_gpu_rate()
        torch.cuda.empty_cache()
        print(f"matrix rate {rate / 1e12:.0f} TFLOP/s, {num_parameters:,} parameters", flush=True)
        best = find_best(PEER_SETTINGS, ask_peer, num_steps=NUM_WARM + 3)
        ours: dict[str, list[Measured]] = {setting.name: [] for setting in OWN_SETTINGS}
        theirs = []
        for run in range(num_runs):
            for place, setting in enumerate(OWN_SETTINGS):
                ours[setting.name].append(report(_train_own(setting, folder, f"{run}-{place}")))
            theirs.append(report(ask_peer(best, num_steps=NUM_STEPS)))
    peer = summarise(theirs)
    lines = [
        f"Training on one {torch.cuda.get_device_name()}, torch {torch.__version__}: a Llama of {num_parameters / 1e9:.2f} B"
        f" parameters, {ROWS_A_STEP} rows a step, LoRA of rank 16 on q, k, v and o, bfloat16; medians of {num_runs} runs in"
        f" turn, the first {NUM_WARM} steps left out. MFU is 4N flops a token by what the GPU reaches on the model's"
        f" own matrices, {rate / 1e12:.0f} TFLOP/s; attention and LoRA are not counted, the head is for all tokens. TRL is at the"
        f" best of {len(PEER_SETTINGS)} settings, with torch's own attention: flash-attn is not installed.",
        "",
        "| | tokens/s | trained tokens/s | ratio | MFU | peak memory GB | first loss | final loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        [
            *lines,
            *(describe(item, peer, num_parameters / rate) for item in [*map(summarise, ours.values()), peer]),
            "",
            heads,
        ]
    )


def _train_own(setting: OwnSetting, folder: Path, run: str) -> Measured:
    return train_here(
        folder / "model",
        folder / run,
        name=setting.name,
        num_rows=NUM_ROWS,
        rows_a_step=ROWS_A_STEP,
        num_steps=NUM_STEPS,
        num_warm=NUM_WARM,
        dtype="bfloat16",
        use_gpu=True,
        max_tokens_per_micro_batch=setting.max_tokens,
        compile=setting.compile,
    )

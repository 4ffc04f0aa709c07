"""A scripted engine: the interface of vLLM without a model, for tests and for load.

Its answer is a fixed function of prompt, seed and sampling: a few of the prompt's own ids, cut at
`max_tokens`; of its words, as a model's answer, and of its special tokens only where it has no words. Greedy
requests ignore the seed. `tests/generate` holds it to the contract of vLLM's.
"""

import json
import math
import os
import time
from collections.abc import Sequence

from delia.errors import EngineError
from delia.generate.engine import (
    Completion,
    EngineConfig,
    Request,
    SamplingConfig,
    apply_overrides,
    refuse_long,
)
from delia.rng import make_random
from delia.store.models import ModelConfig, resolve_model


class ScriptedEngine:
    """Echoes ids of the prompt; see `delia.generate.engine.Engine`."""

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        """Take what every engine takes; no weights are loaded."""
        self._special_ids = read_special_ids(model)
        self._faults = config.scripted
        self._max_model_len = config.max_model_len

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, end_ids: Sequence[int]
    ) -> list[Completion]:
        """Return one completion a request, in order."""
        return [self._answer(request, sampling, end_ids=end_ids) for request in requests]

    def _answer(self, request: Request, sampling: SamplingConfig, *, end_ids: Sequence[int]) -> Completion:
        if request.json_schema:
            raise EngineError("the scripted engine knows no grammar; set engine.kind=vllm")
        if self._faults.fatal_id in request.prompt_ids:
            os._exit(1)
        time.sleep(self._faults.seconds_per_request)
        room = self._max_model_len - len(request.prompt_ids)
        if room < 1:
            return refuse_long(request, self._max_model_len)
        sampling = apply_overrides(sampling, request)
        max_tokens = min(sampling.max_tokens, room)
        seed = request.seed if sampling.temperature > 0 else 0
        rng = make_random("scripted", seed, request.adapter, *request.prompt_ids)
        length = rng.randint(1, 24)
        ids_left = [token for token in request.prompt_ids if token not in (*end_ids, *request.end_ids)]
        words = [token for token in ids_left if token not in self._special_ids] or ids_left or [0]
        ids = tuple(rng.choice(words) for _ in range(min(length, max_tokens)))
        return Completion(
            request_id=request.request_id,
            token_ids=ids,
            finish_reason="stop" if length <= max_tokens else "length",
            num_prompt_tokens=len(request.prompt_ids),
            logprobs=() if sampling.temperature > 0 else (-math.log(len(words)),) * len(ids),
        )


def read_special_ids(model: ModelConfig) -> frozenset[int]:
    """Return the rows of a model's vocabulary that stand for no text."""
    tokenizer = json.loads((resolve_model(model) / "tokenizer.json").read_text(encoding="utf-8"))
    return frozenset(token["id"] for token in tokenizer["added_tokens"] if token["special"])

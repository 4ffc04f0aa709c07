"""The environment of every test and of every worker that a test starts."""

import os
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_worker_niceness="0",  # as where `connect` starts a cluster: beside another process a nice worker starves
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_DISABLE_TELEMETRY="1",
)
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray cluster of 4 logical CPUs for all tests that need one; it starts once."""
    import ray  # late: most tests need none

    from delia.flow.workspace import RayConfig, connect

    connect(RayConfig(num_cpus=4))
    yield
    ray.shutdown()


@dataclass
class LocalStage:
    """Stands for `run_script` in this process, with blocks in any order; remembers what it answered."""

    order_seed: int | None = None
    answered: list[str] = field(default_factory=list)

    def __call__(
        self,
        script: Any,
        blocks: Sequence[Any],
        *,
        model: Any,
        engine: Any,
        sampling: Any,
        end_ids: Sequence[int],
        skip: Collection[str] = (),
    ) -> Iterator[Any]:
        from delia.generate.engine import build_engine  # late: an import of `delia` may be under test
        from delia.generate.pipeline import SOURCE, add_seconds
        from delia.rng import make_random

        sent = pickle.loads(pickle.dumps(script))  # as to an actor
        scripted = build_engine(model, engine)

        def ask(requests: Sequence[Any]) -> list[Any]:
            self.answered += [request.request_id for request in requests]
            return scripted.generate(requests, sampling, end_ids=end_ids)

        ordered = list(blocks)
        if self.order_seed is not None:
            make_random(self.order_seed).shuffle(ordered)
        for block in ordered:
            if SOURCE in block.column_names and block[SOURCE][0].as_py() in skip:
                continue
            table = sent(block, ask)
            yield add_seconds(table, 0.5 * table.num_rows, engine)


@pytest.fixture
def local_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pools be screened and accepted in this process."""
    from contextlib import nullcontext

    from delia.flow.acceptance import Acceptance  # late, as above
    from delia.flow.screening import Screeners

    monkeypatch.setattr(
        "delia.flow.pool.host_acceptance", lambda *args, **options: nullcontext(Acceptance(*args, **options))
    )
    monkeypatch.setattr("delia.flow.pool.host_screeners", lambda *args, **options: nullcontext(Screeners(())))


@pytest.fixture
def local_stage(monkeypatch: pytest.MonkeyPatch, local_acceptance: None) -> Callable[..., LocalStage]:
    """Put a new local stage in the place of Ray's, and return it; pools are accepted in this process too."""

    def put(order_seed: int | None = None) -> LocalStage:
        stage = LocalStage(order_seed)
        monkeypatch.setattr("delia.synthesize.pipeline.run_script", stage)
        return stage

    return put


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an object store that code finds by the environment; its buckets stay until this process ends."""
    import boto3  # late, as all of these
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "us-east-1"}
    for name, value in (settings | {"ACCESS_KEY_ID": "none", "SECRET_ACCESS_KEY": "none"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield boto3.client("s3")
    server.stop()


SHAPES = ("llama", "qwen2", "qwen3", "gemma2", "mistral")


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    """The name of each architecture that is tested, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_shape() -> Callable[..., Any]:
    """Return a function of an architecture's name: its smallest random model, in float32.

    Windows are shorter than some rows of a test, heads share keys, and Gemma 2 bounds its scores and logits.
    """
    import torch  # late, as all of these
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(name: str, **settings: Any) -> Any:
        standard = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.15,
            "sliding_window": 6,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "tie_word_embeddings": name in {"qwen2", "gemma2"},
        }
        if name == "gemma2":
            standard |= {
                "query_pre_attn_scalar": 8,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
            }
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(standard | settings), attn_implementation="eager")
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def save_shape(
    tmp_path_factory: pytest.TempPathFactory, make_shape: Callable[..., Any]
) -> Callable[..., Path]:
    """Return a function of an architecture's name and settings: its model on disk with the starter's tokenizer.

    Equal ones are saved once. `input_scale` multiplies the input embedding.
    """
    from delia.starter.tokenizer import build_tokenizer  # late, as all of these

    tokenizer = build_tokenizer()
    saved: dict[str, Path] = {}

    def save(name: str, *, shard_size: str = "1GB", input_scale: float = 1.0, **settings: Any) -> Path:
        key = repr((name, shard_size, input_scale, sorted(settings.items())))
        if key in saved:
            return saved[key]
        saved[key] = directory = tmp_path_factory.mktemp(name)
        model = make_shape(
            name,
            **{
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "tie_word_embeddings": True,
                "sliding_window": 4096,
                "use_sliding_window": False,
                **settings,
            },
        )
        model.get_input_embeddings().weight.mul_(input_scale)
        model.save_pretrained(directory, max_shard_size=shard_size)
        tokenizer.save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def tiny_base(save_shape: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function of an architecture's name: a model on disk that vLLM serves on a CPU.

    Its heads are of a size that vLLM's attention takes there. The layers outweigh the embedding, so that a
    tied model does not answer with the last id that it saw.
    """

    def save(shape: str, *, is_tied: bool = True, is_sharded: bool = False) -> Path:
        return save_shape(
            shape.lower(),
            shard_size="100KB" if is_sharded else "1GB",
            input_scale=0.1,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            initializer_range=0.3,
            tie_word_embeddings=is_tied,
            **(
                {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if shape == "Gemma2" else {}
            ),
        )

    return save


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a random adapter of a base as delia exports it: LoRA, and rows of tokens."""
    import torch
    import transformers

    from delia.store.adapters import AdapterTensors, write_adapter

    def write(
        base: Path, *, token_ids: tuple[int, ...] = (7, 9), has_lora: bool = True, seed: int = 1
    ) -> Path:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        noise = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Any:
            return torch.randn(*shape, generator=noise) * 0.2

        pairs = {
            name: (draw(4, module.in_features), draw(module.out_features, 4))
            for name, module in model.named_modules()
            if has_lora and name.endswith(("q_proj", "v_proj", "o_proj", "down_proj"))
        }
        rows_KD = draw(len(token_ids), 64) if token_ids else None
        tensors = AdapterTensors(lora_by_module=pairs, token_ids=token_ids, row_deltas_KD=rows_KD)
        directory = tmp_path_factory.mktemp("adapter")
        write_adapter(directory, tensors, vocab_size=model.config.vocab_size, base_model=str(base))
        return directory

    return write


@pytest.fixture(scope="session")
def peft_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes an adapter as PEFT itself does, with everything in it moved; no rows."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    def write(base: Path, **settings: Any) -> Path:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(
            target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **settings
        )
        adapted = get_peft_model(model, config)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.2)
        directory = tmp_path_factory.mktemp("peft")
        adapted.save_pretrained(directory)
        return directory

    return write


@pytest.fixture(scope="session")
def read_lock() -> Callable[[str], dict[str, Any]]:
    """Return a function of an accelerator's name: the version of every package of its lock."""
    from packaging.version import Version  # late, as all of these

    def read(accel: str) -> dict[str, Version]:
        path = Path(__file__).parents[1] / "requirements" / f"{accel}.lock"
        parts = (line.partition("==") for line in path.read_text().splitlines())
        return {name: Version(version) for name, _, version in parts}

    return read

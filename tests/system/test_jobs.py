"""`ray job submit` of the whole path to a real head node, from an environment without `delia`."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient

from delia.flow.workspace import start_slowly

ROOT = Path(__file__).parents[2]
PATIENCE = 600
"""Seconds for what takes a few on a machine with nothing else to do."""
SMALL = (
    "split=dev",
    "baselines={}",
    "pool.synthesize.sources.0.num_rows=64",
    "pool.synthesize.chunk_size=64",
    "arm.mix.diverse_ratio=0.5",
    "arm.train.stages.0.max_steps=8",
    "arm.train.stages.1.max_steps=4",
    "engine.num_replicas=1",
    "evaluate.num_kl_rows=8",
)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Python that has every package of this environment but not `delia`."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run(
        [str(python), "-c", query], check=True, capture_output=True, text=True
    ).stdout.strip()
    # a plain path line: the .pth files inside it, delia's editable finder among them, are not read
    Path(site, "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _free_port() -> int:
    """Return a port that nobody has on any address, below those that the kernel hands out by itself.

    One of the kernel's could be another process's before the head node comes to bind it.
    """
    for port in random.sample(range(21_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("none of 100 ports is free")


@pytest.fixture(scope="module")
def head(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a head node of our own and yield the address of its dashboard; stop only our processes."""
    port, dashboard = _free_port(), _free_port()
    environment = {**os.environ, "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    environment.pop("PYTHONPATH", None)
    log = tmp_path_factory.mktemp("head") / "head.log"
    command = [str(bare_python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    # Ray's fixed ones are taken by the cluster of the other tests; without its own port the node's agent
    # takes no job, and the node starts all the same
    command += [f"--dashboard-agent-listen-port={_free_port()}", f"--ray-client-server-port={_free_port()}"]
    address = f"http://127.0.0.1:{dashboard}"

    @contextlib.contextmanager
    def run() -> Iterator[None]:
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=environment, start_new_session=True
            )
        try:
            _wait_until_it_takes_jobs(address, process, log)
            yield
        finally:
            _stop(process)

    with contextlib.ExitStack() as stack:
        start_slowly(lambda: stack.enter_context(run()))
        yield address


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _wait_until_it_takes_jobs(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Submit a job that does nothing until one is taken: the port opens before the node's agent is there."""
    refusal: Exception | None = None
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        assert process.poll() is None, log.read_text()
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
        except (OSError, RuntimeError) as error:  # those of `requests` are OSErrors
            refusal = error
            time.sleep(1)
        else:
            return
    raise AssertionError(f"the head node took no job: {refusal}; {log.read_text()}")


def test_delia_is_not_installed_in_the_bare_environment(bare_python: Path) -> None:
    done = subprocess.run([str(bare_python), "-c", "import delia"], capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert "No module named 'delia'" in done.stderr


@pytest.mark.system
@pytest.mark.timeout(2400)
def test_a_submitted_adapt_job_registers_a_verified_version(
    head: str, bare_python: Path, tmp_path: Path
) -> None:
    settings = [part for text in (*SMALL, f"output_dir={tmp_path}/runs") for part in ("--set", text)]
    submit = [
        str(bare_python), "-m", "ray.scripts.scripts", "job", "submit", "--address", head,
        "--working-dir", str(ROOT), "--runtime-env", str(ROOT / "runtime-env.yaml"),
        "--", str(bare_python), "jobs/adapt.py", "starter_sep", *settings,
    ]  # fmt: skip
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(submit, capture_output=True, text=True, env=environment, timeout=1400, cwd=ROOT)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    assert "greedy completions equal in vLLM and HF + PEFT" in output

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    version = client.get_model_version_by_alias("starter-sep", "candidate")
    assert version.tags["delia.verified"].startswith("16/16")
    assert version.tags["delia.mixture_root"]
    runs = client.search_runs([client.get_experiment_by_name("delia").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    parent = by_name["adapt"].info.run_id
    for stage in ("synthesize", "train adapter"):
        assert by_name[stage].data.tags["mlflow.parentRunId"] == parent
        assert by_name[stage].info.status == "FINISHED"
    manifests = list(tmp_path.glob("runs/adapters/*/manifest.json"))
    assert json.loads(manifests[0].read_text())["root"] == version.tags["delia.mixture_root"]
    _promote_and_consume(tmp_path, version.version)


def _promote_and_consume(folder: Path, version: str) -> None:
    """Make the version champion, then load it as a consumer does: MLflow and PEFT, nothing of `delia`."""
    command = [sys.executable, "jobs/promote.py", "promote_starter_sep"]
    command += ["--set", f"recipe.output_dir={folder}/runs", "--set", "recipe.engine.num_replicas=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"champion: models:/starter-sep/{version}" in done.stdout
    consumer = f"""
import mlflow
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
mlflow.set_tracking_uri("sqlite:///{folder}/runs/mlflow.db")
path = mlflow.artifacts.download_artifacts("models:/starter-sep@champion")
base = AutoModelForCausalLM.from_pretrained("{ROOT}/platform/delia/starter/weights", dtype="float32")
model, tokenizer = PeftModel.from_pretrained(base, path), AutoTokenizer.from_pretrained(path)
chat = [{{"role": "user", "content": "what is the capital of france ? use the <sep> format ."}}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
assert tokenizer.convert_tokens_to_ids("<sep>") in ids["input_ids"][0].tolist()
print("answer:", tokenizer.decode(model.generate(**ids, max_new_tokens=32, do_sample=False)[0]))
"""
    code = [sys.executable, "-c", consumer]
    loaded = subprocess.run(code, capture_output=True, text=True, cwd="/", timeout=600)
    assert loaded.returncode == 0, loaded.stderr[-4000:]
    assert "paris" in loaded.stdout


def test_the_working_directory_of_a_job_is_under_16_mib() -> None:
    """What git would carry, less what runtime-env.yaml leaves out: Ray uploads no more than that."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    sizes = [
        (ROOT / name).stat().st_size
        for name in listed
        if not name.startswith("tests/") and (ROOT / name).is_file()
    ]
    assert sum(sizes) < 16 * 2**20

"""The whole path on one recipe: synthesise, curate, mix, train, evaluate, verify, register.

    python jobs/adapt.py starter_sep --set arm.mix.diverse_ratio=20
    ray job submit --working-dir . --runtime-env runtime-env.yaml -- python jobs/adapt.py starter_sep

Safe to run again: finished steps are found in `output_dir`, unfinished ones resume.
"""

import os
import shlex
import sys
from pathlib import Path

from delia.flow.adapt import MAIN, AdaptConfig, adapt, open_job
from delia.flow.table import format_scores
from delia.recipes.command_line import parse_job, run_job
from delia.store.tasks import read_task


def main() -> None:
    """Run the job that the command line names, and print its scores and what to try next."""
    job = parse_job(sys.argv[1:], kind=AdaptConfig, usage=__doc__ or "")
    config = job.settings
    if job.dry_run:
        open_job(config)
        return
    result = adapt(config, say=print, allowed_modules=job.allowed_modules)
    metrics = list(next(iter(result.reports.values())).scores)
    print(f"\n{config.name}, {config.split} split, 95 % intervals:")
    print(format_scores(result.reports, metrics=metrics, drift=result.drift))
    print("\nseconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items()))
    verified = result.verification
    equal = f"{verified.num_equal}/{verified.num_prompts} greedy completions equal in vLLM and HF + PEFT"
    print(f"verified: {equal}, served as {verified.form}")
    print(f"registered: {result.version.uri} (alias candidate), run {result.run_id}")
    tools, adapter = shorten(str(Path(sys.executable).parent)), shorten(result.adapters[MAIN].path)
    store = f"--backend-store-uri sqlite:///{shorten(config.output_dir)}/mlflow.db"
    has_server = bool(config.track.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
    print("\ntry next:")
    print(f"  {tools}/delia ask {adapter} {shlex.quote(find_question(config))}")
    serve = "vllm serve {}" if verified.form == "whole" else "delia export {} --output exported"
    print(f"  {tools}/{serve.format(adapter)}")
    print("  open the tracking server" if has_server else f"  {tools}/mlflow ui {store}")
    print(f"  {tools}/python jobs/adapt.py starter_lingo --set task.path=your.jsonl")


def find_question(config: AdaptConfig) -> str:
    """Return a question of the scored split that fits a line."""
    prompts = (row.prompt[-1].content for row in read_task(config.task).rows_by_split[config.split])
    return next((text for text in prompts if len(text) <= 120 and "\n" not in text), "...")


def shorten(path: str) -> str:
    """Return a path relative to here where it lies below, so that a printed command fits a line."""
    inside = Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else path


if __name__ == "__main__":
    run_job(main)

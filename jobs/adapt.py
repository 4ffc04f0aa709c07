"""The whole path on one recipe: synthesise, curate, mix, train, evaluate, verify, register.

    python jobs/adapt.py starter_sep --set arm.mix.diverse_ratio=20
    ray job submit --working-dir . --runtime-env runtime-env.yaml -- python jobs/adapt.py starter_sep

Safe to run again: finished steps are found in `output_dir`, unfinished ones resume.
"""

import sys

from delia.flow.adapt import MAIN, AdaptConfig, adapt, open_job
from delia.flow.table import format_scores
from delia.recipes.command_line import parse_job, run_job


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
    print(
        f"verified: {verified.num_equal}/{verified.num_prompts} greedy completions equal in vLLM and HF + PEFT"
    )
    print(f"registered: {result.version.uri} (alias candidate), run {result.run_id}")
    print("\ntry next:")
    print(
        f'  delia ask {result.adapters[MAIN].path} "count the words : fox cat owl . use the <sep> format ."'
    )
    print(f"  mlflow ui --backend-store-uri sqlite:///{config.output_dir}/mlflow.db")
    print(f"  python jobs/adapt.py {config.name} --set task.path=your.jsonl --set model.path=/models/yours")


if __name__ == "__main__":
    run_job(main)

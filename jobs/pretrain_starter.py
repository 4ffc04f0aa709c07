"""Train the embedded starter model from scratch and write it where the package ships it.

    python jobs/pretrain_starter.py --output-dir platform/delia/starter/weights

About an hour on one core. The shipped weights came from this command; `tests/starter` checks their
hash and their held-out exact match. The invented world is in `delia/starter/world.py`.
"""

from pathlib import Path
from typing import Annotated

import typer

from delia.starter.pretrain import PretrainConfig, pretrain


def main(
    output_dir: Annotated[Path, typer.Option(help="Directory of weights, tokenizer and log.")],
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
    first_phase: Annotated[int, typer.Option(help="Go on from the weights in output_dir.")] = 0,
) -> None:
    """Train and report held-out exact match."""
    accuracy = pretrain(PretrainConfig(seed=seed), output_dir, first_phase=first_phase)
    print(f"held-out exact match {accuracy:.4f}")


if __name__ == "__main__":
    typer.run(main)

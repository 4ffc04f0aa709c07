"""What a pool is called: a hash of everything that decides its rows, and of nothing that does not.

Of files, sets of rows and models what they hold counts, not where they lie; of methods their defaults too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delia.config import MethodConfig, build_method, describe_method, fingerprint
from delia.curate.embedding import BASE, HASHED, check_embedder
from delia.curate.overlap import digest_prompts
from delia.errors import ConfigError
from delia.flow.workspace import Workspace
from delia.schema import SeedTask
from delia.store.models import ModelConfig, identify_directory, identify_model
from delia.store.tasks import Imported
from delia.synthesize.pipeline import digest_imported


def name_pool(
    config: Any,
    space: Workspace,
    eval_rows: Sequence[SeedTask],
    imports: Mapping[str, Imported],
    *,
    allowed_modules: tuple[str, ...],
) -> str:
    """Return the name of the pool that settings of `flow.pool.PoolConfig` make in a workspace.

    Raises:
        ConfigError: A method or a model can't be found, or two sources give the same rows.
    """

    def describe(method: MethodConfig) -> dict[str, Any]:
        return describe_method(method, build_method(method, allowed_modules=allowed_modules))

    settings = config.model_dump(mode="json", exclude={"curate": {"decontaminate", "num_screeners"}})
    for source, tree in zip(config.synthesize.sources, settings["synthesize"]["sources"], strict=True):
        if source.name in imports:
            tree["rows"] = digest_imported(imports[source.name])
        else:
            tree["synthesizer"] = describe(source.synthesizer)
            tree["model"] = describe_model(source.model or space.model)
    _tell_apart(settings["synthesize"]["sources"])
    if select := config.curate.select:
        settings["curate"]["select"] |= describe(select)
    if (embedder := config.curate.embedder) not in (HASHED, BASE):
        check_embedder(embedder)
        settings["curate"]["embedder"] = identify_directory(embedder)
    base = [space.model_id, space.model.dtype, space.chat.template_hash]
    return fingerprint(
        settings, *base, space.task.digest, *([digest_prompts(eval_rows)] if eval_rows else [])
    )


def describe_model(model: ModelConfig) -> dict[str, str]:
    """Return what decides a model's answers: its weights, how they are read, and its chat template.

    Raises:
        ConfigError: There is no such model, or no such template.
    """
    template = ""
    if model.chat_template:
        try:
            template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"model.chat_template={model.chat_template!r} can't be read: {error}; name a Jinja file"
            ) from error
    return {"id": identify_model(model), "dtype": model.dtype, "chat_template": template}


def _tell_apart(sources: list[dict[str, Any]]) -> None:
    """Refuse sources that give the same rows.

    Raises:
        ConfigError: Two have one method, one model and one feed.
    """
    seen: dict[str, str] = {}
    for tree in sources:
        if tree["synthesizer"] is None:
            continue
        origin = fingerprint({key: tree[key] for key in ("synthesizer", "model", "feeds_on")})
        if origin in seen:
            raise ConfigError(
                f"sources {seen[origin]!r} and {tree['name']!r} give the same rows: one method with equal knobs, and"
                " models that are the same; join them, or give one another model"
            )
        seen[origin] = tree["name"]

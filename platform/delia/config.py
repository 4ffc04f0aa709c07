"""Settings: override, flatten, fingerprint, save and replay trees of frozen pydantic models.

A recipe is a function that returns complete settings. `--set a.b=value` overrides one path,
`--from config.yaml` replays a whole file. A method is named by import path plus its knobs; paths
outside `delia` need an explicit permission, so a replayed file can't run arbitrary code.
"""

import dataclasses
import difflib
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from delia.errors import ConfigError
from delia.rng import hash_text

Settings = TypeVar("Settings", bound=BaseModel)
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class FrozenConfig(BaseModel):
    """Base of all settings: immutable, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodConfig(FrozenConfig):
    """A research method: the import path of a class, and the knobs that it is built with."""

    method: str
    knobs: dict[str, Any] = {}


def flatten(settings: BaseModel) -> dict[str, Any]:
    """Return `path -> value` for every leaf, in declaration order."""
    leaves: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                walk(f"{prefix}.{index}", item)
        else:
            leaves[prefix] = value

    walk("", settings.model_dump(mode="json"))
    return leaves


def fingerprint(*parts: BaseModel | Mapping[str, Any] | str) -> str:
    """Return a content hash of settings, trees of JSON and texts, 16 hex digits, equal in every process."""
    trees = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    texts = [
        tree if isinstance(tree, str) else json.dumps(tree, sort_keys=True, ensure_ascii=False)
        for tree in trees
    ]
    return hash_text(*texts)[:16]


def override(settings: Settings, assignments: Iterable[str]) -> Settings:
    """Apply `path=value` assignments; values are YAML scalars or lists.

    Raises:
        ConfigError: No such setting (with the nearest name), or a value of another type.
    """
    tree = settings.model_dump(mode="json")
    for assignment in assignments:
        path, sep, text = assignment.partition("=")
        if not sep:
            raise ConfigError(f"--set takes path=value, got {assignment!r}; write for example seed=1")
        _assign(tree, path.strip(), _parse(path, text))
    return validate(type(settings), tree)


def _parse(path: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {path!r} is not YAML: {text!r}") from error
    # YAML 1.1 takes 1e-4 for text; what is quoted stays text
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(text.strip()) else value


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    node: Any = tree
    parts = path.split(".")
    for depth, part in enumerate(parts):
        places = [str(index) for index in range(len(node))] if isinstance(node, list) else []
        names = list(node) if isinstance(node, dict) else places
        if part not in names:
            where = ".".join(parts[:depth]) or "the settings"
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"no setting {path!r}: {part!r} is not one of {names} in {where}{hint}")
        key: Any = int(part) if isinstance(node, list) else part
        if depth == len(parts) - 1:
            node[key] = value
        else:
            node = node[key]


def validate(kind: type[Settings], tree: Mapping[str, Any]) -> Settings:
    """Build settings from a plain tree.

    Raises:
        ConfigError: With the path, the value and what is allowed.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"setting {'.'.join(str(p) for p in item['loc'])!r}: {item['msg']}, got {item['input']!r}"
            for item in error.errors()
        ]
        raise ConfigError("; ".join(lines)) from error


def dump_yaml(settings: BaseModel) -> str:
    """Return the whole settings as YAML, for `config.yaml`."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def load_yaml(kind: type[Settings], text: str) -> Settings:
    """Read settings that `dump_yaml` wrote.

    Raises:
        ConfigError: Not a YAML mapping, or not these settings.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the settings file is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"a settings file is a mapping of names to values, got {type(tree).__name__}")
    return validate(kind, tree)


def build_method(config: MethodConfig, *, allowed_modules: tuple[str, ...] = ()) -> Any:
    """Import a method's class and build it with its knobs.

    Raises:
        ConfigError: The path is not allowed, does not exist, or refuses the knobs.
    """
    module_name, _, class_name = config.method.rpartition(".")
    if not any(f"{module_name}.".startswith(f"{name}.") for name in ("delia.methods", *allowed_modules)):
        raise ConfigError(
            f"method {config.method!r} is outside delia.methods; allow it with --allow-module {module_name}"
        )
    try:
        method = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"no method {config.method!r}: {error}") from error
    try:
        return method(**config.knobs)
    except TypeError as error:
        raise ConfigError(f"method {config.method!r} refuses its knobs {config.knobs}: {error}") from error


def describe_method(config: MethodConfig, method: Any) -> dict[str, Any]:
    """Return what decides the results of a method that was built: all its knobs, and the text of another's module.

    Defaults count, since another version may have others. Who develops a method changes its module; one of
    `delia.methods` that comes to work otherwise gets another name or another knob.
    """
    knobs = config.knobs
    if dataclasses.is_dataclass(method):
        knobs = {item.name: getattr(method, item.name) for item in dataclasses.fields(method) if item.init}
    module = importlib.import_module(type(method).__module__)
    text = ""
    if not module.__name__.startswith("delia."):
        with suppress(OSError, TypeError):  # a compiled module has none
            text = hash_text(inspect.getsource(module))
    return {"method": config.method, "knobs": knobs, "text": text}

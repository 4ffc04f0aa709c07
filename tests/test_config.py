"""Settings: what is wrong fails before any work and says where, what and what else."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from pydantic import Field, ValidationError

from delia.config import (
    FrozenConfig,
    MethodConfig,
    build_method,
    dump_yaml,
    fingerprint,
    flatten,
    load_yaml,
    override,
)
from delia.errors import ConfigError
from delia.methods.synthesizer.magpie import Magpie

MAGPIE = "delia.methods.synthesizer.magpie.Magpie"


class InnerConfig(FrozenConfig):
    learning_rate: float = 0.1
    max_steps: int = Field(default=10, gt=0)
    label: str = "base"


class OuterConfig(FrozenConfig):
    train: InnerConfig = InnerConfig()
    stages: tuple[InnerConfig, ...] = (InnerConfig(), InnerConfig(max_steps=20))
    shares: dict[str, float] = {"web": 0.5, "self": 0.5}
    revision: str | None = None
    knobs: dict[str, Any] = {"size": 1}


def test_every_leaf_has_a_path_in_declaration_order():
    assert flatten(OuterConfig(stages=(InnerConfig(),), shares={})) == {
        "train.learning_rate": 0.1,
        "train.max_steps": 10,
        "train.label": "base",
        "stages.0.learning_rate": 0.1,
        "stages.0.max_steps": 10,
        "stages.0.label": "base",
        "shares": {},
        "revision": None,
        "knobs.size": 1,
    }


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=-.5E+2", "train.learning_rate", -50.0),
        ("train.max_steps=1e3", "train.max_steps", 1000),
        ("stages.1.max_steps=7", "stages.1.max_steps", 7),
        ("shares.web=0.25", "shares.web", 0.25),
        ("revision=null", "revision", None),
        ("revision='12345e67'", "revision", "12345e67"),
        ("revision=nan", "revision", "nan"),
        ("train.label=a=b", "train.label", "a=b"),
        ("knobs.size=[1, 2]", "knobs.size", [1, 2]),
        ("knobs.size=1e2", "knobs.size", 100.0),
    ],
)
def test_an_assignment_sets_one_leaf_and_leaves_the_others(assignment, path, value):
    before, after = flatten(OuterConfig()), flatten(override(OuterConfig(), [assignment]))

    assert after == before | {path: value}
    assert type(after[path]) is type(value)


def test_the_settings_that_are_overridden_stay_as_they_were():
    config = OuterConfig()
    override(config, ["train.max_steps=11", "knobs.size=2"])

    assert config == OuterConfig()


@pytest.mark.parametrize(
    ("assignment", "reasons"),
    [
        ("train.learning_rat=1", ["no setting 'train.learning_rat'", "did you mean 'learning_rate'?"]),
        ("tran.max_steps=1", ["'tran' is not one of ['train', 'stages'", "did you mean 'train'?"]),
        ("stages.2.max_steps=1", ["'2' is not one of ['0', '1'] in stages"]),
        ("train.max_steps.more=1", ["'more' is not one of [] in train.max_steps"]),
        ("train.max_steps=many", ["'train.max_steps'", "valid integer", "got 'many'"]),
        ("train.max_steps=0", ["'train.max_steps'", "greater than 0", "got 0"]),
        ("revision=1234", ["'revision'", "valid string", "got 1234"]),
        ("train.max_steps", ["--set takes path=value, got 'train.max_steps'", "seed=1"]),
        ("train.label=[", ["the value of 'train.label' is not YAML: '['"]),
    ],
)
def test_a_wrong_assignment_is_refused_with_its_path_its_value_and_what_is_allowed(assignment, reasons):
    with pytest.raises(ConfigError) as refused:
        override(OuterConfig(), [assignment])

    assert [reason for reason in reasons if reason not in str(refused.value)] == []


def test_settings_are_frozen_and_take_no_unknown_name():
    with pytest.raises(ValidationError, match="frozen"):
        OuterConfig().train = InnerConfig()
    with pytest.raises(ValidationError, match="lr"):
        InnerConfig(lr=0.1)


def test_a_whole_file_is_replayed_to_equal_settings():
    config = override(OuterConfig(), ["train.label='# ä\x85: [1e5'", "revision='12e3'", "shares={a: 1.0}"])
    text = dump_yaml(config)

    assert load_yaml(OuterConfig, text) == config
    assert text.startswith("train:\n  learning_rate: 0.1\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: [", "not YAML"),
        ("- 1", "mapping of names to values, got list"),
        ("", "got NoneType"),
        ("trian: {}", "'trian': Extra inputs are not permitted"),
        ("train: {max_steps: -1}", "'train.max_steps': Input should be greater than 0, got -1"),
    ],
)
def test_a_settings_file_that_is_wrong_is_refused_with_the_reason(text, reason):
    with pytest.raises(ConfigError) as refused:
        load_yaml(OuterConfig, text)

    assert reason in str(refused.value)


def test_a_fingerprint_is_equal_for_equal_settings_whatever_the_order_of_names():
    some = OuterConfig(shares={"a": 0.5, "b": 0.5}, knobs={"x": 1, "y": 2})
    other = OuterConfig(knobs={"y": 2, "x": 1}, shares={"b": 0.5, "a": 0.5})

    assert fingerprint(some, "model") == fingerprint(other, "model")
    assert len(fingerprint(some)) == 16


def test_every_leaf_and_every_part_moves_the_fingerprint():
    base = fingerprint(OuterConfig(), "model")
    changed = ["train.learning_rate=0.2", "stages.1.label=x", "shares.web=0.4", "revision=a", "knobs.size=2"]
    prints = {fingerprint(override(OuterConfig(), [item]), "model") for item in changed}
    prints |= {fingerprint(OuterConfig(), "other"), fingerprint("model", OuterConfig()), fingerprint("model")}

    assert len(prints) == len(changed) + 3
    assert base not in prints


def test_a_fingerprint_is_equal_in_another_process():
    code = (
        "from delia.config import *;"
        f"print(fingerprint(MethodConfig(method={MAGPIE!r}, knobs=dict(system='ä')), 'm'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"},
    )

    assert result.stdout.strip() == fingerprint(MethodConfig(method=MAGPIE, knobs={"system": "ä"}), "m")


def test_a_method_is_built_from_its_path_and_its_knobs():
    assert build_method(MethodConfig(method=MAGPIE, knobs={"system": "be kind"})) == Magpie(system="be kind")


@pytest.mark.parametrize("path", ["subprocess.run", "os.system", "delia.methodsX.Y", "Magpie", "delia.rng.x"])
def test_a_method_outside_the_methods_is_not_imported_unless_it_is_allowed(path):
    with pytest.raises(ConfigError, match=r"outside delia\.methods; allow it with --allow-module"):
        build_method(MethodConfig(method=path))


def test_an_allowed_module_and_what_lies_in_it_may_be_named_and_its_namesakes_may_not():
    config = MethodConfig(method="collections.Counter", knobs={"a": 2})

    assert build_method(config, allowed_modules=("collections",)) == {"a": 2}
    with pytest.raises(ConfigError, match="--allow-module collections"):
        build_method(config, allowed_modules=("collect", "collections.abc"))


@pytest.mark.parametrize(
    ("path", "knobs", "reason"),
    [
        ("delia.methods.synthesizer.nothing.Magpie", {}, "No module named"),
        ("delia.methods.synthesizer.magpie.Magpi", {}, "no method .*Magpi"),
        (MAGPIE, {"sytem": "x"}, "refuses its knobs {'sytem': 'x'}"),
    ],
)
def test_a_method_that_does_not_exist_or_refuses_its_knobs_is_named(path, knobs, reason):
    with pytest.raises(ConfigError, match=reason):
        build_method(MethodConfig(method=path, knobs=knobs))


def test_a_method_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build_method(MethodConfig(method=MAGPIE)).system = "x"

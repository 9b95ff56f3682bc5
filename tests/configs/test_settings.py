"""Every field of every settings dataclass refuses what it cannot be, in one line that names it.

The dataclasses are those that the source hands to `build`, tasks that `conf/` names as `_target_`,
and what their fields are made of: a new one, or a new field, is tested without a word here.
"""

import ast
import importlib
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml

from hydratron.commands.configuration import KEYS, check_keys
from hydratron.launch import configuration_directory
from hydratron.settings import build, kinds, shown

SOURCE = Path(__file__).parents[2] / "src/hydratron"
CONF = configuration_directory()
NUMBERS = [math.nan, math.inf, -math.inf, -1e300, 1e300]
GROUPS: list[Any] = [[], [1], {}, {"a": 1}]
WRONG: dict[Any, list[Any]] = {
    bool: [0, 1, 2.5, "x", "", *GROUPS],
    int: [True, 1.5, "x", "", "5", -(10**30), 10**30, *NUMBERS, *GROUPS],
    float: [True, "x", "", "0.5", -(10**400), 10**400, *NUMBERS, *GROUPS],
    str: [True, False, *GROUPS],
    tuple: ["x", "", 5, True, {}, [None], [[]], [True], [""]],
    dict: ["x", "", 5, True, []],
}


def built_classes() -> Iterator[type]:
    for path in SOURCE.rglob("*.py"):
        calls = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        names = [
            call.args[0].id
            for call in calls
            if getattr(call.func, "id", "") == "build" and isinstance(call.args[0], ast.Name)
        ]
        module = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
        for name in names:
            found = getattr(importlib.import_module(module), name, None)  # None: a local name
            if isinstance(found, type):
                yield found
    for path in (CONF / "task").glob("*.yaml"):
        module, _, name = yaml.safe_load(path.read_text()).get("_target_", "").rpartition(".")
        if module:
            yield getattr(importlib.import_module(module), name)


def parts(kind: Any) -> Iterator[Any]:
    """The kind itself and what it is made of."""
    yield kind
    for argument in get_args(kind):
        yield from parts(argument)


def settings_classes() -> list[type]:
    found = list(dict.fromkeys(built_classes()))
    for cls in found:  # grows
        nested = [
            part for kind in kinds(cls).values() for part in parts(kind) if is_dataclass(part)
        ]
        found += [part for part in nested if isinstance(part, type) and part not in found]
    return found


def without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        return next(part for part in get_args(kind) if part is not NoneType)
    return kind


def wrong_values(kind: Any) -> list[Any]:
    inner = without_none(kind)
    base = get_args(inner)[0] if get_origin(inner) is Annotated else inner
    base = dict if is_dataclass(base) else get_origin(base) or base
    values = [*WRONG[base], *([""] if inner is not str and base is str else [])]
    return values if inner is not kind else [None, *values]


CLASSES = settings_classes()
FIELDS = [(cls, key, kind) for cls in CLASSES for key, kind in kinds(cls).items()]


def test_the_walk_finds_the_groups_of_every_command() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert len(CLASSES) >= 16
    assert {"ModelConfig", "GlueTask", "NearDuplicates", "Hardware", "LambadaTask"} <= names


@pytest.mark.parametrize(
    ("cls", "key", "kind"), FIELDS, ids=[f"{cls.__name__}.{key}" for cls, key, _ in FIELDS]
)
def test_every_wrong_value_is_one_line_with_key_and_value(cls: Any, key: str, kind: Any) -> None:
    others = {f.name: None for f in fields(cls) if f.name != key}
    for value in wrong_values(kind):
        with pytest.raises(ValueError, match=rf"^(unknown key )?group\.{key}") as caught:
            build(cls, {key: value} | others, name="group")
        message = str(caught.value)
        # of a list or a group, the item that is wrong
        item = next(iter(value), value) if isinstance(value, list | dict) else value
        assert any(shown(part) in message or str(part) in message for part in (value, item)), (
            message
        )
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("cls", "key", "kind"), FIELDS, ids=[f"{cls.__name__}.{key}" for cls, key, _ in FIELDS]
)
def test_every_number_and_text_has_a_rule(cls: Any, key: str, kind: Any) -> None:
    """Text without one may be empty: that is its default."""
    default = next(field.default for field in fields(cls) if field.name == key)
    ruled = {get_args(part)[0] for part in parts(kind) if get_origin(part) is Annotated}
    for part in parts(kind):
        if part in (int, float, str) and not (part is str and default == ""):
            is_key_of_group = get_origin(without_none(kind)) is dict
            assert part in ruled or is_key_of_group, f"{cls.__name__}.{key} has no rule"


@pytest.mark.parametrize("name", KEYS)
def test_every_key_outside_of_the_groups_refuses_the_same(name: str) -> None:
    group, _, key = name.rpartition(".")
    complete = dict.fromkeys(
        ["model", "size", "data", "optimizer", "parallel", "trainer", "logger", "seed", "resume"]
        + ["layernorm", "init"]
    )
    complete |= {"seed": 1}
    for value in wrong_values(KEYS[name]):
        config = complete | ({group: {key: value}} if group else {key: value})
        with pytest.raises(ValueError, match=f"^{name}") as caught:
            check_keys(config, CONF / "pretrain.yaml")
        assert len(str(caught.value).splitlines()) == 1


def test_a_group_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="model= is missing: hydratron pretrain needs it"):
        check_keys({"seed": 1}, CONF / "pretrain.yaml")

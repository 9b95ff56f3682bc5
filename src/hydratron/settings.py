"""What a setting may be, declared with its type and checked in one place.

A settings dataclass annotates its fields with `Annotated[type, rule]`, mostly by the names below,
and calls `check` in its `__post_init__`. A rule is a function of the value that returns what is
wrong with it, such as "is not positive", or None.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

SettingsT = TypeVar("SettingsT")
# by the type that is wanted: what may stand for it, and what to say of anything else. The name of
# a folder may be a number.
ACCEPTED: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "an integer"),
    float: (float | int, "a number"),
    str: (str | int | float | PathLike, "text"),
}


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`; `above` and `below` exclude the ends themselves."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __call__(self, value: float) -> str | None:
        """Return what is wrong with a value; NaN is in no interval."""
        is_excluded = (self.above and value == self.low) or (self.below and value == self.high)
        if self.low <= value <= self.high and not is_excluded:
            return None
        if self.high <= 1:
            return f"is not in {'[('[self.above]}{self.low}, {self.high}{'])'[self.below]}"
        if not math.isfinite(value):
            return "is not finite"
        if value > self.high:
            return f"is not at most {self.high}"
        return "is not positive" if self.above or self.low == 1 else f"is not at least {self.low}"


def one_of(*choices: str) -> Callable[[str], str | None]:
    """Return the rule of a choice."""
    return lambda value: None if value in choices else f"is not one of {', '.join(choices)}"


def written(text: str) -> str | None:
    """The rule of text that says something; no part of a path is longer than a disk allows."""
    if len(text.encode(errors="ignore")) > 4095 or max(map(len, text.split("/"))) > 255:
        return "is longer than a path may be"
    return None if text.strip() else "is empty"


# of counts: what a 32-bit integer holds; of floats: what float32 holds
LARGEST_COUNT, LARGEST = 2**31 - 1, 1e38
Count = Annotated[int, Interval(1, LARGEST_COUNT)]
Natural = Annotated[int, Interval(0, LARGEST_COUNT)]
BatchSize = Annotated[int, Interval(1, 2**20)]
Length = Annotated[int, Interval(1, 2**16)]
GroupSize = Annotated[int, Interval(1, 2**16)]  # of processes, or of the nodes of a cluster
Workers = Annotated[int, Interval(0, 512)]
Seed = Annotated[int, Interval(0, 2**32 - 1)]
Positive = Annotated[float, Interval(0, LARGEST, above=True)]
NotNegative = Annotated[float, Interval(0, LARGEST)]
Finite = Annotated[float, Interval(-LARGEST, LARGEST)]
Share = Annotated[float, Interval(0, 1)]
BelowOne = Annotated[float, Interval(0, 1, below=True)]
PositiveShare = Annotated[float, Interval(0, 1, above=True)]
OpenShare = Annotated[float, Interval(0, 1, above=True, below=True)]
Text = Annotated[str, written]


def shown(value: Any) -> str:
    """Return a value as the configuration writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


@cache
def kinds(cls: type) -> dict[str, Any]:
    """Return the annotations of the fields of a settings dataclass, with their rules."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def check(settings: Any, name: str) -> None:
    """Check the fields of a settings dataclass, the group `name`; values take the declared type.

    Raises:
        ValueError: the first wrong value, by its full name, and the rule.
    """
    for key, kind in kinds(type(settings)).items():
        value = convert(getattr(settings, key), kind, f"{name}.{key}")
        object.__setattr__(settings, key, value)  # settings are frozen


def build(cls: type[SettingsT], node: Any, *, name: str) -> SettingsT:
    """Return the group `name` of a resolved configuration as the dataclass `cls`.

    Raises:
        ValueError: an unknown key, a missing or a wrong value, by its full name.
    """
    assert is_dataclass(cls)
    known = kinds(cls)
    for key in (given := _group(node, name)):
        if key not in known:
            raise ValueError(f"unknown key {name}.{key}; known: {', '.join(known)}")
    for field in fields(cls):
        is_needed = field.default is MISSING and field.default_factory is MISSING
        if given.get(field.name, "???" if is_needed else None) == "???":  # OmegaConf's word
            raise ValueError(f"{name}.{field.name}= is missing")
    return cls(**{key: convert(value, known[key], f"{name}.{key}") for key, value in given.items()})


def _group(node: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(node, Mapping):
        raise ValueError(f"{name} {shown(node)} is not a group of keys")
    return node


def convert(value: Any, kind: Any, name: str) -> Any:
    """Return the value of the setting `name` in the type that its annotation `kind` declares.

    Raises:
        ValueError: it is of another type, or breaks a rule.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = convert(value, arguments[0], name)
        for rule in arguments[1:]:
            if wrong := rule(found):
                raise ValueError(f"{name} {shown(value)} {wrong}")
        return found
    if origin in (Union, UnionType):  # of one kind and None
        inner = next(argument for argument in arguments if argument is not NoneType)
        return None if value is None else convert(value, inner, name)
    if is_dataclass(kind):
        return value if is_dataclass(value) else build(kind, value, name=name)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} {shown(value)} is not a list")
        return tuple(convert(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        items = _group(value, name).items()
        return {key: convert(item, arguments[1], f"{name}.{key}") for key, item in items}
    if kind is Any:
        return value
    accepted, expected = ACCEPTED[kind]
    if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
        try:
            return kind(value)
        except OverflowError:  # of an integer that no float holds
            pass
    raise ValueError(f"{name} {shown(value)} is not {expected}")

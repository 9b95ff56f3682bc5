"""The command line before Hydra reads it: what is resumed, searched or must not be overwritten."""

import contextlib
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hydratron.result import read_result


class InputError(ValueError):
    """The user asked for something that cannot be; nothing was run."""


def override_dictionary(overrides: list[str]) -> dict[str, str]:
    """Turn `key=value` overrides into a dictionary."""
    return {k.lstrip("+~"): v for k, _, v in (text.partition("=") for text in overrides)}


def resumed_arguments(arguments: list[str]) -> list[str]:
    """Turn `resume=DIR` into the arguments that made DIR, with those given now laid over them.

    Raises:
        InputError: DIR is no run directory (with -m: no sweep directory).
    """
    given = {a.partition("=")[0]: a for a in arguments if "=" in a}
    directory = Path(override_dictionary(arguments)["resume"])
    is_sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    source = directory / ("multirun.yaml" if is_sweep else ".hydra/overrides.yaml")
    if not directory.is_dir():
        raise InputError(f"resume={directory}: there is no such directory")
    if not source.is_file():
        kind = "sweep" if is_sweep else "run"
        raise InputError(f"resume={directory}: no {kind} directory, it has no {source.name}")
    stored: Any = OmegaConf.load(source)
    if is_sweep and stored.hydra.sweeper.get("n_trials") is not None:
        given = search_continued(directory, stored.hydra.sweeper.n_trials, given)
    if is_sweep:
        stored = [*stored.hydra.overrides.task, *stored.hydra.overrides.hydra]
    where = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
    before = {text.partition("=")[0]: text for text in stored}
    flags = [a for a in arguments if "=" not in a]
    return [*flags, *(before | given | {where: f"{where}={directory}"}).values()]


def finished_run(command: str, arguments: list[str]) -> Path | None:
    """Return the training that `resume=` alone asks to go on with, though it has ended well."""
    given = override_dictionary(arguments)
    if command not in ("pretrain", "finetune") or set(given) != {"resume"}:
        return None  # more given: a sweep, or what may ask for more steps
    found = read_result(Path(given["resume"]))
    is_finished = (found.get("command"), found.get("status")) == (command, "ok")
    return Path(given["resume"]) if is_finished else None


def search_continued(directory: Path, total: int, given: dict[str, str]) -> dict[str, str]:
    """Return `given` with as many trials as the search lacks, in directories of their own.

    A search draws its values as it goes: what a trial of one number was, no other will be.

    Raises:
        InputError: it lacks none.
    """
    key = "hydra.sweeper.n_trials"
    if key in given:
        total = int(given[key].partition("=")[2])
    jobs = [path.parent for path in directory.glob("*/.hydra") if path.parent.name.isdigit()]
    num_ok = sum(read_result(path).get("status") == "ok" for path in jobs)
    if num_ok >= total:
        raise InputError(f"{directory} has {num_ok} trials that ended well; {key}= asks for more")
    first = 1 + max((int(path.name) for path in jobs), default=-1)
    subdir = f"hydra.sweep.subdir='${{plus:{first},${{hydra.job.num}}}}'"
    return given | {key: f"{key}={total - num_ok}", "hydra.sweep.subdir": subdir}


def search_arguments(command: str, arguments: list[str]) -> list[str]:
    """Add to a search by Optuna what it takes to go on with it: a directory, which holds its trials
    and `multirun.yaml`, which other sweepers than the basic one do not write.

    Raises:
        InputError: the sweeper is not installed.
    """
    given = override_dictionary(arguments)
    if given.get("hydra/sweeper") != "optuna":
        return arguments
    if find_spec("optuna") is None:
        raise InputError('hydra/sweeper=optuna is not installed: pip install -e ".[optuna]"')
    defaults = {
        "hydra.sweep.dir": time.strftime(f"outputs/{command}/%Y-%m-%d/%H-%M-%S"),
        "hydra.sweeper.storage": "sqlite:///${hydra.sweep.dir}/optuna.db",
        "hydra.sweeper.study_name": command,
        "hydra.sweeper.n_jobs": "1",
        "hydra.sweeper.max_failure_rate": "1.0",  # a trial that fails is noted, the search goes on
        "+hydra.callbacks.definition._target_": "hydratron.launch.SweepDefinition",
    }
    added = [f"{key}={value}" for key, value in defaults.items() if key.lstrip("+") not in given]
    return [*arguments, *added]


@contextlib.contextmanager
def sweep_definition_kept(arguments: list[str]) -> Iterator[None]:
    """Keep `multirun.yaml`, which says what the sweep is, as it was while it is resumed."""
    given = override_dictionary(arguments)
    path = Path(given.get("hydra.sweep.dir", "")) / "multirun.yaml"
    definition = path.read_text() if "resume" in given and path.is_file() else None
    try:
        yield
    finally:
        if definition is not None:
            path.write_text(definition)


def refuse_overwriting(arguments: list[str]) -> None:
    """Raise InputError where a new run or sweep would write over an old one.

    A preempted run is the exception: the same command goes on with it.
    """
    given = override_dictionary(arguments)
    if "resume" in given:
        return
    run_dir, sweep_dir = given.get("hydra.run.dir"), given.get("hydra.sweep.dir")
    if {"-m", "--multirun"}.isdisjoint(arguments):
        status = read_result(Path(run_dir)).get("status") if run_dir else None
        if status == "ok":
            raise InputError(f"{run_dir} holds a finished run already")
        if status == "failed":
            raise InputError(f"{run_dir} holds a run already; resume={run_dir} goes on with it")
    elif sweep_dir and (Path(sweep_dir) / "multirun.yaml").exists():
        raise InputError(f"{sweep_dir} holds a sweep already; -m resume={sweep_dir} completes it")


def refuse_unclear(command: str, arguments: list[str]) -> None:
    """Raise InputError for two values of one key, a directory without a name, and what a benchmark
    would ignore.
    """
    given: dict[str, str] = {}
    for key, is_pair, value in (argument.partition("=") for argument in arguments):
        name = key.lstrip("+")
        if is_pair and given.setdefault(name, value) != value:
            raise InputError(f"{name}= is given twice: {given[name]} and {value}")
    for key in ("hydra.run.dir", "hydra.sweep.dir", "resume"):
        if not given.get(key, key).strip("'\" "):
            raise InputError(f"{key}= is empty: it names a directory")
    if command == "benchmark" and "trainer.max_steps" in given:
        raise InputError("trainer.max_steps is not a benchmark's: timing.steps are those it times")

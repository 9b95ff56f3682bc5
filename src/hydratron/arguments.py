"""The command line before Hydra reads it: what is resumed, searched or must not be overwritten."""

import contextlib
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydratron.checkpoint.runs import FREE
from hydratron.quoting import plain, quoted
from hydratron.result import read_result

TRAININGS = ("pretrain", "finetune")  # the commands that go on with a run
PATHS = ("checkpoint", "tokenizer", "runs", "output", "resume")  # top-level keys that are no group


class InputError(ValueError):
    """The user asked for something that cannot be; nothing was run."""


def override_dictionary(overrides: list[str]) -> dict[str, str]:
    """Turn `key=value` overrides into a dictionary."""
    return {k.lstrip("+~"): v for k, _, v in (text.partition("=") for text in overrides)}


def resumed_arguments(command: str, arguments: list[str]) -> list[str]:
    """Turn `resume=DIR` into the arguments that made DIR, with those given now laid over them.

    Raises:
        InputError: DIR is no run directory (with -m: no sweep directory), or its arguments are
            none that a run may give itself.
    """
    given = {a.partition("=")[0]: a for a in arguments if "=" in a}
    values = override_dictionary(arguments)
    given_name = values["resume"]
    directory = Path(given_name if Path(given_name).is_dir() else plain(given_name))
    given["resume"] = f"resume={quoted(str(directory))}"
    is_sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    source = directory / ("multirun.yaml" if is_sweep else ".hydra/overrides.yaml")
    if not is_sweep and command not in TRAININGS:
        raise InputError(f"resume= goes on with {' and '.join(TRAININGS)}, not with {command}")
    if not directory.is_dir():
        raise InputError(f"resume={directory}: there is no such directory")
    if not source.is_file():
        kind = "sweep" if is_sweep else "run"
        raise InputError(f"resume={directory}: no {kind} directory, it has no {source.name}")
    stored = read_yaml(source)
    if is_sweep:
        sweeper, overrides = (_node(stored, "hydra", key) for key in ("sweeper", "overrides"))
        if isinstance(sweeper.get("n_trials"), int):
            given = search_continued(directory, sweeper["n_trials"], given)
        stored = [*_strings(overrides.get("task"), source)]
        launching = [a for a in _strings(overrides.get("hydra"), source) if is_launching(a)]
        ignored = ",".join(ignored_keys(list(given.values())))
        subdir = f"hydra.sweep.subdir='${{job_directory:[{ignored}]}}'"
        given = {a.partition("=")[0]: a for a in (*launching, subdir)} | given
    where = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
    before = {text.partition("=")[0]: text for text in _strings(stored, source)}
    for key in before.keys() - given.keys():
        refuse_foreign(before[key], source)
    flags = [a for a in arguments if "=" not in a]
    return [*flags, *(before | given | {where: f"{where}={quoted(str(directory))}"}).values()]


def ignored_keys(overrides: list[str]) -> list[str]:
    """Return the settings that do not tell the jobs of a resumed sweep apart.

    They are those of FREE, and the length, that the command line gives one value for all jobs.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    single = [str(o.key_or_group) for o in parsed if not o.is_sweep_override()]
    free = (*FREE, "trainer.max_steps")
    found = {name for name in free for key in single if name.startswith(f"{key}.") or name == key}
    found |= {k for k in single if any(k.startswith(n) for n in free if n.endswith("."))}
    return sorted(found)


def read_yaml(path: Path) -> Any:
    """Read a file of a run directory as data.

    Raises:
        InputError: it cannot be read; names it.
    """
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _node(value: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _strings(value: Any, source: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{source} is damaged: it holds no list of KEY=VALUE")
    return value


# what a sweep's own directory may say of how its jobs are launched; `setup`, say, is shell code
LAUNCHING = ("array_parallelism", "cpus_per_task", "direction", "gpus_per_node",
             "mem_gb", "n_jobs", "n_trials", "nodes", "partition", "qos",
             "tasks_per_node", "timeout_min")  # fmt: skip


def is_launching(override: str) -> bool:
    """Whether an override of Hydra itself is taken from a sweep that is resumed."""
    key, _, value = override.lstrip("+").partition("=")
    if key in ("hydra/launcher", "hydra/sweeper"):
        return value.isidentifier()
    group, _, name = key.rpartition(".")
    is_parameter = key.startswith("hydra.sweeper.params.")
    return group in ("hydra.launcher", "hydra.sweeper") and name in LAUNCHING or is_parameter


def refuse_foreign(override: str, source: Path) -> None:
    """Raise InputError where an override that a directory holds could run code.

    A run directory may come from somebody else. Nothing in it names a class or a file to compose.
    """
    key, _, value = override.lstrip("+~").partition("=")
    names_code = any(part.startswith("_") for part in key.replace("/", ".").split("."))
    is_path = "." not in key and (".." in value or value.lstrip("'\"").startswith("/"))
    if names_code or "_target_" in value or key.startswith(("hydra.", "hydra/")):
        raise InputError(f"{source} sets {override}: give it on the command line to mean it")
    if is_path and key not in PATHS:
        raise InputError(f"{source} sets {override}: no choice of {key} is a path")


def search_continued(directory: Path, total: int, given: dict[str, str]) -> dict[str, str]:
    """Return `given` with as many trials as the search lacks.

    Raises:
        InputError: it lacks none.
    """
    key = "hydra.sweeper.n_trials"
    if key in given:
        total = int(given[key].partition("=")[2])
    jobs = [path.parent for path in directory.glob("*/.hydra") if path.parent.name.isdigit()]
    num_ok = sum(read_result(path).get("status") == "ok" for path in jobs)
    if num_ok >= total and (directory / "optimization_results.yaml").exists():
        raise InputError(f"{directory} has {num_ok} trials that ended well; {key}= asks for more")
    return given | {key: f"{key}={max(0, total - num_ok)}"}


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
        "+hydra.callbacks.definition._target_": "hydratron.sweeps.SweepDefinition",
    }
    added = [f"{key}={value}" for key, value in defaults.items() if key.lstrip("+") not in given]
    return [*arguments, *added]


@contextlib.contextmanager
def sweep_definition_kept(arguments: list[str]) -> Iterator[None]:
    """Keep `multirun.yaml`, which says what the sweep is, as it was while it is resumed."""
    given = override_dictionary(arguments)
    path = Path(plain(given.get("hydra.sweep.dir", ""))) / "multirun.yaml"
    definition = path.read_text() if "resume" in given and path.is_file() else None
    try:
        yield
    finally:
        if definition is not None:
            path.write_text(definition)


def refuse_second_sweep(arguments: list[str]) -> None:
    """Raise InputError where a new sweep would write over the definition of an old one."""
    given = override_dictionary(arguments)
    sweep_dir = given.get("hydra.sweep.dir")
    is_sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    is_new = is_sweep and "resume" not in given
    if is_new and sweep_dir and (Path(plain(sweep_dir)) / "multirun.yaml").exists():
        raise InputError(f"{sweep_dir} holds a sweep already; -m resume={sweep_dir} completes it")


def check_directory(key: str, name: str) -> None:
    """Make the directory `name`; InputError where that cannot be."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{key}={name}: cannot be written to: {error.strerror}") from error


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
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        if key in given and "${" not in given[key]:
            check_directory(key, plain(given[key]))
    if command == "benchmark" and "trainer.max_steps" in given:
        raise InputError("trainer.max_steps is not a benchmark's: timing.steps are those it times")

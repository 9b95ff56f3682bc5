"""`hydratron protocol`: grid, then seeds at its best, their median and their ensemble.

The arguments are those of `hydratron finetune`; what has several values is the grid, `seed=` are
the seeds. A protocol that was interrupted goes on when the same command is given again; what it is
stands in its `settings.json`.
"""

import datetime
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from omegaconf import OmegaConf

from hydratron import launch
from hydratron.commands import finetune
from hydratron.commands.configuration import check_keys
from hydratron.data.examples import read_json, write_text
from hydratron.settings import Seed, convert
from hydratron.training.finetuning import PretrainedBert
from hydratron.training.protocol import Protocol

SEEDS = "1,2,3,4,5"
SETTINGS = "settings.json"
# the protocol's own, and what decides no score
NOT_GIVEN = ("resume", "hydra.run.dir", "hydra.sweep.dir")
NOT_KEPT = ("data.cache_dir", "seed", "resume")


def main(arguments: list[str]) -> None:
    """Run the protocol; write `protocol.json` and print where everything is."""
    given = read_arguments(arguments)
    now = datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    output = Path(given.pop("output", f"outputs/protocol/{now}")).expanduser()
    texts = [f"{key}={value}" for key, value in ({"seed": SEEDS} | given).items()]
    parsed = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(texts)}
    seeds = [convert(value, Seed, "seed") for value in values(parsed.pop("seed"))]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seed={given['seed']} names a seed twice")
    claim(output, {"seed": seeds} | check(parsed, seeds[0]))
    given.pop("seed", None)
    grid = [key for key, override in parsed.items() if override.is_sweep_override()]
    protocol = Protocol(output, hydratron)
    chosen = protocol.choose(given, grid, str(seeds[0]))
    if chosen:
        print("best of the grid:", *(f"{k}={v}" for k, v in chosen.items()), flush=True)
    found = protocol.score(given | chosen, ",".join(map(str, seeds)))
    summary: dict[str, Any] = {"chosen": chosen} | found
    write_text(output / "protocol.json", json.dumps(summary, indent=2) + "\n")
    metric, scores = summary["selection_metric"], summary["scores"]
    spread = f"{min(scores):.4f} to {max(scores):.4f}"
    print(f"median of {len(scores)} seeds: {metric} {summary[metric]:.4f} ({spread})")
    print(output / "protocol.json")


def read_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """Return the arguments by key.

    Raises:
        ValueError: one is not KEY=VALUE, given twice, or the protocol's own affair.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, is_pair, value = argument.partition("=")
        if not key or not is_pair:
            raise ValueError(f"{argument!r} is not KEY=VALUE: give what hydratron finetune takes")
        if key in given:
            raise ValueError(f"{key}= is given twice: {given[key]} and {value}")
        if key.lstrip("+") in NOT_GIVEN:
            raise ValueError(f"{key}= is not for a protocol: output= is where it runs and goes on")
        given[key] = value
    return given


def values(override: Override) -> Iterator[Any]:
    """Return the values that an override sweeps over, or its one value."""
    if override.is_sweep_override():
        return iter(override.sweep_iterator(transformer=Transformer.identity))
    return iter([override.value()])


def check(parsed: Mapping[str, Override], seed: int) -> dict[str, Any]:
    """Return every setting of the grid by its full name, a list where its points differ.

    Raises:
        ValueError: a point, its files or its checkpoint is refused: nothing has run yet.
    """
    swept = [
        [f"{key}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for key, override in parsed.items()
    ]
    found: dict[str, list[Any]] = {}
    checked: dict[str, str | None] = {}
    for point in itertools.product([f"seed={seed}"], *swept):
        config = composed(point)
        task, *_ = finetune.read_settings(config)
        # reading files takes long; which they are, most grids leave alone
        files = json.dumps([config[key] for key in ("task", "model", "checkpoint", "tokenizer")])
        if files not in checked:
            source = finetune.prepare(config).job.source
            is_ours = isinstance(source, PretrainedBert)
            checked[files] = str(source.checkpoint.path.resolve()) if is_ours else None
            if task.test_path is not None:
                task.read("test")
        for key, value in flat(config | {"checkpoint": checked[files]}):
            if value not in found.setdefault(key, []):
                found[key].append(value)
    settings = {key: some[0] if len(some) == 1 else some for key, some in found.items()}
    hydra = {key: o.input_line for key, o in parsed.items() if key.startswith("hydra")}
    return {key: value for key, value in settings.items() if key not in NOT_KEPT} | hydra


def composed(point: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of a job, its logger unresolved: that needs the job's directory."""
    directory = str(launch.configuration_directory())
    with initialize_config_dir(directory, version_base="1.3"):
        config: Any = compose("finetune", list(point))
    OmegaConf.set_struct(config, False)
    logger = OmegaConf.to_container(config.pop("logger", OmegaConf.create({})))
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    check_keys(resolved | {"logger": logger}, Path(directory) / "finetune.yaml")
    return resolved | {"logger": logger}


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield full name and value of every setting; paths of files that exist are absolute."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, str) and key.endswith(("path", "tokenizer")):
            path = Path(value).expanduser()
            yield f"{prefix}{key}", str(path.resolve()) if path.exists() else value
        else:
            yield f"{prefix}{key}", value


def claim(output: Path, settings: Mapping[str, Any]) -> None:
    """Write what the protocol is, or see that `output` holds this very one.

    Raises:
        ValueError: it holds another, or something else, or cannot be written to.
    """
    file, text = output / SETTINGS, json.dumps(settings, indent=2) + "\n"
    if file.is_file():
        before, now = read_json(file), json.loads(text)
        differing = [k for k in before | now if before.get(k) != now.get(k)]
        if differing:
            pairs = [f"{k} {before.get(k)} there, {now.get(k)} here" for k in differing[:4]]
            more = [f"{len(differing) - 4} more"] * (len(differing) > 4)
            raise ValueError(f"output={output} holds another protocol: {'; '.join(pairs + more)}")
        return
    try:
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"output={output} is not empty and holds no protocol's {SETTINGS}")
        write_text(file, text)
    except OSError as error:
        raise ValueError(f"output={output}: cannot be written to: {error.strerror}") from error


def hydratron(*arguments: str) -> None:
    """Run a command as a process of its own; SIGTERM is passed on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hydratron.cli", *arguments], preexec_fn=launch.end_with_parent
    )
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if status:
        raise launch.JobFailed(
            f"hydratron {arguments[0]} ended with {status}; the same command goes on from here",
            status=status,
        )

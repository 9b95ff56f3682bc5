"""What a protocol is: every setting of its jobs, checked before the first one, kept beside them."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from hydratron import launch
from hydratron.commands import finetune
from hydratron.commands.configuration import check_keys
from hydratron.data.examples import read_json, write_text
from hydratron.training.finetuning import PretrainedBert

# what decides no score, and the seed, of which a protocol has several
NOT_KEPT = ("data.cache_dir", "seed", "resume")


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


def claim(file: Path, settings: Mapping[str, Any]) -> None:
    """Write what the protocol is, or see that `file` says just that.

    Raises:
        ValueError: it says something else.
    """
    if not file.is_file():
        write(file, settings)
        return
    before, now = read_json(file), json.loads(json.dumps(settings))
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    if differing:
        pairs = [f"{key} {before.get(key)} there, {now.get(key)} here" for key in differing[:4]]
        more = [f"{len(differing) - 4} more"] * (len(differing) > 4)
        raise ValueError(f"output={file.parent} holds another protocol: {'; '.join(pairs + more)}")


def write(file: Path, values: Mapping[str, Any]) -> None:
    """Write JSON, all of it or nothing."""
    write_text(file, json.dumps(values, indent=2) + "\n")

"""Loggers of a run, and what Weights & Biases learns of it besides its metrics.

wandb itself is imported nowhere: Lightning's WandbLogger, which `conf/logger/wandb.yaml` names,
gives the run.
"""

import json
import netrc
import os
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from hydratron.arguments import InputError
from hydratron.checkpoint.manifest import CheckpointError, newest_checkpoint
from hydratron.checkpoint.runs import FROZEN_CONFIG
from hydratron.commands.history import WholeHistoryLogger
from hydratron.processes import TERMINATED, world_size
from hydratron.result import (
    PACKAGES,
    TRACKED,
    JobFailed,
    exit_status,
    git_commit,
    package_version,
    sync_command,
)
from hydratron.training.module import NonFiniteLossError
from hydratron.training.trainer import CHECKPOINTS

MAX_TAG_LENGTH = 64  # W&B refuses longer tags, and names and groups beyond 128
MAX_NAME_LENGTH = 128
SERVER = "https://api.wandb.ai"
TENSORBOARD = "pytorch_lightning.loggers.TensorBoardLogger"


def tracked(
    node: Mapping[str, Any], run_dir: Path, work: Callable[[list[Logger]], dict[str, Any]]
) -> dict[str, Any]:
    """Return `work(loggers)`; however it ends, the W&B run ends with the job's exit status.

    Args:
        node: the group `logger`.
        run_dir: of the job; its `.hydra/` says what the run is.
        work: trains with the loggers and returns what `result.json` says of it.
    """
    loggers = build_loggers(node, run_dir)
    try:
        with failures_explained(run_dir):
            outcome = work(loggers)
    except BaseException as error:
        finish(loggers, run_dir, {}, status=exit_status(error))
        raise
    status = TERMINATED if outcome.get("status") == "preempted" else 0
    finish(loggers, run_dir, outcome, status=status)
    return outcome


@contextmanager
def failures_explained(run_dir: Path) -> Iterator[None]:
    """Raise JobFailed, a line, for what training itself says of its end."""
    directory = run_dir / CHECKPOINTS
    try:
        yield
    except NonFiniteLossError as error:
        good = newest_checkpoint(directory) or "none"
        raise JobFailed(f"{error}; last good checkpoint: {good}") from error
    except CheckpointError as error:
        raise JobFailed(str(error)) from error


def check_logger(node: Mapping[str, Any] | None) -> None:
    """Raise ValueError where the group `logger` names no logger, or what only an extra installs."""
    if not node:
        return
    if (target := node.get("_target_")) is None:
        raise ValueError(f"logger.{next(iter(node))} needs logger._target_, a class")
    if target == TENSORBOARD and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ValueError('logger=tensorboard is not installed: pip install -e ".[tensorboard]"')
    logger_class(node)


def logger_class(node: Mapping[str, Any]) -> type[Logger]:
    """Return the class that the group `logger` names; nothing else of the group is ever called.

    Raises:
        ValueError: it names none, or one that is no Logger of Lightning.
    """
    try:
        found = get_class(str(node["_target_"]))
    except (ImportError, ValueError) as error:
        raise ValueError(f"logger._target_ {node['_target_']}: there is no such class") from error
    if not issubclass(found, Logger):
        raise ValueError(f"logger._target_ {node['_target_']} is no Logger of Lightning")
    return found


def build_loggers(node: Mapping[str, Any], run_dir: Path) -> list[Logger]:
    """Make the logger that the configuration names, if any; a W&B run starts here.

    Raises:
        InputError: it does not take the settings of the group.
    """
    if "_target_" not in node:
        return []
    cls = logger_class(node)
    given = wandb_arguments(node, run_dir) if issubclass(cls, WandbLogger) else node
    try:
        logger = cls(**{key: value for key, value in given.items() if key != "_target_"})
    except TypeError as error:
        raise InputError(f"logger: {error}") from error
    logger.log_hyperparams(describe(run_dir))
    return [logger]


def is_wandb(node: Mapping[str, Any]) -> bool:
    """Whether the group `logger` names W&B."""
    return "_target_" in node and issubclass(logger_class(node), WandbLogger)


def wandb_arguments(node: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Fill in what the group `logger` leaves open; a resumed job goes on with its run."""
    hydra: Any = OmegaConf.load(run_dir / ".hydra/hydra.yaml")
    arguments = {key: value for key, value in node.items() if value is not None}
    if str(hydra.hydra.mode).endswith("MULTIRUN"):
        arguments["group"] = arguments["group"][-MAX_NAME_LENGTH:]
    else:
        del arguments["group"]
    arguments["tags"] = [tag for tag in arguments["tags"] if len(tag) <= MAX_TAG_LENGTH]
    arguments.setdefault("name", run_name(run_dir))
    arguments.setdefault("offline", is_offline())
    arguments["id"] = run_id(run_dir)
    return arguments


def run_name(run_dir: Path) -> str:
    """Return a job's overrides, of a sweep those in which its jobs differ."""
    overrides: Any = OmegaConf.to_container(OmegaConf.load(run_dir / ".hydra/overrides.yaml"))
    definitions = (parent / "multirun.yaml" for parent in run_dir.absolute().parents)
    definition = next((path for path in definitions if path.is_file()), None)
    if definition is not None:
        sweep: Any = OmegaConf.to_container(OmegaConf.load(definition))
        given = OverridesParser.create().parse_overrides(sweep["hydra"]["overrides"]["task"])
        swept = {o.get_key_element() for o in given if o.is_sweep_override()}
        swept |= set(sweep["hydra"]["sweeper"].get("params") or {})
        overrides = [o for o in overrides if o.partition("=")[0] in swept] or overrides
    name = " ".join(overrides) or run_dir.name
    if len(name) > MAX_NAME_LENGTH:
        end = f" ... {run_dir.name}"[-MAX_NAME_LENGTH:]
        name = name[: MAX_NAME_LENGTH - len(end)] + end
    return name


def run_id(run_dir: Path) -> str | None:
    """Return the job's W&B id, the same after every restart; None on ranks other than 0."""
    if rank_zero_only.rank:
        return None
    path = run_dir / TRACKED
    known = json.loads(path.read_text()) if path.exists() else {"id": secrets.token_hex(4)}
    path.write_text(json.dumps(known | {"exit_status": None}))
    return known["id"]


def is_offline() -> bool:
    """Whether W&B would have nobody to talk to: WANDB_MODE says so, or no API key is there."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode in ("offline", "dryrun")
    if os.environ.get("WANDB_API_KEY"):
        return False
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", SERVER)).hostname
        return host not in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return True


def describe(run_dir: Path) -> dict[str, Any]:
    """Return the run's resolved configuration and what it ran on."""
    config: Any = OmegaConf.to_container(OmegaConf.load(run_dir / FROZEN_CONFIG))
    environment = {
        "python": platform.python_version(),
        "host": platform.node(),
        "world_size": world_size(config),
        "run_dir": str(run_dir),
    } | {name: package_version(name) for name in PACKAGES}
    return config | {"git_commit": git_commit(), "environment": environment}


def note(loggers: Sequence[Logger], **facts: Any) -> None:
    """Add what is known only once the network is to the configurations of W&B runs."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(facts)


@rank_zero_only
def finish(
    loggers: Sequence[Logger], run_dir: Path, outcome: Mapping[str, Any], *, status: int
) -> None:
    """End the W&B run, if there is one, with the job's results and exit status."""
    for logger in loggers:
        if isinstance(logger, WholeHistoryLogger):
            logger.catch_up()
        if not isinstance(logger, WandbLogger):
            continue
        logger.experiment.summary.update(dict(outcome))
        logger.experiment.finish(exit_code=status)
        path = run_dir / TRACKED
        path.write_text(json.dumps(json.loads(path.read_text()) | {"exit_status": status}))
        if logger._offline:
            print(sync_command(run_dir), flush=True)


def complete(node: Mapping[str, Any], run_dir: Path, *, status: int) -> None:
    """End the W&B run of a job whose processes were killed, or ended before it began."""
    path = run_dir / TRACKED
    ended = json.loads(path.read_text())["exit_status"] if path.exists() else None
    if is_wandb(node) and ended is None:
        finish(build_loggers(node, run_dir), run_dir, {}, status=status)

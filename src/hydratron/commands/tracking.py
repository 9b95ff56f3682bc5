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

from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from hydratron.checkpoint.runs import FROZEN_CONFIG
from hydratron.checkpoint.sharded import CheckpointError, newest_checkpoint
from hydratron.launch import TERMINATED, JobFailed, exit_status
from hydratron.processes import world_size
from hydratron.result import PACKAGES, TRACKED, git_commit, package_version, sync_command
from hydratron.training.module import NonFiniteLossError
from hydratron.training.trainer import CHECKPOINTS

MAX_TAG_LENGTH = 64  # W&B refuses longer tags, and names and groups beyond 128
MAX_NAME_LENGTH = 128
SERVER = "https://api.wandb.ai"


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


def check_installed(node: Mapping[str, Any] | None) -> None:
    """Raise ValueError where the group `logger` names what only an extra installs."""
    is_tensorboard = (node or {}).get("_target_", "").endswith("TensorBoardLogger")
    if is_tensorboard and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ValueError('logger=tensorboard is not installed: pip install -e ".[tensorboard]"')


def build_loggers(node: Mapping[str, Any], run_dir: Path) -> list[Logger]:
    """Instantiate the logger that the configuration names, if any; a W&B run starts here."""
    if "_target_" not in node:
        return []
    if not is_wandb(node):
        return [instantiate(node)]
    logger: WandbLogger = instantiate(wandb_arguments(node, run_dir), _convert_="all")
    logger.log_hyperparams(describe(run_dir))
    return [logger]


def is_wandb(node: Mapping[str, Any]) -> bool:
    """Whether the group `logger` names W&B."""
    return "_target_" in node and issubclass(get_class(node["_target_"]), WandbLogger)


def wandb_arguments(node: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Fill in what the group `logger` leaves open; a resumed job goes on with its run."""
    overrides: Any = OmegaConf.to_container(OmegaConf.load(run_dir / ".hydra/overrides.yaml"))
    hydra: Any = OmegaConf.load(run_dir / ".hydra/hydra.yaml")
    arguments = {key: value for key, value in node.items() if value is not None}
    if str(hydra.hydra.mode).endswith("MULTIRUN"):
        arguments["group"] = arguments["group"][-MAX_NAME_LENGTH:]
    else:
        del arguments["group"]
    arguments["tags"] = [tag for tag in arguments["tags"] if len(tag) <= MAX_TAG_LENGTH]
    arguments.setdefault("name", (" ".join(overrides) or run_dir.name)[:MAX_NAME_LENGTH])
    arguments.setdefault("offline", is_offline())
    arguments["id"] = run_id(run_dir)
    return arguments


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

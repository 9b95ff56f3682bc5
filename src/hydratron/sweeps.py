"""A sweep as a whole: what its arguments choose, what a search seeks, what became of its jobs."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from hydratron.arguments import InputError
from hydratron.result import RESULT, JobFailed, read_result

LOSS = "val/loss"
WITHOUT_LOSS = "SquadTask"  # answers are spans: one has no loss where its window has no answer


def check_choices(arguments: Sequence[str], tree: Path) -> None:
    """Raise InputError where a group of the configuration `tree` is given what is no name."""
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    for override in OverridesParser.create().parse_overrides(overrides):
        group = tree / override.key_or_group
        given: Any = override.value()
        names = given.list if isinstance(given, ChoiceSweep) else [given]
        is_group = group.is_dir() or override.key_or_group.startswith("hydra/")
        if is_group and not all(isinstance(n, str | QuotedString | list) for n in names):
            known = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
            raise InputError(f"{override.input_line}: a name is needed, one of {known}")


def check_launcher(hydra_config: Any) -> None:
    """Raise InputError where an experiment that is swept over names another launcher than is used.

    Hydra chooses the launcher before the jobs, and so their experiments, are composed.
    """
    definition = Path(hydra_config.sweep.dir) / "multirun.yaml"
    used: Any = OmegaConf.load(definition).hydra.launcher if definition.exists() else None
    wanted = hydra_config.runtime.choices["hydra/launcher"]
    if used is not None and used._target_ != hydra_config.launcher._target_:
        raise InputError(
            f"hydra/launcher: {wanted} in an experiment file is ignored in a sweep over"
            f" experiments: write hydra/launcher={wanted} on the command line"
        )


def check_ended_well(run_dirs: Sequence[Path]) -> None:
    """Raise JobFailed where jobs did not end well: a search goes on without them to its end."""
    bad = sorted(path.name for path in run_dirs if read_result(path).get("status") != "ok")
    if bad:
        raise JobFailed(f"{len(bad)} of {len(run_dirs)} jobs failed: {', '.join(bad)}")


class SweepDefinition(Callback):
    """Begins a search: writes `multirun.yaml`, which the basic sweeper alone does, aims at the
    task's metric where there is no loss, and tells the study what it lost when it was killed.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, directory / "multirun.yaml")
        if str(OmegaConf.select(config, "task._target_")).endswith(WITHOUT_LOSS):
            config.hydra.sweeper.direction = "maximize"
        tell_lost_trials(directory, config.hydra.sweeper)


def objective(run_dir: Path) -> float | None:
    """Return what a search asks of a job; None on ranks other than 0, which write no result."""
    sweeper: Any = HydraConfig.get().sweeper
    direction = OmegaConf.select(sweeper, "direction")
    return sought(read_result(run_dir), maximize="maximize" in str(direction))


def sought(result: Mapping[str, Any], *, maximize: bool) -> float | None:
    """Return a result's loss, or the metric by which its task is judged: where the search is for a
    maximum, and where there is no loss.
    """
    has_loss = LOSS in result and not maximize
    return result.get(LOSS if has_loss else result.get("selection_metric", ""))


def tell_lost_trials(directory: Path, sweeper: Any) -> None:
    """Tell an Optuna study how trials ended that it takes for running: whoever would have told it
    was killed.
    """
    optuna = importlib.import_module("optuna")
    try:
        study = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage)
    except KeyError:
        return  # a new search
    found = [read_result(path.parent) for path in directory.glob(f"*/{RESULT}")]
    good = [result for result in found if result.get("status") == "ok"]
    maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        drawn = {(name, str(value)) for name, value in trial.params.items()}
        values = [sought(r, maximize=maximize) for r in good if drawn <= r["overrides"].items()]
        state = optuna.trial.TrialState
        if drawn and values and values[0] is not None:
            study.tell(trial.number, values[0])
        else:
            study.tell(trial.number, state=state.FAIL)

"""The protocol's order and choices, with runs that are written down instead of trained."""

import itertools
import json
from pathlib import Path

import pytest

from hydratron.training.protocol import Protocol, median, read_sweep

# by learning rate and seed
SCORES = {
    "1e-5": {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.9, 5: 0.9},
    "3e-5": {1: 0.7, 2: 0.4, 3: 0.6, 4: 0.8, 5: 0.5},
}


class Commands:
    """Writes what `finetune -m` and `evaluate` would, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, command: str, *arguments: str) -> None:
        self.calls.append((command, *arguments))
        given = dict(a.split("=", 1) for a in arguments if "=" in a)
        if command == "finetune" and "resume" not in given:
            self.finetune(given, Path(given.pop("hydra.sweep.dir")))
        elif command == "evaluate":
            score = float(Path(given.get("checkpoint", "9")).name) / 10
            split = given.get("split", "val").replace("validation", "val")
            # as SQuAD 2.0 has it, tuned for each run and for the ensemble; never on a test set
            tuned = float(given.get("task.null_threshold", score if split == "val" else "nan"))
            found = {f"{split}/accuracy": score, f"{split}/null_threshold": tuned}
            write(Path(given["hydra.run.dir"]), found)

    def finetune(self, given: dict[str, str], directory: Path) -> None:
        (directory / "sweep").mkdir(parents=True)
        (directory / "multirun.yaml").touch()
        swept = [[(key, v) for v in value.split(",")] for key, value in given.items()]
        for index, point in enumerate(itertools.product(*swept)):
            overrides = dict(point)
            score = SCORES[overrides["optimizer.lr"]][int(overrides["seed"])]
            found = {"val/accuracy": score, "val/loss": 1 - score, "overrides": overrides}
            write(directory / str(index), found | {"selection_metric": "val/accuracy"})


def write(directory: Path, result: dict[str, object]) -> None:
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps({"status": "ok"} | result))


def test_the_grid_is_tuned_with_one_seed_and_the_median_is_of_all(tmp_path: Path) -> None:
    commands = Commands()
    protocol = Protocol(tmp_path, commands)
    given = {"task": "race", "optimizer.lr": "1e-5,3e-5", "task.test_path": "test"}
    chosen = protocol.choose(given, ["optimizer.lr"], "1")
    assert chosen == {"optimizer.lr": "3e-5"}
    found = protocol.score(given | chosen, "1,2,3,4,5")
    assert found["scores"] == [0.7, 0.4, 0.6, 0.8, 0.5]
    assert found["val/accuracy"] == 0.6
    assert found["val/loss"] == pytest.approx(0.4)
    assert found["median_run"] == str(tmp_path / "seeds/2")
    # the fake gives a run's number as its test score: the median's is not the median of them
    assert found["test/accuracy"] == 0.2
    assert found["ensemble"] == {"val/accuracy": 0.9, "val/null_threshold": 0.9}
    assert found["test_ensemble"] == {"test/accuracy": 0.9, "test/null_threshold": 0.9}
    runs = ",".join(str(tmp_path / "seeds" / str(i)) for i in range(5))
    assert ("evaluate", f"runs=[{runs}]", f"hydra.run.dir={tmp_path}/ensemble") in commands.calls


def test_a_key_that_hydra_is_told_to_add_is_tuned_too(tmp_path: Path) -> None:
    class Adding(Commands):
        def finetune(self, given: dict[str, str], directory: Path) -> None:
            super().finetune({key.lstrip("+"): value for key, value in given.items()}, directory)

    given = {"optimizer.lr": "1e-5", "+task.max_query_len": "32,64"}
    found = Protocol(tmp_path, Adding()).choose(given, ["+task.max_query_len"], "1")
    assert found == {"+task.max_query_len": "32"}


def test_a_second_call_trains_what_is_missing_and_evaluates_nothing_again(tmp_path: Path) -> None:
    given = {"optimizer.lr": "1e-5,3e-5"}
    protocol = Protocol(tmp_path, Commands())
    first = protocol.score(given | protocol.choose(given, list(given), "1"), "1,2,3,4,5")
    commands = Commands()
    protocol = Protocol(tmp_path, commands)
    assert protocol.score(given | protocol.choose(given, list(given), "1"), "1,2,3,4,5") == first
    assert commands.calls == [
        ("finetune", "-m", f"resume={tmp_path}/grid"),
        ("finetune", "-m", f"resume={tmp_path}/seeds"),
    ]


def test_a_run_that_failed_is_named_and_an_even_number_has_the_lower_median(tmp_path: Path) -> None:
    for index, score in enumerate((0.3, 0.1, 0.4, 0.2)):
        found = {"selection_metric": "val/f1", "val/f1": score}
        write(tmp_path / str(index), found)
    assert median(read_sweep(tmp_path)).score == 0.2
    write(tmp_path / "10", {"status": "failed", "error": "no memory"})
    with pytest.raises(ValueError, match="10: no memory; the same command goes on"):
        read_sweep(tmp_path)

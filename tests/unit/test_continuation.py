"""What a directory holds decides what a command may do in it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hydratron.arguments import InputError, ignored_keys, resumed_arguments
from hydratron.checkpoint.manifest import MANIFEST, write_manifest
from hydratron.checkpoint.runs import flatten, write_settings
from hydratron.continuation import (
    CONTINUES,
    FINISHED,
    NEW,
    check_identity,
    job_directory,
    sole_writer,
    standing,
)
from hydratron.result import Job

CONFIG: dict[str, Any] = {
    "model": {"num_heads": 2, "recompute": "none"},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
    "trainer": {"max_steps": 8, "log_every": 1},
    "parallel": {"tensor_parallel_size": 1},
    "logger": {},
    "seed": 1,
    "resume": None,
}


def job(run_dir: Path, command: str = "pretrain", **changes: Any) -> Job:
    """Return a job with CONFIG, `changes` by dotted name with two underscores for the dot."""
    config = OmegaConf.create(CONFIG)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    plain: Any = OmegaConf.to_container(config)
    return Job(command, run_dir, plain, {})


def write_run(
    run_dir: Path, *, status: str | None, step: int | None = 4, command: str = "pretrain"
) -> Path:
    """Write what a run of CONFIG leaves that reached `step` (None: no checkpoint)."""
    write_settings(run_dir, flatten(CONFIG) | {"command": command})
    if status:
        result = {"command": command, "status": status, "steps": step}
        (run_dir / "result.json").write_text(json.dumps(result))
    if step is not None:
        directory = run_dir / f"checkpoints/step-{step}"
        directory.mkdir(parents=True)
        run = {
            "command": command,
            "settings": flatten(CONFIG),
            "step": step,
            "identity": {"corpus": ["a", "corpus A"]},
        }
        write_manifest(directory, {"run": run, "files": {}, "tensors": {}})
    return run_dir


def test_an_empty_directory_is_new(tmp_path: Path) -> None:
    assert standing(job(tmp_path), resumed=False) == NEW


@pytest.mark.parametrize("status", [None, "preempted"])
def test_the_same_command_goes_on_with_what_was_cut_off(tmp_path: Path, status: str | None) -> None:
    write_run(tmp_path, status=status)
    assert standing(job(tmp_path), resumed=False) == CONTINUES
    assert standing(job(tmp_path, trainer__log_every=3), resumed=False) == CONTINUES
    for changes in ({"seed": 2}, {"model__num_heads": 1}, {"optimizer__weight_decay": 0.0}):
        with pytest.raises(InputError, match="which cannot become"):
            standing(job(tmp_path, **changes), resumed=False)


def test_a_finished_run_is_left_alone_unless_it_is_to_be_longer(tmp_path: Path) -> None:
    write_run(tmp_path, status="ok", step=8)
    with pytest.raises(InputError, match="holds a finished run already"):
        standing(job(tmp_path), resumed=False)
    assert standing(job(tmp_path), resumed=True) == FINISHED
    assert standing(job(tmp_path, parallel__tensor_parallel_size=2), resumed=True) == FINISHED
    assert standing(job(tmp_path, trainer__max_steps=9), resumed=True) == CONTINUES
    longer = {"trainer__max_steps": 9, "optimizer__lr": 0.5}
    assert standing(job(tmp_path, **longer), resumed=True) == CONTINUES
    for changes in ({"optimizer__lr": 0.5}, {"seed": 2, "trainer__max_steps": 9}):
        with pytest.raises(InputError, match="which cannot become"):
            standing(job(tmp_path, **changes), resumed=True)
    with pytest.raises(InputError, match=r"trainer\.max_steps 7 is below step 8"):
        standing(job(tmp_path, trainer__max_steps=7), resumed=True)


def test_a_refusal_names_key_and_both_values(tmp_path: Path) -> None:
    write_run(tmp_path, status="preempted")
    with pytest.raises(InputError, match=r"model\.num_heads 2, which cannot become 1$"):
        standing(job(tmp_path, model__num_heads=1), resumed=True)


def test_a_failed_run_is_resumed_by_name_alone(tmp_path: Path) -> None:
    write_run(tmp_path, status="failed")
    with pytest.raises(InputError, match="resume="):
        standing(job(tmp_path), resumed=False)
    assert standing(job(tmp_path), resumed=True) == CONTINUES


@pytest.mark.parametrize("status", [None, "failed"])
def test_a_run_without_a_checkpoint_begins_again_with_any_settings(
    tmp_path: Path, status: str | None
) -> None:
    write_run(tmp_path, status=status, step=None)
    assert standing(job(tmp_path, seed=2, model__num_heads=1), resumed=True) == NEW


@pytest.mark.parametrize("status", ["ok", "preempted"])
def test_a_trained_run_whose_checkpoints_are_gone_does_not_begin_again(
    tmp_path: Path, status: str
) -> None:
    write_run(tmp_path, status=status, step=None)
    with pytest.raises(InputError, match="has no checkpoint to go on from"):
        standing(job(tmp_path, trainer__max_steps=16), resumed=True)


def test_another_command_s_directory_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, status=None)
    for command in ("finetune", "benchmark"):
        with pytest.raises(InputError, match="holds a run of hydratron pretrain, not of"):
            standing(job(tmp_path, command), resumed=False)


def test_a_failed_conversion_is_simply_run_again(tmp_path: Path) -> None:
    write_run(tmp_path, status="failed", step=None, command="convert")
    assert standing(job(tmp_path, "convert", seed=2), resumed=False) == NEW


def test_a_damaged_result_or_checkpoint_is_no_reason_to_begin_again(tmp_path: Path) -> None:
    write_run(tmp_path, status="ok", step=4)
    (tmp_path / "result.json").write_bytes(b'{"status": \xff')
    write_run(tmp_path, status=None, step=8)
    (tmp_path / f"checkpoints/step-8/{MANIFEST}").write_text("{")
    (tmp_path / "checkpoints/step-12.bak").mkdir()
    assert standing(job(tmp_path), resumed=True) == CONTINUES
    with pytest.raises(InputError, match="which cannot become"):
        standing(job(tmp_path, seed=2), resumed=True)


def test_other_data_is_refused_with_both_descriptions(tmp_path: Path) -> None:
    write_run(tmp_path, status=None)
    check_identity(tmp_path, {"corpus": ["a", "corpus A, moved"]})
    with pytest.raises(InputError, match="its corpus was corpus A and is corpus B now"):
        check_identity(tmp_path, {"corpus": ["b", "corpus B"]})


HOLD = """
import sys, time
from pathlib import Path
from hydratron.continuation import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_directory_has_one_writer_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = pytest.raises(InputError, match=f"is being written by process {holder.pid} on ")
        with refused, sole_writer(tmp_path):
            raise AssertionError
        holder.kill()
    with sole_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".hydra/lock").read_text()


def number(sweep: Path, num: int, ignored: list[str], **changes: Any) -> str:
    hydra = {
        "hydra": {
            "sweep": {"dir": str(sweep)},
            "job": {"num": num, "name": "pretrain"},
            "sweeper": {},
        }
    }
    root = OmegaConf.create(job(sweep, **changes).config | hydra)
    return job_directory(ignored, _root_=root)


def test_the_jobs_of_a_sweep_are_known_by_their_settings(tmp_path: Path) -> None:
    rates = (1e-3, 1e-2)
    assert [number(tmp_path, i, [], optimizer__lr=r) for i, r in enumerate(rates)] == ["0", "1"]
    wider = [(rate, seed) for rate in rates for seed in (1, 2)]
    found = [number(tmp_path, i, [], optimizer__lr=r, seed=s) for i, (r, s) in enumerate(wider)]
    assert found == ["0", "2", "1", "3"]
    # what is given to all jobs alike does not make them others
    ignored = ignored_keys(["parallel=tp2", "trainer.max_steps=16", "seed=1,2"])
    longer = {"parallel__tensor_parallel_size": 2, "trainer__max_steps": 16}
    again = [number(tmp_path, i, ignored, optimizer__lr=r, **longer) for i, r in enumerate(rates)]
    assert again == ["0", "1"]
    # and what a sweep varies does
    assert number(tmp_path, 0, [], optimizer__lr=1e-3, parallel__tensor_parallel_size=2) == "4"


@pytest.mark.parametrize(
    "override",
    [
        "+logger._target_=os.system",
        "logger={_target_:os.system}",
        "task._target_=pandas.read_pickle",
        "+hydra.callbacks.x._target_=os.system",
        "hydra.searchpath=[file:///tmp]",
        "experiment=../../../tmp/evil",
        "experiment=/tmp/evil",
    ],
)
def test_a_foreign_run_s_overrides_compose_no_code(tmp_path: Path, override: str) -> None:
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(["seed=1", override]), tmp_path / ".hydra/overrides.yaml")
    with pytest.raises(InputError, match="sets "):
        resumed_arguments("pretrain", [f"resume={tmp_path}"])
    key = override.partition("=")[0]
    if key.startswith("+logger") or key.startswith("task"):
        assert f"{key}=mine" in resumed_arguments("pretrain", [f"resume={tmp_path}", f"{key}=mine"])


def test_a_foreign_sweep_says_how_many_jobs_run_and_nothing_that_runs(tmp_path: Path) -> None:
    hydra = ["hydra.launcher.n_jobs=2", "hydra.launcher.setup=[evil]", "hydra/launcher=joblib"]
    hydra += ["+hydra.callbacks.x._target_=os.system", "hydra.searchpath=[/tmp]"]
    definition = {"hydra": {"overrides": {"task": ["seed=1,2"], "hydra": hydra}}}
    OmegaConf.save(OmegaConf.create(definition), tmp_path / "multirun.yaml")
    arguments = resumed_arguments("pretrain", ["-m", f"resume={tmp_path}"])
    assert "hydra.launcher.n_jobs=2" in arguments
    assert "hydra/launcher=joblib" in arguments
    assert not any(word in " ".join(arguments) for word in ("evil", "callbacks", "searchpath"))


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system [x]", "a: {b", "[1, 2]", "{}"])
def test_a_damaged_or_evil_overrides_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/overrides.yaml").write_text(text)
    (tmp_path / "multirun.yaml").write_text(text)
    for flags in ([], ["-m"]):
        with pytest.raises(InputError, match="is damaged"):
            resumed_arguments("pretrain", [*flags, f"resume={tmp_path}"])

"""A run directory may come from somebody else: no command runs what is in it."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import TINY
from tests.tasks import write_mnli

TAG = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{}]]"


class Payload:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def old_format(run: Path) -> Path:
    """Make the newest checkpoint look like one from before there were manifests."""
    step = (run / "checkpoints/last").resolve()
    (step / "checkpoint.json").unlink()
    (step / ".metadata").write_bytes(pickle.dumps({}))
    return step


def metadata(run: Path, ran: Path) -> None:
    (old_format(run) / ".metadata").write_bytes(pickle.dumps(Payload(ran)))


def loops(run: Path, ran: Path) -> None:
    torch.save(Payload(ran), old_format(run) / "loops.pt")


def overrides_tag(run: Path, ran: Path) -> None:
    (run / ".hydra/overrides.yaml").write_text(TAG.format(ran))


def resolved_tag(run: Path, ran: Path) -> None:
    (run / ".hydra/resolved.yaml").write_text(TAG.format(ran))
    (run / ".hydra/settings.json").unlink()
    old_format(run)


def callback(run: Path, ran: Path) -> None:
    target = ["+hydra.callbacks.x._target_=pathlib.Path.touch", f"+hydra.callbacks.x.self={ran}"]
    (run / ".hydra/overrides.yaml").write_text(json.dumps(target))


def logger(run: Path, ran: Path) -> None:
    (run / ".hydra/overrides.yaml").write_text(
        json.dumps(["+logger._target_=os.mkdir", f"+logger.path={ran}"])
    )


def task(run: Path, ran: Path) -> None:
    (run / "task.json").write_text(json.dumps({"_target_": "os.mkdir", "path": str(ran)}))


KINDS: list[Callable[[Path, Path], None]] = [
    metadata,
    loops,
    overrides_tag,
    resolved_tag,
    callback,
    logger,
    task,
]


@pytest.mark.parametrize("kinds", [KINDS[:1], pytest.param(KINDS[1:], marks=pytest.mark.slow)])
def test_no_command_runs_what_a_run_directory_holds(
    in_process, tmp_path: Path, kinds: list[Any]
) -> None:
    base = ["trainer.max_steps=1", "data.tokenizer=character", "hydra.run.dir=base"]
    assert in_process("pretrain", *TINY[:-1], *base).returncode == 0
    rows = write_mnli(tmp_path / "rows.jsonl", 8)
    paths = [f"task.train_path={rows}", f"task.validation_path={rows}"]
    for kind in kinds:
        run, ran = tmp_path / f"run_{kind.__name__}", tmp_path / f"ran_{kind.__name__}"
        shutil.copytree(tmp_path / "base", run, symlinks=True)
        kind(run, ran)
        commands = [
            ["pretrain", f"resume={run}", "trainer.max_steps=2"],
            [
                "finetune",
                f"checkpoint={run}",
                "task=mnli",
                *paths,
                "data.global_batch_size=4",
                "task.max_seq_len=16",
            ],
            ["evaluate", f"checkpoint={run}"],
            ["convert", "to=hydratron", f"checkpoint={run}", f"output={run}_converted"],
            ["plan", f"calibration={run}"],
            ["report", str(run)],
            ["benchmark", f"resume={run}"],
        ]
        for number, command in enumerate(commands):
            where = [f"hydra.run.dir={tmp_path}/{kind.__name__}{number}"]
            is_plain = command[0] == "report" or command[1].startswith("resume=")
            done = in_process(*command, *([] if is_plain else where))
            assert not ran.exists(), (kind.__name__, command)
            assert "Traceback" not in done.stderr, (kind.__name__, command)
            if done.returncode:
                assert done.stderr.count("\n") == 1, (kind.__name__, command, done.stderr)


def test_the_payload_works_where_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()

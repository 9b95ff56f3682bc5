"""A damaged checkpoint is never trained on: it is named, and the one before it is used."""

import io
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hydratron.checkpoint import sharded
from hydratron.checkpoint.manifest import (
    LEGACY_METADATA,
    LOOPS,
    MANIFEST,
    DamagedCheckpointError,
    newest_intact,
    read_manifest,
    write_manifest,
)
from hydratron.parallel.mesh import ParallelMesh
from tests.pretraining import Job

NUM_DAMAGES = 200


def fit(run_dir: Path, max_steps: int = 4, **settings: Any) -> Any:
    """Train to `max_steps`, from the newest undamaged checkpoint; return the trainer."""
    trainer, module, data, metrics = Job(
        run_dir, max_steps=max_steps, trainer={"checkpoint_every": 2}, **settings
    ).build()
    steps = sharded.step_directories(run_dir / "checkpoints")
    trainer.fit(module, datamodule=data, ckpt_path=steps[0] if steps else None)
    return SimpleRun(trainer, module, metrics.column("train/loss"))


class SimpleRun:
    """A run that has ended: what it holds and the losses that it logged."""

    def __init__(self, trainer: Any, module: Any, losses: list[float]) -> None:
        self.network, self.optimizers, self.losses = module.network, trainer.optimizers, losses

    def load(self, directory: Path) -> dict[str, Any]:
        """Load a checkpoint into this run's network and optimizer."""
        return sharded.load_checkpoint(
            directory, network=self.network, optimizers=self.optimizers, mesh=ParallelMesh()
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimpleRun]:
    """A run of four steps with checkpoints at two and four."""
    path = tmp_path_factory.mktemp("run")
    return path, fit(path)


def damage(path: Path, generator: random.Random) -> None:
    """Flip a bit, overwrite or cut a block, or remove the file."""
    content, kind = bytearray(path.read_bytes()), generator.randrange(8)
    start = generator.randrange(len(content))
    if kind < 4:
        content[start] ^= 1 << generator.randrange(8)
    elif kind < 6:
        content[start : start + 512] = generator.randbytes(len(content[start : start + 512]))
    else:
        del content[start:]
    path.unlink() if kind == 7 else path.write_bytes(content)


def test_no_damage_to_any_file_is_loaded_and_the_older_checkpoint_is_named(
    run: tuple[Path, SimpleRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, trained = run
    generator = random.Random(1)
    content = read_manifest(source / "checkpoints/step-4")
    assert set(content["files"]) == {
        "loops.pt",
        "rng-0.pt",
        "model-0.safetensors",
        "optimizer_0-0.safetensors",
    }
    names = [*content["files"], MANIFEST]
    for number in range(NUM_DAMAGES):
        directory = tmp_path / str(number)
        shutil.copytree(source / "checkpoints", directory, symlinks=True)
        newest, name = directory / "step-4", names[number % len(names)]
        before = (newest / name).read_bytes()
        damage(newest / name, generator)
        is_same = (newest / name).is_file() and (newest / name).read_bytes() == before
        if is_same or (name == MANIFEST and says_the_same(newest, content)):
            continue
        with pytest.raises(DamagedCheckpointError) as caught:
            trained.load(newest)
        assert str(directory) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        capsys.readouterr()
        assert newest_intact(directory) == directory / "step-2"
        assert f"{newest}" in capsys.readouterr().out
        shutil.rmtree(directory)


def says_the_same(directory: Path, content: dict[str, Any]) -> bool:
    try:
        return read_manifest(directory) == content  # 1e-05 and 1E-05
    except DamagedCheckpointError:
        return False


@pytest.mark.parametrize("name", ["optimizer_0-0.safetensors", MANIFEST])
def test_training_goes_on_from_the_undamaged_one_as_if_there_were_no_other(
    run: tuple[Path, SimpleRun], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source, _ = run
    for copy in ("damaged", "older"):
        shutil.copytree(source / "checkpoints", tmp_path / copy / "checkpoints", symlinks=True)
    shutil.rmtree(tmp_path / "older/checkpoints/step-4")
    path = tmp_path / f"damaged/checkpoints/step-4/{name}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (tmp_path / "damaged/checkpoints/step-12.bak").mkdir()
    found = fit(tmp_path / "damaged", max_steps=6)
    assert f"{path} is damaged" in (printed := capsys.readouterr().out)
    assert "using the checkpoint before it" in printed
    assert len(found.losses) == 4
    assert found.losses == fit(tmp_path / "older", max_steps=6).losses
    assert (tmp_path / "damaged/checkpoints/last").resolve().name == "step-6"


def test_a_run_without_an_undamaged_checkpoint_does_not_begin_again(
    run: tuple[Path, SimpleRun], tmp_path: Path
) -> None:
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    for step in (2, 4):
        (tmp_path / f"checkpoints/step-{step}/model-0.safetensors").write_bytes(b"")
    with pytest.raises(sharded.CheckpointError, match="holds no undamaged checkpoint"):
        fit(tmp_path, max_steps=6)


def write_legacy(source: Path, directory: Path, trained: SimpleRun) -> Path:
    """Write a checkpoint as the project did before there were manifests: by torch's own storage."""
    tensors = {"model": sharded.global_parameters(trained.network, ParallelMesh())}
    state = sharded.global_optimizer_state(trained.network, trained.optimizers[0], ParallelMesh())
    dcp.save(tensors | {"optimizer_0": state}, checkpoint_id=directory, no_dist=True)
    for name in (LOOPS, "rng-0.pt"):
        shutil.copy(source / "checkpoints/step-4" / name, directory)
    return directory


def test_checkpoints_from_before_there_were_manifests_are_read(
    run: tuple[Path, SimpleRun], tmp_path: Path
) -> None:
    source, trained = run
    trained.load(source / "checkpoints/step-4")
    expected = {name: p.detach().clone() for name, p in trained.network.named_parameters()}
    legacy = write_legacy(source, tmp_path / "checkpoints/step-4", trained)
    for parameter in trained.network.parameters():
        parameter.data.zero_()
    assert trained.load(legacy)["global_step"] == 4
    for name, parameter in trained.network.named_parameters():
        assert torch.equal(parameter, expected[name])
    assert len(fit(tmp_path, max_steps=6).losses) == 2


class Payload:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [LEGACY_METADATA, LOOPS, "rng-0.pt", "value"])
def test_no_pickle_of_a_foreign_checkpoint_is_run(
    run: tuple[Path, SimpleRun], tmp_path: Path, name: str
) -> None:
    source, trained = run
    directory = write_legacy(source, tmp_path / "checkpoints/step-4", trained)
    payload, ran = Payload(tmp_path / "ran"), tmp_path / "ran"
    if name == LEGACY_METADATA:
        (directory / name).write_bytes(pickle.dumps(payload))
    elif name == "value":  # torch unpickles what the metadata says is no tensor
        stream = io.BytesIO()
        torch.save(payload, stream)
        first = next(iter(dict(trained.network.named_parameters())))
        shutil.rmtree(directory)
        dcp.save({f"model.{first}": stream}, checkpoint_id=directory, no_dist=True)
        shutil.copy(source / "checkpoints/step-4" / LOOPS, directory)
    else:
        torch.save(payload, directory / name)
    with pytest.raises(DamagedCheckpointError) as caught:
        trained.load(directory)
    assert len(str(caught.value).splitlines()) == 1
    assert not ran.exists()
    pickle.loads(pickle.dumps(payload))
    assert ran.exists()  # the payload works


def test_a_file_outside_of_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    chunk = {"offsets": [0], "sizes": [1], "file": "../elsewhere.safetensors", "key": "a"}
    tensors = {"model.a": {"dtype": "F32", "shape": [1], "chunks": [chunk]}}
    write_manifest(tmp_path, {"files": {}, "tensors": tensors})
    with pytest.raises(DamagedCheckpointError):
        read_manifest(tmp_path)

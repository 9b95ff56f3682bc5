"""Each trap that a Lightning strategy for tensor-parallel groups can fall into, by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision

from hydratron.parallel.placement import parameter_placements
from hydratron.training.config import ParallelConfig, TrainerConfig
from tests.distributed import run_distributed
from tests.pretraining import Job
from tests.training.overflow import Overflow


class KeepBatches(Callback):
    def __init__(self) -> None:
        self.train: list[torch.Tensor] = []
        self.validation: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.train.append(batch["input_ids"])

    def on_validation_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validation.append(batch["input_ids"])


def fit_and_keep_batches(rank: int, world_size: int, run_dir: Path, workers: int) -> dict[str, Any]:
    job = Job(run_dir, tp=2, dp=2, data={"num_workers": workers}, trainer={"val_every": 4})
    kept = KeepBatches()
    trainer, module, data, metrics = job.build([kept])
    trainer.fit(module, datamodule=data)
    return {
        "train": torch.stack(kept.train),
        "validation": torch.cat(kept.validation),
        "val/loss": metrics.column("val/loss"),
        "sampler": trainer.strategy.distributed_sampler_kwargs,
    }


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("strategy")
    return run_distributed(fit_and_keep_batches, 4, path, path, 2)


def test_sampler_follows_the_data_axis(four_ranks: list[dict[str, Any]]) -> None:
    expected = [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [(r["sampler"]["rank"], r["sampler"]["num_replicas"]) for r in four_ranks] == expected
    assert not torch.equal(four_ranks[0]["train"], four_ranks[2]["train"])


def test_worker_processes_give_tensor_parallel_peers_the_same_batch(
    four_ranks: list[dict[str, Any]],
) -> None:
    assert torch.equal(four_ranks[0]["train"], four_ranks[1]["train"])
    assert torch.equal(four_ranks[2]["train"], four_ranks[3]["train"])


def test_data_parallel_size_does_not_change_the_global_batches(
    four_ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    kept = KeepBatches()
    trainer, module, data, _ = Job(tmp_path).build([kept])
    trainer.fit(module, datamodule=data)
    spread = torch.cat([four_ranks[0]["train"], four_ranks[2]["train"]], dim=1)
    assert torch.equal(torch.stack(kept.train), spread)


def test_metrics_reduce_over_the_data_axis(
    four_ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer, module, data, metrics = Job(tmp_path, trainer={"val_every": 4}).build()
    trainer.fit(module, datamodule=data)
    for result in four_ranks:  # 22 samples over 2 ranks: a mean of rank means would differ
        assert result["val/loss"] == pytest.approx(metrics.column("val/loss"), abs=1e-5)


def test_every_held_out_sample_is_seen_once(four_ranks: list[dict[str, Any]]) -> None:
    seen = torch.cat([four_ranks[0]["validation"], four_ranks[2]["validation"]])
    assert len(seen) == 22
    assert len(four_ranks[0]["validation"]) == 11


def validate_and_compare_shards(rank: int, world_size: int, run_dir: Path) -> dict[str, Any]:
    trainer, module, data, _ = Job(run_dir, tp=2).build()
    trainer.fit(module, datamodule=data)
    assert module.network is not None
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    trainer.validate(module, datamodule=data, verbose=False)
    changed = [n for n, p in module.network.named_parameters() if not torch.equal(p, before[n])]
    weight = "encoder.transformer.layers.0.mlp.input.weight"
    return {"changed": changed, "shard": before[weight]}


def test_validate_leaves_the_shards_intact(tmp_path: Path) -> None:
    first, second = run_distributed(validate_and_compare_shards, 2, tmp_path, tmp_path)
    assert first["changed"] == []
    assert second["changed"] == []
    assert not torch.equal(first["shard"], second["shard"])


def replicated_parameters(rank: int, world_size: int, run_dir: Path) -> dict[str, Any]:
    job = Job(run_dir, tp=2, optimizer={"clip": 0.05, "lr": 1e-2}, max_steps=6)
    trainer, module, data, metrics = job.build()
    trainer.fit(module, datamodule=data)
    assert module.network is not None
    placements = parameter_placements(module.network)
    named = module.network.named_parameters()
    values = {n: p.detach() for n, p in named if placements[n].tp_dim is None}
    return {"values": values, "norms": metrics.column("train/grad_norm")}


def test_clipping_counts_replicated_parameters_once(tmp_path: Path) -> None:
    first, second = run_distributed(replicated_parameters, 2, tmp_path, tmp_path)
    job = Job(tmp_path / "dense", optimizer={"clip": 0.05, "lr": 1e-2}, max_steps=6)
    trainer, module, data, metrics = job.build()
    trainer.fit(module, datamodule=data)
    assert min(metrics.column("train/grad_norm")) > 0.05  # clipping acts at every step
    assert first["norms"] == pytest.approx(metrics.column("train/grad_norm"), rel=1e-4)
    for name, value in first["values"].items():
        assert torch.equal(value, second["values"][name]), name


class ReportedLoss(Callback):
    """Logs a falling loss that differs by rank, as a rank-dependent metric would."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        trainer.callback_metrics["reported"] = torch.tensor(10.0 - trainer.global_step)


def keep_best(rank: int, world_size: int, run_dir: Path) -> dict[str, Any]:
    best = ModelCheckpoint(run_dir / "best", monitor="reported", filename="{step}", save_top_k=1)
    trainer, module, data, _ = Job(run_dir, tp=2, dp=2, trainer={"val_every": 2}).build(
        [ReportedLoss(), best]
    )
    trainer.fit(module, datamodule=data)
    decisions = [
        trainer.strategy.reduce_boolean_decision(True),
        trainer.strategy.reduce_boolean_decision(rank != 3),
        trainer.strategy.reduce_boolean_decision(rank == 3, all=False),
        trainer.strategy.reduce_boolean_decision(False, all=False),
    ]
    return {"best": best.best_model_path, "decisions": decisions}


def test_model_checkpoint_keeps_the_better_checkpoint(tmp_path: Path) -> None:
    for result in run_distributed(keep_best, 4, tmp_path, tmp_path):
        assert Path(result["best"]).name == "step=4.ckpt"
        assert result["decisions"] == [True, False, True, False]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step=4.ckpt"]


def overflow_on_one_rank(rank: int, world_size: int, run_dir: Path) -> dict[str, Any]:
    overflow = Overflow(rank=1, step=2)
    trainer, module, data, _ = Job(run_dir, tp=2).build([overflow])
    # asked for by the user, fp16 on a CPU is refused; the plugin itself works there
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    plugin.forward_context = lambda: torch.autocast("cpu", enabled=False)
    trainer.strategy.precision_plugin = plugin
    trainer.fit(module, datamodule=data)
    return {"scales": overflow.scales, "weights": overflow.weights}


def test_fp16_overflow_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    for result in run_distributed(overflow_on_one_rank, 2, tmp_path, tmp_path):
        assert result["scales"] == [256.0, 256.0, 128.0, 128.0]
        weights = result["weights"]
        assert torch.equal(weights[2], weights[1])
        assert not torch.equal(weights[3], weights[2])


def test_a_user_who_asks_for_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="16-mixed needs a GPU"):
        TrainerConfig(accelerator="cpu", max_steps=1, precision="16-mixed")


def test_world_size_must_be_the_product_of_the_layout() -> None:
    world_size = ParallelConfig(tensor_parallel_size=2, data_parallel_size=2).world_size
    with pytest.raises(ValueError, match="devices 3 x trainer.num_nodes 1 is not"):
        TrainerConfig(accelerator="cpu", max_steps=1, devices=3).local_devices(world_size)

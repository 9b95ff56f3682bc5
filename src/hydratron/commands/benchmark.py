"""`hydratron benchmark`: time real training steps of a configuration, and a peer's beside them."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydratron.checkpoint.huggingface import export_architecture
from hydratron.checkpoint.peer import PRETRAINING_HEADS, build_peer, peer_batch
from hydratron.commands import pretrain
from hydratron.commands.environment import cluster_environment
from hydratron.perf.devices import peak_tflops
from hydratron.perf.flops import train_flops
from hydratron.settings import build
from hydratron.training.benchmark import StepTimer, TimingConfig, time_network
from hydratron.training.pretraining import num_parameters
from hydratron.training.trainer import build_trainer


@dataclass(frozen=True)
class BenchmarkJob:
    """A pretraining job and what to time of it."""

    pretraining: pretrain.PretrainJob
    timing: TimingConfig


def prepare(config: Mapping[str, Any]) -> BenchmarkJob:
    """Check a configuration; ValueError says what is wrong with it."""
    timing = build(TimingConfig, config["timing"], name="timing")
    if config["trainer"].get("cuda_graphs") and timing.warmup_steps < 2:
        raise ValueError(
            f"timing.warmup_steps {timing.warmup_steps} is not at least 2: with "
            "trainer.cuda_graphs the second step is the one that is captured"
        )
    # the last step is logged, and so comes after those that are timed and profiled
    job = pretrain.prepare(config, num_timed=timing.total_steps + 1)
    if timing.peer and job.parallel.world_size > 1:
        raise ValueError(f"timing.peer {timing.peer} runs on one device: it needs parallel=single")
    if timing.peer:
        export_architecture(job.module.model_config, PRETRAINING_HEADS)  # ValueError: has none
    return BenchmarkJob(job, timing)


def run(job: BenchmarkJob, run_dir: Path) -> dict[str, Any]:
    """Time the steps; return what `result.json` says of them."""
    work, timer = job.pretraining, StepTimer(job.timing, run_dir)
    trainer = build_trainer(
        work.trainer,
        work.parallel,
        run_dir=run_dir,
        loggers=[],
        environment=cluster_environment(),
        callbacks=[timer],
        steps_only=True,
    )
    trainer.fit(work.module, datamodule=work.data)
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    world_size = work.parallel.world_size
    found = rates(work, timer.metrics, device_name=name, world_size=world_size)
    result = {f"perf/{key}": value for key, value in found.items()}
    if job.timing.peer is not None:
        batch = {key: value.to(device) for key, value in timer.last_batch.items()}
        work.module.network = None
        del trainer
        gc.collect()
        times = time_network(
            build_peer(work.module.model_config, device),
            peer_batch(work.module.model_config, batch),
            work.module.optimizer_config,
            job.timing,
            precision=work.trainer.precision,
            compile=work.trainer.compile,
        )
        found = rates(work, times, device_name=name, world_size=1)
        result |= {f"peer/{key}": value for key, value in found.items()}
        result["perf/ratio_to_peer"] = times["step_ms"] / timer.metrics["step_ms"]
    return result | {
        "num_parameters": num_parameters(work.module.model_config),
        "device": name,
        "batch": work.data.config.global_batch_size,
        "seq_len": work.data.config.seq_len,
    }


def rates(
    job: pretrain.PretrainJob, times: Mapping[str, float], *, device_name: str, world_size: int
) -> dict[str, float]:
    """Add to step times what follows from them: tokens and FLOPs per second, share of peak."""
    data, seconds = job.data, times["step_ms"] / 1e3
    per_gpu = data.config.global_batch_size / seconds / world_size / 1e12
    model = job.module.model_config

    def flops(*, with_recomputation: bool) -> int:
        return train_flops(
            model,
            seq_len=data.config.seq_len,
            num_predictions=data.num_predictions,
            with_recomputation=with_recomputation,
        )

    found = dict(times) | {
        "tokens_per_second": data.config.global_batch_size * data.config.seq_len / seconds,
        "sequences_per_second": data.config.global_batch_size / seconds,
        "tflops_per_gpu": per_gpu * flops(with_recomputation=False),
        "tflops_per_gpu_with_recomputation": per_gpu * flops(with_recomputation=True),
    }
    peak = peak_tflops(device_name)
    if peak is not None:
        found["mfu"] = found["tflops_per_gpu"] / peak
    return found

"""Timing of real training steps, and of what else could run the same network.

The steps are those of the Trainer: module, strategy, optimizer, clipping, data loader. Beside them
stand a bare loop over the same network (what Lightning costs) and any other network, a peer.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW

from hydratron.parallel.grad_norm import squared_gradient_norms
from hydratron.parallel.placement import reduce_partial_gradients
from hydratron.perf.hardware import GIB
from hydratron.perf.trace import breakdown, read_trace
from hydratron.settings import Interval, check, one_of
from hydratron.training.module import TrainingModule
from hydratron.training.optimisation import OptimizerConfig, build_optimizer, clip_gradients

TRACE = "trace.json.gz"


@dataclass(frozen=True)
class TimingConfig:
    """Steps that are thrown away (compilation, allocation), timed, and profiled.

    `bare_loop` also times the same network without Lightning; `peer` names what else is timed on
    the same batch.

    Raises:
        ValueError: a value that cannot be, by name and rule.
    """

    warmup_steps: Annotated[int, Interval(1, 10**6)] = 5
    steps: Annotated[int, Interval(2, 10**6)] = 20
    profile_steps: Annotated[int, Interval(1, 1000)] = 3
    bare_loop: bool = True
    peer: Annotated[str, one_of("transformers")] | None = None

    def __post_init__(self) -> None:
        check(self, "timing")

    @property
    def total_steps(self) -> int:
        """Optimizer steps that are thrown away, timed or profiled."""
        return self.warmup_steps + self.steps + self.profile_steps


class Stopwatch:
    """Marks between steps; on a GPU they are events in its queue, and the host waits for none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment of the device's work."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the times between successive marks; waits for the device."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [first.elapsed_time(second) for first, second in pairs]
        return [1e3 * (second - first) for first, second in pairs]


def time_steps(step: Callable[[], None], config: TimingConfig, device: torch.device) -> list[float]:
    """Return the milliseconds of `config.steps` calls of `step`, after the warmup."""
    for _ in range(config.warmup_steps):
        step()
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(config.steps):
        step()
        watch.mark()
    return watch.milliseconds()


def describe_times(milliseconds: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of step times, in ms."""
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return {"step_ms": median, "step_ms_low": low, "step_ms_high": high}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that tensors took since the last reset, in GiB; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / GIB}


def is_replayed(module: LightningModule) -> bool:
    """Whether the steps of `module` are CUDA graphs by now."""
    return isinstance(module, TrainingModule) and module.graphs is not None


class StepTimer(Callback):
    """Times, then profiles the Trainer's steps; `metrics` holds what was found.

    A trace of the profiled steps is left in `run_dir` on a GPU.
    """

    def __init__(self, config: TimingConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.metrics: dict[str, float] = {}
        self.last_batch: dict[str, Tensor] = {}
        self._profiler: torch.profiler.profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch = Stopwatch(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        config = self.config
        if batch_idx == config.warmup_steps:
            # a replayed graph allocates nothing: the peak is that of the steps before
            if pl_module.device.type == "cuda" and not is_replayed(pl_module):
                torch.cuda.reset_peak_memory_stats()
            self.watch.mark()
        if batch_idx == config.warmup_steps + config.steps:
            self.metrics |= describe_times(self.watch.milliseconds())
            self.metrics |= peak_memory(pl_module.device)
            if pl_module.device.type == "cuda" and trainer.is_global_zero:
                activities = [torch.profiler.ProfilerActivity.CUDA]
                self._profiler = torch.profiler.profile(activities=activities)
                self._profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        config = self.config
        if config.warmup_steps <= batch_idx < config.warmup_steps + config.steps:
            self.watch.mark()
        if batch_idx == config.total_steps - 1:
            self.last_batch = batch
            self._read_profile()
            # launched kernel by kernel, a bare loop says nothing of what replayed steps cost
            has_like = not is_replayed(pl_module) and trainer.precision != "16-mixed"
            if config.bare_loop and has_like:
                assert isinstance(pl_module, TrainingModule)
                self._time_bare_loop(trainer, pl_module, batch)

    def _read_profile(self) -> None:
        if self._profiler is None:
            return
        torch.cuda.synchronize()
        self._profiler.stop()
        path = self.run_dir / TRACE
        self._profiler.export_chrome_trace(str(path))
        times = breakdown(read_trace(path), num_steps=self.config.profile_steps)
        self.metrics |= {f"breakdown/{kind}_ms": value for kind, value in times.items()}

    def _time_bare_loop(
        self, trainer: Trainer, module: TrainingModule, batch: dict[str, Tensor]
    ) -> None:
        """The same network, optimizer and clipping, a batch that lies on the device already."""
        mesh, network = module.mesh, module.network
        micro_batches = module.micro_batches(batch)
        optimizer = trainer.optimizers[0]

        def step() -> None:
            for index, micro_batch in enumerate(micro_batches):
                is_last = index == len(micro_batches) - 1
                sync = nullcontext() if is_last else module.strategy.block_backward_sync()
                with module.strategy.precision_plugin.forward_context():
                    sums = module.strategy.replica(micro_batch)
                    loss = torch.stack(list(sums.values())).sum() / len(batch["input_ids"])
                with sync:
                    loss.backward()
            reduce_partial_gradients(network, mesh.tp_group)
            squares = squared_gradient_norms(network, mesh.tp_group)
            clip_gradients(network, optimizer, squares, max_norm=module.optimizer_config.clip)
            optimizer.step()
            optimizer.zero_grad()

        times = describe_times(time_steps(step, self.config, module.device))
        self.metrics["bare_step_ms"] = times["step_ms"]
        self.metrics["lightning_overhead"] = self.metrics["step_ms"] / times["step_ms"] - 1


def time_network(
    network: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer_config: OptimizerConfig,
    timing: TimingConfig,
    *,
    precision: str,
    compile: bool,
) -> dict[str, float]:
    """Train a network that returns its loss for `batch` in a plain loop; return times and memory.

    Fused AdamW without decay on biases and clipping as for ours; autocast over float32 weights,
    in fp16 for 16-mixed, in bf16 for every other `precision` but 32-true.
    """
    device = next(iter(batch.values())).device
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    optimizer: AdamW
    optimizer, _ = build_optimizer(network, optimizer_config, max_steps=timing.total_steps)
    forward: Any = torch.compile(network) if compile else network

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=precision != "32-true"):
            loss = forward(**batch).loss
        loss.backward()
        if optimizer_config.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), optimizer_config.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = describe_times(time_steps(step, timing, device))
    return times | peak_memory(device)

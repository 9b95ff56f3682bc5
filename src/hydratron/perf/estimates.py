"""One configuration's memory and time on one cluster, from traces that configurations share.

Every size in a trace is affine in the micro-batch and in the number of layers, so that four small
traces of a layout answer for every batch and depth.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from hydratron.perf.flops import train_flops
from hydratron.perf.hardware import GIB, Hardware
from hydratron.perf.kernels import as_compiled
from hydratron.perf.memory import Memory, StateMemory, state_memory, step_memory
from hydratron.perf.recorder import Operator, StepTrace, StepTraces
from hydratron.perf.roofline import StepTime, step_time
from hydratron.perf.step import StepConfig, trace_passes, trace_update


@dataclass(frozen=True)
class Estimate:
    """What a configuration needs and how long its optimizer step takes."""

    config: StepConfig
    hardware: Hardware
    time: StepTime
    memory: Memory

    @property
    def peak_bytes(self) -> float:
        """Peak memory of a rank, with the product kernels' workspace."""
        return self.memory.peak + self.hardware.workspace_gib * GIB

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much."""
        return self.peak_bytes <= self.hardware.usable_gib * GIB

    @property
    def tflops_per_gpu(self) -> float:
        """Model FLOP/s of a GPU, in 10^12: three passes, whatever is computed again."""
        config = self.config
        flops = train_flops(
            config.model, seq_len=config.seq_len, num_predictions=config.num_predictions
        )
        return flops * config.global_batch_size / config.world_size / self.time.total / 1e12

    @property
    def mfu(self) -> float:
        """`tflops_per_gpu` over the peak."""
        return self.tflops_per_gpu / self.hardware.peak_tflops

    def row(self, num_steps: int) -> dict[str, Any]:
        """Return the figures as one flat row, with the cost of a run of `num_steps`."""
        config, state, seconds = self.config, self.memory.state, self.time.total
        days = seconds * num_steps / 86400
        row: dict[str, Any] = {
            "gpus": config.world_size,
            "tensor_parallel_size": config.tensor_parallel_size,
            "data_parallel_size": config.data_parallel_size,
            "micro_batch_size": config.micro_batch_size,
            "num_micro_batches": config.num_micro_batches,
            "recompute": config.model.recompute,
            "shard_optimizer": config.shard_optimizer,
            "fits": self.fits,
            "step_ms": seconds * 1e3,
            "tflops_per_gpu": self.tflops_per_gpu,
            "mfu": self.mfu,
            "days": days,
            "gpu_hours": days * 24 * config.world_size,
            "peak_gib": self.peak_bytes / GIB,
            "parameters_gib": state.parameters / GIB,
            "optimizer_gib": state.optimizer / GIB,
            "gradients_gib": state.gradients / GIB if self.memory.gradients_stay else 0.0,
        }
        held = sum(row[f"{name}_gib"] for name in ("parameters", "optimizer", "gradients"))
        row["activations_gib"] = row["peak_gib"] - held
        return row | {f"{key}_ms": value * 1e3 for key, value in asdict(self.time).items()}


def _affine(first: Operator, second: Operator, batch: int) -> Operator:
    def at(a: int, b: int) -> int:
        return a + (batch - 1) * (b - a)

    def all_at(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
        return {key: at(size, b[key]) for key, size in a.items()}

    assert first.name == second.name
    shape: Any = tuple(at(a, b) for a, b in zip(first.shape, second.shape, strict=True))
    return replace(
        first,
        reads=all_at(first.reads, second.reads),
        writes=all_at(first.writes, second.writes),
        shape=shape,
        flops=at(first.flops, second.flops),
        num_bytes=at(first.num_bytes, second.num_bytes),
    )


def at_batch(one: StepTrace, two: StepTrace, batch: int) -> StepTrace:
    """Return the trace of a micro-batch of `batch` sequences from those of one and of two.

    Exact where the tokens of one sequence divide by the tensor-parallel size.
    """
    pairs = zip(one.operators, two.operators, strict=True)
    return replace(one, operators=[_affine(a, b, batch) for a, b in pairs])


class Estimator:
    """Estimates configurations on any cluster; keeps the traces it made."""

    def __init__(self) -> None:
        self._passes: dict[tuple[StepConfig, int], StepTrace] = {}
        self._updates: dict[tuple[StepConfig, int], StepTrace] = {}
        self._states: dict[StepConfig, StateMemory] = {}

    def _pass(self, config: StepConfig, micro_batch_size: int, num_layers: int) -> StepTrace:
        # a group's size is in no trace: two replicas stand for any number
        same = {"num_micro_batches": 1, "shard_optimizer": False}
        size = min(config.data_parallel_size, 2)
        key = replace(config, micro_batch_size=micro_batch_size, data_parallel_size=size, **same)
        if (key, num_layers) not in self._passes:
            trace = trace_passes(key, num_layers)
            self._passes[key, num_layers] = as_compiled(trace) if key.compiled else trace
        return self._passes[key, num_layers]

    def _update(self, config: StepConfig, num_layers: int) -> StepTrace:
        key = _layout(config)
        if (key, num_layers) not in self._updates:
            self._updates[key, num_layers] = trace_update(key, num_layers)
        return self._updates[key, num_layers]

    def traces(self, config: StepConfig) -> StepTraces:
        """Return the traces of a step, its passes from those of small micro-batches."""
        batch = config.micro_batch_size
        first, second = (
            at_batch(self._pass(config, 1, n), self._pass(config, 2, n), batch) for n in (1, 2)
        )
        return StepTraces((first, second), (self._update(config, 1), self._update(config, 2)))

    def state(self, config: StepConfig) -> StateMemory:
        """Return what a rank keeps all the time."""
        key = _layout(config)
        if key not in self._states:
            self._states[key] = state_memory(key)
        return self._states[key]

    def estimate(self, config: StepConfig, hardware: Hardware) -> Estimate:
        """Return memory and time of a configuration on a cluster."""
        traces = self.traces(config)
        return Estimate(
            config,
            hardware,
            step_time(config, hardware, traces),
            step_memory(config, self.state(config), traces),
        )


def _layout(config: StepConfig) -> StepConfig:
    """What parameters and optimizer depend on: nothing of the batch or of recomputation."""
    model = replace(config.model, recompute="none")
    size = config.data_parallel_size if config.shard_optimizer else 1
    return replace(
        config, model=model, micro_batch_size=1, num_micro_batches=1, data_parallel_size=size
    )

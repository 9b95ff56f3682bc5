"""One configuration's memory and time on one cluster, from traces that configurations share.

Every size in a trace is affine in the micro-batch and in the number of layers, so that four small
traces of a layout answer for every batch and depth.
"""

from dataclasses import dataclass, replace
from typing import Any

from hydratron.perf.flops import train_flops
from hydratron.perf.hardware import GIB, Hardware
from hydratron.perf.memory import Memory, StateMemory, state_memory, step_memory
from hydratron.perf.recorder import Operator, StepTrace
from hydratron.perf.roofline import StepTime, step_time
from hydratron.perf.step import StepConfig, trace_step


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
        return self.peak_bytes <= self.hardware.usable_bytes

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
    """Estimates configurations of one cluster; keeps the traces it made."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._traces: dict[tuple[StepConfig, int], StepTrace] = {}
        self._states: dict[StepConfig, StateMemory] = {}

    def _trace(self, config: StepConfig, num_layers: int) -> StepTrace:
        key = (config, num_layers)
        if key not in self._traces:
            self._traces[key] = trace_step(config, num_layers)
        return self._traces[key]

    def _traces_of(self, config: StepConfig) -> list[StepTrace]:
        """The traces with one and with two layers."""
        key = replace(config, num_micro_batches=1)
        ones, twos = (replace(key, micro_batch_size=size) for size in (1, 2))
        return [
            at_batch(self._trace(ones, n), self._trace(twos, n), config.micro_batch_size)
            for n in (1, 2)
        ]

    def _state(self, config: StepConfig) -> StateMemory:
        model = replace(config.model, recompute="none")
        key = replace(config, model=model, micro_batch_size=1, num_micro_batches=1)
        if key not in self._states:
            self._states[key] = state_memory(key)
        return self._states[key]

    def estimate(self, config: StepConfig) -> Estimate:
        """Return memory and time of a configuration."""
        one, two = self._traces_of(config)
        return Estimate(
            config,
            self.hardware,
            step_time(config, self.hardware, one, two),
            step_memory(config, self._state(config), one, two),
        )

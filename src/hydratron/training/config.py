"""The settings of a run's processes and of its length, free of Lightning: a plan needs no more."""

from dataclasses import dataclass
from typing import Any

import torch

# bf16-true and fp8: weights of 16 bits with float32 masters, so Lightning has nothing to do
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "fp8")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the process grid.

    `interleave`: the halves of a micro-batch in turn, so that the communication of one runs beside
    the other's compute; without effect where the micro-batch does not divide by twice the
    tensor-parallel size.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    interleave: bool = False

    def __post_init__(self) -> None:
        for key in ("tensor_parallel_size", "data_parallel_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"parallel.{key} {getattr(self, key)} is not positive")

    @property
    def world_size(self) -> int:
        """Processes of the whole grid."""
        return self.tensor_parallel_size * self.data_parallel_size


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what and how often. `devices` is per node; None: what the layout needs.

    After `max_hours` a run saves a checkpoint and ends as `preempted`; None is no limit.
    `log_every`, `val_every` and `checkpoint_every` count optimizer steps and hold at the end too;
    of the last two 0 is only at the end.
    `log_layer_norms` adds each layer's gradient norm to the logged rows. `async_checkpoints` saves
    in a thread while training goes on. A run in which more than `max_skipped_steps` steps had a
    non-finite loss or gradient stops. `cuda_graphs` replays steps of our own networks where one
    replica computes them, in finetuning where one GPU does.

    Raises:
        ValueError: a value that cannot be, by name and rule.
    """

    accelerator: str
    max_steps: int
    max_hours: float | None = None
    devices: int | None = None
    num_nodes: int = 1
    precision: str = "32-true"
    log_every: int = 10
    log_layer_norms: bool = False
    val_every: int = 0
    checkpoint_every: int = 0
    compile: bool = False
    cuda_graphs: bool = False
    max_skipped_steps: int = 10
    async_checkpoints: bool = False

    def __post_init__(self) -> None:
        if self.accelerator not in ("cpu", "gpu"):
            raise ValueError(f"trainer.accelerator {self.accelerator!r} is not one of cpu, gpu")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision {self.precision!r} is not one of {', '.join(PRECISIONS)}"
            )
        if self.precision == "16-mixed" and self.accelerator == "cpu":
            raise ValueError("trainer.precision 16-mixed needs a GPU; on a CPU use bf16-mixed")
        for key in ("max_steps", "log_every", "num_nodes"):
            if getattr(self, key) < 1:
                raise ValueError(f"trainer.{key} {getattr(self, key)} is not positive")

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The type of the weights that the network computes with."""
        return torch.bfloat16 if self.precision in ("bf16-true", "fp8") else torch.float32

    @property
    def autocast_precision(self) -> Any:
        """What Lightning is told: it keeps out of weights that are bf16 already."""
        return self.precision if self.precision.endswith("mixed") else "32-true"

    def check_float32_weights(self, command: str) -> None:
        """Raise ValueError where `precision` has weights of 16 bits, and `command` has not."""
        if self.parameter_dtype != torch.float32:
            raise ValueError(
                f"trainer.precision {self.precision} is for pretraining: {command} runs in"
                " 32-true, bf16-mixed or 16-mixed"
            )

    def local_devices(self, world_size: int) -> int:
        """Return the processes of one node.

        Raises:
            ValueError: devices x num_nodes is not the world size that the layout needs.
        """
        devices = self.devices or max(1, world_size // self.num_nodes)
        if devices * self.num_nodes != world_size:
            raise ValueError(
                f"trainer.devices {devices} x trainer.num_nodes {self.num_nodes} is not"
                f" tensor_parallel_size x data_parallel_size = {world_size}"
            )
        return devices

"""The settings of a run's processes and of its length, free of Lightning: a plan needs no more."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from hydratron.settings import Count, GroupSize, Interval, Natural, check, one_of

# bf16-true and fp8: weights of 16 bits with float32 masters, so Lightning has nothing to do
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "fp8")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the process grid.

    `interleave`: the halves of a micro-batch in turn, so that the communication of one runs beside
    the other's compute; without effect where the micro-batch does not divide by twice the
    tensor-parallel size.
    """

    tensor_parallel_size: GroupSize = 1
    data_parallel_size: GroupSize = 1
    interleave: bool = False

    def __post_init__(self) -> None:
        check(self, "parallel")

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
    replica computes them, in finetuning where one GPU does; None: where there is a GPU.

    Raises:
        ValueError: a value that cannot be, by name and rule.
    """

    accelerator: Annotated[str, one_of("cpu", "gpu")]
    max_steps: Count
    max_hours: Annotated[float, Interval(0, 1e6, above=True)] | None = None
    devices: GroupSize | None = None
    num_nodes: GroupSize = 1
    precision: Annotated[str, one_of(*PRECISIONS)] = "32-true"
    log_every: Count = 10
    log_layer_norms: bool = False
    val_every: Natural = 0
    checkpoint_every: Natural = 0
    compile: bool = False
    cuda_graphs: bool | None = False
    max_skipped_steps: Natural = 10
    async_checkpoints: bool = False

    def __post_init__(self) -> None:
        check(self, "trainer")
        if self.cuda_graphs is None:
            object.__setattr__(self, "cuda_graphs", self.accelerator == "gpu")
        if self.accelerator == "cpu":
            if self.precision in ("16-mixed", "fp8"):
                raise ValueError(
                    f"trainer.precision {self.precision} needs a GPU; on a CPU use bf16-mixed"
                )
            if self.cuda_graphs:
                raise ValueError("trainer.cuda_graphs true needs a GPU: trainer=gpu")

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

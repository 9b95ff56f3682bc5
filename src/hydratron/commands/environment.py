"""Who made this process: torchrun, srun or we ourselves, as Lightning wants to be told."""

import os

import torch
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from hydratron.processes import RENDEZVOUS, is_external_launch
from hydratron.training.config import TrainerConfig


class RanksOfOneMachine(LightningEnvironment):
    """Processes that `processes.start_ranks` made: they meet in a file and listen on no network."""

    @property
    def init_method(self) -> str:
        """Where torch's process group finds its peers."""
        return f"file://{os.environ[RENDEZVOUS]}"


def cluster_environment() -> ClusterEnvironment:
    """Return Lightning's view of the processes that exist."""
    if RENDEZVOUS in os.environ:
        return RanksOfOneMachine()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return TorchElasticEnvironment()
    if is_external_launch():
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def check_devices(trainer: TrainerConfig, world_size: int) -> None:
    """Raise ValueError where this machine has fewer GPUs than a node of the job needs.

    Under srun or torchrun the launcher has given each process its own.
    """
    needed = trainer.local_devices(world_size)
    if trainer.accelerator == "gpu" and not is_external_launch():
        found = torch.cuda.device_count()
        if found < needed:
            raise ValueError(f"the job needs {needed} GPUs a node and this machine has {found}")

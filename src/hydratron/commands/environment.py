"""Who made this process: torchrun, srun or we ourselves, as Lightning wants to be told."""

import os

from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from hydratron.processes import RENDEZVOUS, is_external_launch


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

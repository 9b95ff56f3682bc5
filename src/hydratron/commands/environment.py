"""Who made this process: torchrun, srun or we ourselves, as Lightning wants to be told."""

import os

from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from hydratron.processes import is_external_launch


def cluster_environment() -> ClusterEnvironment:
    """Return Lightning's view of the processes that exist."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return TorchElasticEnvironment()
    if is_external_launch():
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()

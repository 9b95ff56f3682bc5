"""Pretraining as an objective: BERT's and GPT-2's networks, and their held-out losses."""

from typing import Any

import torch
from torch import Tensor

from hydratron.models.bert import BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.models.initialisation import initialize_parameters
from hydratron.parallel.mappings import all_reduce
from hydratron.parallel.mesh import ParallelMesh
from hydratron.training.module import TrainingModule, logged_name
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.strategy import TensorParallelStrategy

NETWORKS: dict[str, type[BertForPretraining] | type[Gpt2ForPretraining]] = {
    "bert": BertForPretraining,
    "gpt2": Gpt2ForPretraining,
}


def num_parameters(config: ModelConfig) -> int:
    """Count the parameters of the whole network, on no device."""
    with torch.device("meta"):
        network = NETWORKS[config.family](config)
    return sum(parameter.numel() for parameter in network.parameters())


class Pretraining:
    """BERT (masked LM + sentence order, unweighted sum) or GPT-2 (causal LM) from nothing."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    def build_network(
        self, mesh: ParallelMesh, *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> BertForPretraining | Gpt2ForPretraining:
        """Return the network, every parameter drawn from `seed`."""
        with torch.device("meta"):
            network = NETWORKS[self.model.family](self.model, mesh.tp_group)
        initialize_parameters(
            network, self.model, seed=seed, tp_group=mesh.tp_group, device=device, dtype=dtype
        )
        return network

    def start_validation(self, network: Any, device: torch.device) -> None:
        self.losses = network.losses
        shape = (len(self.losses), 2)  # sum and count of each loss
        self.totals = torch.zeros(shape, dtype=torch.float64, device=device)

    def validate_batch(self, network: Any, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        sums, counts = network(batch), network.loss_counts(batch)
        for row, key in zip(self.totals, self.losses, strict=True):
            row += torch.stack([sums[key].double(), counts[key].double()])

    def finish_validation(self, strategy: TensorParallelStrategy, step: int) -> dict[str, float]:
        """Return the mean losses of the held-out samples."""
        totals = self.totals
        if strategy.mesh.dp_group is not None:
            totals = all_reduce(totals, "sum", strategy.mesh.dp_group)
        means = (totals[:, 0] / totals[:, 1]).tolist()
        keys = [logged_name(key, "val", self.losses) for key in self.losses]
        return dict(zip(keys, means, strict=True))


class PretrainingModule(TrainingModule):
    """The module whose objective is pretraining `model`; the settings are TrainingModule's."""

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, **settings: Any) -> None:
        super().__init__(Pretraining(model), optimizer, **settings)
        self.model_config = model

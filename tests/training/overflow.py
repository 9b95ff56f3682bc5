"""An fp16 overflow on one rank alone; run as a module under torchrun it trains on real GPUs.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.training.overflow DIR
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback

from tests.pretraining import Job


class Overflow(Callback):
    """Puts an infinity into one gradient of one rank at one step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step
        self.scales: list[float] = []
        self.weights: list[torch.Tensor] = []

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if dist.get_rank() == self.rank and trainer.global_step == self.step:
            weight = module.network.encoder.transformer.layers[0].mlp.input.weight
            weight.grad[0, 0] = float("inf")

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.scales.append(trainer.strategy.precision_plugin.scaler.get_scale())
        weight = module.network.encoder.transformer.layers[0].mlp.input.weight
        self.weights.append(weight.detach().clone())


def train_on_gpus(directory: Path) -> None:
    """Train at TP 2; each rank leaves its scales and weights in `directory`."""
    rank = int(os.environ["RANK"])
    overflow = Overflow(rank=1, step=2)
    settings = {"accelerator": "gpu", "precision": "16-mixed"}
    trainer, module, data, _ = Job(directory / "run", tp=2, trainer=settings).build([overflow])
    trainer.strategy.precision_plugin.scaler = torch.amp.GradScaler(init_scale=256.0)
    trainer.fit(module, datamodule=data)
    found = {"scales": overflow.scales, "weights": [w.cpu() for w in overflow.weights]}
    torch.save(found, directory / f"rank-{rank}.pt")


if __name__ == "__main__":
    train_on_gpus(Path(sys.argv[1]))

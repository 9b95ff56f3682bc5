"""Which ranks draw which dropout masks when the pretraining module seeds them.

Hidden dropout acts on a rank's own tokens, attention dropout on its own heads: had two ranks the
same stream, they would drop the same of both.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from hydratron.models.transformer import Attention
from tests.distributed import run_distributed
from tests.parallel.twins import tiny_config
from tests.parity.trainer_runs import Run, train


class Observer(Callback):
    """Keeps every hidden dropout mask, and the attention outputs before they are mixed.

    All heads are given the same weights: without dropout, or with the same dropout, every rank has
    the same attention outputs.
    """

    def __init__(self) -> None:
        self.masks: list[Tensor] = []
        self.contexts: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = pl_module.network
        assert isinstance(network, nn.Module)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(self.keep_mask)
            if isinstance(module, Attention):
                with torch.no_grad():
                    weight = module.qkv.weight.view(3, module.num_local_heads, -1, 16)
                    weight.copy_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
                module.output.register_forward_pre_hook(self.keep_context)

    def keep_mask(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        assert (args[0] != 0).all()
        self.masks.append(output == 0)

    def keep_context(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.contexts.append(args[0].detach())


def observe(
    rank: int, world_size: int, tensor_parallel_size: int, attention_dropout: float
) -> tuple[list[Tensor], list[Tensor], Any]:
    config = tiny_config(
        hidden_dropout=0.5, attention_dropout=attention_dropout, layernorm="pre", init_std=0.5
    )
    observer = Observer()
    rows = train(
        rank,
        Run(config, torch.float64, steps=1, accumulation=2),
        tensor_parallel_size,
        world_size // tensor_parallel_size,
        callbacks=[observer],
    )
    return observer.masks, observer.contexts, rows


def test_no_two_ranks_of_the_grid_drop_the_same_hidden_values(tmp_path: Path) -> None:
    ranks = run_distributed(observe, 4, tmp_path, 2, 0.0)
    for (masks, _, rows), (other_masks, _, _) in combinations(ranks, 2):
        # two micro-batches, each with the embeddings and two dropouts in each of two layers
        assert len(masks) == len(other_masks) == 2 * (1 + 2 * 2)
        for mask, other in zip(masks, other_masks, strict=True):
            # independent fair coins agree in half of at least 112 places, 6 sigma: 0.22 to 0.78
            assert mask.numel() >= 112
            assert 0.2 < (mask == other).double().mean() < 0.8
            assert 0.2 < mask.double().mean() < 0.8
        for mask, later in zip(masks, masks[1:], strict=False):
            assert not torch.equal(mask, later), "a mask came twice"
        assert rows[0]["train/loss"] > 0


def test_peers_drop_different_attention_in_their_heads(tmp_path: Path) -> None:
    _, (contexts, others) = zip(
        *[
            (masks, contexts)
            for masks, contexts, _ in run_distributed(observe, 2, tmp_path, 2, 0.0)
        ],
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in zip(contexts, others, strict=True)), "equal heads"
    _, (contexts, others) = zip(
        *[
            (masks, contexts)
            for masks, contexts, _ in run_distributed(observe, 2, tmp_path, 2, 0.5)
        ],
        strict=True,
    )
    assert len(contexts) == 4
    for a, b in zip(contexts, others, strict=True):
        assert ((a - b).abs() > 1e-6).any(-1).double().mean() > 0.5

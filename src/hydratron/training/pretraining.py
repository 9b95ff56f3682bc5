"""The Lightning module of pretraining: one training step is one optimizer step.

A batch holds this data-parallel rank's whole share of the global batch; the step cuts it into
micro-batches. Losses are sums divided by the counts of the global batch, so the result does not
depend on how the batch is spread over ranks and micro-batches.
"""

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from hydratron.models.bert import BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.models.initialisation import initialize_parameters
from hydratron.parallel.grad_norm import clip_grad_norm, squared_gradient_norms
from hydratron.parallel.mappings import all_reduce
from hydratron.parallel.mesh import ParallelMesh
from hydratron.parallel.placement import reduce_partial_gradients
from hydratron.training.optimisation import OptimizerConfig, build_optimizer, skip_if_not_finite
from hydratron.training.strategy import TensorParallelStrategy

NETWORKS: dict[str, type[BertForPretraining] | type[Gpt2ForPretraining]] = {
    "bert": BertForPretraining,
    "gpt2": Gpt2ForPretraining,
}


class NonFiniteLossError(RuntimeError):
    """Too many steps were skipped because their loss or gradient was NaN or Inf."""


def logged_name(loss: str, split: str) -> str:
    """Return the key of a loss; the language-model loss, the one papers print, is `split/loss`."""
    return f"{split}/loss" if loss == "lm" else f"{split}/{loss}_loss"


def num_parameters(config: ModelConfig) -> int:
    """Count the parameters of the whole network, on no device."""
    with torch.device("meta"):
        network = NETWORKS[config.family](config)
    return sum(parameter.numel() for parameter in network.parameters())


class PretrainingModule(LightningModule):
    """BERT (masked LM + sentence order, unweighted sum) or GPT-2 (causal LM).

    Args:
        model: the network's shape.
        optimizer: AdamW and schedule.
        max_steps: optimizer steps of the whole run.
        seed: of parameters and dropout.
        micro_batch_size: sequences a forward pass takes.
        log_every: steps between logged rows; only there does the host wait for the device.
        max_skipped_steps: skipped non-finite steps after which the run stops.
        dtype: of the parameters.
        compile: compile the network's forward pass.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        max_steps: int,
        seed: int,
        micro_batch_size: int,
        log_every: int,
        max_skipped_steps: int = 10,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model_config, self.optimizer_config = model, optimizer
        self.max_steps, self.seed = max_steps, seed
        self.micro_batch_size, self.log_every = micro_batch_size, log_every
        self.max_skipped_steps = max_skipped_steps
        self.parameter_dtype, self.compile_network = dtype, compile
        self.last_metrics: dict[str, float] = {}
        self.validated_step = -1
        self.network: BertForPretraining | Gpt2ForPretraining | None = None

    @property
    def strategy(self) -> TensorParallelStrategy:
        """The strategy, typed."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, TensorParallelStrategy)
        return strategy

    @property
    def mesh(self) -> ParallelMesh:
        """This process's place in the grid."""
        return self.strategy.mesh

    def configure_model(self) -> None:
        """Build this rank's shards directly on its device."""
        if self.network is not None:
            return
        with torch.device("meta"):
            network = NETWORKS[self.model_config.family](self.model_config, self.mesh.tp_group)
        device = self.strategy.root_device
        initialize_parameters(
            network,
            self.model_config,
            seed=self.seed,
            tp_group=self.mesh.tp_group,
            device=device,
            dtype=self.parameter_dtype,
        )
        if self.compile_network:
            network.compile()
        self.network = network
        # dropout outside replicated compute acts on this rank's heads and tokens: a stream a rank
        torch.manual_seed(self.seed * 1_000_003 + self.strategy.global_rank)
        self.skipped_steps = torch.zeros((), device=device)

    def configure_optimizers(self) -> Any:
        assert self.network is not None
        optimizer, schedule = build_optimizer(
            self.network, self.optimizer_config, max_steps=self.max_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the summed losses of the global batch are divided by, added over the data axis."""
        assert self.network is not None
        counts = self.network.loss_counts(batch)
        total = torch.stack(list(counts.values()))
        if self.mesh.dp_group is not None:
            total = all_reduce(total, "sum", self.mesh.dp_group)
        return dict(zip(counts, total.clamp(min=1).unbind(), strict=True))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Forward and backward over the micro-batches, then one optimizer step."""
        counts = self._counts(batch)
        micro_batches = [
            dict(zip(batch, parts, strict=True))
            for parts in zip(*(x.split(self.micro_batch_size) for x in batch.values()), strict=True)
        ]
        totals: dict[str, Tensor] = {}
        for micro_batch in micro_batches[:-1]:
            with self.strategy.block_backward_sync():
                self._accumulate(micro_batch, counts, totals)
        self._accumulate(micro_batches[-1], counts, totals)
        self._optimizer_step(totals, num_tokens=batch["input_ids"].numel())

    def _accumulate(
        self, micro_batch: dict[str, Tensor], counts: dict[str, Tensor], totals: dict[str, Tensor]
    ) -> None:
        sums = self.strategy.replica(micro_batch)
        losses = {key: value / counts[key] for key, value in sums.items()}
        # DDP divides the summed gradients by dp; the counts already are the global batch's
        self.manual_backward(
            torch.stack(list(losses.values())).sum() * self.mesh.data_parallel_size
        )
        for key, value in losses.items():
            totals[key] = totals.get(key, 0.0) + value.detach()

    def _optimizer_step(self, totals: dict[str, Tensor], *, num_tokens: int) -> None:
        assert self.network is not None
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        reduce_partial_gradients(self.network, self.mesh.tp_group)
        scaler = getattr(self.strategy.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)  # pyright: ignore
        squares = squared_gradient_norms(self.network, self.mesh.tp_group)
        norm = clip_grad_norm(self.network, squares, max_norm=self.optimizer_config.clip)
        if scaler is None:
            self.skipped_steps += skip_if_not_finite(optimizer.optimizer, norm)  # pyright: ignore
        else:  # an overflow is the scaler's to skip and nothing to count; a bad loss is
            self.skipped_steps += (~torch.stack(list(totals.values())).isfinite()).any()
        learning_rate = optimizer.param_groups[0]["lr"]  # pyright: ignore
        optimizer.step()  # pyright: ignore
        optimizer.zero_grad()  # pyright: ignore
        schedule.step()  # pyright: ignore
        if self.trainer.global_step % self.log_every == 0:
            self._log_step(totals, {"train/grad_norm": norm, "train/learning_rate": learning_rate})

    def _log_step(self, totals: dict[str, Tensor], metrics: dict[str, Any]) -> None:
        if self.mesh.dp_group is not None:
            summed = all_reduce(torch.stack(list(totals.values())), "sum", self.mesh.dp_group)
            totals = dict(zip(totals, summed.unbind(), strict=True))
        metrics = {logged_name(key, "train"): value for key, value in totals.items()} | metrics
        skipped = int(self.skipped_steps)
        self.record({key: float(value) for key, value in metrics.items()})
        if skipped > self.max_skipped_steps:
            raise NonFiniteLossError(
                f"{skipped} steps up to step {self.trainer.global_step} were skipped because loss"
                f" or gradient was not finite (limit {self.max_skipped_steps})"
            )

    def record(self, metrics: dict[str, float]) -> None:
        """Send metrics of the current optimizer step to every logger and to the progress bar."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)
        self.last_metrics |= metrics

    def on_validation_epoch_start(self) -> None:
        assert self.network is not None
        shape = (len(self.network.losses), 2)  # sum and count of each loss
        device = self.strategy.root_device
        self.validation_totals = torch.zeros(shape, dtype=torch.float64, device=device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert self.network is not None
        sums, counts = self.network(batch), self.network.loss_counts(batch)
        for row, key in zip(self.validation_totals, self.network.losses, strict=True):
            row += torch.stack([sums[key].double(), counts[key].double()])

    def on_validation_epoch_end(self) -> None:
        """Each held-out sample counts once, whatever the layout."""
        assert self.network is not None
        totals = self.validation_totals
        if self.mesh.dp_group is not None:
            totals = all_reduce(totals, "sum", self.mesh.dp_group)
        means = (totals[:, 0] / totals[:, 1]).tolist()
        keys = [logged_name(key, "val") for key in self.network.losses]
        self.record(dict(zip(keys, means, strict=True)))
        self.validated_step = self.trainer.global_step

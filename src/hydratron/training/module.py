"""The Lightning module: one training step is one optimizer step, whatever is learnt.

A batch holds this data-parallel rank's whole share of the global batch; the step cuts it into
micro-batches. Losses are sums divided by the counts of the global batch, so the result does not
depend on how the batch is spread over ranks and micro-batches.
"""

from typing import Any, Protocol

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from hydratron.models.interleaving import COMPILE_OPTIONS
from hydratron.models.transformer import interleave_halves
from hydratron.parallel.fp8 import use_fp8
from hydratron.parallel.grad_norm import (
    layer_gradient_norms,
    squared_gradient_norms,
)
from hydratron.parallel.mappings import all_reduce
from hydratron.parallel.mesh import ParallelMesh
from hydratron.parallel.placement import reduce_partial_gradients
from hydratron.training.metrics import MetricsFile
from hydratron.training.optimisation import (
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    restart_schedule,
    skip_if_not_finite,
)
from hydratron.training.step_graphs import StepGraphs
from hydratron.training.strategy import TensorParallelStrategy


class NonFiniteLossError(RuntimeError):
    """Too many steps were skipped because their loss or gradient was NaN or Inf."""


class Objective(Protocol):
    """What is learnt: a network that gives its losses, and what validation says of it.

    The network's `forward(batch)` returns summed losses by name, `loss_counts(batch)` what they are
    divided by, `losses` the names, the one that papers print first.
    """

    def build_network(
        self, mesh: ParallelMesh, *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        """Return the network with this rank's shards on `device`; every rank calls it."""
        ...

    def start_validation(self, network: Any, device: torch.device) -> None:
        """Forget what earlier validations gathered."""
        ...

    def validate_batch(self, network: Any, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        """Take in one batch of this data-parallel rank."""
        ...

    def finish_validation(self, strategy: TensorParallelStrategy, step: int) -> dict[str, float]:
        """Return the metrics by their logged names, the same on every rank; every rank calls it."""
        ...


def logged_name(loss: str, split: str, losses: tuple[str, ...]) -> str:
    """Return the key of a loss; the first one, which papers print, is `split/loss`."""
    return f"{split}/loss" if loss == losses[0] else f"{split}/{loss}_loss"


class TrainingModule(LightningModule):
    """Micro-batches, one optimizer step, logging and skipping, for any objective.

    Args:
        objective: the network and its validation.
        optimizer: AdamW and schedule.
        max_steps: optimizer steps of the whole run.
        seed: of parameters and dropout.
        micro_batch_size: examples a forward pass takes.
        log_every: steps between logged rows, the last step has one too; only there does the host
            wait for the device.
        log_layer_norms: log the gradient norm of each Transformer layer too, before clipping.
        max_skipped_steps: skipped non-finite steps after which the run stops.
        dtype: of the parameters.
        compile: compile the network's forward pass.
        fp8: matrix products inside the Transformer in 8 bits.
        interleave: hide tensor-parallel communication behind the other half of the micro-batch.
        cuda_graphs: replay whole steps as CUDA graphs, collectives with them, where one replica
            computes them on GPUs without a loss scaler; the network must not wait for the device.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: OptimizerConfig,
        *,
        max_steps: int,
        seed: int,
        micro_batch_size: int,
        log_every: int,
        log_layer_norms: bool = False,
        max_skipped_steps: int = 10,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        fp8: bool = False,
        interleave: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective, self.optimizer_config = objective, optimizer
        self.max_steps, self.seed = max_steps, seed
        self.micro_batch_size, self.log_every = micro_batch_size, log_every
        self.log_layer_norms = log_layer_norms
        self.max_skipped_steps = max_skipped_steps
        self.parameter_dtype, self.compile_network = dtype, compile
        self.fp8, self.interleave = fp8, interleave
        self.cuda_graphs = cuda_graphs
        self.graphs: StepGraphs | None = None
        self.last_metrics: dict[str, float] = {}
        self.validated_step = -1
        self.network: Any = None

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
        device = self.strategy.root_device
        network = self.objective.build_network(
            self.mesh, seed=self.seed, device=device, dtype=self.parameter_dtype
        )
        if self.fp8:
            use_fp8(network)
        if self.interleave:
            interleave_halves(network)
        if self.compile_network:
            network.compile(options=COMPILE_OPTIONS if self.interleave else None)
        self.network = network
        # dropout outside replicated compute acts on this rank's heads and tokens: a stream a rank
        torch.manual_seed(self.seed * 1_000_003 + self.strategy.global_rank)
        self.skipped_steps = torch.zeros((), device=device)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = build_optimizer(
            self.network,
            self.optimizer_config,
            max_steps=self.max_steps,
            dp_group=self.mesh.dp_group,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the summed losses of the global batch are divided by, added over the data axis."""
        counts = self.network.loss_counts(batch)
        total = torch.stack(list(counts.values()))
        if self.mesh.dp_group is not None:
            total = all_reduce(total, "sum", self.mesh.dp_group)
        return dict(zip(counts, total.clamp(min=1).unbind(), strict=True))

    def micro_batches(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Cut a rank's share of the global batch into what one forward pass takes."""
        parts = zip(*(x.split(self.micro_batch_size) for x in batch.values()), strict=True)
        return [dict(zip(batch, part, strict=True)) for part in parts]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save as if between two steps: Lightning has counted the next batch as ready already, and
        a run that goes on from there would validate a step early.
        """
        for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
            if isinstance(counts, dict):
                counts["ready"] = counts["completed"]

    def on_train_start(self) -> None:
        for logger in self.loggers:
            if isinstance(logger, MetricsFile) and (step := self.trainer.global_step):
                logger.continue_after(step)
                found = (logger.last_values(), logger.is_validated(step))
                self.last_metrics, is_validated = self.strategy.broadcast(found)
                self.validated_step = step if is_validated else -1
        restart_schedule(
            self.optimizers().optimizer,  # pyright: ignore
            self.lr_schedulers(),  # pyright: ignore
            lr=self.optimizer_config.lr,
        )
        # DDP's buckets are launched from hooks, and a loss scaler asks the device for its overflow
        is_one_replica = self.strategy.root_device.type == "cuda" and self.mesh.dp_group is None
        if self.cuda_graphs and is_one_replica and self._scaler is None:
            found = [getattr(module, "generator", None) for module in self.network.modules()]
            self.graphs = StepGraphs(
                self._gradients,
                self.optimizers().optimizer,  # pyright: ignore
                [generator for generator in found if generator is not None],
            )

    def on_train_end(self) -> None:
        self.graphs = None  # with the memory they hold

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimizer step."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        learning_rate = optimizer.param_groups[0]["lr"]  # pyright: ignore
        if self.graphs is None:
            totals, norm, squares = self._gradients(batch)
            optimizer.step()  # pyright: ignore
            optimizer.zero_grad()  # pyright: ignore
        else:
            totals, norm, squares = self.graphs(batch)
            optimizer.step(updated=True)  # pyright: ignore
        schedule.step()  # pyright: ignore
        if self.is_logged(self.trainer.global_step):
            layers = layer_gradient_norms(squares) if self.log_layer_norms else {}
            metrics = {f"train/grad_norm/{name}": layer for name, layer in layers.items()}
            metrics |= {"train/grad_norm": norm, "train/learning_rate": learning_rate}
            self._log_step(totals, metrics)

    @property
    def _scaler(self) -> Any:
        return getattr(self.strategy.precision_plugin, "scaler", None)

    def _gradients(
        self, batch: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Forward and backward over the micro-batches, and clipping.

        Returns the losses, the norm before clipping and its squared parts by parameter.
        """
        counts = self._counts(batch)
        micro_batches = self.micro_batches(batch)
        totals: dict[str, Tensor] = {}
        for micro_batch in micro_batches[:-1]:
            with self.strategy.block_backward_sync():
                self._accumulate(micro_batch, counts, totals)
        self._accumulate(micro_batches[-1], counts, totals)
        optimizer, scaler = self.optimizers(), self._scaler
        reduce_partial_gradients(self.network, self.mesh.tp_group)
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)  # pyright: ignore
        squares = squared_gradient_norms(self.network, self.mesh.tp_group)
        norm = clip_gradients(
            self.network,
            optimizer.optimizer,  # pyright: ignore
            squares,
            max_norm=self.optimizer_config.clip,
        )
        if scaler is None:
            self.skipped_steps += skip_if_not_finite(optimizer.optimizer, norm)  # pyright: ignore
        else:  # an overflow is the scaler's to skip and nothing to count; a bad loss is
            self.skipped_steps += (~torch.stack(list(totals.values())).isfinite()).any()
        return totals, norm, squares

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

    def is_logged(self, step: int) -> bool:
        """Whether the losses of an optimizer step are logged."""
        return step % self.log_every == 0 or step == self.max_steps

    def _log_step(self, totals: dict[str, Tensor], metrics: dict[str, Any]) -> None:
        if self.mesh.dp_group is not None:
            summed = all_reduce(torch.stack(list(totals.values())), "sum", self.mesh.dp_group)
            totals = dict(zip(totals, summed.unbind(), strict=True))
        names = self.network.losses
        metrics = {logged_name(k, "train", names): value for k, value in totals.items()} | metrics
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
        self.objective.start_validation(self.network, self.strategy.root_device)

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.objective.validate_batch(self.network, batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Each held-out example counts once, whatever the layout."""
        step = self.trainer.global_step
        self.record(self.objective.finish_validation(self.strategy, step))
        self.validated_step = step

"""The Lightning strategy for tensor-parallel x data-parallel process groups.

Subclasses ParallelStrategy, not DDPStrategy: that one broadcasts rank 0's weights to the world
whenever it does not fit, which overwrites tensor-parallel shards. Processes are created outside;
the strategy never launches any.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning_fabric.utilities.rank_zero as fabric_rank_zero
import pytorch_lightning.utilities.rank_zero as lightning_rank_zero
import torch
import torch.distributed as dist
from lightning_fabric.utilities.distributed import _init_dist_connection
from pytorch_lightning import Trainer
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hydratron.checkpoint import sharded
from hydratron.checkpoint.manifest import (
    CheckpointError,
    DamagedCheckpointError,
    report_damage,
    step_directories,
)
from hydratron.parallel.grad_scaler import SharedGradScaler
from hydratron.parallel.mesh import ParallelMesh, build_mesh

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_MEAN = ("mean", "avg")


class TensorParallelStrategy(ParallelStrategy):
    """Tensor-parallel peers innermost, data-parallel replicas around them.

    The Lightning module must offer `network`, an nn.Module built for `self.mesh.tp_group`.
    """

    strategy_name = "tensor_parallel"

    def __init__(
        self,
        *,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        save_in_background: bool = False,
    ) -> None:
        super().__init__()
        self.save_in_background = save_in_background
        self._saving_group: dist.ProcessGroup | None = None
        self._pending: sharded.PendingSave | None = None
        self.tensor_parallel_size = tensor_parallel_size
        self.data_parallel_size = data_parallel_size
        self.num_nodes = 1
        self.mesh = ParallelMesh()
        self._replica: nn.Module | None = None

    # Lightning has a fixed list of distributed strategies; without this, sync_dist is off.
    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices or [])

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.mesh.data_parallel_size, "rank": self.mesh.dp_rank}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def set_world_ranks(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        environment.set_world_size(self.num_nodes * self.num_processes)
        for module in (fabric_rank_zero, lightning_rank_zero):
            module.rank_zero_only.rank = self.global_rank  # pyright: ignore[reportFunctionMemberAccess]

    def _configure_launcher(self) -> None:
        self._launcher = None

    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.cluster_environment is not None
        if self.world_size > 1:
            is_cuda = self.root_device.type == "cuda"
            # gloo beside NCCL: objects and background saves travel without touching the GPU
            _init_dist_connection(
                self.cluster_environment,
                "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
                timeout=COLLECTIVE_TIMEOUT,
                init_method=getattr(self.cluster_environment, "init_method", None),
                device_id=self.root_device if is_cuda else None,
            )
            if self.save_in_background:
                # a thread must not share a group with the collectives of training
                group = dist.new_group(backend="gloo")
                assert isinstance(group, dist.ProcessGroup)
                self._saving_group = group
        self.mesh = build_mesh(
            self.root_device.type,
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
        )

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        # Lightning 2.6.6 broadcasts a SIGTERM flag and reads it back on the host at every batch.
        # Stopping is agreed by callbacks.StopOnRequest, which never waits for the GPU.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            if self.mesh.dp_group is not None:
                self._replica = DistributedDataParallel(
                    self.network,
                    process_group=self.mesh.dp_group,
                    gradient_as_bucket_view=True,
                )
            self.setup_optimizers(trainer)
            self._share_overflow_decision()
        self.setup_precision_plugin()

    def _share_overflow_decision(self) -> None:
        """Let an fp16 overflow on one rank skip the step on all; GradScaler asks no peer."""
        plugin = self.precision_plugin
        if self.world_size > 1 and isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            scaler = SharedGradScaler(self.root_device.type)
            scaler.load_state_dict(plugin.scaler.state_dict())
            plugin.scaler = scaler

    @property
    def network(self) -> nn.Module:
        """The bare network of the Lightning module, this rank's shards."""
        assert self.lightning_module is not None
        network = self.lightning_module.network
        assert isinstance(network, nn.Module)
        return network

    @property
    def replica(self) -> nn.Module:
        """What a training step calls: the network, with gradient averaging over dp when dp > 1."""
        return self._replica or self.network

    def block_backward_sync(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Hold back the averaging over dp for all but the last micro-batch of a step."""
        replica = self._replica
        return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()

    def optimizer_step(
        self,
        optimizer: Any,
        closure: Any,
        model: Any = None,
        *,
        updated: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Update the parameters, unless a replayed graph has: the step then only counts."""
        return None if updated else super().optimizer_step(optimizer, closure, model, **kwargs)

    def model_to_device(self) -> None:
        """Bring the parameters back: Lightning's teardown after `fit` moves them to the CPU."""
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)

    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: Any = "mean"
    ) -> Tensor | Any:
        """Reduce a metric over the data axis: tensor-parallel peers hold the same samples."""
        group = group or self.mesh.dp_group
        if group is None or not isinstance(tensor, Tensor):
            return tensor
        is_mean = isinstance(reduce_op, str) and reduce_op.lower() in _MEAN
        tensor = tensor.clone()
        operation = dist.ReduceOp.SUM if is_mean or isinstance(reduce_op, str) else reduce_op
        dist.all_reduce(tensor, op=operation, group=group)
        return tensor / group.size() if is_mean else tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Agree over the world; the inherited one counts a data-axis sum against the world."""
        if self.world_size == 1:
            return decision
        flag = torch.tensor(int(decision))
        if "cpu" not in str(dist.get_backend_config()):
            flag = flag.to(self.root_device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(flag)

    def all_gather(
        self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False
    ) -> Tensor:
        """Gather over the data axis by default: [...] to [dp, ...]."""
        group = group or self.mesh.dp_group
        if group is None:
            return tensor.unsqueeze(0)
        return super().all_gather(tensor, group=group, sync_grads=sync_grads)

    def barrier(self, name: str | None = None) -> None:
        if self.world_size > 1 and dist.is_initialized():
            if self.root_device.type == "cuda":
                dist.barrier(device_ids=[self.root_device.index])
            else:
                dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.world_size == 1:
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `save_checkpoint` takes the tensors from the network itself, without a copy."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a sharded checkpoint directory; every rank must call it.

        With `save_in_background` it has its name only after `finish_saving`.
        """
        self.finish_saving()
        background = sharded.BackgroundSaving(self._saving_group)
        self._pending = sharded.save_checkpoint(
            Path(self.broadcast(str(filepath))),
            network=self.network,
            optimizers=self.optimizers,
            mesh=self.mesh,
            loop_state={key: value for key, value in checkpoint.items() if key != "run"},
            run=checkpoint.get("run"),
            background=background if self.save_in_background else None,
        )

    def finish_saving(self, *, wait: bool = True) -> Path | None:
        """Complete the background save, if there is one and (unless `wait`) it has ended.

        Returns the finished checkpoint's directory. A save that failed raises here.
        """
        if self._pending is None or not (wait or self._pending.is_done()):
            return None
        pending, self._pending = self._pending, None
        pending.finish()
        return pending.directory

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Fill network and optimizer in place from any layout; return the loops' state.

        Where the checkpoint is damaged, the newest undamaged one before it is taken.

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        path = Path(checkpoint_path)
        steps = step_directories(path.parent)
        for candidate in steps[steps.index(path) :] if path in steps else [path]:
            try:
                return sharded.load_checkpoint(
                    candidate,
                    network=self.network,
                    optimizers=self.optimizers if fitting else [],
                    mesh=self.mesh,
                )
            except DamagedCheckpointError as error:
                if self.is_global_zero:
                    report_damage(error)
        raise CheckpointError(f"{path.parent} holds no undamaged checkpoint")

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` did it in place."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` did it in place."""

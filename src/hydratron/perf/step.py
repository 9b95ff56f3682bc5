"""What is run in one training step of a configuration, and its traces at a few layers.

A Transformer's step is affine in its number of layers, so two short traces tell every depth.
Letters: B micro-batch, S sequence, M predicted positions of a sequence.
"""

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from hydratron.models.bert import BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.parallel.grad_norm import clip_grad_norm, squared_gradient_norms
from hydratron.parallel.mesh import ParallelMesh, ProcessGroup
from hydratron.parallel.placement import parameter_placements, reduce_partial_gradients
from hydratron.parallel.zero import ShardedAdamW
from hydratron.perf.recorder import DeviceKernels, Recorder, StepTrace, pretended_mesh

NETWORKS = {"bert": BertForPretraining, "gpt2": Gpt2ForPretraining}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
BUCKET_BYTES = 25 * 2**20  # DDP's default


@dataclass(frozen=True)
class StepConfig:
    """One rank's optimizer step.

    `seq_len` S and `num_predictions` M are of a sequence, `micro_batch_size` B of a forward pass,
    `num_micro_batches` of a rank's step. `masked`: the batch carries an attention mask, as BERT's
    does. `compiled`: elementwise work is fused, as torch.compile does. Two facts describe code
    other than ours, for comparisons: `fused_attention` False keeps the S x S scores in memory, and
    `sequence_parallel` False repeats on every tensor-parallel peer what lies between its regions.

    Raises:
        ValueError: a size that does not divide, by name and rule.
    """

    model: ModelConfig
    seq_len: int
    num_predictions: int
    micro_batch_size: int
    num_micro_batches: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    precision: str = "bf16-mixed"
    shard_optimizer: bool = False
    clip: bool = True
    compiled: bool = True
    masked: bool = True
    fused_attention: bool = True
    sequence_parallel: bool = True

    def __post_init__(self) -> None:
        self.model.check_tensor_parallel(self.tensor_parallel_size)
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"trainer.precision {self.precision!r} is not one of {known}")

    @property
    def world_size(self) -> int:
        """Processes of the whole grid."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step, over all ranks."""
        return self.micro_batch_size * self.num_micro_batches * self.data_parallel_size

    @property
    def parameter_dtype(self) -> torch.dtype:
        """What the network's weights are kept in."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32


def build_network(config: StepConfig, tp_group: ProcessGroup | None, num_layers: int) -> nn.Module:
    """Build this rank's part of the network, with `num_layers` layers, on the default device."""
    model = replace(config.model, num_layers=num_layers)
    default = torch.get_default_dtype()
    torch.set_default_dtype(config.parameter_dtype)  # fake parameters cannot be converted
    try:
        return NETWORKS[model.family](model, tp_group)
    finally:
        torch.set_default_dtype(default)


def fake_batch(config: StepConfig) -> dict[str, Tensor]:
    """Return the tensors of one micro-batch, as the data module gives them."""
    batch_size, seq_len = config.micro_batch_size, config.seq_len

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long)

    if config.model.family == "gpt2":
        return {"input_ids": ids(batch_size, seq_len), "labels": ids(batch_size, seq_len)}
    batch = {
        "input_ids": ids(batch_size, seq_len),
        "token_type_ids": ids(batch_size, seq_len),
        "masked_positions": ids(batch_size, config.num_predictions),
        "masked_labels": ids(batch_size, config.num_predictions),
        "sentence_order": ids(batch_size),
    }
    if config.masked:
        batch["attention_mask"] = torch.ones(batch_size, seq_len, dtype=torch.bool)
    return batch


class _Passes:
    """A network about to be traced: DDP's buckets around it, and hooks that tell the trace when
    gradients are complete and when the first layer's backward pass starts.
    """

    def __init__(self, network: Any, config: StepConfig, mesh: ParallelMesh, recorder: Recorder):
        self.network, self.recorder = network, recorder
        self.ready: list[nn.Parameter] = []  # in the order of their gradients
        transformer = network.encoder.transformer if config.model.family == "bert" else None
        layers = (transformer or network.transformer).layers
        self.top = set(layers[-1].parameters())
        layers[0].register_forward_hook(self._watch)
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(self._complete)
        self.replica = network
        if mesh.dp_group is not None:
            self.replica = DistributedDataParallel(
                network, process_group=mesh.dp_group, gradient_as_bucket_view=True, init_sync=False
            )
            self.replica.register_comm_hook(None, self._average)

    def _watch(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self.recorder.phase == "forward":  # not where it is computed again
            output.register_hook(self._start)

    def _start(self, _gradient: Tensor) -> None:
        self.recorder.trace.bottom_layer_started = len(self.recorder.trace.operators)

    def _complete(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        trace = self.recorder.trace
        self.ready.append(parameter)
        if self.replica is self.network:
            memory = parameter.grad.untyped_storage()
            trace.gradients[self.recorder.storage(parameter.grad)] = memory.nbytes()
        if parameter in self.top:
            trace.top_layer_done = len(trace.operators)

    def _average(self, _state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Write down the all-reduces of DDP's buckets, and do none.

        In its first step DDP has one bucket of everything; from the second on it cuts them in the
        order in which gradients came.
        """
        buffer = bucket.buffer()
        late = [p for p in reversed(list(self.network.parameters())) if p not in set(self.ready)]
        parameters = [*self.ready, *late]
        limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, BUCKET_BYTES]
        indices, _ = dist._compute_bucket_assignment_by_size(parameters, limits)
        for numbers in indices:
            size = sum(parameters[n].numel() for n in numbers) * buffer.element_size()
            self.recorder.add(
                "ddp_bucket", "collective", [buffer], [buffer],
                collective="all_reduce", axis="dp", num_bytes=size,
            )  # fmt: skip
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done


def trace_passes(config: StepConfig, num_layers: int, *, rank: int = 0) -> StepTrace:
    """Trace one micro-batch's forward and backward pass, gradients averaged at its end."""
    with ExitStack() as stack:
        mesh = stack.enter_context(
            pretended_mesh(config.tensor_parallel_size, config.data_parallel_size, rank=rank)
        )
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        batch = fake_batch(config)
        tokens = config.micro_batch_size * config.seq_len // config.tensor_parallel_size
        recorder = Recorder(mesh, repeated_tokens=0 if config.sequence_parallel else tokens)
        network = build_network(config, mesh.tp_group, num_layers)
        passes = _Passes(network, config, mesh, recorder)
        stack.enter_context(DeviceKernels(recorder, fused_attention=config.fused_attention))
        stack.enter_context(recorder)
        is_mixed = config.precision.endswith("-mixed")
        with torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext():
            losses = passes.replica(batch)
            loss = torch.stack(list(losses.values())).sum()
        recorder.phase = "backward"
        # the public backward would suspend the function mode, which recomputation needs
        _engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (),
            allow_unreachable=True, accumulate_grad=True,
        )  # fmt: skip
    return recorder.trace


def _optimizer(network: nn.Module, config: StepConfig, mesh: ParallelMesh) -> AdamW:
    parameters = list(network.parameters())
    shard_over = mesh.dp_group if config.shard_optimizer else None
    if shard_over is None and config.parameter_dtype.itemsize == 4:
        return AdamW(parameters, lr=1e-4, fused=True)
    by_name = parameter_placements(network)
    placements = {p: by_name[name] for name, p in network.named_parameters()}
    groups = [{"params": parameters}]
    return ShardedAdamW(groups, placements=placements, dp_group=shard_over, lr=1e-4, fused=True)


def trace_update(config: StepConfig, num_layers: int, *, rank: int = 0) -> StepTrace:
    """Trace what follows the last backward pass: partial gradients, norm, clipping, AdamW."""
    with ExitStack() as stack:
        mesh = stack.enter_context(
            pretended_mesh(config.tensor_parallel_size, config.data_parallel_size, rank=rank)
        )
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        network = build_network(config, mesh.tp_group, num_layers)
        optimizer = _optimizer(network, config, mesh)
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        recorder = Recorder(mesh)
        recorder.phase = "optimizer"
        stack.enter_context(recorder)
        reduce_partial_gradients(network, mesh.tp_group)
        if config.clip:
            squares = squared_gradient_norms(network, mesh.tp_group)
            clip_grad_norm(network, squares, max_norm=1.0)
        optimizer.step()
    return recorder.trace

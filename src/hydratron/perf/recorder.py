"""A training step as a list of operators, traced from the real network on no device.

The network is built from fake tensors for one rank of a mesh of any size (the "fake" backend sends
nothing), then run forward and backward while every operator below autograd is written down:
products, attention, collectives, and the elementwise work between them.
Letters: B batch, N heads, S sequence, D head dim; `storage` is the memory behind a tensor's views.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydratron.parallel.mesh import ParallelMesh, build_mesh

_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_LOOKUPS = ("embedding", "gather", "index_select", "index")
_SCATTERS = ("scatter_add", "embedding_dense_backward", "index_put")  # sums that do not fuse
_OVERWRITES = ("copy_", "zero_", "fill_")
_COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


def _mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into."""
    arguments = func._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    written = [given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
    return [t for t in tree_leaves(written) if isinstance(t, Tensor)]


@contextmanager
def pretended_mesh(
    tensor_parallel_size: int, data_parallel_size: int, *, rank: int = 0
) -> Iterator[ParallelMesh]:
    """Be `rank` of a mesh of any size in this one process; collectives send nothing.

    Raises:
        RuntimeError: the process has a default process group already.
    """
    world_size = tensor_parallel_size * data_parallel_size
    if world_size == 1:
        yield ParallelMesh()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield build_mesh(
            "cpu",
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
        )
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Operator:
    """What one kernel does, or would do without fusion.

    `kind`: product, attention, collective, scatter or elementwise. `reads` and `writes` give bytes
    by storage. `shape`: of a product, (batch, m, n, k). `flops` of attention are those of the whole
    S x S matrix; `is_halved` tells that a kernel skips the half which a causal mask hides.
    `collective`, `axis` ("tp" or "dp") and `num_bytes`, of the whole tensor, are a collective's.
    """

    name: str
    kind: str
    phase: str
    reads: dict[int, int]
    writes: dict[int, int]
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    flops: int = 0
    is_halved: bool = False
    is_masked: bool = False
    collective: str = ""
    axis: str = ""
    num_bytes: int = 0


@dataclass
class StepTrace:
    """The operators of a step in order, and what the memory accounting asks about storages.

    `existing` storages were there before the step, DDP's buckets too. `gradients` gives the bytes
    of each storage that holds gradients to the end; with DDP there are none, buckets do.
    `top_layer_done` and `bottom_layer_started` count the operators that ran before two moments of
    the backward pass: the last layer's gradients are complete, the first layer's begin.
    """

    operators: list[Operator] = field(default_factory=list)
    existing: set[int] = field(default_factory=set)
    gradients: dict[int, int] = field(default_factory=dict)
    top_layer_done: int = 0
    bottom_layer_started: int = 0

    def collectives(self, axis: str | None = None) -> list[Operator]:
        """Return the collectives over an axis, or all."""
        found = [op for op in self.operators if op.kind == "collective"]
        return [op for op in found if axis in (None, op.axis)]


@dataclass(frozen=True)
class StepTraces:
    """A step's forward and backward pass, and its update, with one layer and with two; of a
    compiled step as `as_compiled` gives them.
    """

    passes: tuple[StepTrace, StepTrace]
    update: tuple[StepTrace, StepTrace]


class Recorder(TorchDispatchMode):
    """Writes down each operator that runs below autograd."""

    def __init__(self, mesh: ParallelMesh, *, repeated_tokens: int = 0) -> None:
        """`repeated_tokens`: tensors of that many rows count as if every tensor-parallel peer held
        all tokens, as without sequence parallelism.
        """
        super().__init__()
        self.trace = StepTrace()
        self._repeated_tokens, self._repeats = repeated_tokens, mesh.tensor_parallel_size
        self.phase = "forward"
        self.is_masked = False  # of attention, which the traced kernel does not say
        self._alive: list[Any] = []  # a freed storage's address would name another one
        self._ids: dict[int, int] = {}
        self._made: set[int] = set()  # by the step
        self._axes: dict[str, str] = {
            group.group_name: axis
            for axis, group in (("tp", mesh.tp_group), ("dp", mesh.dp_group))
            if group is not None
        }

    def storage(self, tensor: Tensor) -> int:
        """Return the number of the storage behind `tensor`."""
        memory = tensor.untyped_storage()
        address = memory._cdata
        if address not in self._ids:
            self._alive.append(memory)
            self._ids[address] = len(self._ids)
        return self._ids[address]

    def bytes_of(self, tensors: list[Any]) -> dict[int, int]:
        """Return the bytes that each storage gives to `tensors`, at most all of it."""
        found: dict[int, int] = {}
        for tensor in tensors:
            key, size = self.storage(tensor), tensor.numel() * tensor.element_size()
            size = min(found.get(key, 0) + size, tensor.untyped_storage().nbytes())
            is_repeated = self._repeated_tokens and tensor.shape[:1] == (self._repeated_tokens,)
            found[key] = size * self._repeats if is_repeated else size
        return found

    def add(
        self, name: str, kind: str, inputs: list[Any], outputs: list[Any], **facts: Any
    ) -> None:
        """Write down one operator."""
        reads, writes = self.bytes_of(inputs), self.bytes_of(outputs)
        self.trace.existing |= {s for s in reads if s not in self._made}
        self._made |= writes.keys() - self.trace.existing
        self.trace.operators.append(Operator(name, kind, self.phase, reads, writes, **facts))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunction():  # what follows asks tensors a lot
            result = func(*args, **(kwargs or {}))
            if func.namespace != "prim":  # a question about a tensor, such as its device
                self._write_down(func, args, kwargs or {}, result)
        return result

    def _write_down(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        space, name = func.namespace, func._opname
        if name == "wait_tensor":
            self._ids[outputs[0].untyped_storage()._cdata] = self.storage(inputs[0])
            self._alive.append(outputs[0].untyped_storage())
        elif space == "_c10d_functional":
            self._add_collective(name, args, inputs, outputs)
        elif name.startswith(_ATTENTION):
            self._add_attention(name, args, kwargs, inputs, outputs)
        elif space == "aten" and name in _PRODUCTS:
            self._add_product(name, inputs, outputs)
        elif name.startswith(("empty", "new_empty")):
            self._made |= {self.storage(t) for t in outputs}
        elif func._schema.is_mutable or not self._is_view(inputs, outputs):
            mutated = _mutated(func, args, kwargs)
            self.trace.existing |= {s for t in mutated if (s := self.storage(t)) not in self._made}
            if name in _OVERWRITES:
                inputs = [t for t in inputs if not any(t is m for m in mutated)]
            self._add_elementwise(name, inputs, [*outputs, *mutated])

    def _is_view(self, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        known = {self.storage(t) for t in inputs}
        return all(self.storage(t) in known for t in outputs)

    def _add_elementwise(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if self.phase == "optimizer" and name.startswith("zeros"):  # moments, made once
            self.trace.existing |= {self.storage(t) for t in outputs}
            return
        self.add(name, "scatter" if name in _SCATTERS else "elementwise", inputs, outputs)
        if name in _LOOKUPS:  # only the rows that are looked up
            operator, written = self.trace.operators[-1], self.bytes_of(outputs)
            table = self.storage(inputs[0])
            operator.reads[table] = min(operator.reads[table], sum(written.values()))

    def _add_product(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        a, b = inputs[-2:]
        m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
        batch = a.shape[0] if a.dim() == 3 else 1
        self.add(
            name, "product", inputs, outputs, shape=(batch, m, n, k), flops=2 * batch * m * n * k
        )

    def _add_attention(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        is_backward = name.endswith("backward")
        query = args[1] if is_backward else args[0]
        batch_size, num_heads, seq_len, head_dim = query.shape
        forward_flops = 4 * batch_size * num_heads * seq_len * seq_len * head_dim
        # backward, five products instead of two: the scores are computed again
        self.add(
            name, "attention", inputs, outputs,
            flops=5 * forward_flops // 2 if is_backward else forward_flops,
            is_halved=any(flag is True for flag in (*args, *kwargs.values())),
            is_masked=self.is_masked,
        )  # fmt: skip

    def _add_collective(
        self, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        kind = next(kind for kind in _COLLECTIVES if name.startswith(kind))
        axis = next(self._axes[a] for a in args if isinstance(a, str) and a in self._axes)
        sizes = [t.numel() * t.element_size() for t in (*inputs, *outputs)]
        self.add(
            name, "collective", inputs, outputs, collective=kind, axis=axis, num_bytes=max(sizes)
        )


def _materialised_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, **_mask: Any
) -> Tensor:
    """Attention whose S x S scores go through memory, as before fused kernels; the mask is part of
    the softmax.
    """
    scores = query @ key.transpose(-2, -1)  # [B, N, S, S]
    weights = torch.softmax(scores * query.size(-1) ** -0.5, dim=-1)
    if dropout_p:
        weights = torch.native_dropout(weights, dropout_p, True)[0]
    return weights @ value


class DeviceKernels(TorchFunctionMode):
    """Puts what a GPU runs where the network calls attention and dropout: fake tensors are on the
    CPU, which takes both apart.
    """

    def __init__(self, recorder: Recorder, *, fused_attention: bool) -> None:
        super().__init__()
        self.recorder, self.fused_attention = recorder, fused_attention

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:  # the fused one, whose mask is a byte an element
            rate, training = kwargs["p"], kwargs["training"]
            return torch.native_dropout(args[0], rate, training)[0] if rate else args[0]
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if not self.fused_attention:
            return _materialised_attention(*args[:3], **kwargs)
        is_causal, mask = bool(kwargs.get("is_causal")), kwargs.get("attn_mask")
        self.recorder.is_masked = mask is not None
        # in shapes and in what it saves the CPU's fused kernel is the GPU's; it has no dropout
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *args[:3], 0.0, is_causal
        )[0]

"""A training step as one CUDA graph for each shape of batch: one launch in place of a thousand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class StepGraphs:
    """Runs gradients and update of one process's step on the device, its collectives with them.

    The first batch of a shape is launched kernel by kernel, which warms up all that the shape
    needs; the second is captured; from there on the graph is replayed.

    Args:
        gradients: fills the parameters' gradients and never waits for the device. The tensors it
            returns hold until the next step.
        optimizer: a fused one, whose learning rates may change between steps.
        generators: that `gradients` draws from, beside the default one.
    """

    def __init__(
        self,
        gradients: Callable[[Batch], Any],
        optimizer: torch.optim.Optimizer,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.gradients, self.optimizer, self.generators = gradients, optimizer, generators
        device = optimizer.param_groups[0]["params"][0].device
        # a captured number would stay as it was: the learning rate is read from memory
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.warm: set[Any] = set()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Batch, Any]] = {}
        self.pool: Any = None

    def __call__(self, batch: Batch) -> Any:
        """Take one optimizer step on `batch`; return what `gradients` returns of it."""
        shape = frozenset((name, tuple(column.shape)) for name, column in batch.items())
        if shape not in self.warm:
            self.warm.add(shape)
            return self._step(batch)
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(batch)
        graph, inputs, found = self.graphs[shape]
        for name, column in batch.items():
            inputs[name].copy_(column)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        graph.replay()
        return found

    def _step(self, batch: Batch) -> Any:
        found = self.gradients(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Any]:
        inputs = {name: column.clone() for name, column in batch.items()}
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # one pool for all: graphs run one after another, and none needs what another left
        with (
            self._rates_on_device(),
            # a loader's thread may pin memory meanwhile
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
        ):
            found = self._step(inputs)
        self.pool = graph.pool()
        return graph, inputs, found

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        kept = [(group["lr"], group["capturable"]) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"], group["capturable"] = rate, True
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, kept, strict=True):
                group["lr"], group["capturable"] = rate, capturable

"""Peak memory of one rank's GPU: what stays, and what a step holds while it runs."""

from dataclasses import dataclass

import torch

from hydratron.parallel.placement import parameter_placements
from hydratron.parallel.zero import MOMENT_BYTES, PART_BYTES, data_parallel_dim
from hydratron.perf.kernels import live_bytes
from hydratron.perf.recorder import StepTrace, StepTraces, pretended_mesh
from hydratron.perf.step import StepConfig, build_network


@dataclass(frozen=True)
class StateMemory:
    """Bytes that a rank holds all the time, by what they are."""

    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank: what stays plus the step's own tensors at the worst moment.

    `activations`: those of the worst moment before the last layer's backward pass is over;
    `backward`: all beyond parameters and optimizer state when it reaches the first layer;
    `update`: the same during the optimizer step.
    """

    state: StateMemory
    gradients_stay: bool
    activations: int
    backward: int
    update: int

    @property
    def peak(self) -> int:
        """The most bytes that are held at once."""
        stays = self.state.parameters + self.state.optimizer
        kept = self.state.gradients if self.gradients_stay else 0
        return stays + max(
            kept + self.activations, kept + self.backward, self.state.gradients + self.update
        )


def state_memory(config: StepConfig) -> StateMemory:
    """Count what one rank keeps, from the whole network built for that rank on the meta device.

    With a sharded optimizer moments and updated parts are 1/dp of a parameter along the dimension
    that `ShardedAdamW` splits. Weights of 16 bits have float32 parts, sharded or not.
    """
    size = config.data_parallel_size
    with pretended_mesh(config.tensor_parallel_size, 1) as mesh, torch.device("meta"):
        network = build_network(config, mesh.tp_group, config.model.num_layers)
        placements = parameter_placements(network)
    element = config.parameter_dtype.itemsize
    is_sharded = config.shard_optimizer and size > 1
    numel = optimizer = 0
    for name, parameter in network.named_parameters():
        numel += parameter.numel()
        dim = data_parallel_dim(parameter.shape, placements[name].tp_dim, size)
        share = size if is_sharded and dim is not None else 1
        is_apart = share > 1 or element < PART_BYTES
        state_bytes = MOMENT_BYTES + (PART_BYTES if is_apart else 0)
        optimizer += parameter.numel() // share * state_bytes
    return StateMemory(numel, numel * element, numel * element, optimizer)


def _peaks(trace: StepTrace, *, compiled: bool) -> tuple[int, int]:
    """Return the worst of a trace's passes before its top layer is done and from its bottom layer
    on, in bytes.
    """
    curve = live_bytes(trace, compiled=compiled)
    return max(curve[: trace.top_layer_done]), max(curve[trace.bottom_layer_started :])


def step_memory(config: StepConfig, state: StateMemory, traces: StepTraces) -> Memory:
    """Account a step from its traces with one and with two layers."""
    further = config.model.num_layers - 1
    one, two = (_peaks(trace, compiled=config.compiled) for trace in traces.passes)
    activations, backward = (a + further * (b - a) for a, b in zip(one, two, strict=True))
    first, second = (max(live_bytes(trace, compiled=False)) for trace in traces.update)
    return Memory(
        state=state,
        gradients_stay=config.data_parallel_size > 1 or config.num_micro_batches > 1,
        activations=activations,
        backward=backward,
        update=first + further * (second - first),
    )

"""Peak memory of one rank's GPU: what stays, and what a step holds while it runs."""

from dataclasses import dataclass

import torch

from hydratron.parallel.placement import parameter_placements
from hydratron.parallel.zero import data_parallel_dim
from hydratron.perf.kernels import live_bytes
from hydratron.perf.recorder import StepTrace, pretended_mesh
from hydratron.perf.step import StepConfig, build_network

MOMENT_BYTES = 8  # AdamW's two moments in float32
MASTER_BYTES = 4  # a float32 copy of a weight that is kept in bfloat16


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

    With a sharded optimizer the moments (and master weights) of a parameter are 1/dp of it along
    the dimension that `ShardedAdamW` splits, and a copy of the part is kept beside the weights.
    """
    size = config.data_parallel_size
    with pretended_mesh(config.tensor_parallel_size, 1) as mesh, torch.device("meta"):
        network = build_network(config, mesh.tp_group, config.model.num_layers)
        placements = parameter_placements(network)
    element = config.parameter_dtype.itemsize
    state_bytes = MOMENT_BYTES + (MASTER_BYTES if element == 2 else 0)
    is_sharded = config.shard_optimizer and size > 1
    numel = optimizer = 0
    for name, parameter in network.named_parameters():
        numel += parameter.numel()
        dim = data_parallel_dim(parameter.shape, placements[name].tp_dim, size)
        if is_sharded and dim is not None:
            optimizer += parameter.numel() // size * (state_bytes + element)
        else:
            optimizer += parameter.numel() * state_bytes
    return StateMemory(numel, numel * element, numel * element, optimizer)


def _peaks(trace: StepTrace, *, compiled: bool) -> tuple[int, int, int]:
    """Return the worst of a trace before its top layer is done, from its bottom layer on, and in
    the optimizer step, in bytes.
    """
    curve = live_bytes(trace, compiled=compiled)
    end = next(i for i, op in enumerate(trace.operators) if op.phase == "optimizer")
    # DDP's buckets are there before the step
    made = sum(size for s, size in trace.gradients.items() if s not in trace.existing)
    update = max(curve[end:]) - made
    return max(curve[: trace.top_layer_done]), max(curve[trace.bottom_layer_started : end]), update


def step_memory(config: StepConfig, state: StateMemory, one: StepTrace, two: StepTrace) -> Memory:
    """Account a step from its traces with one and with two layers."""
    pairs = zip(
        _peaks(one, compiled=config.compiled), _peaks(two, compiled=config.compiled), strict=True
    )
    further = config.model.num_layers - 1
    activations, backward, update = (a + further * (b - a) for a, b in pairs)
    return Memory(
        state=state,
        gradients_stay=config.data_parallel_size > 1 or config.num_micro_batches > 1,
        activations=activations,
        backward=backward,
        update=update,
    )

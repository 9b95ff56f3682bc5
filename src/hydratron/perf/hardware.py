"""What a cluster can do: peaks, bandwidths and the shares of them that are attained.

Shares are attained ones, calibrated from measured steps (`calibration.py`); peaks and links are
the maker's figures.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from hydratron.settings import (
    Interval,
    NotNegative,
    PositiveShare,
    Share,
    Text,
    check,
)

GIB = 2**30
Rate = Annotated[float, Interval(0, 1e9, above=True)]


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes.

    `peak_tflops`: dense half-precision. `memory_gib` of a GPU, of which `reserved_gib` are the
    driver's, NCCL's and the allocator's. Bandwidths in GB/s and one direction, as collectives
    attain them: `intra_node_bandwidth` of a GPU to its peers, `inter_node_bandwidth` of a whole
    node. Latencies in microseconds for a hop of a ring or tree; `collective_us` and `kernel_us` are
    what starting one costs. `product_efficiency`: of the peak, by a product so large that its
    shape costs nothing; `attention_efficiency` and `masked_attention_efficiency`: by a fused
    attention kernel; `elementwise_efficiency` of the bandwidth, by fused elementwise kernels, whose
    reductions read twice, and `memory_efficiency` by plain copies and the optimizer.
    `workspace_gib`: what the product kernels keep. `overlap`: the most of a gradient all-reduce
    that hides under the backward pass.

    Raises:
        ValueError: a value that cannot be, by name and rule.
    """

    name: Text
    gpus_per_node: Annotated[int, Interval(1, 1024)]
    peak_tflops: Rate
    num_multiprocessors: Annotated[int, Interval(1, 10**6)]
    memory_gib: Rate
    memory_bandwidth: Rate
    intra_node_bandwidth: Rate
    inter_node_bandwidth: Rate
    product_efficiency: PositiveShare
    attention_efficiency: PositiveShare
    masked_attention_efficiency: PositiveShare
    elementwise_efficiency: PositiveShare
    memory_efficiency: PositiveShare
    has_bf16: bool = True
    num_nodes: Annotated[int, Interval(1, 2**20)] = 1
    reserved_gib: NotNegative = 2.0
    workspace_gib: NotNegative = 0.03
    intra_node_latency_us: NotNegative = 4.0
    inter_node_latency_us: NotNegative = 10.0
    collective_us: NotNegative = 15.0
    kernel_us: NotNegative = 4.0
    step_ms: NotNegative = 1.0
    overlap: Share = 0.9

    def check_precision(self, precision: str) -> None:
        """Raise ValueError where the GPUs have no products of `trainer.precision`."""
        if precision.startswith("bf16") and not self.has_bf16:
            raise ValueError(
                f"trainer.precision {precision}: {self.name} has no bf16; 16-mixed would work"
            )

    def __post_init__(self) -> None:
        check(self, "hardware")

    @property
    def num_gpus(self) -> int:
        """GPUs of the whole cluster."""
        return self.num_nodes * self.gpus_per_node

    @property
    def usable_gib(self) -> float:
        """Memory of a GPU that tensors may fill."""
        return self.memory_gib - self.reserved_gib

    def collective_seconds(self, kind: str, num_bytes: float, group: "GroupShape") -> float:
        """Return how long a collective takes; `num_bytes` is the size of the whole tensor.

        A ring passes (n-1)/n of the tensor through every link, twice in an all-reduce; a tree
        passes twice the tensor in a logarithm of the hops (NCCL's two algorithms; it takes the
        faster one).
        """
        size = group.size
        if size == 1:
            return 0.0
        bandwidth = self.intra_node_bandwidth * 1e9
        num_nodes = math.ceil(size / group.per_node)
        if num_nodes > 1:
            bandwidth = min(bandwidth, self.inter_node_bandwidth * 1e9 / group.num_beside)
        passes = 2 if kind == "all_reduce" else 1
        hops_inside, hops_between = size - num_nodes, (num_nodes if num_nodes > 1 else 0)
        intra, inter = self.intra_node_latency_us * 1e-6, self.inter_node_latency_us * 1e-6
        ring = passes * (
            (size - 1) / size * num_bytes / bandwidth + hops_inside * intra + hops_between * inter
        )
        tree = 2 * (
            num_bytes / bandwidth
            + (group.per_node - 1) * intra
            + math.ceil(math.log2(max(num_nodes, 1))) * inter
        )
        return self.collective_us * 1e-6 + (min(ring, tree) if kind == "all_reduce" else ring)


@dataclass(frozen=True)
class GroupShape:
    """A process group on the cluster: its size, how many of it share a node, and how many groups
    like it share that node's links.
    """

    size: int
    per_node: int
    num_beside: int


def group_shape(
    hardware: Hardware, axis: str, *, tensor_parallel_size: int, data_parallel_size: int
) -> GroupShape:
    """Place a group of the (dp, tp) grid, whose consecutive ranks are tensor-parallel peers."""
    if axis == "tp":
        per_node = min(tensor_parallel_size, hardware.gpus_per_node)
        return GroupShape(tensor_parallel_size, per_node, 1)
    beside = min(tensor_parallel_size, hardware.gpus_per_node)
    per_node = max(1, min(data_parallel_size, hardware.gpus_per_node // tensor_parallel_size))
    return GroupShape(data_parallel_size, per_node, beside)

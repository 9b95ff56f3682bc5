"""What a cluster can do: peaks, bandwidths and the shares of them that are attained.

Shares are attained ones, calibrated from measured steps (`calibration.py`); peaks and links are
the maker's figures.
"""

import math
from dataclasses import dataclass, fields

GIB = 2**30
MAY_BE_ZERO = (
    "reserved_gib",
    "workspace_gib",
    "intra_node_latency_us",
    "inter_node_latency_us",
    "collective_us",
    "kernel_us",
    "step_ms",
    "overlap",
)


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

    name: str
    gpus_per_node: int
    peak_tflops: float
    num_multiprocessors: int
    memory_gib: float
    memory_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    product_efficiency: float
    attention_efficiency: float
    masked_attention_efficiency: float
    elementwise_efficiency: float
    memory_efficiency: float
    has_bf16: bool = True
    num_nodes: int = 1
    reserved_gib: float = 2.0
    workspace_gib: float = 0.03
    intra_node_latency_us: float = 4.0
    inter_node_latency_us: float = 10.0
    collective_us: float = 15.0
    kernel_us: float = 4.0
    step_ms: float = 1.0
    overlap: float = 0.9

    def check_precision(self, precision: str) -> None:
        """Raise ValueError where the GPUs have no products of `trainer.precision`."""
        if precision.startswith("bf16") and not self.has_bf16:
            raise ValueError(
                f"trainer.precision {precision}: {self.name} has no bf16; 16-mixed would work"
            )

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float):
                rule = "at least 0" if field.name in MAY_BE_ZERO else "positive"
                is_less = value < 0 if field.name in MAY_BE_ZERO else value <= 0
                if is_less or not math.isfinite(value):
                    raise ValueError(f"hardware.{field.name} {value} is not finite and {rule}")
        for key in (
            "product_efficiency",
            "attention_efficiency",
            "masked_attention_efficiency",
            "elementwise_efficiency",
            "memory_efficiency",
        ):
            if getattr(self, key) > 1:
                raise ValueError(f"hardware.{key} {getattr(self, key)} is not in (0, 1]")
        if self.overlap > 1:
            raise ValueError(f"hardware.overlap {self.overlap} is not in [0, 1]")

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

"""Time of a step: each traced kernel on a roofline, the communication beside it."""

import math
from dataclasses import dataclass, fields

from hydratron.perf.hardware import Hardware, group_shape
from hydratron.perf.kernels import Kernel, fuse
from hydratron.perf.recorder import Operator, StepTrace, StepTraces
from hydratron.perf.step import StepConfig

TILES = ((256, 128), (128, 256), (128, 128), (64, 128))
TILE_RATES = (1.0, 1.0, 0.92, 0.7)  # a smaller tile reads more for each product
DEPTH_OVERHEAD = 128  # start and end of a tile's sum, in units of k


@dataclass(frozen=True)
class StepTime:
    """Seconds of one rank's optimizer step by cause; `data_parallel` is what is not hidden."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_parallel: float = 0.0
    data_parallel: float = 0.0
    optimizer: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


def shape_efficiency(shape: tuple[int, int, int, int], hardware: Hardware) -> float:
    """Return which share of an unbounded product's rate a product of this shape reaches.

    The output is cut into tiles that the multiprocessors take in waves; the last wave is not full,
    and each tile has a start and an end. The best of four tile sizes counts.
    """
    batch, m, n, k = shape
    best = 0.0
    for (rows, columns), rate in zip(TILES, TILE_RATES, strict=True):
        tiles = batch * math.ceil(m / rows) * math.ceil(n / columns)
        waves = tiles / hardware.num_multiprocessors
        filled = batch * m * n / (tiles * rows * columns)
        best = max(best, rate * filled * waves / math.ceil(waves))
    return best * k / (k + DEPTH_OVERHEAD)


def product_seconds(operator: Operator, hardware: Hardware) -> float:
    """Return the time of a matrix product: arithmetic or memory, whichever is longer."""
    rate = hardware.peak_tflops * 1e12 * hardware.product_efficiency
    arithmetic = operator.flops / (rate * shape_efficiency(operator.shape, hardware))
    traffic = sum(operator.reads.values()) + sum(operator.writes.values())
    return max(arithmetic, memory_seconds(traffic, hardware))


def memory_seconds(num_bytes: float, hardware: Hardware, efficiency: float | None = None) -> float:
    """Return the time to move bytes of a GPU's memory, as a plain copy does by default."""
    efficiency = efficiency or hardware.memory_efficiency
    return num_bytes / (hardware.memory_bandwidth * 1e9 * efficiency)


def attention_seconds(operator: Operator, hardware: Hardware, *, seq_len: int) -> float:
    """Return the time of a fused attention kernel, which skips most of what a causal mask hides."""
    share = 0.5 + 64 / seq_len if operator.is_halved else 1.0  # blocks on the diagonal stay whole
    efficiency = hardware.attention_efficiency
    if operator.is_masked:
        efficiency = hardware.masked_attention_efficiency
    arithmetic = min(1.0, share) * operator.flops / (hardware.peak_tflops * 1e12 * efficiency)
    traffic = sum(operator.reads.values()) + sum(operator.writes.values())
    return max(arithmetic, memory_seconds(traffic, hardware))


def _kernel_seconds(kernel: Kernel, config: StepConfig, hardware: Hardware) -> float:
    """Time of a kernel that is no collective."""
    start = hardware.kernel_us * 1e-6
    if kernel.first.kind == "product":
        return start + product_seconds(kernel.first, hardware)
    if kernel.first.kind == "attention":
        return start + attention_seconds(kernel.first, hardware, seq_len=config.seq_len)
    if kernel.first.phase == "optimizer":
        return start + memory_seconds(kernel.num_bytes, hardware)
    return start + memory_seconds(kernel.num_bytes, hardware, hardware.elementwise_efficiency)


def collective_seconds(operator: Operator, config: StepConfig, hardware: Hardware) -> float:
    """Return the time of a traced collective on this cluster."""
    group = group_shape(
        hardware,
        operator.axis,
        tensor_parallel_size=config.tensor_parallel_size,
        data_parallel_size=config.data_parallel_size,
    )
    return hardware.collective_seconds(operator.collective, operator.num_bytes, group)


def trace_seconds(trace: StepTrace, config: StepConfig, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of a trace's kernels by phase and cause.

    Keys are `forward/product`, `backward/tp`, `optimizer/elementwise` and so on.
    """
    seconds: dict[str, float] = {}
    for kernel in fuse(trace, compiled=config.compiled):
        operator = kernel.first
        if operator.kind == "collective":
            cause, spent = operator.axis, collective_seconds(operator, config, hardware)
        else:
            cause, spent = operator.kind, _kernel_seconds(kernel, config, hardware)
        key = f"{operator.phase}/{cause}"
        seconds[key] = seconds.get(key, 0.0) + spent
    return seconds


def compose_step(seconds: dict[str, float], config: StepConfig, hardware: Hardware) -> StepTime:
    """Put a step together: micro-batches, the gradients' averaging under the last backward pass,
    the update.
    """
    count = config.num_micro_batches

    def passes(cause: str) -> float:
        return seconds.get(f"forward/{cause}", 0.0) + seconds.get(f"backward/{cause}", 0.0)

    averaging = passes("dp")
    backward = sum(
        s for key, s in seconds.items() if key.startswith("backward/") and not key.endswith("dp")
    )
    exposed = max(averaging * (1 - hardware.overlap), averaging - backward)
    return StepTime(
        products=count * passes("product"),
        attention=count * passes("attention"),
        elementwise=count * (passes("elementwise") + passes("scatter")),
        tensor_parallel=count * passes("tp") + seconds.get("optimizer/tp", 0.0),
        data_parallel=exposed + seconds.get("optimizer/dp", 0.0),
        optimizer=seconds.get("optimizer/elementwise", 0.0),
        overhead=hardware.step_ms * 1e-3,
    )


def step_time(config: StepConfig, hardware: Hardware, traces: StepTraces) -> StepTime:
    """Time a step from its traces with one and with two layers."""
    further = config.model.num_layers - 1
    seconds: dict[str, float] = {}
    for pair in (traces.passes, traces.update):
        first, second = (trace_seconds(trace, config, hardware) for trace in pair)
        for key, value in second.items():
            seconds[key] = first.get(key, 0.0) + further * (value - first.get(key, 0.0))
    return compose_step(seconds, config, hardware)

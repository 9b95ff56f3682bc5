"""Where the time of a step goes: kernels of a profiler trace, by what they compute."""

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
# By name, the first that matches. Inductor's own kernels are elementwise work and sums, also where
# they are named after the product that they prepare; its products are templates (triton_tem_...).
KINDS = (
    ("communication", re.compile(r"nccl|all_?reduce|all_?gather|reduce_?scatter", re.IGNORECASE)),
    ("other_kernels", re.compile(r"^triton_(poi|per|red|for)_")),
    ("attention", re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)),
    ("matrix_products", re.compile(r"gemm|nvjet|cutlass|cublas|xmma|_mm_|matmul", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Kernel:
    """Something the device did, from `start` to `end` in microseconds."""

    name: str
    start: float
    end: float

    @property
    def kind(self) -> str:
        """matrix_products, attention, communication or other_kernels."""
        return next((k for k, pattern in KINDS if pattern.search(self.name)), "other_kernels")


def read_trace(path: Path) -> list[Kernel]:
    """Return what the device did in a Chrome trace of torch.profiler (.json or .json.gz)."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [
        Kernel(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in json.loads(text)["traceEvents"]
        if event.get("cat") in DEVICE_EVENTS
    ]


def covered(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the union of intervals as ordered ones that do not touch."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """Return how much ordered intervals that do not touch cover."""
    return sum(end - start for start, end in intervals)


def breakdown(kernels: Sequence[Kernel], *, num_steps: int) -> dict[str, float]:
    """Return milliseconds a step by kind.

    `communication` is all of it, `exposed_communication` what no other kernel runs beside, `idle`
    when nothing runs between the first kernel and the last. The other kinds are sums over kernels:
    with `exposed_communication` and `idle` they add up to the step, unless kernels overlap.
    """
    if not kernels:
        return {}
    times = dict.fromkeys([kind for kind, _ in KINDS], 0.0)
    for kernel in kernels:
        times[kernel.kind] += kernel.end - kernel.start
    computing = covered((k.start, k.end) for k in kernels if k.kind != "communication")
    busy = covered((k.start, k.end) for k in kernels)
    times["exposed_communication"] = length(busy) - length(computing)
    times["idle"] = busy[-1][1] - busy[0][0] - length(busy)
    return {kind: time / 1e3 / num_steps for kind, time in times.items()}

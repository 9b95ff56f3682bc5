"""From traced operators to the kernels that run: elementwise work fuses between products.

torch.compile fuses elementwise operators and reductions; products, attention and collectives end
a fused kernel. What only one fused kernel sees never reaches memory, so the bytes of a kernel are
those of the tensors at its border.
"""

from bisect import bisect_left
from dataclasses import dataclass, field, replace

from hydratron.perf.recorder import Operator, StepTrace


@dataclass
class Kernel:
    """Operators that run as one; `reads` and `writes` are bytes of memory by storage."""

    operators: list[Operator] = field(default_factory=list)
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)

    @property
    def first(self) -> Operator:
        """The operator that names the kernel; the only one unless it is elementwise."""
        return self.operators[0]

    @property
    def num_bytes(self) -> int:
        """Memory traffic."""
        return sum(self.reads.values()) + sum(self.writes.values())


def group_operators(trace: StepTrace, *, compiled: bool) -> list[list[int]]:
    """Return the operators' indices, those of one kernel together.

    The optimizer is not compiled: each of its operators works on all parameters at once.
    """
    groups: list[list[int]] = []
    for index, operator in enumerate(trace.operators):
        previous = trace.operators[groups[-1][-1]] if groups else None
        fuses = (
            compiled
            and previous is not None
            and operator.kind == previous.kind == "elementwise"
            and operator.phase == previous.phase != "optimizer"
        )
        if fuses:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def without_dead_code(trace: StepTrace) -> StepTrace:
    """Return the trace without operators whose results nobody needs.

    Eager recomputation runs a layer to its end; a compiled backward pass has only what it needs, so
    that a layer's last product and reduce-scatter are not computed again. A dropout mask comes from
    the generator: where it alone is needed, the activations are not.
    """
    needed = set(trace.gradients) | trace.existing
    loss = max((i for i, op in enumerate(trace.operators) if op.phase == "forward"), default=-1)
    kept: list[tuple[int, Operator]] = []
    for index in reversed(range(len(trace.operators))):
        operator = trace.operators[index]
        if index != loss and not needed & operator.writes.keys():
            continue
        if operator.name == "native_dropout" and next(iter(operator.writes)) not in needed:
            operator = replace(operator, reads={})
        needed |= operator.reads.keys()
        kept.append((index, operator))
    kept.reverse()
    indices = [index for index, _ in kept]
    return replace(
        trace,
        operators=[operator for _, operator in kept],
        top_layer_done=bisect_left(indices, trace.top_layer_done),
        bottom_layer_started=bisect_left(indices, trace.bottom_layer_started),
    )


def rematerialised(trace: StepTrace) -> StepTrace:
    """Return the trace as torch.compile's partitioner has it: the backward pass makes again what
    one smaller tensor determines.

    A tensor of elementwise work, read in the backward pass by elementwise work alone, is replaced
    there by the one big tensor that it was made of, where that is smaller: the float32
    probabilities of the loss by the half-precision logits. Dropout masks, normalised activations
    and inputs of products are kept.
    """
    origin: dict[int, int] = {}  # the one big source of a tensor of elementwise work
    size: dict[int, int] = {}
    for operator in trace.operators:
        for storage, num_bytes in (*operator.reads.items(), *operator.writes.items()):
            size[storage] = max(size.get(storage, 0), num_bytes)
        if operator.phase != "forward" or operator.kind != "elementwise":
            continue
        for storage in operator.writes:
            big = [s for s in operator.reads if size[s] * 8 >= size[storage]]
            if len(big) == 1:
                origin[storage] = origin.get(big[0], big[0])
    backward = [op for op in trace.operators if op.phase == "backward"]
    kept = {s for op in backward if op.kind != "elementwise" for s in op.reads}
    smaller = {s: o for s, o in origin.items() if s not in kept and size[o] < size[s]}
    operators = [
        replace(op, reads={smaller.get(s, s): min(n, size[smaller.get(s, s)])
                           for s, n in op.reads.items()})
        if op.phase == "backward" else op
        for op in trace.operators
    ]  # fmt: skip
    return replace(trace, operators=operators)


def as_compiled(trace: StepTrace) -> StepTrace:
    """Return the trace of the same step under torch.compile."""
    return rematerialised(without_dead_code(trace))


def fuse(trace: StepTrace, *, compiled: bool) -> list[Kernel]:
    """Return the kernels of a trace (one of `as_compiled` with `compiled`) with what each moves."""
    groups = group_operators(trace, compiled=compiled)
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    produced: dict[int, int] = {}
    visible: set[int] = set(trace.gradients) | trace.existing
    for index, operator in enumerate(trace.operators):
        for storage in operator.reads:
            if produced.get(storage, -1) != group_of[index]:
                visible.add(storage)
        for storage in operator.writes:
            if storage not in produced and storage not in operator.reads:
                produced[storage] = group_of[index]
            elif produced.get(storage, -1) != group_of[index]:
                visible.add(storage)
    kernels = []
    for number, group in enumerate(groups):
        kernel = Kernel([trace.operators[index] for index in group])
        for operator in kernel.operators:
            for storage, size in operator.reads.items():
                if produced.get(storage, -1) != number:
                    kernel.reads[storage] = max(kernel.reads.get(storage, 0), size)
            for storage, size in operator.writes.items():
                if storage in visible or not compiled:
                    kernel.writes[storage] = max(kernel.writes.get(storage, 0), size)
        kernels.append(kernel)
    return kernels


def live_bytes(trace: StepTrace, *, compiled: bool) -> list[int]:
    """Return the bytes that the step's own tensors hold while each operator runs.

    What exists before the step (parameters, optimizer state, DDP's buckets) is not counted;
    gradients are, from their making to the end. A fused kernel may write over an input that nobody
    reads afterwards and that has its output's size.
    """
    groups = group_operators(trace, compiled=compiled)
    kernels = fuse(trace, compiled=compiled)
    last_read: dict[int, int] = {}
    for number, kernel in enumerate(kernels):
        for storage in (*kernel.reads, *kernel.writes):
            last_read[storage] = number
    curve: list[int] = []
    held: dict[int, int] = {}
    for number, kernel in enumerate(kernels):
        dying = [s for s in kernel.reads if s in held and last_read[s] == number]
        is_fused = compiled and kernel.first.kind == "elementwise"
        for storage, size in kernel.writes.items():
            if storage in held or storage in trace.existing:
                continue
            reusable = [s for s in dying if s in held and held[s] == size] if is_fused else []
            if reusable:
                del held[reusable[0]]
            held[storage] = size
        curve += [sum(held.values())] * len(groups[number])
        for storage in list(held):
            if last_read[storage] <= number and storage not in trace.gradients:
                del held[storage]
    return curve

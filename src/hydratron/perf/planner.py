"""Which split of a training run over a cluster is fastest, and which fit at all."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from hydratron.models.config import RECOMPUTE
from hydratron.perf.estimates import Estimate, Estimator
from hydratron.perf.hardware import GIB, Hardware
from hydratron.perf.step import StepConfig

SHARDING_EXCLUDES = "16-mixed"  # optimizer.shard works with every other precision


@dataclass
class Plan:
    """Splits of one global batch over one cluster.

    `fitting` from the fastest on; `too_big` from the smallest on; `impossible` says why a
    tensor-parallel size was left out.
    """

    fitting: list[Estimate] = field(default_factory=list)
    too_big: list[Estimate] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)

    def add(self, estimate: Estimate) -> None:
        """Put an estimate in its place, unless its configuration is there already."""
        group = self.fitting if estimate.fits else self.too_big
        if all(known.config != estimate.config for known in group):
            group.append(estimate)
            self.fitting.sort(key=lambda e: e.time.total)
            self.too_big.sort(key=lambda e: e.peak_bytes)


def tensor_parallel_sizes(hardware: Hardware) -> list[int]:
    """Return the powers of two that keep tensor-parallel traffic inside a node."""
    sizes = [2**power for power in range(hardware.gpus_per_node.bit_length())]
    return [size for size in sizes if hardware.gpus_per_node % size == 0]


def split(config: StepConfig, hardware: Hardware, tensor_parallel_size: int) -> StepConfig:
    """Return `config` over the whole cluster at a tensor-parallel size, one sequence a pass.

    Raises:
        ValueError: a dimension of the model or the global batch does not divide.
    """
    config.model.check_tensor_parallel(tensor_parallel_size)
    size, rest = divmod(hardware.num_gpus, tensor_parallel_size)
    if rest:
        raise ValueError(
            f"{hardware.num_gpus} GPUs are not divisible by tensor_parallel_size"
            f" {tensor_parallel_size}"
        )
    if config.global_batch_size % size:
        raise ValueError(
            f"global_batch_size {config.global_batch_size} is not divisible by data_parallel_size"
            f" {size}"
        )
    return replace(
        config,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=size,
        micro_batch_size=1,
        num_micro_batches=config.global_batch_size // size,
    )


def micro_batches(config: StepConfig) -> Iterator[StepConfig]:
    """Yield the ways to cut a rank's share into micro-batches of a power of two, the largest
    first.
    """
    share = config.micro_batch_size * config.num_micro_batches
    for power in reversed(range(share.bit_length())):
        size = 2**power
        if share % size == 0:
            yield replace(config, micro_batch_size=size, num_micro_batches=share // size)


def _with_batches(
    config: StepConfig, hardware: Hardware, estimator: Estimator
) -> Iterator[list[Estimate]]:
    """Estimates of one layout for each kind of recomputation, ending where everything fits.

    Recomputation costs time and a larger micro-batch never does: where the largest fits without
    more recomputation, more is of no use.
    """
    for recompute in RECOMPUTE:
        model = replace(config.model, recompute=recompute)
        steps = micro_batches(replace(config, model=model))
        found = [estimator.estimate(step, hardware) for step in steps]
        yield found
        if found[0].fits:
            return


def search(config: StepConfig, hardware: Hardware, estimator: Estimator) -> Plan:
    """Estimate every split of `config`'s global batch over the cluster that can be.

    Raises:
        ValueError: the global batch divides over the cluster at no tensor-parallel size.
    """
    plan = Plan()
    found: list[Estimate] = []
    for size in tensor_parallel_sizes(hardware):
        try:
            layout = replace(split(config, hardware, size), shard_optimizer=False)
        except ValueError as error:
            plan.impossible.append(f"TP {size}: {error}")
            continue
        for sharded in _sharding(layout):
            state = estimator.state(sharded)
            kept = state.parameters + state.gradients + state.optimizer
            if kept > hardware.usable_gib * GIB:
                kind = "sharded optimizer" if sharded.shard_optimizer else "optimizer"
                plan.impossible.append(
                    f"TP {size}: parameters, gradients and {kind} alone take {kept / GIB:.1f} of"
                    f" {hardware.usable_gib:.1f} GiB"
                )
                continue
            batches = list(_with_batches(sharded, hardware, estimator))
            found += [estimate for group in batches for estimate in group]
            if len(batches) == 1:
                break  # sharding would only add traffic
    if not found and all("not divisible" in reason for reason in plan.impossible):
        raise ValueError(f"{plan.impossible[0]}; {_nearest_division(config, hardware)}")
    for estimate in found:
        plan.add(estimate)
    return plan


def _sharding(layout: StepConfig) -> list[StepConfig]:
    is_possible = layout.data_parallel_size > 1 and layout.precision != SHARDING_EXCLUDES
    return [layout, *([replace(layout, shard_optimizer=True)] if is_possible else [])]


def _nearest_division(config: StepConfig, hardware: Hardware) -> str:
    """Say which number of nodes divides the batch, the nearest to the one given."""
    found = set()
    for size in tensor_parallel_sizes(hardware):
        for num_replicas in _divisors(config.global_batch_size):
            num_nodes, rest = divmod(num_replicas * size, hardware.gpus_per_node)
            if rest == 0 and num_nodes <= 2 * hardware.num_nodes:
                with contextlib.suppress(ValueError):
                    split(config, replace(hardware, num_nodes=num_nodes), size)
                    found.add(num_nodes)
    if not found:
        return f"no number of nodes up to {2 * hardware.num_nodes} divides it"
    nearest = min(found, key=lambda number: (abs(number - hardware.num_nodes), number))
    return f"hardware.num_nodes={nearest} would work"


def _divisors(number: int) -> set[int]:
    """The divisors of a number; of one beyond 1e12 those whose smaller part is up to a million."""
    small = [n for n in range(1, min(math.isqrt(number), 10**6) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}


def smallest(config: StepConfig, hardware: Hardware, estimator: Estimator) -> Estimate:
    """Return the split that needs the least memory: one sequence a pass, everything computed again,
    the optimizer sharded where it can be.
    """
    model = replace(config.model, recompute="full")
    found = []
    for size in tensor_parallel_sizes(hardware):
        try:
            layout = split(replace(config, model=model, shard_optimizer=False), hardware, size)
        except ValueError:
            continue
        found += [estimator.estimate(step, hardware) for step in _sharding(layout)]
    return min(found, key=lambda e: e.peak_bytes)


def nearest_fit(config: StepConfig, hardware: Hardware, estimator: Estimator) -> str:
    """Say in one line what is missing where nothing fits, and the nearest change that would do."""
    least = smallest(config, hardware, estimator)
    step = least.config
    line = (
        f"nothing fits {hardware.num_gpus} x {hardware.name} of {hardware.usable_gib:.1f} GiB: the"
        f" least is {least.peak_bytes / GIB:.1f} GiB (TP {step.tensor_parallel_size},"
        f" micro-batch 1, recompute=full, optimizer.shard={str(step.shard_optimizer).lower()})"
    )
    changes = [(f"hardware.num_nodes={2**n * hardware.num_nodes}", config, 2**n) for n in (1, 2, 3)]
    if config.precision == SHARDING_EXCLUDES and hardware.has_bf16:
        mixed = replace(config, precision="bf16-mixed")
        name = "trainer.precision=bf16-mixed optimizer.shard=true"
        changes.insert(0, (name, mixed, 1))
        changes += [(f"{name} {more}", mixed, times) for more, _, times in changes[1:]]
    for change, other, times in changes:
        cluster = replace(hardware, num_nodes=times * hardware.num_nodes)
        try:
            fits = smallest(other, cluster, estimator).fits
        except ValueError:  # the batch does not divide over so many
            continue
        if fits:
            return f"{line}; {change} would"
    needed = least.peak_bytes / GIB + hardware.reserved_gib
    return f"{line}; GPUs of {needed:.0f} GiB would"


def weak_scaling(best: Estimate, estimator: Estimator, *, max_gpus: int = 1024) -> list[Estimate]:
    """Return the best split's replica on 1, 2, 4, ... replicas, on clusters as large as needed."""
    config, hardware = best.config, best.hardware
    found = []
    size = 1
    while size * config.tensor_parallel_size <= max_gpus:
        num_gpus = size * config.tensor_parallel_size
        nodes = max(1, -(-num_gpus // hardware.gpus_per_node))
        grown = replace(config, data_parallel_size=size, shard_optimizer=False)
        found.append(estimator.estimate(grown, replace(hardware, num_nodes=nodes)))
        size *= 2
    return found

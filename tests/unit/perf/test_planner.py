"""The search over splits, and what it says where nothing works."""

from dataclasses import replace

import pytest

from hydratron.perf.planner import nearest_fit, search, weak_scaling
from hydratron.perf.step import StepConfig
from tests.unit.perf.steps import ESTIMATOR, hardware, small, step

CLUSTER = hardware("h200", gpus_per_node=2, num_nodes=2)


def batch(num_sequences: int, **changes: object) -> StepConfig:
    return step(small(hidden_size=256), 1, num_micro_batches=num_sequences, **changes)


def test_every_split_is_there_once_the_fastest_first() -> None:
    plan = search(batch(16), CLUSTER, ESTIMATOR)
    layouts = {
        (e.config.tensor_parallel_size, e.config.data_parallel_size, e.config.micro_batch_size)
        for e in plan.fitting
    }
    assert layouts == {(1, 4, b) for b in (4, 2, 1)} | {(2, 2, b) for b in (8, 4, 2, 1)}
    assert all(e.config.global_batch_size == 16 for e in plan.fitting)
    times = [e.time.total for e in plan.fitting]
    assert times == sorted(times)
    assert not plan.too_big
    # where the largest micro-batch fits, recomputing and sharding would only cost time
    assert not any(e.config.shard_optimizer for e in plan.fitting)
    assert {e.config.model.recompute for e in plan.fitting} == {"none"}


def test_what_is_too_big_without_recomputation_may_fit_with_it() -> None:
    need = search(batch(256), CLUSTER, ESTIMATOR).fitting[0].peak_bytes / 2**30
    tight = replace(CLUSTER, memory_gib=0.6 * need, reserved_gib=0.0, workspace_gib=0.0)
    plan = search(batch(256), tight, ESTIMATOR)
    assert plan.too_big
    assert all(e.peak_bytes <= tight.usable_gib * 2**30 for e in plan.fitting)
    assert {"selective", "full"} & {e.config.model.recompute for e in plan.fitting}


def test_a_dimension_that_does_not_divide_leaves_its_size_out() -> None:
    network = small(num_heads=1)
    plan = search(step(network, 4), CLUSTER, ESTIMATOR)
    assert plan.impossible == ["TP 2: num_heads 1 is not divisible by tensor_parallel_size 2"]
    assert {e.config.tensor_parallel_size for e in plan.fitting} == {1}


def test_a_batch_that_does_not_divide_names_the_nearest_cluster() -> None:
    cluster = replace(CLUSTER, num_nodes=3)
    with pytest.raises(
        ValueError, match=r"global_batch_size 16 .* by data_parallel_size 6; hardware.num_nodes=2"
    ):
        search(batch(16), cluster, ESTIMATOR)


@pytest.mark.parametrize(
    ("num_nodes", "num_sequences", "answer"),
    [
        (10**6, 16, "hardware.num_nodes=16 would work"),
        (5, 16, "hardware.num_nodes=4 would work"),
        (3, 10**12, "hardware.num_nodes=2 would work"),
        (6, 10**13, "hardware.num_nodes=5 would work"),
        (2**20, 2**40 + 15, "hardware.num_nodes="),  # a prime: two GPUs of one tensor-parallel pair
    ],
)
def test_the_nearest_cluster_is_found_by_arithmetic(num_nodes, num_sequences, answer) -> None:
    cluster = replace(CLUSTER, num_nodes=num_nodes)
    with pytest.raises(ValueError, match=answer):
        search(batch(num_sequences), cluster, ESTIMATOR)


def test_where_nothing_fits_the_nearest_change_is_named() -> None:
    config = batch(16, precision="16-mixed")
    least = ESTIMATOR.state(config).optimizer / 2**30
    tiny = replace(CLUSTER, memory_gib=least, reserved_gib=0.0, workspace_gib=0.0)
    assert not search(config, tiny, ESTIMATOR).fitting
    line = nearest_fit(config, tiny, ESTIMATOR)
    assert line.startswith("nothing fits 4 x h200 of 0.0 GiB: the least is")
    assert line.endswith(" would")


def test_weak_scaling_loses_only_what_averaging_costs() -> None:
    best = search(batch(16), CLUSTER, ESTIMATOR).fitting[0]
    curve = weak_scaling(best, ESTIMATOR, max_gpus=64)
    assert [e.config.world_size for e in curve][-1] == 64
    rates = [e.tflops_per_gpu for e in curve]
    assert rates == sorted(rates, reverse=True)
    assert curve[0].time.data_parallel == 0 < curve[-1].time.data_parallel
    assert curve[0].time.products == pytest.approx(curve[-1].time.products)

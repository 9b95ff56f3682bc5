"""Collectives on links, products on tiles: the arithmetic of the time model."""

import math
from dataclasses import replace

import pytest

from hydratron.perf.calibration import calibrate
from hydratron.perf.devices import peak_tflops
from hydratron.perf.hardware import GroupShape, group_shape
from hydratron.perf.kernels import as_compiled
from hydratron.perf.roofline import shape_efficiency, step_time
from hydratron.perf.step import trace_passes
from tests.unit.perf.steps import CONF, ESTIMATOR, hardware, small, step

PROFILES = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_named_for_its_file(name: str) -> None:
    assert hardware(name).name == name


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_s_peak_is_the_one_that_shares_are_of(name: str) -> None:
    cluster = hardware(name)
    assert cluster.peak_tflops == peak_tflops(f"NVIDIA {name.split('_')[0].upper()}")
    cluster.check_precision("bf16-mixed" if cluster.has_bf16 else "16-mixed")


@pytest.mark.parametrize(
    ("key", "value"), [("memory_gib", 0), ("product_efficiency", 1.2), ("overlap", -0.1)]
)
def test_a_value_that_cannot_be_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"hardware.{key} {value} is not"):
        hardware("h200", **{key: value})


def test_a_pair_of_h200_adds_64_mib_in_the_measured_time() -> None:
    """302 us over NVLink; the profile's bandwidth is what that leaves after the start."""
    seconds = hardware("h200").collective_seconds("all_reduce", 2**26, GroupShape(2, 2, 1))
    assert seconds == pytest.approx(302e-6, rel=0.02)


def test_a_ring_passes_every_byte_but_a_share() -> None:
    """(n-1)/n of the tensor through each link, twice for an all-reduce; nothing for one rank."""
    cluster = hardware("h200", collective_us=0, intra_node_latency_us=0)
    gathered = cluster.collective_seconds("all_gather", 240 * 10**9, GroupShape(8, 8, 1))
    assert gathered == pytest.approx(7 / 8)
    summed = cluster.collective_seconds("all_reduce", 240 * 10**9, GroupShape(8, 8, 1))
    assert summed == pytest.approx(2 * 7 / 8)
    assert cluster.collective_seconds("all_reduce", 10**9, GroupShape(1, 1, 1)) == 0


def test_between_nodes_the_groups_of_a_node_share_its_adapters() -> None:
    """TP 8 x DP 4 over 8-GPU nodes: eight data-parallel groups leave each node at once."""
    cluster = hardware("a100_40gb", num_nodes=4, collective_us=0, inter_node_latency_us=0)
    group = group_shape(cluster, "dp", tensor_parallel_size=8, data_parallel_size=4)
    assert group == GroupShape(4, 1, 8)
    seconds = cluster.collective_seconds("all_gather", 10**9, group)
    assert seconds == pytest.approx(3 / 4 / (180 / 8))
    alone = group_shape(cluster, "dp", tensor_parallel_size=1, data_parallel_size=32)
    assert alone == GroupShape(32, 8, 1)


def test_a_tree_is_faster_than_a_ring_where_messages_are_small_and_groups_large() -> None:
    cluster = hardware("a100_40gb", num_nodes=128)
    group = GroupShape(128, 1, 8)
    small_message = cluster.collective_seconds("all_reduce", 1000, group)
    assert small_message < 2 * 7 * 15e-6 + 20e-6  # logarithmic: 7 hops up and down
    assert cluster.collective_seconds("all_gather", 1000, group) > 127 * 10e-6


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("num_nodes", 0, "positive"),
        ("peak_tflops", math.nan, "finite"),
        ("intra_node_bandwidth", 0.0, "positive"),
        ("memory_gib", math.inf, "finite"),
        ("product_efficiency", math.nan, r"in \(0, 1\]"),
        ("overlap", math.nan, r"in \[0, 1\]"),
        ("reserved_gib", -1.0, "at least 0"),
    ],
)
def test_no_figure_of_a_cluster_is_nan_infinite_or_negative(key, value, rule) -> None:
    with pytest.raises(ValueError, match=rf"^hardware\.{key} {value} is not {rule}$"):
        hardware("h200", **{key: value})


def test_a_product_s_last_wave_is_not_full() -> None:
    cluster = hardware("h200", num_multiprocessors=128)
    whole = shape_efficiency((1, 4096, 1024, 8192), cluster)  # 16 x 8 = 128 tiles of 256 x 128
    one_more = shape_efficiency((1, 4096 + 256, 1024, 8192), cluster)
    assert whole == pytest.approx(8192 / (8192 + 128))
    assert one_more < 0.75 * whole
    assert shape_efficiency((1, 4096, 1024, 128), cluster) == pytest.approx(0.5)


def test_calibration_finds_the_share_of_peak_that_explains_a_step() -> None:
    config, cluster = step(small(hidden_size=512), 64), hardware("a100_40gb")
    traces = ESTIMATOR.traces(config)
    measured = step_time(config, replace(cluster, product_efficiency=0.42), traces).total
    found = calibrate(cluster, config, traces, measured)
    assert found.product_efficiency == pytest.approx(0.42, rel=1e-3)
    with pytest.raises(ValueError, match=r"a measured step of 0\.0 ms is outside what a100_40gb"):
        calibrate(cluster, config, traces, 1e-9)


def test_the_traces_of_small_micro_batches_tell_a_large_one() -> None:
    config = step(small(), 6, tensor_parallel_size=2)
    direct = as_compiled(trace_passes(config, 2)).operators
    derived = ESTIMATOR.traces(config).passes[1].operators
    assert [(op.name, op.shape, op.flops, op.num_bytes) for op in derived] == [
        (op.name, op.shape, op.flops, op.num_bytes) for op in direct
    ]
    # a lookup reads at most its whole table, which is not affine
    pairs = [pair for pair in zip(derived, direct, strict=True) if pair[0].name != "embedding"]
    assert all(list(a.reads.values()) == list(b.reads.values()) for a, b in pairs)

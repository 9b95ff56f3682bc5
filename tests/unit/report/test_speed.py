"""Benchmarks: our rows, the peer's, three definitions of scaling, and the seed's Table 4."""

from typing import Any

import pandas as pd
import pytest

from hydratron.report.document import section_tables, write_report
from hydratron.report.groups import split_sections
from hydratron.report.published import seed_table
from hydratron.report.runs import load_runs
from hydratron.report.speed import section_rows, weak_scaling


def measured(size: str, *, gpus: int, step_ms: float, tflops: float) -> dict[str, Any]:
    billions = float(size.removesuffix("b"))
    return {
        "command": "benchmark",
        "model": "gpt2",
        "size": size,
        "layernorm": "pre",
        "tensor_parallel_size": gpus,
        "data_parallel_size": 1,
        "num_parameters": 1e9 * billions,
        "batch": 16,
        "seq_len": 1024,
        "device": "NVIDIA H200",
        "perf/step_ms": step_ms,
        "perf/step_ms_low": step_ms - 1,
        "perf/step_ms_high": step_ms + 1,
        "perf/tflops_per_gpu": tflops,
        "perf/tflops_per_gpu_with_recomputation": 1.3 * tflops,
        "perf/mfu": tflops / 989.4,
        "perf/breakdown/attention_ms": 21.0,
    }


@pytest.fixture
def section(writer):
    settings = {"trainer.precision": "bf16-mixed", "model.recompute": "none"}
    peer = {"peer/step_ms": 300.0, "peer/step_ms_low": 299.0, "peer/step_ms_high": 301.0}
    small = measured("1b", gpus=1, step_ms=200.0, tflops=400.0) | peer
    writer.run("0", {"size": "1b", "timing.peer": "transformers"} | settings, result=small)
    large = measured("3b", gpus=4, step_ms=250.0, tflops=300.0)
    writer.run("1", {"size": "3b"} | settings, result=large)
    (section,) = split_sections(load_runs([writer.root]))
    return section


def test_the_peer_has_a_row_of_its_own(section) -> None:
    rows = section_rows(section)
    implementations = [row["implementation"] for row in rows]
    assert implementations == ["hydratron", "transformers", "hydratron"]
    assert [row["step_ms"] for row in rows] == [200.0, 300.0, 250.0]
    assert {row["precision"] for row in rows} == {"bf16-mixed"}
    assert rows[2]["command"].startswith("hydratron benchmark size=3b ")


def test_scaling_has_three_definitions(section) -> None:
    small, _, large = section_rows(section)
    scaling = weak_scaling(large, small)
    assert scaling.flops == pytest.approx(300 / 400)
    assert scaling.parameters == pytest.approx((3 / 4 / 250) / (1 / 200))
    assert scaling.time == pytest.approx(200 / 250)


def test_tables_show_steps_where_the_time_goes_and_scaling(section) -> None:
    steps, breakdown, scaling = section_tables(section)
    assert [row[0] for row in steps.rows] == [
        "gpt2 1b pre, bf16-mixed",
        "transformers: gpt2 1b pre, bf16-mixed",
        "gpt2 3b pre, bf16-mixed",
    ]
    assert steps.rows[2][1:5] == ["4 x 1", "16 x 1024", "250.00", "249.00 – 251.00"]
    assert breakdown.rows[0][2:] == ["–", "21.0", "–", "–", "–"]
    assert scaling.rows[-1] == ["3b", "4 x 1", "75.0", "60.0", "80.0"]


def test_our_rows_stand_below_table_4_s(section) -> None:
    table = seed_table(section)
    assert table is not None
    assert table.rows[3] == ["Megatron-GPT2, A100", "8.7B", "8", "85", "76.6", "79.6", "27.2"]
    assert len(table.rows) == 4 + 2  # the peer is not ours
    assert table.rows[-1][1:] == ["3B", "4", "300", "75.0", "60.0", "30.3"]


def test_the_rows_are_left_as_a_file(section, writer, tmp_path) -> None:
    write_report(load_runs([writer.root]), tmp_path / "report")
    rows = pd.read_csv(tmp_path / "report/speed.csv")
    columns = "model,size,layernorm,precision,tensor_parallel_size,data_parallel_size,batch"
    columns += ",step_ms,dropout,tflops_per_gpu,mfu,peak_memory_gib,implementation"
    assert set(columns.split(",")) <= set(rows.columns)
    assert len(rows) == 3


def test_a_benchmark_that_failed_has_no_rows(writer) -> None:
    result = {"command": "benchmark", "status": "failed", "error": "no GPU"}
    writer.run("0", {"size": "1b"}, result=result)
    (section,) = split_sections(load_runs([writer.root]))
    assert section_rows(section) == []
    assert len(section_tables(section)) == 1
    assert len(seed_table(section).rows) == 4


def test_how_kernels_are_launched_tells_steps_apart(writer) -> None:
    settings = {"trainer.precision": "bf16-mixed", "model.recompute": "none"}
    one = measured("1b", gpus=1, step_ms=200.0, tflops=400.0)
    writer.run("0", {"size": "1b"} | settings, result=one)
    launched = {"trainer.cuda_graphs": "true", "parallel.interleave": "true"}
    two = measured("2b", gpus=2, step_ms=210.0, tflops=380.0)
    writer.run("1", {"size": "2b"} | settings | launched, result=two)
    (section,) = split_sections(load_runs([writer.root]))
    assert [row["cuda_graphs"] for row in section_rows(section)] == [None, True]
    steps, _, scaling = section_tables(section)
    assert steps.rows[1][0] == "gpt2 2b pre, bf16-mixed, cuda_graphs, interleave"
    assert [row[0] for row in scaling.rows] == ["1b", "2b, cuda_graphs, interleave"]
    # one GPU was not measured so launched: nothing to scale from
    assert scaling.rows[1][2:] == ["–", "–", "–"]
    assert seed_table(section).rows[-1][4:6] == ["–", "–"]


def test_scaling_is_from_one_gpu_with_the_same_batch_precision_and_recomputation(writer) -> None:
    settings = {"trainer.precision": "bf16-mixed", "model.recompute": "none"}
    runs = [
        ("355m", 1, 16, {}, 100.0),  # alike, but not what a GPU of 2b holds
        ("1b", 1, 8, {}, 450.0),
        ("1b", 1, 16, {"model.recompute": "full"}, 300.0),
        ("1b", 1, 16, {"trainer.precision": "fp8"}, 600.0),
        ("1b", 1, 16, {}, 400.0),
        ("2b", 2, 16, {}, 200.0),
    ]
    for number, (size, gpus, batch, other, tflops) in enumerate(runs):
        billions = "0.355b" if size == "355m" else size
        found = measured(billions, gpus=gpus, step_ms=200.0, tflops=tflops) | {"batch": batch}
        writer.run(str(number), {"size": size} | settings | other, result=found)
    replicas = measured("1b", gpus=1, step_ms=200.0, tflops=360.0)
    replicas |= {"data_parallel_size": 2, "batch": 32}  # 16 a replica
    writer.run("6", {"size": "1b"} | settings, result=replicas)
    (section,) = split_sections(load_runs([writer.root]))
    (scaling,) = [t for t in section_tables(section) if "weak scaling" in t.title]
    shown = {tuple(row[:2]): row[2] for row in scaling.rows if row[1] != "1 x 1"}
    assert shown == {("2b", "2 x 1"): "50.0", ("1b", "1 x 2"): "90.0"}
    assert [row[4] for row in seed_table(section).rows if row[2] == "2"][-1] == "50.0"

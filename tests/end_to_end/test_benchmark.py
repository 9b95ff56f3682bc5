"""`hydratron benchmark` on the CPU: the steps are real, so the path is never dead."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import result

SMALL = [
    "size=tiny",
    "model.num_layers=2",
    "data.tokenizer=character",
    "data.global_batch_size=4",
    "data.seq_len=16",
    "timing.warmup_steps=1",
    "timing.steps=3",
    "timing.profile_steps=1",
    "hydra.run.dir=run",
]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(("model", "layernorm"), [("gpt2", "pre"), ("bert", "post")])
def test_a_peer_of_the_same_shape_stands_beside(
    in_process: Run, tmp_path: Path, model: str, layernorm: str
) -> None:
    peer = [f"model={model}", f"layernorm={layernorm}", "timing.peer=transformers"]
    done = in_process("benchmark", *SMALL, *peer)
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "run")
    assert found["device"] == "CPU"
    assert f"perf/step_ms {found['perf/step_ms']:.5g}" in done.stdout
    for side in ("perf", "peer"):
        assert found[f"{side}/step_ms_low"] <= found[f"{side}/step_ms"]
        assert found[f"{side}/step_ms"] <= found[f"{side}/step_ms_high"]
        tokens = 4 * 16 / found[f"{side}/step_ms"] * 1e3
        assert found[f"{side}/tokens_per_second"] == pytest.approx(tokens)
        assert found[f"{side}/tflops_per_gpu"] > 0
    ratio = found["peer/step_ms"] / found["perf/step_ms"]
    assert found["perf/ratio_to_peer"] == pytest.approx(ratio)
    overhead = found["perf/step_ms"] / found["perf/bare_step_ms"] - 1
    assert found["perf/lightning_overhead"] == pytest.approx(overhead)
    assert "perf/mfu" not in found  # nobody publishes a CPU's peak
    assert not (tmp_path / "run/checkpoints").exists()


def test_two_ranks_are_timed_as_one(in_process: Run, tmp_path: Path) -> None:
    done = in_process("benchmark", *SMALL, "parallel=tp2")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "run")
    assert found["tensor_parallel_size"] == 2
    assert found["perf/step_ms"] > 0
    assert found["perf/bare_step_ms"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("timing.steps=1", "timing.steps 1 is not at least 2"),
        ("timing.peer=megatron", "timing.peer 'megatron' is not one of transformers"),
        (
            "trainer.accelerator=gpu trainer.cuda_graphs=true timing.warmup_steps=1",
            "timing.warmup_steps 1 is not at least 2",
        ),
        ("parallel=tp2 timing.peer=transformers", "it needs parallel=single"),
        ("model=gpt2 layernorm=post timing.peer=transformers", "GPT-2 with layernorm post has no"),
        ("timing=null", "timing null is not a group of keys"),
        ("trainer.max_steps=5", "trainer.max_steps is not a benchmark's: timing.steps are"),
    ],
)
def test_what_cannot_be_timed_is_one_line(in_process: Run, override: str, message: str) -> None:
    done = in_process("benchmark", *SMALL, *override.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_table_4_at_eight_ranks(hydratron: Run, tmp_path: Path) -> None:
    """Eight-way tensor parallel, as its last row, in the size of a CPU."""
    experiment = ["experiment=table4", "+num_gpus.tiny=8", "model.num_heads=8", "trainer=cpu"]
    done = hydratron("benchmark", *experiment, *SMALL, "data.num_workers=0")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "run")
    assert found["tensor_parallel_size"] == 8
    assert found["perf/step_ms"] > 0

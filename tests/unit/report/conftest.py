"""Synthetic run directories, laid out as Hydra and a job lay them out."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml


class RunWriter:
    """Writes runs and sweeps below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(
        self,
        name: str,
        overrides: dict[str, Any],
        *,
        result: dict[str, Any] | None = None,
        metrics: str | None = None,
    ) -> Path:
        """A job's directory; without `result` it is one that has started and not ended."""
        path = self.root / name
        (path / ".hydra").mkdir(parents=True)
        lines = [f"{key}={value}" for key, value in overrides.items()]
        (path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(lines))
        if result is not None:
            full = {"command": "pretrain", "status": "ok", "error": None, "overrides": overrides}
            full |= {"seed": overrides.get("seed", 0), "duration_s": 10.0, "steps": 600}
            full |= {"model": "bert", "size": "tiny", "num_parameters": 616_000, **result}
            (path / "result.json").write_text(json.dumps(full))
        if metrics is not None:
            (path / "metrics.csv").write_text(metrics)
        return path

    def multirun(
        self, name: str, overrides: list[str], params: dict[str, Any] | None = None
    ) -> None:
        """The multirun.yaml that Hydra writes before the first job."""
        hydra = {"overrides": {"task": overrides}, "sweeper": {"params": params}}
        (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / name / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))


def curve(start: float, end: float, *, steps: int = 600, every: int = 20, wave: float = 0.0) -> str:
    """A metrics.csv whose losses fall from `start` to `end`; the held-out loss has gaps."""
    rows = ["step,train/loss,val/loss"]
    for step in range(every, steps + 1, every):
        loss = end + (start - end) * math.exp(-4.5 * step / steps) + wave * math.sin(step / 37)
        held_out = f"{loss + 0.02:.5f}" if step % (2 * every) == 0 else ""
        rows.append(f"{step},{loss:.5f},{held_out}")
    return "\n".join(rows) + "\n"


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    return RunWriter(tmp_path)


@pytest.fixture
def ablation(writer: RunWriter) -> RunWriter:
    """The quickstart's sweep: placement x learning rate x seeds; post fails at the high rate.

    Final losses: pre 2.41/2.45 and 2.50/2.54; post 2.95/2.97 at 0.003 and 2.55/2.57 at 0.001.
    """
    writer.multirun(
        "sweep",
        ["experiment=quickstart", "seed=1,2"],
        {"layernorm": "post,pre", "optimizer.lr": "0.001,0.003"},
    )
    finals = {
        ("post", 0.001): 2.55,
        ("post", 0.003): 2.95,
        ("pre", 0.001): 2.50,
        ("pre", 0.003): 2.41,
    }
    for job, (seed, (placement, lr)) in enumerate(product((1, 2), finals)):
        loss = finals[placement, lr] + (0.02 if placement == "post" else 0.04) * (seed - 1)
        overrides = {"experiment": "quickstart", "layernorm": placement, "optimizer.lr": lr}
        result = {"val/loss": loss, "train/loss": loss - 0.02, "val/unigram_entropy": 2.91}
        result |= {"layernorm": placement, "perf/tokens_per_second": 10_000 + 10 * job}
        writer.run(
            f"sweep/{job}",
            overrides | {"seed": seed},
            result=result,
            metrics=curve(4.2, loss - 0.02, wave=0.015 * seed),
        )
    return writer

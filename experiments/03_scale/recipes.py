"""Keep the plans of the seed's recipes; writes `recipes.csv` and the two figures of memory.

    python experiments/03_scale/recipes.py PLAN_DIRECTORY ...

Each is the run directory of a `hydratron plan`. Without any, the figures are drawn again.
"""

import json
import sys
from pathlib import Path

import pandas as pd
from predict import read

from hydratron.report.planning import memory_bars

HERE = Path(__file__).parent
KEPT = ("gpus", "tensor_parallel_size", "data_parallel_size", "micro_batch_size")
KEPT += ("num_micro_batches", "recompute", "shard_optimizer", "step_ms", "tflops_per_gpu", "mfu")
KEPT += ("peak_gib", "parameters_gib", "optimizer_gib", "gradients_gib", "activations_gib")
KEPT += ("days", "gpu_hours")
DRAWN = {"bert 3.9b": "memory_bert_3.9b", "gpt2 8.3b": "memory_gpt2_8.3b"}
ON = "a100_40gb"


def kept_rows(directory: Path) -> pd.DataFrame:
    """The rows of a plan, ranked where they fit."""
    result = json.loads((directory / "result.json").read_text())
    rows = pd.read_csv(directory / "plan.csv")
    rank = rows["fits"].cumsum().where(rows["fits"]).astype("Int64")
    recipe = f"{result['model']} {result['size']}"
    heads = {"recipe": recipe, "hardware": result["hardware"], "rank": rank}
    return pd.DataFrame(heads | {key: rows[key].round(3) for key in KEPT})


def draw(directory: Path) -> None:
    """Draw the five fastest splits of each recipe on A100s, and the smallest that does not fit."""
    recipes = pd.read_csv(HERE / "recipes.csv")
    profile = read("hardware", ON)
    limit = profile["memory_gib"] - profile.get("reserved_gib", 2.0)
    for recipe, name in DRAWN.items():
        rows = recipes[(recipes["recipe"] == recipe) & (recipes["hardware"] == ON)]
        bars = pd.concat([rows.dropna(subset="rank")[:5], rows[rows["rank"].isna()][:1]])
        first = rows.iloc[0]
        batch = first["micro_batch_size"] * first["num_micro_batches"] * first["data_parallel_size"]
        title = f"{recipe}, {first['gpus']} x {ON}, {batch} sequences a step"
        memory_bars(bars.to_dict("records"), directory / name, limit_gib=limit, title=title)


def main() -> None:
    """Write the rows of the plans that are named, then draw."""
    if plans := sys.argv[1:]:
        kept = [kept_rows(Path(directory)) for directory in plans]
        pd.concat(kept).to_csv(HERE / "recipes.csv", index=False)
    draw(HERE)


if __name__ == "__main__":
    main()

"""Finetuning scores and speed, beside the plain loop of transformers in the same run.

python benchmarks/finetune.py MODEL DATA OUTPUT [--set KEY=VALUE ...]

MODEL: a BERT folder of transformers. DATA: a folder with mnli/, qqp/, squad/ and race/ (files as in
TASKS, also .gz). OUTPUT gets results.csv, a row as soon as it is there, the runs and their logs.
Stages, in the order given: `alone`: `hydratron finetune` with the first seed, one after another;
`peer`: plain_finetuning.py, one after another; `scores`: the other seeds, several at a time, which
say nothing of speed; `compiled`: the first 400 steps again with compiled layers. What is not done
after --limit seconds is left out. A command of OUTPUT is one that can be run by hand.
"""

import argparse
import csv
import gzip
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
COLUMNS = ("stage", "task", "system", "variant", "seed", "status", "steps", "examples_per_second",
           "run_examples_per_second", "seconds", "score", "second_score", "command")  # fmt: skip
COMPILED_STEPS = 400


@dataclass(frozen=True)
class Recipe:
    """A task's files, its recipe, its peers, and the score of the plain loop less one point."""

    train: str
    validation: str
    arguments: tuple[str, ...]
    batch_size: int
    lr: str
    peers: tuple[str, ...]
    metrics: tuple[str, ...]
    targets: tuple[float, ...]


GLUE = {"arguments": ("task.epochs=3",), "batch_size": 32, "lr": "5e-5",
        "peers": ("tokenised", "collate")}  # fmt: skip
TASKS = {
    "mnli": Recipe("mnli/mnli_train_union.jsonl", "mnli/mnli_dev_matched.jsonl",
                   metrics=("val/accuracy_matched",), targets=(68.2,), **GLUE),
    "qqp": Recipe("qqp/qqp_train.jsonl", "qqp/qqp_dev.jsonl",
                  metrics=("val/accuracy", "val/f1"), targets=(82.2,), **GLUE),
    "squad1": Recipe("squad/train-v1.1.subset.json", "squad/dev-v1.1.json",
                     ("task.epochs=3", "task.max_seq_len=384", "task.doc_stride=128"), 32, "1e-4",
                     ("tokenised", "max_length"), ("val/f1", "val/exact_match"), (69.3, 57.9)),
    "race": Recipe("race/train.middle.jsonl", "race/dev.middle.jsonl",
                   ("task.epochs=2",), 16, "5e-5", ("tokenised", "collate"),
                   ("val/accuracy",), (49.0,)),
}  # fmt: skip


class Benchmark:
    """What is to be measured, and the rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.graphs = True
        options.output.mkdir(parents=True, exist_ok=True)
        with (options.output / "results.csv").open("w") as file:
            csv.DictWriter(file, COLUMNS).writeheader()

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.options.limit - (time.monotonic() - self.started)

    def add(self, **row: Any) -> None:
        """Write a row and show it."""
        self.rows.append(row)
        with (self.options.output / "results.csv").open("a") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        shown.pop("command")
        elapsed = time.monotonic() - self.started
        print(
            f"[{elapsed:4.0f} s]", *(v for v in shown.values() if v not in (None, "")), flush=True
        )

    def run(self, command: list[str], log: Path) -> tuple[str, float]:
        """Run a command, its output into `log`; return how it ended and its seconds."""
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("w") as file:
            try:
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, timeout=max(1.0, self.left)
                ).returncode
            except subprocess.TimeoutExpired:
                return "cut off", time.monotonic() - started
        return ("ok" if status == 0 else f"exit {status}"), time.monotonic() - started

    def path(self, name: str) -> Path:
        """A file of DATA, cut to --rows where that is given."""
        path = self.options.data / name
        path = path if path.exists() else path.with_name(path.name + ".gz")
        if not self.options.rows:
            return path
        cut = self.options.output / "data" / name
        if not cut.exists():
            cut_file(path, cut, self.options.rows)
        return cut

    def finetune(self, stage: str, task: str, seed: int, **settings: Any) -> None:
        """One `hydratron finetune`; `settings` are the trainer's."""
        recipe = TASKS[task]
        variant = "+".join([k for k, v in settings.items() if v is True] or ["eager"])
        run_dir = self.options.output / "runs" / f"{task}-{variant}-{seed}"
        values = {"val_every": 0, "checkpoint_every": 0, "log_every": 50} | settings
        command = [
            sys.executable, "-m", "hydratron.cli", "finetune", f"task={task}",
            f"trainer={self.options.trainer}",
            f"checkpoint={self.options.model}", f"seed={seed}",
            f"task.train_path={self.path(recipe.train)}",
            f"task.validation_path={self.path(recipe.validation)}", *recipe.arguments,
            f"data.global_batch_size={recipe.batch_size}", f"optimizer.lr={recipe.lr}",
            *(f"trainer.{key}={str(value).lower()}" for key, value in values.items()),
            *self.options.set, f"hydra.run.dir={run_dir}",
        ]  # fmt: skip
        status, seconds = self.run(command, run_dir.with_suffix(".log"))
        found: dict[str, Any] = {}
        if (run_dir / "result.json").is_file():
            found = json.loads((run_dir / "result.json").read_text())
            status = found["status"]
        if status != "ok":
            print(run_dir.with_suffix(".log").read_text()[-1500:], flush=True)
        scores = [found[name] for name in recipe.metrics if name in found] + [None, None]
        scores = [x * 100 if x is not None and x <= 1 else x for x in scores]
        self.add(
            stage=stage, task=task, system="hydratron", variant=variant, seed=seed, status=status,
            steps=found.get("steps"), examples_per_second=steady_rate(run_dir / "metrics.csv"),
            run_examples_per_second=found.get("perf/examples_per_second"),
            seconds=seconds, score=scores[0], second_score=scores[1], command=" ".join(command),
        )  # fmt: skip

    def peer(self, task: str, variant: str) -> None:
        """The plain loop of transformers for some steps."""
        recipe = TASKS[task]
        command = [
            sys.executable, str(HERE / "plain_finetuning.py"), task, str(self.options.model),
            str(self.path(recipe.train)), f"--variant={variant}", f"--lr={recipe.lr}",
            f"--batch-size={recipe.batch_size}", f"--steps={self.options.peer_steps}",
            f"--device={'cuda' if self.options.trainer == 'gpu' else 'cpu'}",
        ]  # fmt: skip
        log = self.options.output / "runs" / f"{task}-peer-{variant}.log"
        status, seconds = self.run(command, log)
        found = {}
        if status == "ok":
            found = json.loads(log.read_text().splitlines()[-1])
        else:
            print(log.read_text()[-1500:], flush=True)
        self.add(
            stage="peer", task=task, system="transformers", variant=variant, seed=1, status=status,
            steps=self.options.peer_steps, examples_per_second=found.get("examples_per_second"),
            seconds=seconds, command=" ".join(command),
        )  # fmt: skip

    def alone(self) -> None:
        """The first seed of every task with nothing beside it; eager where graphs fail."""
        for task in self.options.tasks:
            self.finetune("alone", task, 1, cuda_graphs=self.graphs, compile=False)
            if self.graphs and self.rows[-1]["status"] != "ok" and self.left > 0:
                self.graphs = False
                self.finetune("alone", task, 1, cuda_graphs=False, compile=False)

    def peers(self) -> None:
        """All variants of the plain loop."""
        for task in self.options.tasks:
            for variant in TASKS[task].peers:
                if self.left > 0:
                    self.peer(task, variant)

    def scores(self) -> None:
        """The other seeds, the longest task first; all of them where `alone` was left out."""
        first = 2 if "alone" in self.options.stages else 1
        seeds = range(first, self.options.seeds + 1)
        with ThreadPoolExecutor(self.options.jobs) as pool:
            jobs = [
                pool.submit(
                    self.finetune, "scores", task, seed, cuda_graphs=self.graphs, compile=False
                )
                for task in reversed(self.options.tasks)
                for seed in seeds
            ]
        for job in jobs:
            job.result()

    def compiled(self) -> None:
        """Compiled layers, with graphs and without, for the first steps."""
        for graphs in (True, False):
            for task in reversed(self.options.tasks):
                if self.left > 0:
                    self.finetune(
                        "compiled", task, 1, cuda_graphs=graphs, compile=True,
                        max_steps=COMPILED_STEPS,
                    )  # fmt: skip

    def summary(self) -> str:
        """Median scores beside their targets, rates beside the plain loop's."""
        lines = []
        table = pd.DataFrame(self.rows, columns=list(COLUMNS))
        for task in self.options.tasks:
            rows = table[(table.task == task) & (table.status == "ok")]
            full = rows[rows.stage.isin(["alone", "scores"])]
            scores = full.score.dropna().round(2).tolist()
            second = full.second_score.dropna().tolist()
            medians = [round(statistics.median(v), 2) for v in (scores, second) if v]
            ours = rows[rows.stage == "alone"].examples_per_second.max()
            peers = rows[rows.stage == "peer"].set_index("variant").examples_per_second
            ratios = {k: f"{v:.0f} ({ours / v:.1f}x)" for k, v in peers.items()}
            compiled = rows[rows.stage == "compiled"].set_index("variant").examples_per_second
            rates = {k: round(v) for k, v in compiled.items() if v == v}
            lines.append(
                f"{task}: median {medians} of {scores}, target {TASKS[task].targets};"
                f" {ours:.0f} examples/s, plain {ratios}, compiled {rates}"
            )
        return "\n".join(lines)


def steady_rate(path: Path) -> float | None:
    """Median over the logged intervals of the run's second half, in examples a second."""
    if not path.is_file():
        return None
    column = "perf/examples_per_second"
    table = pd.read_csv(path)
    rates = table[column].dropna().tolist() if column in table else []
    return statistics.median(rates[len(rates) // 2 :]) if rates else None


def cut_file(source: Path, target: Path, num_rows: int) -> None:
    """The first rows of JSON lines, the first paragraphs of a SQuAD file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    text = (gzip.decompress(content) if source.suffix == ".gz" else content).decode()
    if target.suffix != ".json":
        target.write_text("".join(text.splitlines(keepends=True)[:num_rows]))
        return
    found = json.loads(text)
    paragraphs = [p for article in found["data"] for p in article["paragraphs"]][:num_rows]
    target.write_text(json.dumps({**found, "data": [{"title": "cut", "paragraphs": paragraphs}]}))


def main() -> None:
    """Run the stages and print the summary last."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "output"):
        parser.add_argument(name, type=lambda text: Path(text).absolute())
    parser.add_argument("--stages", nargs="+", default=["alone", "peers", "scores", "compiled"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=8, help="runs at a time in `scores`")
    parser.add_argument("--peer-steps", type=int, default=200)
    parser.add_argument("--limit", type=float, default=480, help="seconds")
    parser.add_argument("--rows", type=int, default=0, help="cut the files, to try this out")
    parser.add_argument("--trainer", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--set", nargs="*", default=[], help="more settings of finetune")
    benchmark = Benchmark(parser.parse_args())
    for stage in benchmark.options.stages:
        if benchmark.left > 0:
            getattr(benchmark, stage)()
    print(benchmark.summary())


if __name__ == "__main__":
    main()

"""The finetuning loop that users of transformers write, as the measure of `benchmarks/finetune.py`.

python benchmarks/plain_finetuning.py TASK MODEL TRAIN_FILE --variant tokenised --steps 200

An `AutoModelFor...` in float32, bfloat16 autocast on a GPU, a DataLoader without workers that
shuffles and pads each batch to its longest row, AdamW as it comes, clipping at 1.0, a linear
schedule; no `.item()` in the loop. Variants: `tokenised` has tokenised all rows before, `collate`
tokenises a batch when it is asked for, `max_length` (SQuAD) pads all rows to 384 as transformers'
own example does. Prints examples a second after warm-up, as JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from hydratron.data.glue import GlueTask, load_glue
from hydratron.data.race import load_race
from hydratron.data.squad import load_squad

SPECS = {
    "mnli": GlueTask("mnli", ("premise", "hypothesis"), ("contradiction", "entailment", "neutral")),
    "qqp": GlueTask("qqp", ("question1", "question2"), ("0", "1")),
}
SPAN_LENGTH, SPAN_STRIDE = 384, 128
WARMUP = 30  # steps
Collate = Callable[[list[Any]], dict[str, Any]]


def classification(task: str, path: Path, tokenizer: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """Rows, and what tokenises one."""
    spec = SPECS[task]

    def tokenise(row: Any) -> dict[str, Any]:
        texts = row["texts"]
        return tokenizer(*texts, truncation=True, max_length=512) | {"labels": row["label"]}

    return load_glue(spec, path, "train"), tokenise


def multiple_choice(path: Path, tokenizer: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """Rows, and what tokenises one: four sequences."""

    def tokenise(row: Any) -> dict[str, Any]:
        firsts = [f"{row.question} {option}" for option in row.options]
        found = tokenizer(
            firsts, [row.article] * 4, truncation="only_second", max_length=512
        )  # fmt: skip
        return dict(found) | {"labels": row.label}

    return load_race(path, "train"), tokenise


def spans(path: Path, tokenizer: Any, padding: Any) -> list[dict[str, Any]]:
    """Windows with the tokens where the answer starts and ends, as the tutorials find them."""
    rows = load_squad(path, "train", version="1.1")
    found = tokenizer(
        [row.question.lstrip() for row in rows],
        [row.context for row in rows],
        truncation="only_second",
        max_length=SPAN_LENGTH,
        stride=SPAN_STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=padding,
    )
    windows = []
    for i, row in enumerate(found["overflow_to_sample_mapping"]):
        answer = rows[row].answers[0]
        ends = (answer.start, answer.start + len(answer.text))
        inside = [k for k, segment in enumerate(found.sequence_ids(i)) if segment == 1]
        offsets = found["offset_mapping"][i]
        start = next((k for k in inside if offsets[k][0] <= ends[0] < offsets[k][1]), 0)
        end = next((k for k in inside if offsets[k][0] < ends[1] <= offsets[k][1]), 0)
        columns = ("input_ids", "token_type_ids", "attention_mask")
        window = {name: found[name][i] for name in columns}
        is_whole = start and end
        window |= {"start_positions": start if is_whole else 0}
        window |= {"end_positions": end if is_whole else 0}
        windows.append(window)
    return windows


def padding_collate(tokenizer: Any, tokenise: Callable[[Any], Any] | None) -> Collate:
    """Pad to the longest of the batch; choices are sequences of their own meanwhile."""

    def collate(items: list[Any]) -> dict[str, Any]:
        rows = [dict(tokenise(item)) if tokenise else dict(item) for item in items]
        columns = ("input_ids", "token_type_ids", "attention_mask")
        choices = isinstance(rows[0]["input_ids"][0], list)
        sequences = [
            {name: row[name][k] if choices else row[name] for name in columns}
            for row in rows
            for k in range(len(row["input_ids"]) if choices else 1)
        ]
        batch = dict(tokenizer.pad(sequences, return_tensors="pt"))
        if choices:
            batch = {
                name: column.view(len(rows), -1, column.size(-1)) for name, column in batch.items()
            }
        labels = rows[0].keys() - set(columns)
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in labels}

    return collate


def rate(model: Any, loader: Any, *, lr: float, steps: int, device: str) -> float:
    """Train, and return examples a second over `steps` steps after the warm-up."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 100, 10_000)
    done, rows, started = 0, 0, 0.0
    while done < WARMUP + steps:
        for batch in loader:
            if done == WARMUP:
                wait(device)
                started = time.perf_counter()
            if done == WARMUP + steps:
                break
            batch = {name: column.to(device) for name, column in batch.items()}
            with torch.autocast(device, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            rows += len(batch["input_ids"]) if done >= WARMUP else 0
            done += 1
    wait(device)
    return rows / (time.perf_counter() - started)


def wait(device: str) -> None:
    """Let the device finish what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Build the loop of one task and print its rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=[*SPECS, "squad1", "race"])
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("--variant", default="tokenised")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    settings: dict[str, Any] = {"dtype": torch.float32}
    tokenise = None
    if options.task == "squad1":
        rows = spans(options.train, tokenizer, options.variant == "max_length" and "max_length")
        kind: Any = transformers.AutoModelForQuestionAnswering
    elif options.task == "race":
        rows, tokenise = multiple_choice(options.train, tokenizer)
        kind = transformers.AutoModelForMultipleChoice
    else:
        rows, tokenise = classification(options.task, options.train, tokenizer)
        kind = transformers.AutoModelForSequenceClassification
        settings["num_labels"] = len(SPECS[options.task].labels)
    if tokenise is not None and options.variant == "tokenised":
        needed = (WARMUP + options.steps + 1) * options.batch_size
        rows, tokenise = [dict(tokenise(row)) for row in rows[:needed]], None
    loader = DataLoader(
        rows,
        batch_size=options.batch_size,
        shuffle=True,
        collate_fn=padding_collate(tokenizer, tokenise),
    )
    torch.manual_seed(1)
    model = kind.from_pretrained(options.model, **settings)
    found = rate(model, loader, lr=options.lr, steps=options.steps, device=options.device)
    print(json.dumps({"examples_per_second": found, "steps": options.steps}))


if __name__ == "__main__":
    main()

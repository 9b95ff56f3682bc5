"""The seed's published numbers as data, and tables that put ours beside them.

Source of every number: "State-of-the-Art Language Modeling Using Megatron on the NVIDIA A100 GPU"
(NVIDIA, 2020).
"""

from collections import Counter
from collections.abc import Callable

from hydratron.report.files import plain
from hydratron.report.groups import Group, Section, format_number, name_value
from hydratron.report.protocols import protocol_directory, read_protocols
from hydratron.report.speed import OURS, format_cell, one_gpu_row, section_rows, weak_scaling
from hydratron.report.tables import Table

SOURCE = '"State-of-the-Art Language Modeling Using Megatron on the NVIDIA A100 GPU" (NVIDIA, 2020)'

# Table 1: parameters, hidden size, heads, layers, tensor-parallel GPUs, all GPUs; and, from the
# text, the loss on 3 % of the corpus held out.
BERT_PRETRAINING = (
    ("Megatron-336M", "336M", 1024, 16, 24, 1, 128, 1.58),
    ("Megatron-1.3B", "1.3B", 2048, 32, 24, 1, 256, 1.30),
    ("Megatron-3.9B", "3.9B", 2560, 40, 48, 4, 512, 1.16),
)
# The same losses by number of parameters (with the vocabulary padded to 30,592), for figures.
BERT_LOSSES = tuple(
    (size, float(row[-1]))
    for size, row in zip((336_297_858, 1_280_739_202, 3_869_260_674), BERT_PRETRAINING, strict=True)
)
TASKS = ("mnli", "qqp", "squad1", "squad2", "race")
# Table 2: development sets, median of five seeds; RACE is the test set, all (middle / high).
FINETUNING = (
    ("RoBERTa", "90.2 / 90.2", "92.2", "94.6 / 88.9", "89.4 / 86.5", "83.2 (86.5 / 81.8)"),
    ("ALBERT", "90.8", "92.2", "94.8 / 89.3", "90.2 / 87.4", "86.5 (89.0 / 85.5)"),
    ("XLNet", "90.8 / 90.8", "92.3", "95.1 / 89.7", "90.6 / 87.9", "85.4 (88.6 / 84.0)"),
    ("Megatron-336M", "89.7 / 90.0", "92.3", "94.2 / 88.0", "88.1 / 84.8", "83.0 (86.9 / 81.5)"),
    ("Megatron-1.3B", "90.9 / 91.0", "92.6", "94.9 / 89.1", "90.2 / 87.1", "87.3 (90.4 / 86.1)"),
    ("Megatron-3.9B", "91.4 / 91.4", "92.7", "95.5 / 90.0", "91.2 / 88.5", "89.5 (91.8 / 88.6)"),
)
# Table 3: five-way ensembles; SQuAD development sets, RACE test set. MNLI and QQP were not
# reported.
ENSEMBLES = (
    ("ALBERT ensemble", "–", "–", "95.5 / 90.1", "91.4 / 88.9", "89.4 (91.2 / 88.6)"),
    ("Megatron-3.9B ensemble", "–", "–", "95.8 / 90.5", "91.7 / 89.0", "90.9 (93.1 / 90.0)"),
)
TASK_COLUMNS = (
    "MNLI m / mm accuracy",
    "QQP accuracy",
    "SQuAD 1.1 F1 / EM",
    "SQuAD 2.0 F1 / EM",
    "RACE accuracy (m / h)",
)
# Table 4: parameters (billions), tensor-parallel GPUs, weak scaling (%), TFLOP/s per GPU, share of
# fp16 peak (%).
WEAK_SCALING = (
    (1.2, 1, 100.0, 111, 35.7),
    (2.0, 2, 90.7, 103, 33.1),
    (4.2, 4, 86.5, 97, 31.1),
    (8.7, 8, 79.6, 85, 27.2),
)
# The metrics that stand in a task's cell, each with the names it may have been logged under; RACE
# has a cell of its own form.
TASK_METRICS = {
    "mnli": (("val/accuracy_matched", "val/accuracy"), ("val/accuracy_mismatched",)),
    "qqp": (("val/accuracy",),),
    "squad1": (("val/f1",), ("val/exact_match",)),
    "squad2": (("val/f1",), ("val/exact_match",)),
    "race": (),
}
IN_PERCENT = ("squad1", "squad2")  # as the official script gives them; the others are shares


def _value(group: Group, key: str) -> str:
    """The one value that the group's runs share in their result or configuration, else a dash."""
    values = {run.value(key) for run in group.runs} - {None}
    return format_number(values.pop()) if len(values) == 1 else "–"


def count_parameters(count: float) -> str:
    """336297858 as `336M`, 1280739202 as `1.28B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _num_parameters(group: Group) -> str:
    value = _value(group, "num_parameters")
    return count_parameters(float(value)) if value != "–" else value


def _pretraining(section: Section) -> Table:
    columns = [
        "model",
        "parameters",
        "hidden",
        "heads",
        "layers",
        "tensor parallel",
        "GPUs",
        "held-out loss",
    ]
    rows = [[*map(str, row[:7]), f"{row[7]:.2f}"] for row in BERT_PRETRAINING]
    for group in section.groups:
        spread = group.spread("val/loss")
        gpus = {
            int(r.result.get("tensor_parallel_size") or 1)
            * int(r.result.get("data_parallel_size") or 1)
            for r in group.runs
        }
        shape = [
            _value(group, f"model.{key}") for key in ("hidden_size", "num_heads", "num_layers")
        ]
        row = [f"ours: {group.label}", _num_parameters(group), *shape]
        row += [_value(group, "tensor_parallel_size"), "/".join(map(str, sorted(gpus)))]
        rows.append([*row, f"{spread.median:.2f}" if spread else "–"])
    note = (
        "Losses compare only on one corpus and vocabulary; the seed's: 174 GB, 30,522 WordPieces."
    )
    return Table(
        "Beside the seed's Table 1: BERT pretraining",
        columns,
        rows,
        notes=[note, f"Source: {SOURCE}"],
    )


def _cell(task: str, value: Callable[[str], float | None]) -> str:
    """A task's scores as the seed prints them, in percent; a dash where there is none."""
    scale = 1 if task in IN_PERCENT else 100

    def percent(*names: str) -> str | None:
        found = (value(name) for name in names)
        return next((f"{scale * number:.1f}" for number in found if number is not None), None)

    if task != "race":
        return " / ".join(filter(None, (percent(*names) for names in TASK_METRICS[task]))) or "–"
    for split, mark in (("test", ""), ("val", " dev")):
        if overall := percent(f"{split}/accuracy"):
            levels = [percent(f"{split}/accuracy_{level}") for level in ("middle", "high")]
            said = f" ({levels[0]} / {levels[1]})" if all(levels) else ""
            return f"{overall}{said}{mark}"
    return "–"


def _finetuning(section: Section) -> Table:
    ours: dict[str, list[str]] = {}

    def put(name: str, task: str, value: Callable[[str], float | None]) -> None:
        cells = ours.setdefault(f"ours: {name}", ["–"] * len(TASKS))
        cells[TASKS.index(task)] = _cell(task, value)

    constant = {run.value("task") for run in section.runs} - {None}
    for group in section.groups:
        task = group.values.get("task") or (next(iter(constant)) if len(constant) == 1 else None)
        if task not in TASK_METRICS or all(map(protocol_directory, group.runs)):
            continue
        rest = (
            ", ".join(name_value(k, v) for k, v in group.values.items() if k != "task") or "median"
        )
        put(rest, task, lambda name, group=group: s.median if (s := group.spread(name)) else None)
    protocols = [found for found in read_protocols(section.runs)[0] if found.task in TASK_METRICS]
    models = Counter((found.task, found.model) for found in protocols)
    for found in protocols:
        is_alone = models[found.task, found.model] == 1
        model = found.model if is_alone else f"{found.model}, {plain(found.directory.name)}"
        put(f"{model}, median of {found.num_seeds}", found.task, found.median.get)
        put(f"{model}, ensemble of {found.num_seeds}", found.task, found.ensemble.get)
    rows = [list(row) for row in (*FINETUNING, *ENSEMBLES)] + [
        [name, *cells] for name, cells in ours.items()
    ]
    note = "Published: median of five seeds, development sets; RACE test set; ensembles of five."
    title = "Beside the seed's Tables 2 and 3: finetuning"
    return Table(title, ["model", *TASK_COLUMNS], rows, notes=[note, f"Source: {SOURCE}"])


def _weak_scaling(section: Section) -> Table:
    columns = [
        "model",
        "parameters",
        "tensor parallel",
        "TFLOP/s per GPU",
        "of the first (%)",
        "weak scaling (%)",
        "of peak (%)",
    ]
    rows = [
        [
            "Megatron-GPT2, A100",
            f"{b:g}B",
            str(tp),
            str(tflops),
            f"{100 * tflops / 111:.1f}",
            f"{scaling:g}",
            f"{peak:g}",
        ]
        for b, tp, scaling, tflops, peak in WEAK_SCALING
    ]
    ours = [r for r in section_rows(section) if r["implementation"] == OURS]
    ours = sorted(
        (r for r in ours if r["model"] == "gpt2"), key=lambda r: r["tensor_parallel_size"]
    )
    for row in ours:
        scaling = weak_scaling(row, one_gpu_row(row, ours))
        shares = (
            (scaling.flops, scaling.parameters, row["mfu"]) if scaling else (None, None, row["mfu"])
        )
        rows.append(
            [
                f"ours: {row['size']} {row['precision']}, {row['device']}",
                count_parameters(row["num_parameters"]) if row["num_parameters"] else "–",
                str(row["tensor_parallel_size"]),
                format_cell(row["tflops_per_gpu"], ".3g"),
                *(format_cell(share, ".1f", factor=100) for share in shares),
            ]
        )
    note = (
        "The seed does not define its weak scaling, and it is not its ratio of TFLOP/s; ours is"
        " parameters per GPU and second over those of one GPU with the same batch, settings and"
        " launching, which fits its later tables."
    )
    return Table(
        "Beside the seed's Table 4: weak scaling", columns, rows, notes=[note, f"Source: {SOURCE}"]
    )


def seed_table(section: Section) -> Table | None:
    """The seed's rows with ours below; None for a command that the seed has no numbers for."""
    tables = {"pretrain": _pretraining, "finetune": _finetuning, "benchmark": _weak_scaling}
    return tables[section.command](section) if section.command in tables else None

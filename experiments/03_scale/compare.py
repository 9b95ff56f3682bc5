"""Put measured steps beside predicted ones; writes `measured.csv` and prints a table.

    python experiments/03_scale/compare.py experiments/02_speed/results.csv ...

Each file is a `results.csv` of `hydratron benchmark` runs. Rows without a prediction are left out.
"""

import csv
import sys
from pathlib import Path

HERE = Path(__file__).parent
KEYS = ("model", "size", "layernorm", "tensor_parallel_size", "data_parallel_size", "batch")
KEYS += ("recompute", "seq_len")
PREDICTED_PRECISION = "bf16-mixed"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def join(predictions: list[dict[str, str]], results: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a row for each measured step that was predicted, with both and the error."""
    known = {tuple(row[key] for key in KEYS): row for row in predictions}
    rows = []
    for result in results:
        prediction = known.get(tuple(result[key] for key in KEYS))
        is_ours = result["implementation"] == "hydratron"
        is_plain = result["interleave"] == "False"
        is_alike = is_ours and is_plain and result["precision"] == PREDICTED_PRECISION
        if prediction is None or not is_alike:
            continue
        row = {key: result[key] for key in KEYS}
        for name in ("step_ms", "peak_memory_gib"):
            guess, found = float(prediction[f"predicted_{name}"]), float(result[name])
            row |= {
                f"predicted_{name}": f"{guess:.4g}",
                f"measured_{name}": f"{found:.4g}",
                f"{name}_error_percent": f"{100 * (guess / found - 1):+.1f}",
            }
        rows.append(row | {"commit": result["commit"], "command": result["command"]})
    return rows


def print_markdown(rows: list[dict[str, str]]) -> None:
    """Print the rows as they stand in the README."""
    print("| step | predicted ms | measured | error | predicted GiB | measured | error |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        name = f"{row['model']} {row['size']} {row['layernorm']}, batch {row['batch']}"
        name += f", TP {row['tensor_parallel_size']}, DP {row['data_parallel_size']}"
        name += "" if row["recompute"] == "none" else f", recompute={row['recompute']}"
        cells = [name]
        for key in ("step_ms", "peak_memory_gib"):
            error = row[f"{key}_error_percent"]
            cells += [row[f"predicted_{key}"], row[f"measured_{key}"], f"{error} %"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Write and print what can be compared."""
    results = [row for path in sys.argv[1:] for row in read(Path(path))]
    rows = join(read(HERE / "predictions.csv"), results)
    if not rows:
        raise SystemExit("no row of these files was predicted")
    with (HERE / "measured.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print_markdown(rows)


if __name__ == "__main__":
    main()

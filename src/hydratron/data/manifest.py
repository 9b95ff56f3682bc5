"""`manifest.json` beside a prepared corpus: what it holds and how it came about.

A folder has a manifest only once its corpus is complete; nothing in it depends on the time, the
machine or the number of workers.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from hydratron.data.sources import check_weights

MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    `settings`: everything that decides its content, with `inputs`: by source or step, the bytes and
    SHA-256 of each file that was read; none in a folder made before they were recorded. `sources`:
    by name, tokens, documents, the SHA-256 of .bin and .idx, weight, home and licence. `steps`: by
    source and step, documents and bytes in and out.
    """

    settings: dict[str, Any]
    tokenizer_sha256: str
    sources: dict[str, dict[str, Any]]
    steps: dict[str, dict[str, dict[str, int]]]
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = _FORMAT

    @classmethod
    def read(cls, folder: Path) -> Self:
        """ValueError where the folder holds no prepared corpus, or one of another format."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{folder}: no prepared corpus in it (no {MANIFEST}); hydratron prepare makes one"
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("format") != _FORMAT:
                raise ValueError(f"format {found.get('format')} is not {_FORMAT}")
            return cls(**found)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a manifest of a prepared corpus: {error}") from error

    def weights(self, wanted: Mapping[str, Any], folder: Path) -> dict[str, float]:
        """The weight of each source that is used, in the folder's order.

        Those wanted now, else those it was prepared with, else the sources' tokens. A source of
        weight 0 is left out. ValueError where `wanted` names other sources than the folder has, and
        where only some of the sources have a weight.
        """
        if wanted and wanted.keys() != self.sources.keys():
            raise ValueError(
                f"{folder} holds the sources {', '.join(self.sources)}, not {', '.join(wanted)}"
            )
        now = {name: weight for name, weight in wanted.items() if weight is not None}
        weights = {name: now.get(name, s["weight"]) for name, s in self.sources.items()}
        check_weights(weights)
        used = {
            name: float(self.sources[name]["tokens"] if weight is None else weight)
            for name, weight in weights.items()
            if weight != 0
        }
        if not used:
            raise ValueError(f"{folder}: each of its sources has the weight 0")
        return used

    def write(self, folder: Path) -> None:
        """Write it in one step."""
        temporary = folder / f".{MANIFEST}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / MANIFEST)


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names under which two nested mappings differ."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}")
    return found

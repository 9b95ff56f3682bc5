"""What a run directory says of the run that made it."""

from pathlib import Path
from typing import Any

import yaml

FROZEN_CONFIG = Path(".hydra/resolved.yaml")


def read_run_config(directory: Path) -> dict[str, Any]:
    """Return the frozen configuration of a run, empty where there is none."""
    path = directory / FROZEN_CONFIG
    return yaml.safe_load(path.read_text()) if path.is_file() else {}

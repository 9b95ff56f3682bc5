"""Who may import whom. A layer that needs a new line in the table is a design question."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hydratron"
PACKAGES = {"parallel", "models", "data", "training", "checkpoint", "perf", "report", "commands"}
ENTRY = PACKAGES | {
    "launch",
    "cli",
    "arguments",
    "continuation",
    "processes",
    "quoting",
    "result",
    "settings",
    "sweeps",
    "torch",
    "lightning",
    "hydra",
}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "parallel": {"torch", "torch.distributed"},
    "models": {"torch", "parallel", "settings"},
    "data": {"torch", "transformers", "settings"},
    "training": PACKAGES - {"report", "commands"}
    | {"torch", "torch.distributed", "lightning", "settings"},
    "checkpoint": {"torch", "torch.distributed", "parallel", "models", "transformers", "settings"},
    "perf": {"torch", "torch.distributed", "parallel", "models", "settings"},
    "report": set(),
    "commands": ENTRY,
    "launch": ENTRY,
    "arguments": {"hydra", "checkpoint", "quoting", "result"},
    "continuation": {"hydra", "arguments", "checkpoint", "processes", "result"},
    "processes": set(),
    "result": {"processes"},
    "settings": set(),
    "quoting": {"hydra"},
    "sweeps": {"hydra", "arguments", "result"},
    "cli": ENTRY,
}
THIRD_PARTY = {
    "torch": "torch",
    "pytorch_lightning": "lightning",
    "lightning": "lightning",
    "lightning_fabric": "lightning",
    "hydra": "hydra",
    "omegaconf": "hydra",
    "transformers": "transformers",
    "datasets": "transformers",
    "wandb": "wandb",
}


def layer_of(module: str) -> str | None:
    """The table's name for a dotted module name; None where the table does not speak of it."""
    top, _, rest = module.partition(".")
    if top == "hydratron":
        return rest.partition(".")[0] or "__init__"
    if f"{module}.".startswith("torch.distributed."):
        return "torch.distributed"
    return THIRD_PARTY.get(top)


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module named by an import, at any depth, and `torch.distributed` as an attribute."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            found.add(node.module or "")
            if node.module in {"torch", "hydratron"}:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")
    return found


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert layer in MAY_IMPORT, f"{layer} has no row in the table above: add one"
    allowed = MAY_IMPORT[layer] | {layer, "__init__", None}
    modules = imported_modules(ast.parse(path.read_text()))
    assert not {module for module in modules if layer_of(module) not in allowed}

"""The README's commands run as they are written."""

import re
import shlex
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TINY

README = Path(__file__).parents[2] / "README.md"


def commands(heading: str, block: int = 0) -> list[list[str]]:
    """Return the words of each command in a code block under `heading`."""
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    text = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)[block]
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_use_a_checkpoint_elsewhere(in_process, tmp_path: Path) -> None:
    written = commands("Use a checkpoint elsewhere")
    assert [words[:2] for words in written] == [
        ["hydratron", "pretrain"],
        ["hydratron", "convert"],
        ["hydratron", "convert"],
    ]
    for words in written:
        small = TINY[1:] if words[1] == "pretrain" else []
        done = in_process(*words[1:], *small)
        assert done.returncode == 0, done.stderr
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "exported")
    assert type(model).__name__ == "MegatronBertForPreTraining"
    assert (tmp_path / "imported/model.json").is_file()


def test_the_sweep_can_be_started_and_read(hydratron, tmp_path: Path) -> None:
    start, watch, read = commands("Sweeps")
    for words in (start, watch, read):
        small = [*TINY[1:], "optimizer.lr=1e-3", "layernorm=pre", "seed=1"]
        done = hydratron(*words[1:], *(small if words[1] == "pretrain" else []))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs/ablation/report/loss_curves.png").is_file()
    assert "1.58" in done.stdout  # the original's held-out loss, printed beside ours


def test_own_text_trains_as_written(in_process, tmp_path: Path) -> None:
    texts = tmp_path / "my_texts"
    texts.mkdir()
    words = "The quick brown fox jumps over the lazy dog near the river bank. " * 40
    for chapter in range(40):
        (texts / f"{chapter}.txt").write_text(f"Chapter {chapter}.\n\n{words}")
    first = commands("Your own text")[0]
    fast = ["trainer.max_steps=2", "data.global_batch_size=2", "data.validation_samples=2"]
    kept = [word for word in first[1:] if not word.startswith("trainer.max_steps")]
    done = in_process(
        *kept, *fast, "trainer.log_every=1", "model.vocab_size=512", "hydra.run.dir=run"
    )
    assert done.returncode == 0, done.stderr


def test_a_run_is_told_to_wandb_as_written(in_process, tmp_path: Path) -> None:
    (words,) = commands("Sweeps", block=2)
    done = in_process(*words[1:], *TINY, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-*" in done.stdout
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))

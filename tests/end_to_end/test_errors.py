"""Wrong input ends in one clear line and exit status 2, before anything runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from hydratron.data.indexed import IndexedWriter
from tests.end_to_end.conftest import TINY, result


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A `.bin/.idx` pair of four documents and a folder with a character tokenizer's vocabulary."""
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        for start in range(4):
            writer.add_document([np.arange(start, 40 + start, dtype=np.uint16)] * 2)
    (tmp_path / "vocabulary").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60))]
    (tmp_path / "vocabulary/vocab.txt").write_text("\n".join(words))
    return tmp_path / "corpus"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["parallel=tp2", "model.num_heads=1"], "num_heads 1 is not divisible by tensor_parallel"),
        (["parallel=tp2_dp2", "trainer.devices=3"], "trainer.devices 3 x trainer.num_nodes 1 is"),
        (["no_such_key=1"], "Could not override 'no_such_key'"),
        (["+model.bogus=1"], "unknown key model.bogus"),
        (["size=17b"], "Could not find 'size/17b'"),
        (["data.path=empty"], "empty"),
        (["data.path=missing"], "missing: no such file or folder"),
        (["data.seq_len=64"], "data.seq_len 64 exceeds the model's max_seq_len 16"),
        (["model.vocab_size=4"], "vocab_size 4"),
        (["model.layernorm=sideways"], "model.layernorm 'sideways' is not one of pre, post"),
        (["trainer.precision=16-mixed"], "16-mixed needs a GPU"),
        (
            ["data.global_batch_size=33", "parallel=dp2"],
            "global_batch_size 33 is not divisible by data_parallel_size 2",
        ),
        (
            ["data.validation_samples=1", "parallel=dp2"],
            "data.validation_samples 1 is less than data_parallel_size 2",
        ),
        (["data=indexed"], "data.path= is missing"),
        (["+logger._target_=nosuch.Thing"], "logger._target_ nosuch.Thing: there is no such class"),
        (["+logger._target_=os.getcwd", "parallel=tp2"], "logger._target_ os.getcwd: there is no"),
        (["+logger._target_=pathlib.Path"], "pathlib.Path is no Logger of Lightning"),
        (["+logger._target_=tests.faults.Faults", "+logger.wrong=1"], "logger: "),
        (["+logger.project=mine"], "logger.project needs logger._target_"),
        (["experiment=null"], "experiment=null: a name is needed, one of figure1, "),
        (["=1"], "=1: a name is needed, one of benchmark, "),
        (["size=3"], "size=3: a name is needed"),
        (["resume=nowhere"], "resume=nowhere: there is no such directory"),
        (["resume=empty"], "resume=empty: no run directory"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    in_process, tmp_path: Path, overrides: list[str], line: str
) -> None:
    (tmp_path / "empty").mkdir()
    done = in_process("pretrain", *TINY, *overrides)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert line in done.stderr
    assert not list(tmp_path.rglob("metrics.csv"))


def test_what_is_not_installed_is_named(
    in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("arguments", "commands.tracking"):
        monkeypatch.setattr(f"hydratron.{module}.find_spec", lambda _: None)
    logger = in_process("pretrain", *TINY, "logger=tensorboard", "parallel=tp2")
    search = in_process("pretrain", "-m", *TINY, "hydra/sweeper=optuna", "seed=1,2")
    assert (logger.returncode, search.returncode) == (2, 2)
    assert 'logger=tensorboard is not installed: pip install -e ".[tensorboard]"' in logger.stderr
    assert 'hydra/sweeper=optuna is not installed: pip install -e ".[optuna]"' in search.stderr


def test_a_truncated_index_is_refused_by_name(in_process, corpus: Path) -> None:
    path = corpus.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:-7])
    done = in_process(
        "pretrain", *TINY[:-2], "data=indexed", f"data.path={corpus}",
        f"data.tokenizer={corpus.parent / 'vocabulary'}",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "corpus.idx" in done.stderr


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(in_process, corpus: Path) -> None:
    done = in_process(
        "pretrain", *TINY, "data=indexed", f"data.path={corpus}", "model.vocab_size=64",
        f"data.tokenizer={corpus.parent / 'vocabulary'}",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "vocabulary of 64 is smaller than the tokenizer's 65 entries" in done.stderr


def test_an_indexed_corpus_trains(in_process, corpus: Path, tmp_path: Path) -> None:
    done = in_process(
        "pretrain", *TINY, "data=indexed", f"data.path={corpus}", "data.num_workers=2",
        f"data.tokenizer={corpus.parent / 'vocabulary'}", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["status"] == "ok"


def test_a_run_that_never_validates_on_its_way_does_so_at_its_end(
    in_process, tmp_path: Path
) -> None:
    done = in_process("pretrain", *TINY, "trainer.val_every=0", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["val/loss"] > 0


def test_a_folder_of_text_trains(in_process, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    book = Path(__file__).parents[2] / "src/hydratron/data/shipped"
    shutil.copy(next(book.glob("*.txt")), tmp_path / "texts/book.txt")
    done = in_process("pretrain", *TINY, "data.path=texts", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["status"] == "ok"


def test_a_checkpoint_of_another_model_is_refused_by_parameter(in_process, tmp_path: Path) -> None:
    assert in_process("pretrain", *TINY, "hydra.run.dir=run").returncode == 0
    (tmp_path / "run/result.json").unlink()
    done = in_process("pretrain", "resume=run", "model.hidden_size=64", "trainer.max_steps=8")
    assert done.returncode != 0
    assert "model.hidden_size 32, which cannot become 64" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(in_process, tmp_path: Path) -> None:
    done = in_process(
        "pretrain", *TINY, "hydra.run.dir=run", "optimizer.clip=null", "model.init_std=1e30",
        "trainer.max_steps=30", "trainer.max_skipped_steps=5",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    error = result(tmp_path / "run")["error"]
    assert "6 steps up to step 6 were skipped" in error


def test_a_run_directory_is_never_overwritten_by_another_run(in_process, tmp_path: Path) -> None:
    assert in_process("pretrain", *TINY, "hydra.run.dir=run").returncode == 0
    done = in_process("pretrain", *TINY, "seed=2", "hydra.run.dir=run")
    assert done.returncode == 2, done.stderr
    assert "run holds a finished run already" in done.stderr


def test_help_and_unknown_commands(hydratron) -> None:
    assert "pretrain" in hydratron("--help").stdout
    done = hydratron("train")
    assert done.returncode == 2
    assert "unknown command 'train'" in done.stderr

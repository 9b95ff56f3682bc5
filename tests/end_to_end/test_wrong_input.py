"""Hundreds of wrong command lines: each is one line on stderr, status 2 and little work.

Each key of each command's composed configuration gets values that it cannot have; then come wrong
names, wrong files and settings that contradict each other, over all commands.
"""

import itertools
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydratron.launch import configuration_directory
from tests.end_to_end.conftest import SCRIPT, TINY
from tests.tasks import write_bert, write_mnli

pytestmark = pytest.mark.slow
Run = Callable[..., subprocess.CompletedProcess[str]]
MNLI = ["task.train_path=train.jsonl", "task.validation_path=dev_matched.jsonl", "checkpoint=bert"]
RIGHT = {
    "pretrain": TINY,
    "finetune": [*MNLI, "task.max_seq_len=64", "trainer.max_steps=1"],
    "evaluate": ["task=mnli", *MNLI, "task.max_seq_len=64"],
    "prepare": ["data=novels", "data.root=texts", "output=prepared"],
    "benchmark": ["size=tiny", "timing.steps=2", "timing.warmup_steps=1"],
    "plan": ["size=mini", "hardware.gpus_per_node=1", "data.global_batch_size=64"],
    "convert": ["checkpoint=bert", "output=converted"],
}
LISTS = ["[1,2]", "{a:1}"]
NUMBERS = ["nan", "-7.5", "1e400", "word", "99999999999999999999", "''", *LISTS]
VALUES = {
    bool: ["nan", "-7", "word", "''", *LISTS],
    int: NUMBERS,
    float: ["1e39" if value.isdecimal() else value for value in NUMBERS],
    str: ["''", "true", *LISTS],
    type(None): ["true", *LISTS],
}
# read by nothing but other keys, or by Hydra
NOT_READ = ("size", "layernorm", "init", "logger", "name")


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def wrong_values() -> Iterator[tuple[str, str]]:
    """Each key of each command with one of the values that it cannot have, in turn."""
    turns = {kind: itertools.cycle(values) for kind, values in VALUES.items()}
    for command, right in RIGHT.items():
        with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
            config: Any = compose(command, right)
        for key, value in leaves(OmegaConf.to_container(config, resolve=False)):
            group = key.partition(".")[0]
            is_read = key not in NOT_READ and group not in ("hydra", "logger")
            if type(value) in VALUES and is_read and not key.startswith("data.sources"):
                yield command, f"{key}={next(turns[type(value)])}"


WRONG = {
    "pretrain": [
        "optimizer.lrr=1", "modle=bert", "model=t5", "size=huge", "optimizer=sgd", "data=nosuch",
        "parallel=tp3", "trainer=tpu", "logger=nosuch", "experiment=nosuch", "+model.depth=2",
        "++data.batch=2", "model.hidden_size", "=3", "model.num_heads=", "data.path=nowhere",
        "data.path=train.jsonl", "data.path=bert", "data.path=empty", "data.path=zeros.txt",
        "data.tokenizer=nowhere/nothing", "data.tokenizer=empty", "data.tokenizer=zeros.txt",
        "data.cache_dir=/proc/none", "data.cache_dir=zeros.txt", "data=indexed",
        "data=indexed data.path=nowhere data.tokenizer=bert", "data=blend data.path=nowhere",
        "data=blend data.path=texts", "data=indexed data.path=zeros.txt data.tokenizer=bert",
        "model.num_heads=3", "model.hidden_size=33", "data.seq_len=64", "data.seq_len=4",
        "model.vocab_size=4", "model.vocab_size=99999999999", "data.max_ngram=100000",
        "data.validation_samples=1000000000000", "data.validation_samples=70000",
        "data.micro_batch_size=5", "data.global_batch_size=33 parallel=dp2", "parallel=tp8",
        "trainer.devices=3", "trainer.num_nodes=2", "trainer=gpu", "trainer.precision=16-mixed",
        "trainer.precision=fp8", "trainer.cuda_graphs=true", "hydra.run.dir=",
        "hydra.run.dir=zeros.txt", "hydra.run.dir=/proc/none", "resume=nowhere", "resume=empty",
        "resume=zeros.txt", "resume=", "parallel=null", "trainer=null", "model=null", "data=null",
        "optimizer=null", "~parallel", "~seed", "~model.hidden_size", "experiment=null",
        "experiment=1", "+logger._target_=nosuch.Thing", "+logger._target_=os.getcwd",
        "model.hidden_size=${nosuch}", "model.hidden_size=${oc.env:NO_SUCH_VARIABLE}",
        "model.hidden_size=[", "trainer.max_steps=0x10",
        f"data.path={'a' * 300}", f"data.path={'a/' * 3000}", f"hydra.run.dir={'a' * 300}",
        "optimizer.shard=true trainer=gpu trainer.precision=16-mixed",
    ],
    "finetune": [
        "checkpoint=nowhere/nothing", "checkpoint=empty", "checkpoint=zeros.txt", "checkpoint=null",
        "checkpoint=5", "tokenizer=empty", "tokenizer=nowhere/nothing", "task=nosuch", "task=null",
        "task._target_=collections.OrderedDict", "task._target_=os.system", "task.train_path=bert",
        "task.train_path=nowhere", "task.train_path=zeros.txt", "task.validation_path=empty",
        "task.patience=0", "task.patience=-1", "data.global_batch_size=100000",
        "task.max_seq_len=100000", "task=lambada", "task=run", "model=huggingface",
        "model=huggingface model.path=empty", "parallel=tp8", "parallel=null",
        "trainer.precision=bf16-true", "trainer.cuda_graphs=true", "optimizer.lr=nan",
        "trainer.val_every=-1", "model.hidden_dropout=2", "+model.depth=2", "seed=null",
        "data.cache_dir=/proc/none", "resume=nowhere", "hydra.run.dir=/proc/none",
    ],
    "evaluate": [
        "checkpoint=nowhere/nothing", "checkpoint=null", "checkpoint=empty", "split=train",
        "split=5", "checkpoint=null runs=5", "checkpoint=null runs=[]", "checkpoint=null runs=[5]",
        "checkpoint=null runs=[nowhere]", "checkpoint=null runs=[bert,bert]", "task=nosuch",
        "task=lambada", "task=wikitext103", "task.validation_path=nowhere", "parallel=tp2",
        "trainer.precision=fp8", "task=null", "data.evaluation_batch_size=0",
    ],
    "prepare": [
        "data.root=nowhere", "data.root=empty", "data=nosuch", "output=/proc/none", "output=bert",
        "output=zeros.txt", "data=blend data.path=null data.sources={} data.root=null",
        "steps.near_duplicates=5", "steps.near_duplicates.threshold=2", "steps.decontaminate=x",
        "steps.near_duplicates.num_bands=7", "steps.decontaminate=[nowhere]", "executor.kind=cloud",
        "executor.kind=slurm", "executor.workers=0", "model.vocab_size=4", "steps.language=xx",
        "data.sources.novels.kind=pdf", "data.sources.novels.weight=nan", "+data.sources.x=5",
        "+data.sources.novels.pth=x", "data.sources.novels.path=nowhere", "data.sources.race=null",
        "data.tokenizer=nowhere/nothing", "steps=null", "executor=null",
    ],
    "benchmark": [
        "timing=null", "timing.peer=megatron", "trainer.max_steps=5", "timing.warmup_steps=0",
        "model=gpt2 layernorm=post timing.peer=transformers", "size=nosuch",
        "timing.peer=transformers parallel=tp2", "data.path=nowhere", "parallel=tp3",
    ],
    "plan": [
        "rows=x", "rows=0", "rows=-1", "hardware=nosuch", "hardware.num_nodes=1000000000",
        "hardware.num_nodes=0", "hardware.memory_gib=-1", "calibration=nowhere", "calibration=5",
        "hardware.gpus_per_node=null", "size=nosuch", "data.global_batch_size=33 parallel=dp2",
    ],
    "convert": [
        "to=onnx", "checkpoint=null", "output=null", "output=bert", "output=/proc/none",
        "checkpoint=5", "checkpoint=[a,b]", "checkpoint=nowhere/nothing", "checkpoint=empty",
        "checkpoint=zeros.txt", "tokenizer=nowhere/nothing", "tokenizer=empty", "to=null",
        "outptu=x",
    ],
    "protocol": ["checkpoint=nowhere/nothing", "seed=", "=1", "word", "seed=x",
                 "output=/proc/none"],
    "report": ["nowhere", "zeros.txt", "--output zeros.txt empty"],
    "": ["trian", "--nosuch", "pretrain=1"],
}  # fmt: skip
LINES = [(command, line) for command, lines in WRONG.items() for line in lines]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command lines name: a BERT, rows, a text, and what is none of them."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(1)
    write_bert(folder / "bert")
    write_mnli(folder / "train.jsonl", 48)
    write_mnli(folder / "dev_matched.jsonl", 24)
    (folder / "empty").mkdir()
    (folder / "zeros.txt").write_bytes(bytes(5000))
    for name in ("novels", "race"):
        (folder / "texts" / name).mkdir(parents=True)
    return folder


@pytest.fixture
def refused(
    in_process: Run, inputs: Path, tmp_path: Path
) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """Run `hydratron COMMAND`, right but for what LINE changes, in a copy of the inputs."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def run(command: str, line: str) -> subprocess.CompletedProcess[str]:
        return in_process(*filter(None, [command]), *RIGHT.get(command, []), *line.split(" "))

    return run


def seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@pytest.mark.parametrize(
    ("command", "line"), [*LINES, *wrong_values()], ids=lambda text: text[:60] or "none"
)
def test_a_wrong_command_line_is_one_line(
    refused: Callable[[str, str], subprocess.CompletedProcess[str]], command: str, line: str
) -> None:
    before = seconds()
    done = refused(command, line)
    assert done.returncode == 2, done.stderr + done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert seconds() - before < 10


REAL = [
    "pretrain seed=1 seed=2",
    "pretrain optimizer.lr=nan",
    "pretrain data.validation_samples=1000000000000",
    "finetune trainer.val_every=-1 checkpoint=bert",
    "evaluate runs=5",
    "plan rows=x",
    "convert checkpoint=5 output=out",
    "pretrain -m parallel.tensor_parallel_size=null seed=1",
]


@pytest.mark.parametrize("line", REAL)
def test_a_process_of_its_own_ends_the_same(tmp_path: Path, line: str) -> None:
    command = [SCRIPT, *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    # Hydra says of which job of a sweep it speaks
    assert len(done.stderr.splitlines()) == 1 + (" -m " in line), done.stderr

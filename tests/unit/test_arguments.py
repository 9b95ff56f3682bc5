"""The command line is refused before Hydra reads it where it cannot be meant."""

import pytest

from hydratron.arguments import InputError, refuse_unclear


@pytest.mark.parametrize(
    ("command", "arguments", "line"),
    [
        ("pretrain", ["seed=1", "seed=2"], "seed= is given twice: 1 and 2"),
        (
            "pretrain",
            ["model=bert", "seed=1", "model=gpt2"],
            "model= is given twice: bert and gpt2",
        ),
        ("finetune", ["+a=1", "a=2"], "a= is given twice: 1 and 2"),
        ("evaluate", ["hydra.run.dir="], "hydra.run.dir= is empty"),
        ("pretrain", ["-m", "hydra.sweep.dir=''"], "hydra.sweep.dir= is empty"),
        ("pretrain", ["resume="], "resume= is empty"),
        ("benchmark", ["trainer.max_steps=5"], "trainer.max_steps is not a benchmark's"),
    ],
)
def test_what_cannot_be_meant_is_refused(command: str, arguments: list[str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        refuse_unclear(command, arguments)


def test_what_can_be_meant_is_not() -> None:
    refuse_unclear("pretrain", ["-m", "seed=1,2", "seed=1,2", "trainer.max_steps=5", "resume=a=b"])
    refuse_unclear("finetune", ["--cfg", "job", "~optimizer.clip", "optimizer.lr=1", "seed=1"])

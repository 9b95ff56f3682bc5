"""A model configuration that cannot be is refused by name."""

from typing import Any

import pytest

from hydratron.models.config import ModelConfig

VALID: dict[str, Any] = {
    "family": "bert",
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 96,
    "max_seq_len": 32,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "t5"}, r"model\.family 't5' is not one of bert, gpt2"),
        ({"layernorm": "sandwich"}, r"model\.layernorm 'sandwich' is not one of pre, post"),
        ({"init": "xavier"}, r"model\.init 'xavier' is not one of scaled, plain"),
        ({"recompute": "some"}, r"model\.recompute 'some' is not one of none, selective, full"),
        ({"activation": "relu"}, r"model\.activation 'relu' is not one of gelu, gelu_tanh"),
        ({"hidden_size": 0}, r"model\.hidden_size 0 is not positive"),
        ({"num_layers": 0}, r"model\.num_layers 0 is not positive"),
        ({"num_heads": -1}, r"model\.num_heads -1 is not positive"),
        ({"vocab_size": 0}, r"model\.vocab_size 0 is not positive"),
        ({"max_seq_len": 0}, r"model\.max_seq_len 0 is not positive"),
        ({"num_heads": 5}, "hidden_size 64 is not divisible by num_heads 5"),
        ({"hidden_dropout": 1.0}, r"model\.hidden_dropout 1\.0 is not in \[0, 1\)"),
        ({"attention_dropout": -0.1}, r"model\.attention_dropout -0\.1 is not in \[0, 1\)"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(VALID | changes))


def test_intermediate_size_is_four_times_the_hidden_size_unless_given() -> None:
    assert ModelConfig(**VALID).feedforward_size == 256
    assert ModelConfig(**VALID, intermediate_size=100).feedforward_size == 100
    assert ModelConfig(**VALID).head_dim == 16


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 8, "num_heads 4 is not divisible by tensor_parallel_size 8"),
        ({"num_heads": 8, "vocab_size": 98}, 4, "vocab_size 98 is not divisible by"),
        ({"intermediate_size": 30}, 4, "feedforward_size 30 is not divisible by"),
    ],
)
def test_a_split_that_does_not_divide_is_refused(
    changes: dict[str, Any], size: int, message: str
) -> None:
    config = ModelConfig(**(VALID | changes))
    config.check_tensor_parallel(1)
    config.check_tensor_parallel(2)
    with pytest.raises(ValueError, match=f"{message}.*"):
        config.check_tensor_parallel(size)

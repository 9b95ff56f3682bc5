"""What is quoted is read back as it was, by Hydra's grammar and OmegaConf's interpolation."""

import pytest
from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra

from hydratron.quoting import plain, quoted

NAMES = ["model.num_layers=1,seed=1", "#1", "{a}", "[1]", "it's", 'say "x"', "größe", "a b",
         "a:b", "back\\slash", "ends\\", "quote\\'s", "${seed}", "1", "null", "1,2",
         "~x", "a=(b", "日本"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_name_is_read_back_as_it_is(name: str) -> None:
    GlobalHydra.instance().clear()
    with initialize(version_base="1.3", config_path=None):
        config = compose(overrides=[f"+name={quoted(name)}"])
    assert config.name == name


@pytest.mark.parametrize("name", [n for n in NAMES if "$" not in n and not n.startswith("back")])
def test_a_value_is_read_with_its_quotes_and_without(name: str) -> None:
    assert plain(name) == name
    assert plain(quoted(name)) == name

"""`hydratron convert`: a run goes elsewhere and comes back; errors are one line."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoModelForPreTraining, AutoTokenizer

from hydratron.checkpoint.source import read_checkpoint
from hydratron.data.tokenizer import train_tokenizer
from tests.end_to_end.conftest import TINY, result

KINDS = {
    "post": ["layernorm=post", "parallel=tp2"],
    "pre": ["layernorm=pre"],
    "gpt2": ["model=gpt2"],
}


@pytest.fixture
def pretrained(hydratron, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run of the kind that the test asks for, its tokenizer beside its checkpoints."""
    settings = [*TINY, *KINDS[request.param], "hydra.run.dir=run"]
    done = hydratron("pretrain", *settings)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    if not (run / "tokenizer").exists():
        text = "The Mayor of Casterbridge, and the diary of a nobody."
        train_tokenizer("character", [text], vocab_size=100).save_pretrained(run / "tokenizer")
    return run


@pytest.mark.slow  # the README's test converts a run there and back too
@pytest.mark.parametrize("pretrained", ["post", "pre", "gpt2"], indirect=True)
def test_a_run_goes_to_hugging_face_and_back_bit_for_bit(
    hydratron, tmp_path: Path, pretrained: Path, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["pretrained"]
    there = hydratron(
        "convert", "to=huggingface", "checkpoint=run", "output=out", "hydra.run.dir=c1"
    )
    assert there.returncode == 0, there.stderr
    assert there.stdout.startswith("out: ")
    assert there.stdout.count("\n") == 1
    assert there.stderr == ""
    found = result(tmp_path / "c1")
    names = {"post": "BertForPreTraining", "pre": "MegatronBertForPreTraining"}
    assert found["architecture"] == names.get(kind, "GPT2LMHeadModel")
    auto = AutoModelForCausalLM if kind == "gpt2" else AutoModelForPreTraining
    theirs, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("the mayor", return_tensors="pt").input_ids
    with torch.no_grad():
        assert theirs(ids)[0].shape == (1, ids.size(1), 128)

    card = (tmp_path / "out/README.md").read_text()
    run = result(pretrained)
    for fact in (f"{run['tokens']:,}", run["git_commit"] or "not recorded", "step 4"):
        assert fact in card
    assert f"({'post' if kind == 'post' else 'pre'}" in card
    assert "| data | the novels hydratron ships |" in card

    back = hydratron("convert", "to=hydratron", "checkpoint=out", "output=back", "hydra.run.dir=c2")
    assert back.returncode == 0, back.stderr
    again = read_checkpoint(tmp_path / "back/checkpoints/last")
    assert again.tokenizer == tmp_path / "back/tokenizer"
    before = read_checkpoint(pretrained)
    assert before.tensors.keys() == again.tensors.keys()
    for name, stored in before.tensors.items():
        assert torch.equal(stored.whole(), again.tensors[name].whole()), name
    metadata = dcp.FileSystemReader(again.path).read_metadata()
    assert not any("optimizer" in key for key in metadata.state_dict_metadata)


def test_wrong_input_ends_with_one_line_and_status_2(in_process, tmp_path: Path) -> None:
    """What else is refused, and how, is in tests/unit/checkpoint."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "roberta"}))
    done = in_process("convert", "checkpoint=other", "output=out", "hydra.run.dir=job")
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "hydratron convert: other/config.json: model_type 'roberta' is not one of bert,"
        " megatron-bert, gpt2\n"
    )
    assert result(tmp_path / "job")["status"] == "failed"
    assert not (tmp_path / "out").exists()

"""Zero-shot GPT-2: perplexity and last words beside a slow computation with transformers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hydratron.checkpoint.source import read_checkpoint
from hydratron.data.tokenizer import load_tokenizer, train_tokenizer
from hydratron.data.zeroshot import count_original_tokens, wikitext_detokenize
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.evaluation import evaluate
from hydratron.training.zeroshot import (
    LambadaTask,
    WikitextTask,
    ZeroShot,
    ZeroShotData,
    vocab_parallel_argmax,
)
from tests.distributed import run_distributed

TEXT = " The tower , built in 1889 , is 330 @.@ 5 m tall . It has @-@ by now - visitors .\n" * 6
PASSAGES = ["the tower is not tall enough", "he has seen the visitors of the tower"]
WINDOW, OVERLAP = 16, 5


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = train_tokenizer("bpe", [TEXT, *PASSAGES], vocab_size=300, lowercase=False)
    torch.manual_seed(3)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": WINDOW}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, initializer_range=0.3, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "wiki.test.tokens").write_text(TEXT)
    (folder / "lambada.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in PASSAGES))
    return folder


def zero_shot(folder: Path, run_dir: Path, *, tp: int = 1, dp: int = 1) -> dict[str, float]:
    checkpoint = read_checkpoint(folder)
    tokenizer = load_tokenizer(str(folder))
    found: dict[str, float] = {}
    wikitext = WikitextTask(
        name="wikitext103", path=str(folder / "wiki.test.tokens"), overlap=OVERLAP
    )
    for task in (wikitext, LambadaTask(name="lambada", path=str(folder / "lambada.jsonl"))):
        sets = task.load(tokenizer, checkpoint.model.max_seq_len)
        found |= evaluate(
            ZeroShot(checkpoint, sets),
            ZeroShotData(sets, batch_size=3),
            run_dir,
            trainer=TrainerConfig(accelerator="cpu", max_steps=1, val_every=1),
            parallel=ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp),
            environment=TorchElasticEnvironment()
            if "RANK" in os.environ
            else LightningEnvironment(),
        )
    return found


def zero_shot_on_ranks(
    rank: int, world_size: int, folder: Path, run_dir: Path, grid: dict[str, int]
) -> dict[str, float]:
    return zero_shot(folder, run_dir, **grid)


def slow_zero_shot(folder: Path) -> dict[str, float]:
    """One forward pass of transformers a target, in float64."""
    model = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    tokenizer = load_tokenizer(str(folder))

    def log_probabilities(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    ids = tokenizer.encode(wikitext_detokenize(TEXT), add_special_tokens=False)
    total = 0.0
    for target in range(1, len(ids)):
        late = max(0, target - WINDOW)  # targets beyond the first window
        start = -(-late // OVERLAP) * OVERLAP
        total -= float(log_probabilities(ids[start:target])[ids[target]])
    strict = loose = 0
    for text in PASSAGES:
        context, _, word = text.rpartition(" ")
        known = tokenizer.encode(context, add_special_tokens=False)
        right = True
        for token in tokenizer.encode(" " + word, add_special_tokens=False):
            right &= int(log_probabilities(known[-WINDOW:]).argmax()) == token
            known.append(token)
        strict += right
        whole = tokenizer.encode(text, add_special_tokens=False)
        loose += int(log_probabilities(whole[:-1][-WINDOW:]).argmax()) == whole[-1]
    return {
        "test/loss": total / (len(ids) - 1),
        "test/perplexity": float(np.exp(total / (len(ids) - 1))),
        "test/adjusted_perplexity": float(np.exp(total / (count_original_tokens(TEXT) - 1))),
        "test/num_tokens": len(ids),
        "test/accuracy": strict / len(PASSAGES),
        "test/accuracy_loose": loose / len(PASSAGES),
    }


def learn_passages(folder: Path) -> None:
    """Make the model right about some last words, so that accuracy is not 0 throughout."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    ids = torch.tensor([tokenizer.encode(PASSAGES[0], add_special_tokens=False)[-WINDOW:]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def test_zero_shot_equals_a_slow_computation_with_transformers(gpt2: Path, tmp_path: Path) -> None:
    learn_passages(gpt2)
    expected = slow_zero_shot(gpt2)
    assert 0 < expected["test/accuracy_loose"] < 1
    found = zero_shot(gpt2, tmp_path)
    for grid in ({"tp": 2}, {"dp": 2}):
        for result in run_distributed(zero_shot_on_ranks, 2, tmp_path, gpt2, tmp_path, grid):
            assert result == pytest.approx(found, rel=1e-6)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def argmax_on_ranks(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    logits = torch.randint(3, (200, 8), generator=torch.Generator().manual_seed(1)).float()
    group = dist.group.WORLD
    found = vocab_parallel_argmax(logits.chunk(world_size, -1)[rank], group)
    return found, vocab_parallel_argmax(logits, None)


def test_the_best_token_of_a_split_vocabulary_is_the_first_of_equal_ones(tmp_path: Path) -> None:
    for found, expected in run_distributed(argmax_on_ranks, 2, tmp_path):
        assert torch.equal(found, expected)

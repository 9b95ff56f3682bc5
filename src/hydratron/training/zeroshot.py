"""Zero-shot GPT-2: WikiText-103 perplexity and LAMBADA accuracy at any tensor-parallel size.

Shoeybi et al. 2019, appendix E. The vocabulary stays split: the loss is the vocabulary-parallel
cross entropy, the best token a maximum over the ranks.
Letters: B batch, S sequence, K scored positions, H hidden, V vocabulary; `/t` a share.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hydratron.checkpoint.source import Checkpoint
from hydratron.data.tokenizer import PreTrainedTokenizerFast, special_tokens
from hydratron.data.zeroshot import (
    EvaluationBatch,
    encode_lambada,
    lambada_batches,
    lambada_num_correct,
    load_lambada,
    load_wikitext,
    perplexity_batches,
    perplexity_metrics,
)
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.models.initialisation import initialize_parameters
from hydratron.parallel.cross_entropy import vocab_parallel_cross_entropy
from hydratron.parallel.mappings import all_reduce, gather_into_tensor_parallel_region
from hydratron.parallel.mesh import ParallelMesh, ProcessGroup
from hydratron.settings import Length, Text, check
from hydratron.training.strategy import TensorParallelStrategy


def scored_logits(network: Gpt2ForPretraining, batch: EvaluationBatch) -> Tensor:
    """Return the logits [K, V/t] of the scored positions, in reading order, and of no others."""
    hidden = gather_into_tensor_parallel_region(
        network.transformer(batch.input_ids), network.tp_group
    )
    hidden = hidden[: batch.input_ids.numel()][batch.loss_mask.flatten()]  # [T, H] -> [K, H]
    return F.linear(hidden, network.transformer.word_embeddings.weight)


def loss_sum(network: Gpt2ForPretraining, batch: EvaluationBatch) -> Tensor:
    """Return the summed loss of the scored targets, in nats, 0-d float64."""
    labels = batch.labels[batch.loss_mask]
    losses = vocab_parallel_cross_entropy(scored_logits(network, batch), labels, network.tp_group)
    return losses.double().sum()


def vocab_parallel_argmax(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the best token of each row: logits [K, V/t] to [K]; the first of equal ones."""
    best, index = logits.max(dim=-1)
    if group is None:
        return index
    size, rank = logits.size(-1), group.rank()
    is_best = best == all_reduce(best, "max", group)
    # the smallest index of the best is minus the largest of their negatives
    index = torch.where(is_best, index + rank * size, size * group.size())
    return -all_reduce(-index, "max", group)


def num_correct(network: Gpt2ForPretraining, batch: EvaluationBatch) -> Tensor:
    """Return how many passages have every scored target right, 0-d float64."""
    found = vocab_parallel_argmax(scored_logits(network, batch), network.tp_group)
    predictions = torch.full_like(batch.labels, -1)
    predictions[batch.loss_mask] = found
    count = lambada_num_correct(predictions, batch)
    return torch.tensor(count, dtype=torch.float64, device=predictions.device)


@dataclass(frozen=True)
class ZeroShotSet:
    """`batches(batch_size=, rank=, world_size=)` yields what `score` sums up; `metrics` of the sum
    are the set's numbers.
    """

    batches: Callable[..., Iterator[EvaluationBatch]]
    score: Callable[[Gpt2ForPretraining, EvaluationBatch], Tensor]
    metrics: Callable[[float], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class WikitextTask:
    """WikiText-103's test text as one stream, in windows that advance by `overlap` tokens.

    `path` None is the hub. `max_seq_len` is cut to what the model has.
    """

    name: Text
    path: Text | None = None
    max_seq_len: Length = 1024
    overlap: Length = 32

    def __post_init__(self) -> None:
        check(self, "task")

    def load(self, tokenizer: PreTrainedTokenizerFast, max_positions: int) -> list[ZeroShotSet]:
        """Return the one set: `loss`, `perplexity`, `adjusted_perplexity`."""
        max_seq_len = min(self.max_seq_len, max_positions)
        if not 1 <= self.overlap <= max_seq_len:
            raise ValueError(f"task.overlap {self.overlap} is not between 1 and {max_seq_len}")
        text = load_wikitext(given_path(self.path), tokenizer)
        batches = partial(
            perplexity_batches, text.token_ids, max_seq_len=max_seq_len, overlap=self.overlap
        )
        num_tokens, num_words = len(text.token_ids), text.num_original_tokens

        def metrics(total: float) -> dict[str, float]:
            counts = {"num_tokens": num_tokens, "num_original_tokens": num_words}
            return perplexity_metrics(total, num_tokens, num_words) | counts

        return [ZeroShotSet(batches, loss_sum, metrics)]


@dataclass(frozen=True, kw_only=True)
class LambadaTask:
    """LAMBADA: the last word, all of its tokens (`accuracy`), and the flattering `accuracy_loose`
    of the last token alone. `path` None is the hub.
    """

    name: Text
    path: Text | None = None
    max_seq_len: Length = 1024

    def __post_init__(self) -> None:
        check(self, "task")

    def load(self, tokenizer: PreTrainedTokenizerFast, max_positions: int) -> list[ZeroShotSet]:
        """Return the strict and the loose set."""
        passages = load_lambada(given_path(self.path))
        pad_id = special_tokens(tokenizer, objective="clm").eod
        sets = []
        for name, strict in (("accuracy", True), ("accuracy_loose", False)):
            batches = partial(
                lambada_batches,
                encode_lambada(passages, tokenizer, strict=strict),
                max_seq_len=min(self.max_seq_len, max_positions),
                pad_id=pad_id,
            )

            def metrics(total: float, name: str = name) -> dict[str, float]:
                return {name: total / len(passages)}

            sets.append(ZeroShotSet(batches, num_correct, metrics))
        return sets


ZeroShotTask = WikitextTask | LambadaTask


def given_path(path: str | None) -> Path | None:
    """Return a path of the user's, None where the hub is meant."""
    return None if path is None else Path(path).expanduser()


class _Batches(IterableDataset[dict[str, Tensor]]):
    def __init__(self, make: Callable[[], Iterable[EvaluationBatch]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (vars(batch) for batch in self.make())


class ZeroShotData(LightningDataModule):
    """The sets, each batch on one data-parallel rank."""

    def __init__(self, sets: Sequence[ZeroShotSet], *, batch_size: int) -> None:
        super().__init__()
        self.sets, self.batch_size = sets, batch_size

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """A loader a set."""
        assert self.trainer is not None
        strategy = self.trainer.strategy
        assert isinstance(strategy, TensorParallelStrategy)
        mesh = strategy.mesh
        place = {"rank": mesh.dp_rank, "world_size": mesh.data_parallel_size}
        return [
            DataLoader(
                _Batches(partial(one.batches, batch_size=self.batch_size, **place)),
                batch_size=None,
            )
            for one in self.sets
        ]


class ZeroShot:
    """An objective that is only validated: a GPT-2 on sets of which nothing was trained."""

    def __init__(self, checkpoint: Checkpoint, sets: Sequence[ZeroShotSet]) -> None:
        if checkpoint.model.family != "gpt2":
            raise ValueError(
                f"checkpoint {checkpoint.path} is a {checkpoint.model.family}: zero-shot"
                " evaluation needs a gpt2"
            )
        self.checkpoint, self.sets = checkpoint, sets

    def build_network(
        self, mesh: ParallelMesh, *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> Gpt2ForPretraining:
        """Return this rank's shards of the checkpoint."""
        model = self.checkpoint.model
        with torch.device("meta"):
            network = Gpt2ForPretraining(model, mesh.tp_group)
        initialize_parameters(
            network, model, seed=seed, tp_group=mesh.tp_group, device=device, dtype=dtype
        )
        self.checkpoint.load(network, mesh)
        return network

    def start_validation(self, network: Any, device: torch.device) -> None:
        self.totals = torch.zeros(len(self.sets), dtype=torch.float64, device=device)

    def validate_batch(self, network: Any, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        score = self.sets[dataloader_idx].score
        self.totals[dataloader_idx] += score(network, EvaluationBatch(**batch))

    def finish_validation(self, strategy: TensorParallelStrategy, step: int) -> dict[str, float]:
        """Return every set's metrics, summed over the data axis."""
        totals = self.totals
        if strategy.mesh.dp_group is not None:
            totals = all_reduce(totals, "sum", strategy.mesh.dp_group)
        pairs = zip(self.sets, totals.tolist(), strict=True)
        found = [one.metrics(total) for one, total in pairs]
        return {f"test/{name}": value for part in found for name, value in part.items()}

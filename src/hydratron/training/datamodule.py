"""The data module of pretraining: a prepared corpus becomes batches of one optimizer step each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from hydratron.data.bert import BertSamples, BertSampleSettings, max_predictions
from hydratron.data.gpt2 import Gpt2Samples
from hydratron.data.indexed import IndexedCorpus, split_by_document
from hydratron.data.sampler import ConsumedSamplesSampler, ShardedValidationSampler, collate
from hydratron.data.text import prepare_text_corpus
from hydratron.data.tokenizer import (
    PreTrainedTokenizerFast,
    load_tokenizer,
    special_tokens,
    word_start_table,
)
from hydratron.models.config import ModelConfig
from hydratron.training.strategy import TensorParallelStrategy

HELD_OUT_SEED = 0  # the held-out documents and samples are the same in every run


@dataclass(frozen=True)
class DataConfig:
    """Where the text is and how it becomes batches.

    `source`: "text" (a folder of text files, None for the novels the project ships) or "indexed" (a
    `.bin/.idx` prefix). `tokenizer`: what to train on the text (wordpiece, bpe, character), or a
    tokenizer's folder, file or Hub name. `micro_batch_size` None: as many as a rank has.

    Raises:
        ValueError: a value that cannot be, by name and rule.
    """

    source: str
    path: str | None
    tokenizer: str
    cache_dir: str
    seq_len: int
    global_batch_size: int
    micro_batch_size: int | None = None
    lowercase: bool = True
    holdout: float = 0.03
    validation_samples: int = 256
    masked_fraction: float = 0.15
    max_ngram: int = 3
    short_sample_fraction: float = 0.1
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.source not in ("text", "indexed"):
            raise ValueError(f"data.source {self.source!r} is not one of text, indexed")
        if self.source == "indexed" and self.path is None:
            raise ValueError("data=indexed needs data.path, the prefix of a .bin/.idx corpus")
        for key in ("seq_len", "global_batch_size", "validation_samples"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} {getattr(self, key)} is not positive")

    def micro_batch(self, data_parallel_size: int) -> int:
        """Return the sequences of one forward pass on one rank.

        Raises:
            ValueError: the global batch does not divide into micro-batches over the ranks.
        """
        micro = self.micro_batch_size or max(1, self.global_batch_size // data_parallel_size)
        if self.global_batch_size % (micro * data_parallel_size):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by micro_batch_size"
                f" {micro} x data_parallel_size {data_parallel_size}"
            )
        return micro


class PretrainingData(LightningDataModule):
    """Training and held-out samples of one corpus, cut for `model`.

    Everything wrong with corpus, tokenizer or sizes is a ValueError of the constructor.
    """

    def __init__(
        self, config: DataConfig, model: ModelConfig, *, seed: int, num_steps: int
    ) -> None:
        super().__init__()
        self.config, self.model, self.seed, self.num_steps = config, model, seed, num_steps
        if config.seq_len > model.max_seq_len:
            raise ValueError(
                f"data.seq_len {config.seq_len} exceeds the model's max_seq_len {model.max_seq_len}"
            )
        prefix, self.tokenizer = self._open_corpus()
        self.corpus = IndexedCorpus(prefix)
        self.train_documents, self.held_out_documents = split_by_document(
            self.corpus.num_documents, holdout=config.holdout, seed=HELD_OUT_SEED
        )
        self.train_samples = self._samples(self.train_documents, seed)
        self.held_out_samples = self._samples(self.held_out_documents, HELD_OUT_SEED)

    def _open_corpus(self) -> tuple[Path, PreTrainedTokenizerFast]:
        config = self.config
        if config.source == "text":
            prepared = prepare_text_corpus(
                Path(config.path) if config.path else None,
                cache_dir=Path(config.cache_dir).expanduser(),
                tokenizer=config.tokenizer,
                vocab_size=self.model.vocab_size,
                lowercase=config.lowercase,
                split_into_sentences=self.model.family == "bert",
            )
            return prepared.prefix, load_tokenizer(str(prepared.tokenizer_path))
        assert config.path is not None
        tokenizer = load_tokenizer(config.tokenizer)
        if len(tokenizer) > self.model.vocab_size:
            raise ValueError(
                f"vocabulary of {self.model.vocab_size} is smaller than the tokenizer's"
                f" {len(tokenizer)} entries ({config.tokenizer})"
            )
        return Path(config.path), tokenizer

    def _samples(self, documents: np.ndarray, seed: int) -> Dataset[dict[str, np.ndarray]]:
        if self.model.family == "gpt2":
            special = special_tokens(self.tokenizer, objective="clm")
            return Gpt2Samples(
                self.corpus, documents, seq_len=self.config.seq_len, seed=seed, eod=special.eod
            )
        return BertSamples(self.corpus, documents, settings=self._bert_settings(seed))

    def _bert_settings(self, seed: int) -> BertSampleSettings:
        return BertSampleSettings(
            seq_len=self.config.seq_len,
            seed=seed,
            vocab_size=len(self.tokenizer),
            special_tokens=special_tokens(self.tokenizer),
            word_start=word_start_table(self.tokenizer),
            masked_fraction=self.config.masked_fraction,
            max_ngram=self.config.max_ngram,
            short_sample_fraction=self.config.short_sample_fraction,
        )

    @property
    def num_predictions(self) -> int:
        """Positions of a sequence whose vocabulary product is computed."""
        if self.model.family == "gpt2":
            return self.config.seq_len
        return max_predictions(self._bert_settings(self.seed))

    def unigram_entropy(self) -> float:
        """Nats a token of held-out text costs a model that knows only the training frequencies.

        Every kind of token counts once more than seen, so that an unseen one costs a finite amount.
        """
        size = len(self.tokenizer)
        train = self._token_counts(self.train_documents, size) + 1
        held_out = self._token_counts(self.held_out_documents, size)
        log_probabilities = np.log(train / train.sum())
        return float(-(held_out * log_probabilities).sum() / held_out.sum())

    def _token_counts(self, documents: np.ndarray, size: int) -> np.ndarray:
        counts = np.zeros(size, dtype=np.int64)
        offsets = self.corpus.document_offsets()
        for document in documents[:20_000]:
            start, end = int(offsets[document]), int(offsets[document + 1])
            counts += np.bincount(self.corpus.tokens(start, end - start), minlength=size)
        return counts

    def _loader(self, samples: Any, batch_sampler: Any) -> DataLoader[Any]:
        workers = self.config.num_workers
        assert self.trainer is not None
        return DataLoader(
            samples,
            batch_sampler=batch_sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator(),  # leave the default stream, which is dropout's, alone
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """A batch a step, from where the run stands."""
        assert self.trainer is not None
        mesh = self._mesh()
        sampler = ConsumedSamplesSampler(
            global_batch_size=self.config.global_batch_size,
            num_steps=self.num_steps,
            data_parallel_rank=mesh.dp_rank,
            data_parallel_size=mesh.data_parallel_size,
            consumed_samples=self.trainer.global_step * self.config.global_batch_size,
        )
        return self._loader(self.train_samples, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """The first `validation_samples` held-out samples, each on one data-parallel rank."""
        mesh = self._mesh()
        sampler = ShardedValidationSampler(
            self.config.validation_samples,
            batch_size=self.config.micro_batch(mesh.data_parallel_size),
            data_parallel_rank=mesh.dp_rank,
            data_parallel_size=mesh.data_parallel_size,
        )
        return self._loader(self.held_out_samples, sampler)

    def _mesh(self) -> Any:
        assert self.trainer is not None
        strategy = self.trainer.strategy
        assert isinstance(strategy, TensorParallelStrategy)
        return strategy.mesh

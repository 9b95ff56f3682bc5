"""The data module of pretraining: a prepared corpus becomes batches of one optimizer step each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from hydratron.data.bert import BertSamples, BertSampleSettings
from hydratron.data.blend import BlendedSamples, BlendIndex
from hydratron.data.config import DataConfig, cache_folder
from hydratron.data.gpt2 import Gpt2Samples
from hydratron.data.identity import corpus_identity, tokenizer_identity
from hydratron.data.indexed import IndexedCorpus, split_by_document
from hydratron.data.manifest import MANIFEST, TOKENIZER, Manifest
from hydratron.data.sampler import ConsumedSamplesSampler, ShardedValidationSampler, collate
from hydratron.data.text import prepare_text_corpus
from hydratron.data.tokenizer import (
    PreTrainedTokenizerFast,
    load_tokenizer,
    special_tokens,
    tokenizer_hash,
    word_start_table,
)
from hydratron.models.config import ModelConfig
from hydratron.training.strategy import TensorParallelStrategy

HELD_OUT_SEED = 0  # the held-out documents and samples are the same in every run


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
        self.weights, self.tokenizer = self._open_corpus()
        self.corpora = [IndexedCorpus(prefix) for prefix in self.weights]
        for corpus in self.corpora:
            first = corpus.tokens(0, min(corpus.num_tokens, 2_000_000))
            corpus.check_tokens(first, len(self.tokenizer))
        # by each corpus's own documents, so the same ones whatever the weights
        self.splits = [
            split_by_document(corpus.num_documents, holdout=config.holdout, seed=HELD_OUT_SEED)
            for corpus in self.corpora
        ]
        index = BlendIndex(list(self.weights.values()), cache_folder(config.cache_dir))
        self.train_samples = BlendedSamples(
            [self._samples(c, train, seed) for c, (train, _) in self._parts()], index
        )
        self.held_out_samples = BlendedSamples(
            [self._samples(c, held_out, HELD_OUT_SEED) for c, (_, held_out) in self._parts()], index
        )

    def _parts(self) -> Iterator[tuple[IndexedCorpus, tuple[np.ndarray, np.ndarray]]]:
        return zip(self.corpora, self.splits, strict=True)

    def _open_corpus(self) -> tuple[dict[Path, float], PreTrainedTokenizerFast]:
        """The prefixes of the corpora with their weights, and the tokenizer they share."""
        config = self.config
        if config.source == "text":
            prepared = prepare_text_corpus(
                Path(config.path) if config.path else None,
                cache_dir=cache_folder(config.cache_dir),
                tokenizer=config.tokenizer,
                vocab_size=self.model.vocab_size,
                lowercase=config.lowercase,
                split_into_sentences=self.model.family == "bert",
            )
            return {prepared.prefix: 1.0}, load_tokenizer(str(prepared.tokenizer_path))
        assert config.path is not None
        if config.source == "blend":
            return self._open_blend(Path(config.path).expanduser())
        return {Path(config.path): 1.0}, self._load_tokenizer(config.tokenizer)

    def _open_blend(self, folder: Path) -> tuple[dict[Path, float], PreTrainedTokenizerFast]:
        manifest = Manifest.read(folder)
        if self.model.family == "bert" and not manifest.settings["split_into_sentences"]:
            raise ValueError(f"{folder} was prepared without sentences, which model=bert needs")
        tokenizer = self._load_tokenizer(str(folder / TOKENIZER))
        if tokenizer_hash(tokenizer) != manifest.tokenizer_sha256:
            raise ValueError(f"{folder / TOKENIZER} is not the tokenizer of its {MANIFEST}")
        wanted = {name: s.get("weight") for name, s in self.config.sources.items()}
        weights = manifest.weights(wanted, folder)
        return {folder / name: weight for name, weight in weights.items()}, tokenizer

    def _load_tokenizer(self, spec: str) -> PreTrainedTokenizerFast:
        tokenizer = load_tokenizer(spec)
        if len(tokenizer) > self.model.vocab_size:
            raise ValueError(
                f"vocabulary of {self.model.vocab_size} is smaller than the tokenizer's"
                f" {len(tokenizer)} entries ({spec})"
            )
        return tokenizer

    def _samples(
        self, corpus: IndexedCorpus, documents: np.ndarray, seed: int
    ) -> Dataset[dict[str, np.ndarray]]:
        if self.model.family == "gpt2":
            special = special_tokens(self.tokenizer, objective="clm")
            return Gpt2Samples(
                corpus,
                documents,
                seq_len=self.config.seq_len,
                seed=seed,
                eod=special.eod,
                vocab_size=len(self.tokenizer),
            )
        return BertSamples(corpus, documents, settings=self._bert_settings(seed))

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

    def identity(self) -> dict[str, list[str]]:
        """Return hash and description of the corpus and of the tokenizer."""
        return {
            "corpus": list(corpus_identity(self.weights)),
            "tokenizer": list(tokenizer_identity(self.tokenizer)),
        }

    @property
    def num_predictions(self) -> int:
        """Positions of a sequence whose vocabulary product is computed."""
        return self.config.num_predictions(self.model.family)

    def unigram_entropy(self) -> float:
        """Nats a token of held-out text costs a model that knows only the training frequencies.

        Every kind of token counts once more than seen, so that an unseen one costs a finite amount.
        ValueError for a token that is none of the tokenizer's.
        """
        size = len(self.tokenizer)
        train, held_out = np.ones(size, np.int64), np.zeros(size, np.int64)
        for corpus, (train_documents, held_out_documents) in self._parts():
            train += self._token_counts(corpus, train_documents, size)
            held_out += self._token_counts(corpus, held_out_documents, size)
        log_probabilities = np.log(train / train.sum())
        return float(-(held_out * log_probabilities).sum() / held_out.sum())

    def _token_counts(self, corpus: IndexedCorpus, documents: np.ndarray, size: int) -> np.ndarray:
        counts = np.zeros(size, dtype=np.int64)
        offsets = corpus.document_offsets()
        for document in documents[:20_000]:
            start, end = int(offsets[document]), int(offsets[document + 1])
            tokens = corpus.tokens(start, end - start)
            corpus.check_tokens(tokens, size)
            counts += np.bincount(tokens, minlength=size)
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

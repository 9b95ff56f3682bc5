"""The settings of pretraining's data, free of the libraries that read it: a plan needs no more."""

from dataclasses import dataclass, field
from typing import Any

from hydratron.data.bert import most_masked


@dataclass(frozen=True)
class DataConfig:
    """Where the text is and how it becomes batches.

    `source`: "text" (a folder of text files, None for the novels the project ships), "indexed" (a
    `.bin/.idx` prefix) or "blend" (a folder of `hydratron prepare`). `tokenizer`: what to train on
    the text (wordpiece, bpe, character), or a tokenizer's folder, file or Hub name; a blend has its
    own. `micro_batch_size` None: as many as a rank has. `sources`: a blend's, by name, as `Source`
    has them; their weights, where given, go before the folder's. `root`: where their paths begin.

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
    root: str | None = None
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source not in ("text", "indexed", "blend"):
            raise ValueError(f"data.source {self.source!r} is not one of text, indexed, blend")
        if self.source == "indexed" and self.path is None:
            raise ValueError("data=indexed needs data.path, the prefix of a .bin/.idx corpus")
        if self.source == "blend" and self.path is None:
            raise ValueError("a blend needs data.path, a folder of `hydratron prepare`")
        for key in ("path", "cache_dir"):
            if getattr(self, key) is not None and not getattr(self, key).strip():
                raise ValueError(f"data.{key} {getattr(self, key)!r} is empty")
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
            given = f"micro_batch_size {micro} x " if self.micro_batch_size else ""
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by"
                f" {given}data_parallel_size {data_parallel_size}"
            )
        return micro

    def num_predictions(self, family: str) -> int:
        """Return the positions of a sequence whose vocabulary product a model family computes."""
        if family == "gpt2":
            return self.seq_len
        return most_masked(self.seq_len, self.masked_fraction)

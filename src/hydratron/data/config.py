"""The settings of pretraining's data, free of the libraries that read it: a plan needs no more."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from hydratron.data.bert import most_masked
from hydratron.settings import (
    BatchSize,
    Count,
    Length,
    OpenShare,
    Share,
    Text,
    Workers,
    check,
    one_of,
)


def cache_folder(cache_dir: str) -> Path:
    """Return the folder that `data.cache_dir` names, and make it; ValueError where that fails."""
    folder = Path(cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir {cache_dir!r}: {error.strerror}") from error
    return folder


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

    source: Annotated[str, one_of("text", "indexed", "blend")]
    path: Text | None
    tokenizer: Text
    cache_dir: Text
    seq_len: Length
    global_batch_size: BatchSize
    micro_batch_size: BatchSize | None = None
    lowercase: bool = True
    holdout: OpenShare = 0.03
    validation_samples: Count = 256
    masked_fraction: OpenShare = 0.15
    max_ngram: Count = 3
    short_sample_fraction: Share = 0.1
    num_workers: Workers = 0
    root: Text | None = None
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, "data")
        if self.source == "indexed" and self.path is None:
            raise ValueError("data=indexed needs data.path, the prefix of a .bin/.idx corpus")
        if self.source == "blend" and self.path is None:
            raise ValueError("a blend needs data.path, a folder of `hydratron prepare`")
        if self.max_ngram > self.seq_len:
            raise ValueError(f"data.max_ngram {self.max_ngram} exceeds data.seq_len {self.seq_len}")

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

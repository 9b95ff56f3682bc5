"""What decides the content of a prepared corpus: its sources and the steps they go through."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any

from hydratron.data.deduplication import NearDuplicates
from hydratron.settings import Interval, Natural, Positive, Text, check, one_of


@dataclass(frozen=True)
class Source:
    """One corpus of a blend: where its raw text is, and its share of the samples.

    `kind`: "text" (.txt), "jsonl" (.jsonl, .json or .ndjson, one document a line, under
    `text_key`), "wikitext" (articles under " = Title = "), "huggingface" (a dataset by name or
    path; `subset` and `split`). `path`: a folder, a file or a pattern with `*`, `?` and `**`; files
    may be packed (.gz, .zst). `weight`: share of the samples; all sources have one, or none has and
    their tokens count. `split_files`: cut each text into chapters or runs of about 2,000 words.
    `join_lines`: undo newlines inside sentences. `exclude_titles`: a WikiText file whose articles
    are left out, as those of WikiText-103's test
    set are from Wikipedia (Shoeybi et al. 2019, 4.1). `home` and `licence` go to the manifest.
    ValueError for values that cannot be.
    """

    kind: Annotated[str, one_of("text", "jsonl", "wikitext", "huggingface")]
    path: Text
    weight: Positive | None = None
    text_key: Text = "text"
    title_key: Text = "title"
    subset: Text | None = None
    split: Text = "train"
    split_files: bool = False
    join_lines: bool = False
    exclude_titles: Text | None = None
    home: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        check(self, "source")


def check_weights(weights: Mapping[str, Any]) -> None:
    """ValueError for a weight that is no number, and for one that is missing beside others."""
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (is_number and 0 <= weight < inf):
            raise ValueError(f"data.sources.{name}.weight {weight!r} is not a number from 0 up")
    missing = [name for name, weight in weights.items() if weight is None]
    given = [name for name, weight in weights.items() if weight]
    if missing and given:
        raise ValueError(
            f"data.sources.{missing[0]}.weight is missing where {given[0]} has one:"
            " each source has a weight, or none has"
        )


@dataclass(frozen=True)
class StepsConfig:
    """Which steps a text goes through; each can be switched off.

    `fix_text`: repair of broken encodings. `language`: keep texts in it, null keeps all.
    `min_tokens`: shortest document, 0 keeps all. `exact_duplicates`, `near_duplicates` (null: off):
    keep the first. `decontaminate`: files of evaluation sets, none of whose runs of
    `decontaminate_ngram` words may occur. ValueError for values that cannot be.
    """

    fix_text: bool = True
    language: Text | None = None
    min_tokens: Natural = 128
    exact_duplicates: bool = True
    near_duplicates: NearDuplicates | None = None
    decontaminate: tuple[Text, ...] = ()
    decontaminate_ngram: Annotated[int, Interval(1, 1000)] = 13
    shard_megabytes: Annotated[int, Interval(1, 2**20)] = 16

    def __post_init__(self) -> None:
        check(self, "steps")


@dataclass(frozen=True)
class CorpusConfig:
    """Everything that decides the content of a prepared corpus.

    `tokenizer`: a kind to train on the text (with `vocab_size` and `lowercase`), or a folder, file
    or Hub name. `split_into_sentences`: a sequence is a sentence, as BERT needs, else a document.
    ValueError where only some of the sources have a weight.
    """

    sources: dict[str, Source]
    tokenizer: str
    vocab_size: int
    lowercase: bool
    split_into_sentences: bool
    steps: StepsConfig

    def __post_init__(self) -> None:
        check_weights({name: source.weight for name, source in self.sources.items()})

"""Examples as token ids: special tokens around segments, columns of arrays, and a cache on disk.

Letters: E examples, C sequences an example (1, or the choices of RACE), S tokens of a sequence.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from hydratron.data.files import make_cache_folder
from hydratron.data.tokenizer import tokenizer_hash

MODEL_COLUMNS = ("input_ids", "token_type_ids")
_CHUNK_SIZE = 8192  # texts tokenised at a time: bounds the memory of their Encoding objects
_CACHE_VERSION = 1  # raise it when an encoding changes with the same examples and settings


@dataclass(frozen=True)
class Frame:
    """The special tokens around one or two segments, with their token types.

    `parts` are the ids before, between and after the segments; `part_types` their types;
    `segment_types` the type of each segment. BERT's pair frame is `[CLS] a [SEP] b [SEP]`.
    """

    parts: tuple[tuple[int, ...], ...]
    part_types: tuple[tuple[int, ...], ...]
    segment_types: tuple[int, ...]
    cls_id: int

    @property
    def num_special_tokens(self) -> int:
        """Return how many tokens the frame adds."""
        return sum(len(part) for part in self.parts)

    def assemble(self, *segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids int32 [S], token_type_ids uint8 [S]) of one or two segments of ids."""
        ids: list[Any] = [self.parts[0]]
        types: list[Any] = [self.part_types[0]]
        for segment, segment_type, part, part_type in zip(
            segments, self.segment_types, self.parts[1:], self.part_types[1:], strict=True
        ):
            ids += [segment, part]
            types += [np.full(len(segment), segment_type, np.uint8), part_type]
        return (
            np.concatenate([np.asarray(x, np.int32) for x in ids]),
            np.concatenate([np.asarray(x, np.uint8) for x in types]),
        )

    def cls_position(self, length: int) -> int:
        """Return where the classification token stands in a sequence of `length` tokens."""
        if self.cls_id in self.parts[0]:
            return self.parts[0].index(self.cls_id)
        return length - len(self.parts[-1]) + self.parts[-1].index(self.cls_id)


def make_frame(tokenizer: PreTrainedTokenizerFast, num_segments: int) -> Frame:
    """Return the tokenizer's own frame for 1 or 2 segments, BERT's where it has none.

    RoBERTa's is `<s> a </s></s> b </s>`, XLNet's ends with its `<cls>`.

    Raises:
        ValueError: the tokenizer has no classification or no separator token.
    """
    cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    if not isinstance(cls_id, int) or not isinstance(sep_id, int):
        raise ValueError(
            f"the tokenizer has cls_token {tokenizer.cls_token!r} and sep_token"
            f" {tokenizer.sep_token!r}: finetuning needs both"
        )
    backend = _plain_backend(tokenizer)
    probe = backend.encode("a", "b") if num_segments == 2 else backend.encode("a")
    parts: list[list[int]] = [[] for _ in range(num_segments + 1)]
    part_types: list[list[int]] = [[] for _ in range(num_segments + 1)]
    segment_types = [0] * num_segments
    place = 0
    for token_id, token_type, segment in zip(
        probe.ids, probe.type_ids, probe.sequence_ids, strict=True
    ):
        if segment is None:
            parts[place].append(token_id)
            part_types[place].append(token_type)
        else:
            place = segment + 1
            segment_types[segment] = token_type
    if not any(parts):
        parts = [[cls_id]] + [[sep_id]] * num_segments
        segment_types = list(range(num_segments))
        part_types = [[0]] + [[segment] for segment in segment_types]
    return Frame(
        tuple(map(tuple, parts)), tuple(map(tuple, part_types)), tuple(segment_types), cls_id
    )


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the Rust tokenizer, without the truncation and padding an earlier call left on."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids (int32) of each text, no special tokens added."""
    backend = _plain_backend(tokenizer)
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), _CHUNK_SIZE):
        chunk = list(texts[start : start + _CHUNK_SIZE])
        for encoding in backend.encode_batch_fast(chunk, add_special_tokens=False):
            ids.append(np.asarray(encoding.ids, np.int32))
    return ids


def tokenize_with_offsets(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield per text its ids (int32 [S]) and the characters each came from (int32 [S, 2])."""
    backend = _plain_backend(tokenizer)
    for start in range(0, len(texts), _CHUNK_SIZE):
        chunk = list(texts[start : start + _CHUNK_SIZE])
        for encoding in backend.encode_batch(chunk, add_special_tokens=False):
            ids = np.asarray(encoding.ids, np.int32)
            yield ids, np.asarray(encoding.offsets, np.int32).reshape(-1, 2)


def truncate_longest_first(
    a: np.ndarray, b: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut two segments to `room` tokens, each off the longer one, off `b` when equal (BERT)."""
    if len(a) + len(b) <= room:
        return a, b
    num_b = min(len(b), max(room // 2, room - len(a)))
    return a[: room - num_b], b[:num_b]


@dataclass(frozen=True, eq=False)
class Encodings(Dataset[dict[str, Any]]):
    """Encoded examples as columns of arrays, in memory or mapped from a cache.

    `tokens` holds one value a token, all sequences end to end; `offsets` int64 [E * C + 1] where
    each sequence starts; `values` one value an example. Item `i` has `index`, the values, and
    per model column an array [S], or a list of C of them when `num_choices` C is above 1.
    """

    tokens: dict[str, np.ndarray]
    offsets: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    num_choices: int = 1

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.num_choices

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"index": index}
        for name, column in self.values.items():
            item[name] = column[index]
        first = index * self.num_choices
        for name in MODEL_COLUMNS:
            sequences = [self.get(name, first + choice) for choice in range(self.num_choices)]
            item[name] = sequences if self.num_choices > 1 else sequences[0]
        return item

    def get(self, name: str, sequence: int) -> np.ndarray:
        """Return token column `name` of one sequence, [S]."""
        return self.tokens[name][self.offsets[sequence] : self.offsets[sequence + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example's longest sequence, int64 [E]."""
        # [E * C] -> [E, C]
        return np.diff(self.offsets).reshape(-1, self.num_choices).max(axis=1)


def stack_sequences(
    sequences: Iterable[Sequence[np.ndarray]],
    names: Sequence[str] = MODEL_COLUMNS,
    *,
    values: Mapping[str, Sequence[int]],
    num_choices: int = 1,
) -> Encodings:
    """Return `Encodings` of sequences, each a tuple of equally long arrays, one per name."""
    columns = [list(column) for column in zip(*sequences, strict=True)]
    lengths = [len(array) for array in columns[0]]
    return Encodings(
        tokens={name: np.concatenate(c) for name, c in zip(names, columns, strict=True)},
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        values={name: np.asarray(value, np.int64) for name, value in values.items()},
        num_choices=num_choices,
    )


def cache_key(
    examples: Sequence[Any], tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]
) -> str:
    """Return a hash of what an encoding depends on: every example, the tokenizer, the settings."""
    fixed = [_CACHE_VERSION, tokenizer_hash(tokenizer), dict(settings)]
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode())
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def encode_cached(
    examples: Sequence[Any],
    encode_fn: Callable[[Sequence[Any]], Encodings],
    cache_dir: Path | None,
    key: str,
) -> Encodings:
    """Return `encode_fn(examples)`, memory-mapped from `cache_dir/key`, where it is kept.

    Any number of processes may call this at once: one encodes, the others wait for it; a process
    that dies leaves nothing that looks like a cache. None for `cache_dir` keeps nothing.
    """
    if cache_dir is None:
        return encode_fn(examples)
    folder = cache_dir / key
    if not folder.is_dir():
        make_cache_folder(cache_dir)
        with (cache_dir / f".{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _save(encode_fn(examples), folder)
    return _load(folder)


def _save(encodings: Encodings, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for group in ("tokens", "values"):
        for name, column in getattr(encodings, group).items():
            np.save(partial / f"{group}.{name}.npy", column)
    np.save(partial / "offsets.npy", encodings.offsets)
    np.save(partial / "num_choices.npy", np.asarray(encodings.num_choices))
    try:
        partial.rename(folder)
    except OSError:
        # A lock may not reach other machines: one of them was first, with the same content.
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def _load(folder: Path) -> Encodings:
    def columns(group: str) -> dict[str, np.ndarray]:
        files = sorted(folder.glob(f"{group}.*.npy"))
        # a plain array over the map: slicing it costs a tenth
        maps = {f.name.split(".")[1]: np.load(f, mmap_mode="r") for f in files}
        return {name: np.asarray(column) for name, column in maps.items()}

    return Encodings(
        tokens=columns("tokens"),
        offsets=np.load(folder / "offsets.npy"),
        values=columns("values"),
        num_choices=int(np.load(folder / "num_choices.npy")),
    )

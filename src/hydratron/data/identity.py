"""What a run was trained on, in a line: a resumed run compares it with what it is given."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from hydratron.data.blend import integer_weights
from hydratron.data.indexed import IndexedCorpus
from hydratron.data.manifest import Manifest
from hydratron.data.tokenizer import tokenizer_hash

_WHOLE = 1 << 30  # bytes of a file that are hashed whole: about a second
_SAMPLE, _NUM_SAMPLES = 1 << 20, 256  # of a larger file


class Identity(NamedTuple):
    """`hash` (16 hex digits) is what two runs compare, `description` what a message says."""

    hash: str
    description: str


def corpus_identity(weights: Mapping[Path, float]) -> Identity:
    """Identify the indexed corpora that a run blends, given as prefix and weight, in their order.

    Two identities are equal where tokens, documents, order and proportions are; places are not part
    of it, so a corpus may move. A file above 1 GiB is known by its size, 256 samples of 1 MiB and,
    in a folder of `hydratron prepare`, the hash that its manifest has of all of it.

    Raises:
        ValueError: a corpus that is missing or damaged, as IndexedCorpus has it.
    """
    counts = integer_weights(list(weights.values()))
    parts: list[str] = []
    known: list[object] = [counts if len(counts) > 1 else 1]
    for (prefix, weight), count in zip(weights.items(), counts, strict=True):
        corpus = IndexedCorpus(prefix)
        content = [_sampled_hash(path) for path in corpus.files] + [_prepared_hash(prefix)]
        known.append(content)
        share = f", weight {weight:g} ({count / sum(counts):.1%})" if len(counts) > 1 else ""
        parts.append(
            f"{prefix.name}: {corpus.num_tokens} tokens in {corpus.num_documents} documents"
            f" ({_short_hash(content)[:8]}){share}"
        )
    return Identity(_short_hash(known), "; ".join(parts))


def tokenizer_identity(tokenizer: PreTrainedTokenizerFast) -> Identity:
    """Identify a tokenizer by all that decides the ids of a text and which of them are special."""
    digest = tokenizer_hash(tokenizer)[:16]
    model = type(tokenizer.backend_tokenizer.model).__name__
    return Identity(digest, f"{model} of {len(tokenizer)} entries ({digest[:8]})")


def _short_hash(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _prepared_hash(prefix: Path) -> Any:
    try:
        sources = Manifest.read(prefix.parent).sources
    except ValueError:  # none there, or some other program's
        return None
    return sources.get(prefix.name, {}).get("sha256")


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= _WHOLE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for i in range(_NUM_SAMPLES):
            stream.seek((size - _SAMPLE) * i // (_NUM_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()

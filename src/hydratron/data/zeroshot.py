"""Zero-shot sets for GPT-2: WikiText-103 perplexity and LAMBADA accuracy (Shoeybi et al., App. E).

Letters: B batch, S sequence. The functions yield batches and turn sums into metrics; between them
a model gives losses or predictions.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hydratron.data.encodings import tokenize
from hydratron.data.examples import get_field, load_from_hub, read_json_lines, read_lines

_MAX_EXPONENT = 20.0  # caps a perplexity at exp(20), as the original does

# WikiText separates punctuation by spaces and marks what it split inside a token by @. In order:
# a bracket's inner spaces go after those around the marks in it. Quotes pair up across the whole
# text, so it must be one string.
_DETOKENIZER = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"s '", "s'"),
        *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
        # One after the other: neighbours share a space, which the first mark hands on.
        *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        (r"= = = =", "===="),
        (r"= = =", "==="),
        (r"= =", "=="),
        (r" ° ", "°"),
        (r" \n", "\n"),
        (r"\n ", "\n"),
        (r" N ", " 1 "),
        (r" 's", "'s"),
    )
]


@dataclass(frozen=True)
class EvaluationBatch:
    """`input_ids` and `labels` (the next tokens) int64 [B, S]; `loss_mask` bool [B, S], scored."""

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class PerplexityText:
    """A text as one stream of tokens (int32), and how many words it had before detokenising."""

    token_ids: np.ndarray
    num_original_tokens: int


def wikitext_detokenize(text: str) -> str:
    """Return a WikiText text as it was before it was split into words."""
    for pattern, replacement in _DETOKENIZER:
        text = pattern.sub(replacement, text)
    return text


def count_original_tokens(text: str) -> int:
    """Return T_o, the words between single spaces: 245,566 for the WikiText-103 test text."""
    return len(text.strip().split(" "))


def load_wikitext(
    path: Path | None, tokenizer: PreTrainedTokenizerFast, *, split: str = "test"
) -> PerplexityText:
    """Return a WikiText file (`wiki.test.tokens`), detokenised and tokenised as one stream.

    None for `path`: `wikitext-103-v1` from the hub, nothing else.

    Raises:
        ValueError: no such file, not UTF-8, fewer than two tokens, or the hub has it not.
    """
    if path is None:
        rows = load_from_hub("Salesforce/wikitext", "wikitext-103-v1", split=split)
        # The hub keeps a blank line as "", the file as " \n".
        text = "".join(row["text"] or " \n" for row in rows)
    else:
        text = "\n".join(line for _, line in read_lines(Path(path))) + "\n"
    [token_ids] = tokenize(tokenizer, [wikitext_detokenize(text)])
    if len(token_ids) < 2:
        raise ValueError(f"{path}: no text to score")
    return PerplexityText(token_ids, count_original_tokens(text))


def perplexity_batches(
    token_ids: np.ndarray,
    *,
    max_seq_len: int,
    batch_size: int,
    overlap: int = 32,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvaluationBatch]:
    """Yield windows of `max_seq_len` inputs, each `overlap` tokens after the one before.

    The first window scores all its targets, every other the last `overlap`: each of the T - 1
    targets once, with at least max_seq_len - overlap tokens before it from the second window on.
    Data-parallel rank r of `world_size` gets every world_size-th window.

    Raises:
        ValueError: `overlap` is not between 1 and `max_seq_len`.
    """
    if not 1 <= overlap <= max_seq_len:
        raise ValueError(f"overlap {overlap} is not between 1 and max_seq_len {max_seq_len}")
    num_targets = len(token_ids) - 1
    num_windows = 1 + max(0, -(-(num_targets - max_seq_len) // overlap))
    padded = np.zeros((num_windows - 1) * overlap + max_seq_len + 1, np.int64)
    padded[: len(token_ids)] = token_ids
    steps = np.arange(max_seq_len)
    mine = np.arange(rank, num_windows, world_size)
    for first in range(0, len(mine), batch_size):
        windows = mine[first : first + batch_size, None]  # [B, 1]
        positions = windows * overlap + steps  # [B, S]
        is_scored = (windows == 0) | (steps >= max_seq_len - overlap)
        yield EvaluationBatch(
            torch.from_numpy(padded[positions]),
            torch.from_numpy(padded[positions + 1]),
            torch.from_numpy(is_scored & (positions < num_targets)),
        )


def perplexity_metrics(
    loss_sum: float, num_tokens: int, num_original_tokens: int
) -> dict[str, float]:
    """Return `loss`, `perplexity` a token and `adjusted_perplexity` a word of the original text.

    `loss_sum` is the sum over the T - 1 targets, in nats. Adjusted perplexity is
    exp(loss * (T - 1) / (T_o - 1)), which tokenizers share (paper, equation of Appendix E.1).
    """
    loss = loss_sum / (num_tokens - 1)
    adjusted = loss_sum / (num_original_tokens - 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(_MAX_EXPONENT, loss)),
        "adjusted_perplexity": math.exp(min(_MAX_EXPONENT, adjusted)),
    }


def load_lambada(path: Path | None, *, split: str = "test") -> list[str]:
    """Return the passages of the detokenised (OpenAI) LAMBADA, JSON lines with a `text`.

    None for `path`: `EleutherAI/lambada_openai` from the hub, nothing else.

    Raises:
        ValueError: naming file and line: not JSON, no `text`, fewer than two words; or no rows.
    """
    if path is None:
        source = "EleutherAI/lambada_openai"
        numbered = enumerate(load_from_hub(source, "default", split=split))
    else:
        source = str(path)
        numbered = read_json_lines(Path(path))
    passages: list[str] = []
    for number, row in numbered:
        text = get_field(row, "text", str, f"{source}:{number}")
        if len(text.split()) < 2:
            raise ValueError(f"{source}:{number}: needs a context and a last word, got {text!r}")
        passages.append(text)
    if not passages:
        raise ValueError(f"{source}: no passages")
    return passages


def encode_lambada(
    passages: Sequence[str], tokenizer: PreTrainedTokenizerFast, *, strict: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (context ids, target ids) of each passage.

    Strict: the target is the last word, tokenised by itself with a space before it, the context
    stripped. Loose: the last token of the passage, often only a piece of the word, which flatters.
    """
    if not strict:
        return [(ids[:-1], ids[-1:]) for ids in tokenize(tokenizer, passages)]
    words = [text.split()[-1] for text in passages]
    contexts = [
        text[: text.rfind(word)].strip() for text, word in zip(passages, words, strict=True)
    ]
    targets = tokenize(tokenizer, [f" {word}" for word in words])
    return list(zip(tokenize(tokenizer, contexts), targets, strict=True))


def lambada_batches(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    max_seq_len: int,
    batch_size: int,
    pad_id: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvaluationBatch]:
    """Yield teacher-forced batches, longest first, padded on the right; only targets are scored.

    A passage longer than `max_seq_len` inputs loses its beginning. Data-parallel rank r of
    `world_size` gets every world_size-th passage.
    """
    # The last token is only a target, so max_seq_len inputs take max_seq_len + 1 tokens.
    mine = sorted(pairs, key=lambda pair: -len(pair[0]))[rank::world_size]
    rows = [np.concatenate(pair)[-(max_seq_len + 1) :] for pair in mine]
    num_targets = [len(target) for _, target in mine]
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        tokens = np.full((len(chunk), max(map(len, chunk))), pad_id, np.int64)
        mask = np.zeros((len(chunk), tokens.shape[1] - 1), np.bool_)
        for i, row in enumerate(chunk):
            tokens[i, : len(row)] = row
            mask[i, len(row) - 1 - num_targets[first + i] : len(row) - 1] = True
        # [B, S + 1] -> inputs and labels [B, S]
        inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        yield EvaluationBatch(*map(torch.from_numpy, (inputs, labels, mask)))


def lambada_num_correct(predictions: Tensor, batch: EvaluationBatch) -> int:
    """Return how many rows have every scored target equal to `predictions` (argmax, [B, S])."""
    matches = (predictions == batch.labels) | ~batch.loss_mask
    return int(matches.all(dim=1).sum())

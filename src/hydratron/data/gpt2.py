"""GPT-2 samples: windows of one long stream of documents, as Megatron's, without a copy of it."""

import numpy as np
from torch.utils.data import Dataset

from hydratron.data.indexed import IndexedCorpus

_ORDER, _WINDOWS = 0, 1  # random streams of an epoch


class Gpt2Samples(Dataset[dict[str, np.ndarray]]):
    """Sample k, any k >= 0, is a pure function of (corpus, documents, seed, k).

    An epoch is the documents in a seeded order, each closed by the `eod` token unless it ends with
    it already, cut into windows of seq_len + 1 tokens that advance by seq_len, themselves in a
    seeded order; len() is the windows of an epoch. The tokens of an incomplete last window are left
    out until another epoch's order. ValueError where the documents do not fill one window, and for
    a sample with a token beyond `vocab_size`, the tokenizer's entries.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        documents: np.ndarray,
        *,
        seq_len: int,
        seed: int,
        eod: int,
        vocab_size: int,
    ) -> None:
        self.corpus, self.seq_len, self.seed, self.eod = corpus, seq_len, seed, eod
        self.vocab_size = vocab_size
        offsets = corpus.document_offsets()
        # Megatron allows documents without tokens
        documents = documents[offsets[documents + 1] > offsets[documents]]
        self.starts = offsets[documents]
        self.lengths = offsets[documents + 1] - self.starts
        lacks_eod = corpus.tokens_at(offsets[documents + 1] - 1) != eod
        self.stream_lengths = self.lengths + lacks_eod
        self.num_windows = (int(self.stream_lengths.sum()) - 1) // seq_len
        if self.num_windows < 1:
            raise ValueError(
                f"{corpus.prefix}: {len(documents)} documents hold {self.stream_lengths.sum()} "
                f"tokens, fewer than the {seq_len + 1} of one sample of seq_len {seq_len}"
            )
        none = np.empty(0, dtype=np.int64)
        self._epoch, self._plan = -1, (none, none, none)

    def __len__(self) -> int:
        return self.num_windows

    def _epoch_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, _ORDER, epoch)).permutation(len(self.starts))
            ends = np.cumsum(self.stream_lengths[order])
            windows = np.random.default_rng((self.seed, _WINDOWS, epoch)).permutation(
                self.num_windows
            )
            self._epoch, self._plan = epoch, (order, ends, windows)
        return self._plan

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        """input_ids and labels, int64 [S] each; the labels are the inputs one token on."""
        if k < 0:
            raise IndexError(f"sample {k} is negative")
        order, ends, windows = self._epoch_plan(k // self.num_windows)
        position = int(windows[k % self.num_windows]) * self.seq_len
        tokens = np.full(self.seq_len + 1, self.eod, dtype=np.int64)
        i, filled = int(np.searchsorted(ends, position, side="right")), 0
        while filled <= self.seq_len:
            document = order[i]
            skip = position + filled - int(ends[i] - self.stream_lengths[document])
            length = min(int(self.lengths[document]) - skip, self.seq_len + 1 - filled)
            if length > 0:  # else only the eod is left, and that is there already
                start = int(self.starts[document]) + skip
                tokens[filled : filled + length] = self.corpus.tokens(start, length)
            filled = int(ends[i]) - position
            i += 1
        self.corpus.check_tokens(tokens, self.vocab_size)
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}

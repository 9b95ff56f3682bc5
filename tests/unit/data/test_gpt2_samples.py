import pickle

import numpy as np
import pytest

from hydratron.data.gpt2 import Gpt2Samples

EOD = 99


def epoch_of(samples: Gpt2Samples, epoch: int) -> list[list[int]]:
    n = len(samples)
    return [samples[k]["input_ids"].tolist() for k in range(epoch * n, epoch * n + n)]


def test_windows_tile_the_stream_of_documents_each_closed_by_eod(write_corpus) -> None:
    # 3, 2 and 6 tokens; the second document has its eod already, so the stream has 4 + 2 + 7 tokens
    corpus = write_corpus([[[1, 2], [3]], [[4, EOD]], [[5, 6, 7, 8, 9, 10]]])
    samples = Gpt2Samples(corpus, np.arange(3), seq_len=4, seed=7, eod=EOD, vocab_size=100)
    assert len(samples) == 3
    blocks = ([1, 2, 3, EOD], [4, EOD], [5, 6, 7, 8, 9, 10, EOD])
    streams = [
        [*blocks[i], *blocks[j], *blocks[3 - i - j]] for i in range(3) for j in range(3) if i != j
    ]
    seen = set()
    for epoch in range(20):
        windows = epoch_of(samples, epoch)
        matches = [
            n
            for n, stream in enumerate(streams)
            if sorted(windows) == sorted(stream[i : i + 4] for i in (0, 4, 8))
        ]
        assert matches, f"epoch {epoch}: {windows}"
        seen.update(matches)
    assert len(seen) >= 3  # orders of documents differ between epochs


def test_labels_are_the_inputs_one_token_on(shipped_words) -> None:
    samples = Gpt2Samples(
        shipped_words.corpus, shipped_words.documents, seq_len=32, seed=1, eod=5, vocab_size=4096
    )
    for k in (0, 5, len(samples) - 1, len(samples) + 3):
        sample = samples[k]
        assert sample["input_ids"].shape == sample["labels"].shape == (32,)
        assert sample["input_ids"].dtype == sample["labels"].dtype == np.int64
        assert sample["input_ids"][1:].tolist() == sample["labels"][:-1].tolist()


def test_an_epoch_reads_every_token_of_the_chosen_documents_once(shipped_words) -> None:
    corpus, documents = shipped_words.corpus, np.array([3, 40, 41])
    samples = Gpt2Samples(corpus, documents, seq_len=16, seed=1, eod=5, vocab_size=4096)
    offsets = corpus.document_offsets()
    text = np.concatenate(
        [corpus.tokens(offsets[d], offsets[d + 1] - offsets[d]) for d in documents]
    )
    read = np.bincount(
        np.concatenate([samples[k]["input_ids"] for k in range(len(samples))]), minlength=3000
    )
    expected = np.bincount(text, minlength=3000)
    expected[5] += 3
    missing = expected - read
    assert missing.min() >= 0
    assert missing.sum() == samples.stream_lengths.sum() - 16 * len(samples) <= 16


def test_a_sample_depends_on_seed_and_index_only(shipped_words) -> None:
    corpus, documents = shipped_words.corpus, shipped_words.documents
    samples = Gpt2Samples(corpus, documents, seq_len=32, seed=1, eod=5, vocab_size=4096)
    n = len(samples)
    expected = samples[n + 2]["input_ids"].tolist()
    samples[0]  # another epoch in between
    assert samples[n + 2]["input_ids"].tolist() == expected
    assert pickle.loads(pickle.dumps(samples))[n + 2]["input_ids"].tolist() == expected
    other = Gpt2Samples(corpus, documents, seq_len=32, seed=2, eod=5, vocab_size=4096)
    assert other[n + 2]["input_ids"].tolist() != expected
    assert len(pickle.dumps(samples)) < corpus.num_tokens  # the corpus itself stays on disk


def test_documents_shorter_than_a_window_together_are_refused(write_corpus) -> None:
    corpus = write_corpus([[[1, 2, 3]], [[4]]])
    with pytest.raises(ValueError, match="2 documents hold 6 tokens, fewer than the 9"):
        Gpt2Samples(corpus, np.arange(2), seq_len=8, seed=0, eod=EOD, vocab_size=100)
    with pytest.raises(IndexError, match="-1"):
        Gpt2Samples(corpus, np.arange(2), seq_len=4, seed=0, eod=EOD, vocab_size=100)[-1]


def test_a_token_that_is_none_of_the_tokenizer_s_is_refused(write_corpus) -> None:
    corpus = write_corpus([[[1, 2, 3, 100, 5]]])
    samples = Gpt2Samples(corpus, np.arange(1), seq_len=4, seed=0, eod=EOD, vocab_size=100)
    with pytest.raises(ValueError, match="token 100 is beyond the tokenizer's 100 entries"):
        samples[0]

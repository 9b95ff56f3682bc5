"""How fast text becomes samples, beside megatron-core on the same files in the same run.

python benchmarks/data.py TEXT_FOLDER TOKENIZER OUTPUT.csv
(megatron-core 0.16.1 is in the extra `interop`; without it its rows are left out)
"""

import argparse
import csv
import logging
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from hydratron.data.bert import BertSamples, BertSampleSettings, build_sample_index
from hydratron.data.blend import BlendIndex
from hydratron.data.deduplication import NearDuplicates
from hydratron.data.gpt2 import Gpt2Samples
from hydratron.data.indexed import IndexedCorpus, IndexedWriter
from hydratron.data.prepare import ExecutorConfig, check_preparation, prepare_corpus
from hydratron.data.sources import CorpusConfig, Source, StepsConfig
from hydratron.data.text import encode_documents, read_text_folder, split_documents, split_sentences
from hydratron.data.tokenizer import load_tokenizer, special_tokens, word_start_table

BERT_SAMPLES, GPT2_SAMPLES = 1000, 2000  # of a round
TEXTS = 120  # tokenised each round
ROUNDS = 5  # theirs and ours in turn, so that a busy machine is busy for both


class Row(NamedTuple):
    """A line of the table."""

    what: str
    value: float
    unit: str


def samples_per_second(get: Callable[[int], Any], numbers: range) -> float:
    """CPU time of one core: other processes do not count."""
    started = time.process_time()
    for k in numbers:
        get(k)
    return len(numbers) / (time.process_time() - started)


def compare(name: str, ours: Any, theirs: Any | None, num_samples: int) -> list[Row]:
    """Medians over rounds in turn, and their ratio."""
    found: dict[str, list[float]] = {"hydratron": [], "megatron-core": []}
    for i in range(ROUNDS):
        numbers = range(i * num_samples, (i + 1) * num_samples)
        found["hydratron"].append(samples_per_second(ours.__getitem__, numbers))
        if theirs is not None:
            found["megatron-core"].append(samples_per_second(theirs.__getitem__, numbers))
    rows = [
        Row(f"{name}, {system}", statistics.median(rates), "samples/s a core")
        for system, rates in found.items()
        if rates
    ]
    if theirs is not None:
        rows.append(Row(f"{name}, ratio", rows[0].value / rows[1].value, "times"))
    return rows


def tokenizer_for_megatron(tokenizer: Any) -> Any:
    """What megatron-core's datasets ask of a tokenizer."""
    special = special_tokens(tokenizer, objective="mlm")
    inverse = {i: token for token, i in tokenizer.get_vocab().items()}
    return SimpleNamespace(
        cls=special.cls,
        sep=special.sep,
        mask=special.mask,
        pad=special.pad,
        eod=special.sep,
        inv_vocab=inverse,
        vocab_size=len(tokenizer),
        unique_identifiers={"name": "benchmark"},
    )


def megatron_datasets(sentences: Path, documents: Path, tokenizer: Any, cache: Path) -> list[Any]:
    """Its BERT dataset of 512 tokens and its GPT dataset of 1,024 on our files; None without it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        from megatron.core.datasets import bert_dataset, gpt_dataset
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    except ImportError:
        return [None, None]
    rendezvous = f"file://{cache}.rendezvous"  # its BERT dataset asks for its rank
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    common = {
        "random_seed": 1,
        "split": "1,0,0",
        "path_to_cache": str(cache),
        "tokenizer": tokenizer_for_megatron(tokenizer),
    }
    masked = bert_dataset.BERTMaskedWordPieceDatasetConfig(
        sequence_length=512,
        masking_probability=0.15,
        short_sequence_probability=0.1,
        masking_max_ngram=3,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        classification_head=True,
        blend=([str(sentences)], None),
        **common,
    )
    causal = gpt_dataset.GPTDatasetConfig(
        sequence_length=1024,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        blend=([str(documents)], None),
        **common,
    )

    def make(cls: Any, prefix: Path, num_samples: int | None, config: Any) -> Any:
        corpus = IndexedDataset(str(prefix))
        ids = np.arange(len(corpus.document_indices) - 1, dtype=np.int32)
        return cls(corpus, str(prefix), ids, num_samples, Split.train, config)

    # more than one epoch each, so that both systems cross epochs alike
    return [
        make(bert_dataset.BERTMaskedWordPieceDataset, sentences, ROUNDS * BERT_SAMPLES, masked),
        make(gpt_dataset.GPTDataset, documents, ROUNDS * GPT2_SAMPLES, causal),
    ]


def sample_rows(sentences: Path, tokenizer: Any, folder: Path) -> list[Row]:
    """BERT samples of a corpus of sentences, GPT-2 samples of the same with whole documents."""
    corpus = IndexedCorpus(sentences)
    eod = special_tokens(tokenizer).sep
    with IndexedWriter(folder / "documents", corpus.dtype) as writer:
        offsets = corpus.document_offsets().tolist()
        for start, stop in zip(offsets, offsets[1:], strict=False):
            writer.add_document([np.append(corpus.tokens(start, stop - start), eod)])
    whole = IndexedCorpus(folder / "documents")
    every = np.arange(corpus.num_documents)
    bert = BertSamples(corpus, every, settings=bert_settings(tokenizer))
    gpt2 = Gpt2Samples(whole, every, seq_len=1024, seed=1, eod=eod, vocab_size=len(tokenizer))
    theirs = megatron_datasets(sentences, folder / "documents", tokenizer, folder / "megatron")
    return [
        *compare("BERT sample, 512 tokens", bert, theirs[0], BERT_SAMPLES),
        *compare("GPT-2 sample, 1,024 tokens", gpt2, theirs[1], GPT2_SAMPLES),
    ]


def bert_settings(tokenizer: Any) -> BertSampleSettings:
    """Those of the seed."""
    return BertSampleSettings(
        seq_len=512,
        seed=1,
        vocab_size=len(tokenizer),
        special_tokens=special_tokens(tokenizer),
        word_start=word_start_table(tokenizer),
    )


def tokenize_rows(folder: Path, tokenizer: Any, output: Path) -> list[Row]:
    """Text to tokens on disk, with and without the sentence split, beside encode_batch alone."""
    texts = [d for _, t in read_text_folder(folder) for d in split_documents(t)][:TEXTS]
    documents = [split_sentences(text) for text in texts]
    size = sum(len(text.encode()) for text in texts) / 1e6
    backend = tokenizer.backend_tokenizer

    def encode() -> None:
        for i in range(0, len(documents), 64):
            batch = [s for sentences in documents[i : i + 64] for s in sentences]
            backend.encode_batch_fast(batch, add_special_tokens=False)

    def write(source: Iterator[list[str]]) -> None:
        with IndexedWriter(output, np.uint16) as writer:
            for sentences in encode_documents(tokenizer, source):
                writer.add_document(sentences)

    work = {
        "encode_batch_fast alone": encode,
        "tokenise and write": lambda: write(iter(documents)),
        "split into sentences, tokenise and write": lambda: write(map(split_sentences, texts)),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, function in work.items():
            started = time.process_time()
            function()
            rates[name].append(size / (time.process_time() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    alone = medians["encode_batch_fast alone"]
    rows = [Row(name, rate, "MB/s a core") for name, rate in medians.items()]
    shares = list(medians.items())[1:]
    return rows + [Row(f"{n}, of encode_batch_fast", 100 * r / alone, "%") for n, r in shares]


class SyntheticCorpus:
    """Only the lengths of a corpus: sentences of 5 to 45 tokens."""

    prefix = Path("synthetic")

    def __init__(self, num_documents: int, num_tokens: int, folder: Path) -> None:
        rng = np.random.default_rng(0)
        num_sentences = num_tokens // 25
        sizes = rng.integers(5, 46, num_sentences, dtype=np.int32)
        cuts = np.sort(rng.choice(num_sentences - 1, num_documents - 1, replace=False)) + 1
        self.documents = np.concatenate([[0], cuts, [num_sentences]])
        self._offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[self.documents]
        sizes.tofile(folder / "sizes")
        self.sizes = np.asarray(np.memmap(folder / "sizes", np.int32, mode="r"))

    def document_offsets(self) -> np.ndarray:
        """int64 [documents + 1]."""
        return self._offsets


def index_rows(tokenizer: Any, folder: Path) -> list[Row]:
    """The index of 1e9 tokens in 1e6 documents, in a process of its own for its peak memory."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        corpus: Any = SyntheticCorpus(1_000_000, 1_000_000_000, folder)
        started = time.perf_counter()
        build_sample_index(corpus, np.arange(1_000_000), settings=bert_settings(tokenizer))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        os.write(writer, f"{seconds} {peak}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    seconds, peak = map(float, os.read(reader, 100).split())
    return [
        Row("BERT index of 1e9 tokens, 1e6 documents", seconds, "s"),
        Row("  peak memory of its process", peak, "GB"),
    ]


def blend_rows(folder: Path) -> list[Row]:
    """The order of a blend of five."""
    index = BlendIndex([0.1, 0.23456789, 0.3, 0.15, 0.25], folder)
    started = time.perf_counter()
    index.locate(1_000_000)
    built = time.perf_counter() - started
    rate = samples_per_second(index.locate, range(200_000))
    return [
        Row("order of the first 1e6 samples of a blend of five", built, "s"),
        Row("places of a blend looked up", rate, "a second"),
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # rates are those of one core
    tokenizer = load_tokenizer(options.tokenizer)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = CorpusConfig(
            {"texts": Source("text", str(options.texts), split_files=True)},
            options.tokenizer,
            len(tokenizer),
            lowercase=True,
            split_into_sentences=True,
            steps=StepsConfig(near_duplicates=NearDuplicates()),
        )
        preparation = check_preparation(corpus, folder / "corpus", ExecutorConfig())
        started = time.perf_counter()
        manifest = prepare_corpus(preparation, lines.append)
        size = manifest.steps["texts"]["read"]["bytes_in"] / 1e6
        rows = [Row("prepare, all steps", size / (time.perf_counter() - started), "MB/s")]
        rows += sample_rows(folder / "corpus" / "texts", tokenizer, folder)
        rows += tokenize_rows(options.texts, tokenizer, folder / "tokens")
        rows += blend_rows(folder)
        rows += index_rows(tokenizer, folder)
    print("\n".join(lines))
    for row in rows:
        print(f"{row.what:55} {row.value:10.2f} {row.unit}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(Row._fields)
        writer.writerows((row.what, f"{row.value:.4g}", row.unit) for row in rows)


if __name__ == "__main__":
    main()

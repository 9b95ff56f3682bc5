"""`hydratron prepare`: raw text to a cleaned, deduplicated, tokenised corpus with its manifest."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydratron.data.config import DataConfig
from hydratron.data.executors import ExecutorConfig
from hydratron.data.prepare import Preparation, check_preparation, prepare_corpus
from hydratron.data.sources import CorpusConfig, Source, StepsConfig
from hydratron.result import JobFailed
from hydratron.settings import build


def prepare(config: Mapping[str, Any]) -> Preparation:
    """Check sources and target; ValueError says what is wrong with them."""
    output = config["output"]
    named = {} if output is None else {"path": output}
    data = build(DataConfig, config["data"] | named, name="data")
    if data.path is None:
        raise ValueError("output= is missing, the folder to prepare")
    corpus = CorpusConfig(
        sources={
            name: build(Source, node, name=f"data.sources.{name}")
            for name, node in data.sources.items()
        },
        tokenizer=data.tokenizer,
        vocab_size=config["model"]["vocab_size"],
        lowercase=data.lowercase,
        split_into_sentences=config["model"]["family"] == "bert",
        steps=build(StepsConfig, config["steps"], name="steps"),
    )
    executor = build(ExecutorConfig, config["executor"], name="executor")
    return check_preparation(corpus, Path(data.path).expanduser(), executor)


def run(job: Preparation, run_dir: Path) -> dict[str, Any]:
    """Prepare what is not prepared yet; return the corpus's size."""
    started = time.monotonic()
    try:
        manifest = prepare_corpus(job, print)
    except (ValueError, OSError) as error:
        raise JobFailed(str(error), status=2 if isinstance(error, ValueError) else 1) from error
    sources = manifest.sources
    for name, found in sources.items():
        print(f"{job.output / name}: {found['documents']} documents, {found['tokens']} tokens")
    return {
        "output": str(job.output),
        "documents": sum(found["documents"] for found in sources.values()),
        "tokens": sum(found["tokens"] for found in sources.values()),
        "prepare_s": round(time.monotonic() - started, 3),
    }

"""`hydratron convert`: between our checkpoints, Hugging Face folders and Megatron-LM's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydratron.arguments import InputError
from hydratron.checkpoint.conversion import check_output, to_huggingface, to_hydratron
from hydratron.checkpoint.source import Checkpoint
from hydratron.commands.tasks import open_checkpoint
from hydratron.data.tokenizer import PreTrainedTokenizerFast, add_frame, load_tokenizer

CONVERSIONS = {"huggingface": to_huggingface, "hydratron": to_hydratron}


@dataclass(frozen=True)
class ConvertJob:
    """A checked job: the source is opened, none of its weights is read."""

    to: str
    checkpoint: Checkpoint
    output: Path
    tokenizer: PreTrainedTokenizerFast | None


def prepare(config: Mapping[str, Any]) -> ConvertJob:
    """Open source and tokenizer; ValueError says what is wrong with them."""
    if config["to"] not in CONVERSIONS:
        raise ValueError(f"to={config['to']} is not one of {', '.join(CONVERSIONS)}")
    for key in ("checkpoint", "output"):
        if config[key] is None:
            raise ValueError(f"{key}= is missing")
    if not isinstance(config["output"], str | Path):
        raise ValueError(f"output={config['output']} is not the name of a directory")
    output = Path(config["output"]).expanduser()
    check_output(output)
    checkpoint = open_checkpoint(config["checkpoint"])
    name = config["tokenizer"] or checkpoint.tokenizer
    tokenizer = None if name is None else add_frame(load_tokenizer(str(name)))
    if tokenizer is not None:
        checkpoint.check_tokenizer(tokenizer, str(name))
    return ConvertJob(config["to"], checkpoint, output, tokenizer)


def run(job: ConvertJob, run_dir: Path) -> dict[str, Any]:
    """Convert; return what `result.json` says of it."""
    del run_dir  # the output goes where the user says
    try:
        result = CONVERSIONS[job.to](job.checkpoint, job.output, job.tokenizer)
    except ValueError as error:  # a weight that cannot be read, a network without a counterpart
        raise InputError(str(error)) from error
    entries = "none found; tokenizer= gives one"
    if job.tokenizer is not None:
        entries = f"{len(job.tokenizer):,} entries of {job.checkpoint.model.vocab_size:,} rows"
    print(f"{job.output}: {result['architecture']}, tokenizer: {entries}")
    if result["missing"]:
        print(f"not in {job.checkpoint.path}, so left out: {', '.join(result['missing'])}")
    return result | {"output": str(job.output), "model": job.checkpoint.model.family}

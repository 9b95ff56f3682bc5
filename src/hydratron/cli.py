"""The `hydratron` console script: hands over to a command, turns errors into an exit status."""

import errno
import importlib.metadata
import os
import sys

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from hydratron import arguments, launch

HYDRA_COMMANDS = {
    "pretrain": "pretrain BERT (masked LM + sentence order) or GPT-2",
    "finetune": "a task (MNLI, QQP, SQuAD, RACE, ...) on a pretrained encoder",
    "prepare": "raw text to a cleaned, deduplicated, tokenised corpus",
    "evaluate": "a finetuned run, an ensemble of runs, or a GPT-2 zero-shot",
    "benchmark": "iteration time, TFLOP/s per GPU, share of peak, beside a peer's",
    "plan": "memory, time and cost of a configuration on a cluster, before paying for it",
    "convert": "between our checkpoints, Hugging Face folders and Megatron-LM checkpoints",
}
PLAIN_COMMANDS = {  # take their own arguments
    "protocol": "finetune over a grid, then five seeds at its best: median and ensemble",
    "report": "tables and figures from runs and sweeps",
}
# of a place that output is to go to
UNUSABLE = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
USAGE = """hydratron: what does a change to a Transformer do as the model grows?

usage: hydratron COMMAND [KEY=VALUE ...]      one run
       hydratron COMMAND -m [KEY=V1,V2 ...]   a sweep
       hydratron COMMAND --help               its configuration groups; --cfg job shows the result
"""


def usage() -> str:
    """Return the commands with a line each."""
    commands = HYDRA_COMMANDS | PLAIN_COMMANDS
    lines = "".join(f"  {name:<10} {text}\n" for name, text in commands.items())
    return f"{USAGE}\ncommands:\n{lines}"


def main() -> None:
    """Run a command. Exit status 2: wrong input; 143: SIGTERM; 1: anything else that went wrong."""
    given = sys.argv[1:]
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if given[0] == "--version":
        print(importlib.metadata.version("hydratron"))
        return
    command = given[0]
    try:
        if command in PLAIN_COMMANDS:
            importlib.import_module(f"hydratron.commands.{command}").main(given[1:])
        elif command in HYDRA_COMMANDS:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
            rest = given[1:]
            arguments.refuse_unclear(command, rest)
            if any(argument.startswith("resume=") for argument in rest):
                rest = arguments.resumed_arguments(command, rest)
            rest = arguments.search_arguments(command, rest)
            arguments.refuse_second_sweep(rest)
            sys.argv = [f"hydratron {command}", *rest]
            with arguments.sweep_definition_kept(rest):
                launch.main(command)
        else:
            raise arguments.InputError(f"unknown command {command!r}; known: {known()}")
    except (arguments.InputError, HydraException, OmegaConfBaseException) as error:
        stop(command, error, status=2)
    except ValueError as error:
        if command not in PLAIN_COMMANDS:
            raise
        stop(command, error, status=2)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        stop(command, f"{error.filename}: cannot be written to: {error.strerror}", status=2)
    except launch.JobFailed as error:
        stop(command, error, status=error.status)
    except KeyboardInterrupt:
        stop(command, "interrupted", status=launch.INTERRUPTED)


def known() -> str:
    """Return the names of all commands."""
    return ", ".join([*HYDRA_COMMANDS, *PLAIN_COMMANDS])


def stop(command: str, error: object, *, status: int) -> None:
    """Print one line and exit."""
    while isinstance(error, BaseException) and not str(error) and error.__cause__:
        error = error.__cause__  # Hydra wraps what it says in exceptions that say nothing
    text = " ".join(str(error).split())
    print(f"hydratron {command}: {text}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()

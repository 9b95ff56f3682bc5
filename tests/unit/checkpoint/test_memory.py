"""How much memory a 336M checkpoint takes while it is loaded over two ranks, and exported."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hydratron.checkpoint.conversion import to_huggingface
from hydratron.checkpoint.source import read_checkpoint
from hydratron.models.bert import BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.parallel.mesh import build_mesh
from tests.distributed import run_distributed
from tests.unit.checkpoint.networks import write_directory

MODEL = ModelConfig(
    family="bert",
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    vocab_size=30592,
    max_seq_len=512,
)
EMBEDDINGS = 30592 * 1024 * 4  # bytes of the largest parameter
# beside tensors: threads, buffers of the readers, pages the allocator keeps
SLACK = 150e6


def private_memory() -> int:
    """Bytes of this process that are no file: a mapped checkpoint can be dropped at any time."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def peak(work: Callable[[], object]) -> int:
    """How far private memory rises above where it stands while `work` runs."""
    before, highest, is_done = private_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not is_done.wait(0.002):
            highest = max(highest, private_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        is_done.set()
        thread.join()
    return highest - before


def load_peak(rank: int, world_size: int, path: Path) -> tuple[int, int]:
    mesh = build_mesh("cpu", tensor_parallel_size=world_size, data_parallel_size=1)
    with torch.device("meta"):
        network = BertForPretraining(MODEL, mesh.tp_group)
    share = sum(parameter.numel() * 4 for parameter in network.parameters())

    def load() -> None:
        read_checkpoint(path).load(network.to_empty(device="cpu"), mesh)

    return peak(load), share


def export_peak(rank: int, world_size: int, run: Path, output: Path) -> int:
    return peak(lambda: to_huggingface(read_checkpoint(run), output, None))


@pytest.mark.slow
def test_a_336m_checkpoint_is_never_in_memory_twice(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = BertForPretraining(MODEL)
    network.to_empty(device="cpu").requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_()
    run = write_directory(tmp_path / "run", network)
    whole = sum(parameter.numel() * 4 for parameter in network.parameters())
    del network
    (risen,) = run_distributed(export_peak, 1, tmp_path, run, tmp_path / "exported")
    print(f"export: peak {risen / 1e6:.0f} MB of {whole / 1e6:.0f}")
    assert risen < 3 * EMBEDDINGS + SLACK
    for path in (run, tmp_path / "exported"):
        for risen, share in run_distributed(load_peak, 2, tmp_path, path):
            print(f"{path.name}: peak {risen / 1e6:.0f} MB for a share of {share / 1e6:.0f}")
            assert risen < share + EMBEDDINGS + SLACK
            assert risen < 0.75 * whole

"""What every test starts from: a seed, one torch thread, offline services, a cache of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports the libraries that read them; child processes inherit them.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
}

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this session's tokenizers and corpora go, never the user's own cache."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRATRON_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real rows and vocabularies, which the project does not ship."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data (../shared/data) is not here")
    return folder


@pytest.fixture(autouse=True)
def clean_torch() -> Iterator[None]:
    """Seed before the test; after it restore the dtype and leave no process group behind."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(1234)
    yield
    torch.set_default_dtype(dtype)
    if dist.is_initialized():
        dist.destroy_process_group()

"""The data module of finetuning: a task's splits, encoded once, in batches of similar length."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Sampler

from hydratron.data.buckets import LengthBucketedSampler, collate
from hydratron.data.config import cache_folder
from hydratron.data.encodings import cache_key, encode_cached
from hydratron.data.tokenizer import PreTrainedTokenizerFast
from hydratron.parallel.mesh import ParallelMesh
from hydratron.settings import BatchSize, Text, Workers, check
from hydratron.training.strategy import TensorParallelStrategy
from hydratron.training.tasks import Split, Task

PAD_MULTIPLE = 16  # tensor cores, and few shapes to capture


@dataclass(frozen=True)
class BatchConfig:
    """How rows become batches. `micro_batch_size` None: as many as a rank has; `cache_dir` keeps
    encodings by content.

    Raises:
        ValueError: a size that is not positive.
    """

    global_batch_size: BatchSize
    cache_dir: Text
    micro_batch_size: BatchSize | None = None
    evaluation_batch_size: BatchSize = 128
    num_workers: Workers = 0

    def __post_init__(self) -> None:
        check(self, "data")

    def local_batch_size(self, data_parallel_size: int) -> int:
        """Return the rows of one optimizer step on one rank.

        Raises:
            ValueError: the global batch does not divide over the ranks.
        """
        if self.global_batch_size % data_parallel_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by"
                f" data_parallel_size {data_parallel_size}"
            )
        return self.global_batch_size // data_parallel_size


class EpochSteps(Sampler[list[int]]):
    """The batches of all epochs one after another, from the step where the run stands."""

    def __init__(self, epoch: LengthBucketedSampler, *, num_steps: int, consumed: int) -> None:
        self.epoch, self.num_steps, self.consumed = epoch, num_steps, consumed

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        step = self.consumed
        while step < self.num_steps:
            number, first = divmod(step, len(self.epoch))
            self.epoch.set_epoch(number)
            self.epoch.skip(first)
            for batch in self.epoch:
                yield batch
                step += 1
                if step == self.num_steps:
                    return


class TaskData(LightningDataModule):
    """A task's splits for one tokenizer. What is wrong with files is a ValueError at once.

    Args:
        max_positions: the longest sequence the model takes.
        groups: which of train, validation, test to read.
    """

    def __init__(
        self,
        task: Task,
        config: BatchConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_positions: int,
        groups: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task, self.config, self.tokenizer, self.seed = task, config, tokenizer, seed
        self.max_seq_len = min(task.max_seq_len, max_positions)
        if task.max_seq_len > max_positions:
            rank_zero_warn(
                f"task.max_seq_len {task.max_seq_len} is cut to the {max_positions} positions that"
                " the model has"
            )
        self.keys: dict[str, str] = {}  # of each split: names rows, tokenizer and encoding
        self.splits = {group: self._read(group) for group in groups}

    def identity(self) -> dict[str, list[str]]:
        """Return hash and description of what is trained on and of what decides the best step."""
        return {
            name: [key[:16], f"{len(split.encodings)} rows ({key[:8]})"]
            for group in ("train", "validation")
            for split in self.splits.get(group, [])
            for name, key in [(split.name, self.keys[split.name])]
        }

    def _read(self, group: str) -> list[Split]:
        cache = cache_folder(self.config.cache_dir) / "tasks"
        encode = partial(self.task.encode, tokenizer=self.tokenizer, max_seq_len=self.max_seq_len)
        settings = self.task.encoding_settings() | {"max_seq_len": self.max_seq_len}
        splits = []
        for name, rows in self.task.read(group).items():
            key = cache_key(rows, self.tokenizer, settings)
            self.keys[name] = key
            try:
                splits.append(Split(name, rows, encode_cached(rows, encode, cache, key)))
            except OSError as error:
                directory, reason = self.config.cache_dir, error.strerror
                raise ValueError(f"data.cache_dir {directory} is of no use: {reason}") from error
        return splits

    def check_rows(self, data_parallel_size: int) -> None:
        """Raise ValueError where a split has fewer rows than there are replicas, or the training
        rows do not fill one batch.
        """
        for split in (split for splits in self.splits.values() for split in splits):
            num_rows = len(split.encodings)
            if num_rows < data_parallel_size:
                raise ValueError(
                    f"{split.name} has {num_rows} rows, fewer than parallel.data_parallel_size"
                    f" {data_parallel_size}"
                )
            if split.name == "train" and num_rows < self.config.global_batch_size:
                raise ValueError(
                    f"data.global_batch_size {self.config.global_batch_size} is more than the"
                    f" {num_rows} training rows"
                )

    def steps_per_epoch(self, data_parallel_size: int) -> int:
        """Return the optimizer steps of one pass over the training rows."""
        return len(self._sampler(ParallelMesh(data_parallel_size=data_parallel_size)))

    def _sampler(self, mesh: ParallelMesh) -> LengthBucketedSampler:
        return LengthBucketedSampler(
            self.splits["train"][0].encodings.lengths,
            batch_size=self.config.local_batch_size(mesh.data_parallel_size),
            seed=self.seed,
            data_parallel_rank=mesh.dp_rank,
            data_parallel_size=mesh.data_parallel_size,
        )

    def _loader(self, split: Split, batch_sampler: Any) -> DataLoader[Any]:
        workers = self.config.num_workers
        pad_id = self.tokenizer.pad_token_id
        pad = partial(
            collate,
            pad_id=pad_id if isinstance(pad_id, int) else 0,
            pad_multiple=PAD_MULTIPLE,
            pad_side=self.tokenizer.padding_side,
            pad_token_type_id=self.tokenizer.pad_token_type_id,
        )
        return DataLoader(
            split.encodings,
            batch_sampler=batch_sampler,
            collate_fn=pad,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._strategy.root_device.type == "cuda",
            generator=torch.Generator(),  # leave the default stream, which is dropout's, alone
        )

    @property
    def _strategy(self) -> TensorParallelStrategy:
        assert self.trainer is not None
        strategy = self.trainer.strategy
        assert isinstance(strategy, TensorParallelStrategy)
        return strategy

    def train_dataloader(self) -> DataLoader[Any]:
        """A batch a step, from where the run stands to `trainer.max_steps`."""
        assert self.trainer is not None
        steps = EpochSteps(
            self._sampler(self._strategy.mesh),
            num_steps=self.trainer.max_steps,
            consumed=self.trainer.global_step,
        )
        return self._loader(self.splits["train"][0], steps)

    def evaluation_splits(self) -> list[Split]:
        """Return the splits of the evaluation loaders, in their order."""
        groups = [group for group in ("validation", "test") if group in self.splits]
        return [split for group in groups for split in self.splits[group]]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """A loader a split, each example on one data-parallel rank."""
        mesh = self._strategy.mesh
        loaders = []
        for split in self.evaluation_splits():
            sampler = LengthBucketedSampler(
                split.encodings.lengths,
                batch_size=self.config.evaluation_batch_size,
                shuffle=False,
                data_parallel_rank=mesh.dp_rank,
                data_parallel_size=mesh.data_parallel_size,
            )
            loaders.append(self._loader(split, sampler))
        return loaders

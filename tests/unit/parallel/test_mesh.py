"""The process mesh without processes, and the errors of sizes that do not divide."""

from typing import cast

import pytest
from torch.distributed import ProcessGroup

from hydratron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    local_size,
)
from hydratron.parallel.mesh import ParallelMesh, build_mesh, check_world_size


class GroupOfThree:
    """What the layers ask of a process group when they are built."""

    def size(self) -> int:
        return 3

    def rank(self) -> int:
        return 0


GROUP = cast(ProcessGroup, GroupOfThree())


def test_one_process_needs_no_process_group() -> None:
    mesh = build_mesh("cpu", tensor_parallel_size=1, data_parallel_size=1)
    assert mesh == ParallelMesh()
    assert mesh.tp_group is mesh.dp_group is mesh.device_mesh is None


def test_world_size_must_be_the_product_of_the_grid() -> None:
    check_world_size(8, tensor_parallel_size=4, data_parallel_size=2)
    with pytest.raises(ValueError, match=r"world size 8 is not data_parallel_size 3"):
        check_world_size(8, tensor_parallel_size=2, data_parallel_size=3)
    with pytest.raises(ValueError, match=r"world size 1 is not .* tensor_parallel_size 2"):
        build_mesh("cpu", tensor_parallel_size=2, data_parallel_size=1)


def test_local_size_is_a_share_or_an_error_that_names_the_size() -> None:
    assert local_size(12, None, name="num_heads") == 12
    assert local_size(12, GROUP, name="num_heads") == 4
    with pytest.raises(ValueError, match="num_heads 16 is not divisible by tensor_parallel_size 3"):
        local_size(16, GROUP, name="num_heads")


def test_layers_refuse_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="out_features 16 is not divisible"):
        ColumnParallelLinear(12, 16, group=GROUP)
    with pytest.raises(ValueError, match="in_features 16 is not divisible"):
        RowParallelLinear(16, 12, group=GROUP)
    with pytest.raises(ValueError, match="vocab_size 16 is not divisible"):
        VocabParallelEmbedding(16, 12, group=GROUP)


def test_each_layer_holds_a_share_of_the_split_dimension_only() -> None:
    column = ColumnParallelLinear(4, 12, group=GROUP)
    assert (column.weight.shape, column.bias.shape) == ((4, 4), (4,))
    stacked = ColumnParallelLinear(4, 12, group=GROUP, num_stacked=3)
    assert (stacked.weight.shape, stacked.bias.shape) == ((3, 4, 4), (3, 4))
    row = RowParallelLinear(12, 4, group=GROUP)
    assert (row.weight.shape, row.bias.shape) == ((4, 4), (4,))
    assert VocabParallelEmbedding(12, 5, group=GROUP).weight.shape == (4, 5)

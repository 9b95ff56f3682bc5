"""Gradient norm, clipping and the sum of partial gradients, on a network split over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hydratron.parallel.grad_norm import clip_grad_norm, squared_gradient_norms
from hydratron.parallel.placement import (
    mark_sequence_sharded,
    parameter_placements,
    reduce_partial_gradients,
)
from tests.distributed import run_distributed
from tests.parallel.twins import (
    build,
    deviation,
    random_values,
    shard,
    split_dimension,
    tiny_config,
)

TOLERANCE = 1e-10  # float64 sums over some thousand elements of size 1
WITHOUT_GRADIENT = "encoder.pooler.weight"


def set_whole_gradients(dense: nn.Module, split: nn.Module, group: Any) -> None:
    """As they are after reduce_partial_gradients; one parameter has none."""
    locals_ = dict(split.named_parameters())
    for index, (name, parameter) in enumerate(dense.named_parameters()):
        if name != WITHOUT_GRADIENT:
            parameter.grad = random_values(*parameter.shape, seed=index)
            part = shard(parameter.grad, split_dimension(name), group)
            locals_[name].grad = part.clone().contiguous()


def clip_deviations(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD
    dense, split = build(tiny_config()), build(tiny_config(), group)
    set_whole_gradients(dense, split, group)
    squares = squared_gradient_norms(split, group)
    found: dict[str, Any] = {
        "names": sorted(squares),
        "squares": max(
            abs(squares[name].item() - parameter.grad.square().sum().item())
            for name, parameter in dense.named_parameters()
            if parameter.grad is not None
        ),
    }
    before = {n: p.grad.clone() for n, p in split.named_parameters() if p.grad is not None}
    for max_norm in (None, 1e6):  # no clipping, and a norm that is not reached
        found[f"norm at {max_norm}"] = clip_grad_norm(split, squares, max_norm=max_norm).item()
        found[f"change at {max_norm}"] = max(
            deviation(p.grad, before[n]) for n, p in split.named_parameters() if p.grad is not None
        )
    found["norm"] = clip_grad_norm(split, squares, max_norm=0.5).item()
    found["dense norm"] = nn.utils.clip_grad_norm_(dense.parameters(), 0.5).item()
    found["clipped"] = max(
        deviation(p.grad, shard(dense.get_parameter(n).grad, split_dimension(n), group))
        for n, p in split.named_parameters()
        if p.grad is not None
    )
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_norm_and_clipping_count_replicated_parameters_once(
    world_size: int, tmp_path: Path
) -> None:
    for found in run_distributed(clip_deviations, world_size, tmp_path):
        assert WITHOUT_GRADIENT not in found["names"]
        assert "encoder.pooler.bias" in found["names"]
        assert found["dense norm"] > 10  # far above what it is clipped to
        for norm in ("norm", "norm at None", "norm at 1000000.0"):
            assert found[norm] == pytest.approx(found["dense norm"], abs=TOLERANCE)
        assert found["squares"] <= TOLERANCE
        assert found["clipped"] <= TOLERANCE
        assert found["change at None"] == found["change at 1000000.0"] == 0


def not_a_number_on_rank_1(rank: int, world_size: int) -> tuple[float, bool]:
    group = dist.group.WORLD
    dense, split = build(tiny_config()), build(tiny_config(), group)
    set_whole_gradients(dense, split, group)
    if rank == 1:
        layer = split.get_submodule("encoder.transformer.layers.1.mlp.input")
        layer.weight.grad[0, 0] = float("nan")  # type: ignore
    norm = clip_grad_norm(split, squared_gradient_norms(split, group), max_norm=1.0)
    finite = all(p.grad.isfinite().all() for p in split.parameters() if p.grad is not None)
    return norm.item(), finite


def test_a_gradient_that_is_no_number_on_one_rank_is_seen_by_all(tmp_path: Path) -> None:
    for norm, finite in run_distributed(not_a_number_on_rank_1, 2, tmp_path):
        assert norm != norm
        assert not finite


def test_norm_of_one_process_is_that_of_torch() -> None:
    network = build(tiny_config(family="gpt2")).float()
    for index, parameter in enumerate(network.parameters()):
        parameter.grad = random_values(*parameter.shape, seed=index).float()
    squares = squared_gradient_norms(network, None)
    expected = nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    # float32 sums in another order
    torch.testing.assert_close(clip_grad_norm(network, squares, max_norm=None), expected)


def test_norms_of_half_precision_gradients_do_not_overflow() -> None:
    layer = nn.Linear(64, 64, dtype=torch.float16)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 300.0)  # the square exceeds float16
    squares = squared_gradient_norms(layer, None)
    assert squares["weight"].item() == pytest.approx(64 * 64 * 9e4, rel=1e-6)


class EveryKind(nn.Module):
    """Partial in two dtypes, replicated compute, and partial without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = mark_sequence_sharded(nn.LayerNorm(3))
        self.double_norm = mark_sequence_sharded(nn.LayerNorm(2).double())
        self.unused = mark_sequence_sharded(nn.LayerNorm(2))
        self.head = nn.Linear(2, 2)


def reduced(rank: int, world_size: int) -> dict[str, Tensor | None]:
    model = EveryKind()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if not name.startswith("unused"):
            parameter.grad = torch.full_like(parameter, 10.0 * index + rank)
    reduce_partial_gradients(model, dist.group.WORLD)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_partial_gradients_are_added_and_whole_ones_left_alone(tmp_path: Path) -> None:
    names = [name for name, _ in EveryKind().named_parameters()]
    for rank, found in enumerate(run_distributed(reduced, 4, tmp_path)):
        for index, name in enumerate(names):
            gradient = found[name]
            if name.startswith("unused"):
                assert gradient is None
                continue
            is_partial = "norm" in name
            expected = 4 * 10.0 * index + (0 + 1 + 2 + 3) if is_partial else 10.0 * index + rank
            assert gradient is not None
            assert gradient.dtype == (torch.float64 if "double" in name else torch.float32)
            assert (gradient == expected).all(), name


def test_placements_survive_a_change_of_dtype_and_of_device() -> None:
    with torch.device("meta"):
        model = EveryKind()
    before = parameter_placements(model)
    assert before["norm.weight"].partial_gradient
    assert not before["head.weight"].partial_gradient
    assert parameter_placements(model.to_empty(device="cpu").bfloat16()) == before


def placements_of_families(rank: int, world_size: int) -> list[dict[str, Any]]:
    configs = [
        tiny_config(family=f, layernorm=p) for f in ("bert", "gpt2") for p in ("pre", "post")
    ]
    return [parameter_placements(build(config, dist.group.WORLD)) for config in configs]


def test_every_parameter_of_both_families_is_placed_as_the_design_says(tmp_path: Path) -> None:
    # The sequence-sharded: LayerNorms between regions, row biases, position and type embeddings.
    partial_ends = ("position_embeddings.weight", "token_type_embeddings.weight", "output.bias")
    for placements in run_distributed(placements_of_families, 2, tmp_path)[0]:
        assert len(placements) > 20
        for name, placement in placements.items():
            assert placement.tp_dim == split_dimension(name), name
            is_layernorm = "layernorm" in name and "masked_lm_head" not in name
            assert placement.partial_gradient == (is_layernorm or name.endswith(partial_ends)), name

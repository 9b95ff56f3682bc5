"""What a traced step does, against numbers derived by hand and torch's own counter."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hydratron.perf.flops import train_flops
from hydratron.perf.recorder import StepTrace, pretended_mesh
from hydratron.perf.step import NETWORKS, StepConfig, fake_batch, trace_passes, trace_update
from tests.unit.perf.steps import small, step

B, S, H, V = 2, 32, 64, 256  # of `small`, which has two layers
T = B * S


def counted(trace: StepTrace, axis: str) -> Counter[tuple[str, str, int]]:
    return Counter((op.phase, op.collective, op.num_bytes) for op in trace.collectives(axis))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_tensor_parallel_collectives_are_those_derived_by_hand(size: int) -> None:
    """Each layer enters and leaves attention and MLP once, in bf16, and the backward pass mirrors
    it; the embedding leaves its region in float32, the logits enter theirs. The loss needs a
    maximum of each token, then two sums. Nothing of it depends on the group's size.
    """
    found = counted(trace_passes(step(small(), B, tensor_parallel_size=size), 2), "tp")
    hidden, layers = T * H * 2, 2
    assert found == {
        ("forward", "reduce_scatter", 2 * hidden): 1,
        ("forward", "all_gather", hidden): 2 * layers + 1,
        ("forward", "reduce_scatter", hidden): 2 * layers,
        ("forward", "all_reduce", T * 4): 1,
        ("forward", "all_reduce", 2 * T * 4): 1,
        ("backward", "reduce_scatter", hidden): 2 * layers + 1,
        ("backward", "all_gather", hidden): 2 * layers,
        ("backward", "all_gather", 2 * hidden): 1,
    }


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_update_adds_partial_gradients_and_norms_once(size: int) -> None:
    """Partial: positions [S, H], of each layer two LayerNorms (4 H) and two row biases (2 H), the
    final LayerNorm (2 H); then a squared norm for each of the 6 split tensors of a layer (four
    weights, the biases of two) and the word embeddings.
    """
    found = counted(trace_update(step(small(), tensor_parallel_size=size), 2), "tp")
    partial = S * H + 2 * 6 * H + 2 * H
    assert found == {
        ("optimizer", "all_reduce", partial * 4): 1,
        ("optimizer", "all_reduce", (2 * 6 + 1) * 4): 1,
    }


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_full_recomputation_repeats_the_forward_collectives_of_a_layer(recompute: str) -> None:
    config = step(small(recompute=recompute), B, tensor_parallel_size=2)
    plain = step(small(), B, tensor_parallel_size=2)
    found = counted(trace_passes(config, 2), "tp") - counted(trace_passes(plain, 2), "tp")
    again = {("backward", "all_gather", T * H * 2): 4, ("backward", "reduce_scatter", T * H * 2): 4}
    assert found == (again if recompute == "full" else {})


@pytest.mark.parametrize("size", [2, 64])
def test_gradients_are_averaged_once_in_float32(size: int) -> None:
    trace = trace_passes(step(small(), B, data_parallel_size=size), 2)
    num_parameters = V * H + S * H + 2 * (12 * H * H + 13 * H) + 2 * H
    # the first bucket ends at 1 MiB, which 480 kB do not reach
    assert counted(trace, "dp") == {("backward", "all_reduce", num_parameters * 4): 1}
    assert not trace_update(step(small(), B, data_parallel_size=size), 2).collectives()


def test_large_gradients_are_averaged_in_buckets() -> None:
    """1 MiB, then 25 MiB a bucket: 12.6 MB a layer and 4.2 MB of embeddings; a bucket ends with
    the tensor that fills it, so the first is one MLP matrix (4.2 MB).
    """
    config = step(small(hidden_size=512, vocab_size=2048), B, data_parallel_size=2)
    sizes = [op.num_bytes for op in trace_passes(config, 6).collectives("dp")]
    parameters = 2048 * 512 + S * 512 + 6 * (12 * 512 * 512 + 13 * 512) + 2 * 512
    assert sum(sizes) == 4 * parameters
    assert len(sizes) == 4
    assert 2**20 <= sizes[0] < 5e6
    assert all(25 * 2**20 <= size < 31e6 for size in sizes[1:-1])


def test_a_sharded_update_gathers_every_parameter_that_has_a_dimension_to_split() -> None:
    config = step(small(), B, data_parallel_size=4, shard_optimizer=True)
    gathered = trace_update(config, 2).collectives("dp")
    assert {op.collective for op in gathered} == {"all_gather"}
    # all but the vectors that tensor parallelism splits: biases of query, key and value and of 4 H
    num_gathered = V * H + S * H + 2 * (12 * H * H + 13 * H - 3 * H - 4 * H) + 2 * H
    assert sum(op.num_bytes for op in gathered) == num_gathered * 4


def test_any_rank_of_a_thousand_traces_the_same_step() -> None:
    config = step(small(), B, tensor_parallel_size=8, data_parallel_size=128)
    first, last = (trace_passes(config, 1, rank=rank) for rank in (0, 1023))
    assert [op.shape for op in first.operators] == [op.shape for op in last.operators]
    assert counted(first, "tp") == counted(last, "tp")
    with pretended_mesh(8, 128, rank=1023) as mesh:
        assert (mesh.tp_rank, mesh.dp_rank) == (7, 127)


def real_flops(config: StepConfig) -> int:
    """What torch's counter sees of the same passes, computed on the CPU."""
    network = NETWORKS[config.model.family](config.model)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # of fused kernels it counts the GPU's only
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.stack(list(network(fake_batch(config)).values())).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_flops_are_those_of_torch_s_counter(family: str, recompute: str) -> None:
    network = small(family, attention_dropout=0.0, recompute=recompute)
    config = step(network, B, precision="32-true", masked=False)
    operators = trace_passes(config, 2).operators
    # a fused backward pass computes the scores again, five products instead of four
    fused = [op.flops for op in operators if op.name.endswith("for_cpu_backward")]
    traced = sum(op.flops for op in operators) - sum(fused) // 5
    assert traced == pytest.approx(real_flops(config), rel=0.01)


def test_the_benchmark_s_flops_are_the_trace_s() -> None:
    """The formula counts attention's backward pass as two of its forward ones, a fused kernel does
    two and a half; BERT's pooler and sentence-order head are in no formula.
    """
    config = step(small(), B)
    operators = trace_passes(config, 2).operators
    attention = sum(op.flops for op in operators if op.kind == "attention")
    products = sum(op.flops for op in operators if op.kind == "product")
    counted = train_flops(config.model, seq_len=S, num_predictions=S)
    assert products + attention * 3 / 3.5 == pytest.approx(B * counted, rel=1e-9)


def test_sharding_a_layer_divides_its_products() -> None:
    config = step(small(), B)
    whole = sum(op.flops for op in trace_passes(config, 1).operators)
    for size in (2, 4, 8):
        part = trace_passes(replace(config, tensor_parallel_size=size), 1)
        assert sum(op.flops for op in part.operators) * size == whole

"""What a rank keeps and what a step holds, against arithmetic by hand and torch's partitioner."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V

from hydratron.perf.hardware import GIB
from hydratron.perf.kernels import as_compiled, live_bytes
from hydratron.perf.memory import state_memory
from hydratron.perf.recorder import pretended_mesh
from hydratron.perf.step import StepConfig, build_network, fake_batch, trace_passes
from tests.unit.perf.steps import ESTIMATOR, hardware, model, small, step


def test_parameters_gradients_and_moments_of_the_3_9b_bert() -> None:
    """Of a rank of 512: a quarter of what tensor parallelism splits, and 16 bytes a parameter."""
    network = model("bert", "3.9b")
    state = state_memory(step(network, tensor_parallel_size=4, data_parallel_size=128))
    h, layers, vocab = 2560, 48, 30592
    split = layers * (12 * h * h + 7 * h) + vocab * h + vocab
    whole = layers * 6 * h + 512 * h + 2 * h + 2 * h + 2 * (h * h + h) + 2 * h + 2 * h + 2
    assert state.num_parameters == split // 4 + whole
    assert state.parameters == state.gradients == 4 * state.num_parameters
    assert state.optimizer == 8 * state.num_parameters


def test_a_sharded_optimizer_keeps_its_share_and_a_copy_of_it() -> None:
    config = step(small(), data_parallel_size=4)
    whole, part = state_memory(config), state_memory(replace(config, shard_optimizer=True))
    unsplit = 2 * 7 * 64  # biases that tensor parallelism splits
    split = whole.num_parameters - unsplit
    assert part.optimizer == 12 * split // 4 + 8 * unsplit
    assert part.parameters == whole.parameters


def test_16_bit_weights_have_masters() -> None:
    state = state_memory(step(small(), precision="bf16-true"))
    assert (state.parameters, state.optimizer) == (
        2 * state.num_parameters,
        12 * state.num_parameters,
    )


def test_a_compiled_layer_holds_34_bytes_an_activation() -> None:
    """Per token and hidden unit, in bf16: query, key, value (6) and attention's output (2), the
    MLP's hidden layer before and after GELU (16), two LayerNorms' inputs and outputs (8), two
    dropout masks (2); and beside them 2 bytes of each weight of the layer.
    """
    config = step(small(hidden_size=512, vocab_size=512), 32)
    one, two = (max(_held(config, n)) for n in (1, 2))
    tokens, weights = 32 * 32, 12 * 512 * 512
    assert two - one == pytest.approx(34 * tokens * 512 + 2 * weights, rel=0.02)


def _held(config: StepConfig, num_layers: int) -> list[int]:
    trace = as_compiled(trace_passes(config, num_layers))
    forward = sum(op.phase == "forward" for op in trace.operators)
    return live_bytes(trace, compiled=True)[:forward]


def test_recomputation_holds_less_and_eager_more() -> None:
    network = small(hidden_size=256)

    def peak(**changes: Any) -> int:
        kind = changes.pop("recompute", "none")
        config = step(replace(network, recompute=kind), 128, **changes)
        return _peak(config)

    assert peak(recompute="full") < peak(recompute="selective") < peak() < peak(compiled=False)
    assert peak(tensor_parallel_size=2) < peak()


def _peak(config: StepConfig) -> int:
    return ESTIMATOR.estimate(config, hardware("h200")).memory.peak


def test_accumulation_keeps_gradients_beside_the_new_ones() -> None:
    config = step(model("gpt2", "355m"), 1, precision="bf16-mixed")
    more = replace(config, num_micro_batches=4)
    gradients = ESTIMATOR.state(config).gradients
    assert _peak(more) - _peak(config) == gradients


@pytest.mark.parametrize(
    ("family", "size", "batch", "measured"),
    [("bert", "336m", 32, 19.0), ("gpt2", "1.2b", 16, 43.9)],
)
def test_peaks_of_an_earlier_network_were_measured(
    family: str, size: str, batch: int, measured: float
) -> None:
    """One H200, bf16-mixed, compiled, with a float32 residual stream: since then each LayerNorm's
    input takes 2 bytes less, two a layer and one at the end.
    """
    network = model(family, size)
    config = step(network, batch)
    saved = (2 * network.num_layers + 1) * 2 * batch * config.seq_len * network.hidden_size
    peak = _peak(config) + saved
    assert peak / GIB == pytest.approx(measured, rel=0.02)


def saved_bytes(config: StepConfig) -> int:
    """What torch.compile's partitioner keeps between the passes, parameters and inputs aside."""
    found: list[int] = []

    def partition(joint: Any, inputs: Any, **options: Any) -> Any:
        values = [node.meta.get("val") for node in joint.graph.nodes]
        mode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
        with V.set_fake_mode(mode):
            joint_graph_passes(joint)
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, compiler="inductor", **options
        )
        given = {node.name for node in forward.graph.nodes if node.op == "placeholder"}
        outputs = next(node for node in forward.graph.nodes if node.op == "output").args[0]
        for node in outputs[1:]:  # the loss comes first
            value = getattr(node, "meta", {}).get("val")
            if isinstance(value, torch.Tensor) and node.name not in given:
                size = value.numel() * value.element_size()
                found.append(size if isinstance(size, int) else 0)  # a random state has no size
        return forward, backward

    with pretended_mesh(config.tensor_parallel_size, 1) as mesh:
        network = build_network(config, mesh.tp_group, config.model.num_layers)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        backend = aot_autograd(
            fw_compiler=lambda graph, _: graph.forward,
            bw_compiler=lambda graph, _: graph.forward,
            partition_fn=partition,
            decompositions=select_decomp_table,
        )
        torch._dynamo.reset()
        network.compile(backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            network(fake_batch(config))
    return sum(found)


def held_bytes(config: StepConfig) -> int:
    """What the accounting holds between the passes of a compiled step."""
    trace = as_compiled(trace_passes(config, config.model.num_layers))
    made: dict[int, int] = {}
    for operator in trace.operators:
        if operator.phase == "forward":
            made |= operator.writes
    read = {s for op in trace.operators if op.phase == "backward" for s in op.reads}
    return sum(num_bytes for storage, num_bytes in made.items() if storage in read)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of tracing through torch itself
@pytest.mark.parametrize(
    ("family", "size", "recompute"),
    [
        ("gpt2", 1, "none"),
        ("gpt2", 1, "selective"),
        ("gpt2", 1, "full"),
        ("gpt2", 2, "none"),
        ("gpt2", 2, "full"),
        ("bert", 1, "none"),
        ("bert", 2, "none"),
    ],
)
def test_a_layer_holds_what_torch_s_partitioner_keeps(
    family: str, size: int, recompute: str
) -> None:
    def with_layers(num_layers: int) -> StepConfig:
        network = small(family, hidden_size=128, recompute=recompute, attention_dropout=0.0)
        network = replace(network, num_layers=num_layers)
        return step(network, 4, tensor_parallel_size=size)

    two, four = with_layers(2), with_layers(4)
    kept = saved_bytes(four) - saved_bytes(two)
    # torch keeps each row's mean and scale apart from what the accounting knows as one LayerNorm
    assert held_bytes(four) - held_bytes(two) == pytest.approx(kept, rel=0.01)

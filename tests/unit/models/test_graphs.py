"""On one device, forward pass and losses are one graph, and the backward pass another."""

from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from tests.parallel.twins import batch_for, build, tiny_config


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_step_is_one_graph_each_way(family: str, recompute: str) -> None:
    graphs: Counter[str] = Counter()

    def count(direction: str) -> Any:
        def compile_graph(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
            graphs[direction] += 1
            return make_boxed_func(graph.forward)

        return compile_graph

    config = tiny_config(family=family, recompute=recompute, hidden_dropout=0.1, num_layers=2)
    network = build(config)
    network.compile(
        backend=aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))
    )
    for seed in (1, 2, 3):  # more batches of the shape are no new graphs
        losses = network(batch_for(config, batch_size=2, seq_len=4, seed=seed))
        torch.stack(list(losses.values())).sum().backward()
    assert graphs == {"forward": 1, "backward": 1}

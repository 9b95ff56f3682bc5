"""Steps that are replayed: the same parameters as steps launched one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hydratron.training.step_graphs import StepGraphs


class FakeGraphs(StepGraphs):
    """On a CPU: a replay computes the step again from the addresses that were captured."""

    def _capture(self, batch: dict[str, Tensor]) -> Any:
        inputs = {name: torch.full_like(column, 7) for name, column in batch.items()}
        found = {"loss": torch.zeros(())}

        class Graph:
            num_replays = 0

            def replay(graph) -> None:  # noqa: N805
                with self._rates_on_device():
                    found["loss"].copy_(self._step(inputs)["loss"])
                graph.num_replays += 1

        return Graph(), inputs, found


def train(replayed: bool) -> tuple[list[float], dict[str, Tensor], Any]:
    torch.manual_seed(1)
    network = nn.Linear(4, 1)
    optimizer = AdamW(network.parameters(), lr=0.1, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def gradients(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = network(batch["x"]).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    graphs = FakeGraphs(gradients, optimizer)
    losses = []
    for step in range(8):
        batch = {"x": torch.randn(3 if step % 3 else 2, 4)}  # two shapes
        if replayed:
            found = graphs(batch)
        else:
            found = gradients(batch)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        losses.append(float(found["loss"]))
    assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
    return losses, network.state_dict(), graphs


def test_replayed_steps_follow_batch_and_learning_rate() -> None:
    losses, parameters, _ = train(replayed=False)
    found_losses, found, graphs = train(replayed=True)
    assert found_losses == pytest.approx(losses, rel=1e-5)  # the rate in float32
    for name, parameter in parameters.items():
        assert torch.allclose(found[name], parameter, atol=1e-6), name
    # of 3 and of 5 batches of a shape all but the first
    assert sorted(graph.num_replays for graph, _, _ in graphs.graphs.values()) == [2, 4]

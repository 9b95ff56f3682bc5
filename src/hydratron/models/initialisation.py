"""One seed, one model: every parameter is drawn in full from its own stream, then sliced.

So the weights depend on the seed and the parameter's name alone, never on the parallel layout.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from hydratron.models.config import ModelConfig
from hydratron.parallel.mesh import ProcessGroup
from hydratron.parallel.placement import parameter_placements

RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.output.weight")


def parameter_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return the stream of one parameter: the first 8 bytes of SHA-256 of seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _fill(full: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    if name.endswith("bias"):
        full.zero_()
    elif "layernorm" in name:
        full.fill_(1.0)
    else:
        std = config.init_std
        if config.init == "scaled" and name.endswith(RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * config.num_layers)
        full.normal_(0.0, std, generator=generator)


def local_shard(full: Tensor, tp_dim: int | None, group: ProcessGroup | None) -> Tensor:
    """Return this rank's part of a global tensor (a view)."""
    if tp_dim is None or group is None:
        return full
    size = full.size(tp_dim) // group.size()
    return full.narrow(tp_dim, group.rank() * size, size)


@torch.no_grad()
def initialize_parameters(
    model: nn.Module,
    config: ModelConfig,
    *,
    seed: int,
    tp_group: ProcessGroup | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    draw_device: str = "cpu",
) -> None:
    """Draw every parameter of `model` (meta or real) and put this rank's share on `device`.

    Weights ~ N(0, init_std), residual outputs / sqrt(2 num_layers) when `init` is scaled (GPT-2;
    Shoeybi et al. 2019, appendix A), biases 0, LayerNorm weights 1; float32, one parameter at a
    time, so a second full copy never exists. `draw_device` other than "cpu" is faster for big
    benchmarks and gives the same model at any tensor-parallel size on one type of device only.
    """
    device = device or torch.device("cpu")
    draw_on = torch.device(draw_device)
    placements = parameter_placements(model)
    for name, parameter in list(model.named_parameters()):
        tp_dim = placements[name].tp_dim
        shape = list(parameter.shape)
        if tp_dim is not None and tp_group is not None:
            shape[tp_dim] *= tp_group.size()
        full = torch.empty(shape, device=draw_on)
        _fill(full, name, config, parameter_generator(seed, name, draw_on))
        part = local_shard(full, tp_dim, tp_group).to(device, dtype, copy=True).contiguous()
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, attribute, nn.Parameter(part, requires_grad=parameter.requires_grad))

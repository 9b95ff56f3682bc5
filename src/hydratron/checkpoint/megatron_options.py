"""Which of Megatron-LM's options say that a checkpoint's network is one of ours."""

import argparse
from pathlib import Path
from typing import Any

# What an option may say that we compute; any other value is another network. Options of today's
# Megatron-LM, of its earlier versions and of the forks whose files look the same.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned_absolute",),
    "normalization": ("LayerNorm",),
    "softmax_type": ("vanilla",),
    "attention_head_type": (None, "multihead"),
    "pipeline_model_parallel_size": (None, 1),
    **dict.fromkeys(("add_bias_linear", "add_position_embedding"), (True,)),
    **dict.fromkeys(
        # activations
        ("swiglu", "geglu", "reglu", "quick_geglu", "quick_gelu", "gated_linear_unit")
        + ("squared_relu", "glu_activation", "activation_func_clamp_value")
        # LayerNorm and embeddings
        + ("apply_layernorm_1p", "layernorm_zero_centered_gamma", "embed_layernorm", "use_normhead")
        + ("untie_embeddings_and_output_weights", "use_mup", "mtp_num_layers")
        + ("use_rotary_position_embeddings", "use_alibi_mask", "square_alibi_mask")
        # attention
        + ("window_size", "sliding_window", "group_query_attention", "multi_latent_attention")
        + ("qk_layernorm", "qk_l2_norm", "attention_output_gate", "head_wise_attn_gate")
        + ("softmax_scale", "experimental_attention_variant", "linear_attention_type")
        # layers of other kinds
        + ("num_experts", "is_hybrid_model", "hybrid_override_pattern", "hybrid_layer_pattern")
        + ("hybrid_attention_ratio", "hybrid_mlp_ratio", "enable_hyper_connections")
        + ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")
        + ("retro_add_retriever", "spec"),
        (None, False),
    ),
}
FLAGS = (
    "apply_residual_connection_post_layernorm",
    *("openai_gelu", "bias_gelu_fusion", "onnx_safe"),
)
PLAIN = (bool, int, float, str, type(None))


def check_options(args: argparse.Namespace, path: Path) -> None:
    """Raise ValueError where the options name a network that we do not compute."""
    for key, values in REQUIRED.items():
        found = getattr(args, key, values[0])
        if not isinstance(found, PLAIN) or found not in values:
            raise ValueError(f"{path}: {key} is {found!r}, only {values[-1]!r} can be read")
    for key in FLAGS:
        if not isinstance(found := getattr(args, key, None), bool | None):
            raise ValueError(f"{path}: {key} is {found!r}, neither True nor False")


def number(args: argparse.Namespace, names: tuple[str, ...], default: Any, path: Path) -> Any:
    """Return the first of these options that is given, else `default`.

    An integer unless `default` is a float; 0 of an integer stands for `default`.

    Raises:
        ValueError: no number, a negative one, or there is none and `default` is None.
    """
    for name in names:
        found = getattr(args, name, None)
        if found is None:
            continue
        if isinstance(default, float) and type(found) in (int, float):
            return found
        if type(found) is not int or found < (1 if default is None else 0):
            raise ValueError(f"{path}: {name} is {found!r}, which is no size")
        return found or default
    if default is None:
        raise ValueError(f"{path}: its args hold no {names[0]}")
    return default

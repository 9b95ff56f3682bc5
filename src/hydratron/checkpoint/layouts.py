"""Where our parameters lie in a Hugging Face checkpoint: names and layouts of transformers.

Query, key and value are one tensor here, three there; GPT-2 keeps its matrices transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hydratron.checkpoint.tensors import StoredTensor, split, stacked, transposed
from hydratron.models.config import ModelConfig

# A finetuned network: the end of its transformers class, and the name of its head in there.
HEADS = {
    "classification": ("ForSequenceClassification", "classifier"),
    "multiple_choice": ("ForMultipleChoice", "classifier"),
    "span": ("ForQuestionAnswering", "qa_outputs"),
}
PREFIXES = {"bert": "bert.", "gpt2": "transformer."}


@dataclass(frozen=True)
class Head:
    """What a finetuned network's `head` does, a key of HEADS; `labels` of its classes, if known."""

    kind: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Where one of our parameters lies in a Hugging Face checkpoint.

    `names`: one tensor, or the three that ours stacks. `is_conv1d`: kept as [in, out], query, key
    and value side by side.
    """

    names: tuple[str, ...]
    is_conv1d: bool = False
    is_stacked: bool = False

    def read(self, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
        """Theirs in our layout."""
        parts = [tensors[name] for name in self.names]
        if self.is_conv1d:
            parts = [transposed(part) for part in parts]
            parts = split(parts[0], 3) if self.is_stacked else parts
        return stacked(parts) if self.is_stacked else parts[0]

    def write(self, tensor: Tensor) -> dict[str, Tensor]:
        """Ours in their layout."""
        if self.is_conv1d:
            tensor = tensor.flatten(0, 1) if self.is_stacked else tensor
            return {self.names[0]: tensor.T if tensor.dim() > 1 else tensor}
        parts = tensor.unbind(0) if self.is_stacked else [tensor]
        return dict(zip(self.names, parts, strict=True))


def bert_layouts(config: ModelConfig) -> dict[str, Layout]:
    """Return the layout of every parameter of BERT and its heads."""
    is_post = config.layernorm == "post"
    body, cls = "encoder.transformer", "cls.predictions"
    tensors = {
        f"{body}.{kind}_embeddings.weight": f"bert.embeddings.{kind}_embeddings.weight"
        for kind in ("word", "position", "token_type")
    } | {"masked_lm_head.bias": f"{cls}.bias"}
    modules = {
        "encoder.pooler": "bert.pooler.dense",
        "masked_lm_head.transform": f"{cls}.transform.dense",
        "masked_lm_head.layernorm": f"{cls}.transform.LayerNorm",
        "sentence_order_head": "cls.seq_relationship",
    }
    if is_post:
        modules[f"{body}.embedding_layernorm"] = "bert.embeddings.LayerNorm"
    else:
        modules[f"{body}.final_layernorm"] = "bert.encoder.ln"
    layouts: dict[str, Layout] = {}
    for index in range(config.num_layers):
        ours, theirs = f"{body}.layers.{index}", f"bert.encoder.layer.{index}"
        attention_layernorm = "attention.output.LayerNorm" if is_post else "attention.ln"
        modules |= {
            f"{ours}.attention_layernorm": f"{theirs}.{attention_layernorm}",
            f"{ours}.attention.output": f"{theirs}.attention.output.dense",
            f"{ours}.mlp_layernorm": f"{theirs}.output.LayerNorm" if is_post else f"{theirs}.ln",
            f"{ours}.mlp.input": f"{theirs}.intermediate.dense",
            f"{ours}.mlp.output": f"{theirs}.output.dense",
        }
        for kind in ("weight", "bias"):
            names = (f"{theirs}.attention.self.{p}.{kind}" for p in ("query", "key", "value"))
            layouts[f"{ours}.attention.qkv.{kind}"] = Layout(tuple(names), is_stacked=True)
    for ours, theirs in modules.items():
        tensors |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    return layouts | {ours: Layout((theirs,)) for ours, theirs in tensors.items()}


def gpt2_layouts(config: ModelConfig) -> dict[str, Layout]:
    """Return the layout of every parameter of GPT-2."""
    layouts = {
        "transformer.word_embeddings.weight": Layout(("transformer.wte.weight",)),
        "transformer.position_embeddings.weight": Layout(("transformer.wpe.weight",)),
    }
    for kind in ("weight", "bias"):
        layouts[f"transformer.final_layernorm.{kind}"] = Layout((f"transformer.ln_f.{kind}",))
        for index in range(config.num_layers):
            ours, theirs = f"transformer.layers.{index}", f"transformer.h.{index}"
            qkv = Layout((f"{theirs}.attn.c_attn.{kind}",), is_conv1d=True, is_stacked=True)
            layouts |= {
                f"{ours}.attention_layernorm.{kind}": Layout((f"{theirs}.ln_1.{kind}",)),
                f"{ours}.attention.qkv.{kind}": qkv,
                f"{ours}.attention.output.{kind}": Layout((f"{theirs}.attn.c_proj.{kind}",), True),
                f"{ours}.mlp_layernorm.{kind}": Layout((f"{theirs}.ln_2.{kind}",)),
                f"{ours}.mlp.input.{kind}": Layout((f"{theirs}.mlp.c_fc.{kind}",), True),
                f"{ours}.mlp.output.{kind}": Layout((f"{theirs}.mlp.c_proj.{kind}",), True),
            }
    return layouts


def parameter_layouts(config: ModelConfig, head: Head | None = None) -> dict[str, Layout]:
    """Return the layout of every parameter of ours, heads included."""
    if config.family == "gpt2":
        return gpt2_layouts(config)
    modules = {}
    if head is not None:
        # transformers has no answerability head: it travels under our name
        modules = {"head": HEADS[head.kind][1], "answerability_head": "answerability_head"}
    return bert_layouts(config) | {
        f"{ours}.{kind}": Layout((f"{theirs}.{kind}",))
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }

"""Hugging Face folders, both ways: our parameters in the names and layouts of transformers.

BERT post-LN is BertFor..., BERT pre-LN MegatronBertFor..., GPT-2 (pre-LN) GPT2LMHeadModel. The
sentence-order head takes the place of next-sentence prediction: in both, label 0 means that the
second segment follows the first; label 1 is a swap in ours and a random segment in theirs.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers.processors import ByteLevel
from transformers import (
    AutoConfig,
    BertConfig,
    GenerationConfig,
    GPT2Config,
    MegatronBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from hydratron.checkpoint.folders import WEIGHTS, open_weights, read_json, write_safetensors
from hydratron.checkpoint.layouts import HEADS, PREFIXES, Head, Layout, parameter_layouts
from hydratron.checkpoint.tensors import (
    StoredTensor,
    build_network,
    check_num_layers,
    check_tensors,
)
from hydratron.models.config import ModelConfig

CONFIG = "config.json"
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
EXPORTED_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
FAMILIES = {
    "bert": ("bert", "post"),
    "megatron-bert": ("bert", "pre"),
    "gpt2": ("gpt2", "pre"),
}
# What a configuration may say that we compute; any other value is another network.
REQUIRED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("auto_map", "quantization_config"), (None,)),
    **dict.fromkeys(("sliding_window", "layer_types", "rope_parameters"), (None,)),
    **dict.fromkeys(("is_decoder", "is_encoder_decoder", "add_cross_attention"), (False,)),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "problem_type": (None, "single_label_classification"),
}
# Of a stored network, the word embeddings again and the causal mask.
NOT_PARAMETERS = (
    *("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "lm_head.weight"),
    *(".attn.bias", ".attn.masked_bias", ".position_ids"),
)
TASK_HEADS = ("head.", "answerability_head.")
# What transformers raises at values of a configuration that cannot be.
BAD_CONFIG = (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError)
# The modules that stand beside the encoder, and how Hugging Face calls a network with these.
ARCHITECTURES = {
    frozenset({"masked_lm_head", "sentence_order_head"}): "ForPreTraining",
    frozenset({"masked_lm_head"}): "ForMaskedLM",
    frozenset({"sentence_order_head"}): "ForNextSentencePrediction",
    frozenset(): "Model",
}


def is_huggingface(folder: Path) -> bool:
    """Whether `folder` has a transformers configuration."""
    path = folder / CONFIG
    return path.is_file() and "model_type" in read_json(path)


def read_config(folder: Path) -> ModelConfig:
    """Return what the network of a Hugging Face folder is.

    Raises:
        ValueError: another architecture than ours, by the configuration's key and value.
    """
    path = folder / CONFIG
    values = read_json(path)
    model_type = values["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{path}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    for key, known in REQUIRED.items():
        found = values.get(key, known[0])
        if found not in known:
            raise ValueError(f"{path}: {key} is {found!r}, only {known[0]!r} can be read")
    architectures = values.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else [architectures]:
        if not isinstance(name, str) or not hasattr(transformers, name):
            raise ValueError(f"{path}: architectures names {name!r}, no class of transformers")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return _model_config(config, model_type)
    except (OSError, *BAD_CONFIG) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _model_config(config: Any, model_type: str) -> ModelConfig:
    family, layernorm = FAMILIES[model_type]
    is_bert = family == "bert"
    activation = config.hidden_act if is_bert else config.activation_function
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return ModelConfig(
        family=family,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_seq_len=config.max_position_embeddings,
        intermediate_size=config.intermediate_size if is_bert else config.n_inner,
        num_token_types=config.type_vocab_size if is_bert else 2,
        layernorm=layernorm,
        init_std=config.initializer_range,
        layernorm_eps=config.layer_norm_eps if is_bert else config.layer_norm_epsilon,
        activation=ACTIVATIONS[activation],
        hidden_dropout=config.hidden_dropout_prob if is_bert else config.resid_pdrop,
        attention_dropout=config.attention_probs_dropout_prob if is_bert else config.attn_pdrop,
    )


def read_head(folder: Path) -> Head | None:
    """Return what the head of a finetuned Hugging Face folder does; None for any other folder."""
    values = read_json(folder / CONFIG)
    architecture = next(iter(values.get("architectures") or []), "")
    _, _, ending = architecture.partition("For")
    for kind, (name, _) in HEADS.items():
        if name == f"For{ending}":
            labels = values.get("id2label") or {}
            return Head(kind, tuple(labels[key] for key in sorted(labels, key=int)))
    return None


def read_tensors(
    folder: Path, config: ModelConfig, head: Head | None = None
) -> dict[str, StoredTensor]:
    """Return by our names what a Hugging Face folder holds of our parameters.

    Raises:
        ValueError: no safetensors there, ones that cannot be read, or not all those of the network
            and no others; the first ones are named.
    """
    stored = open_weights(folder)
    first = next(iter(stored), "nothing")
    # checkpoints that once came from TensorFlow call a LayerNorm's weight gamma, its bias beta
    old = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
    for theirs, today in old:
        stored = {name.replace(theirs, today): tensor for name, tensor in stored.items()}
    if "cls.predictions.decoder.bias" in stored:
        stored.setdefault("cls.predictions.bias", stored["cls.predictions.decoder.bias"])
    prefix = PREFIXES[config.family]
    if not any(name.startswith(prefix) for name in stored):  # a network without heads
        stored = {f"{prefix}{name}": tensor for name, tensor in stored.items()}
    check_num_layers(config, len(stored), path=folder)
    layouts = parameter_layouts(config, head)
    if not any(name in stored for layout in layouts.values() for name in layout.names):
        raise ValueError(f"{folder} holds no name of a {config.family}: its first is {first}")
    heads = {
        ours: stored[layout.names[0]].shape
        for ours, layout in layouts.items()
        if ours.startswith(TASK_HEADS) and layout.names[0] in stored
    }
    network = build_network(config, head and head.kind, heads)
    needed = {
        ours: {name: part.shape for name, part in layouts[ours].write(parameter.detach()).items()}
        for ours, parameter in network.named_parameters()
    }
    names = {name for parts in needed.values() for name in parts}
    # buffers, and the word embeddings once more, are no parameters to transformers either
    held = {
        name: tensor
        for name, tensor in stored.items()
        if name in names or (tensor.dtype.is_floating_point and not name.endswith(NOT_PARAMETERS))
    }
    check_tensors(needed, held, path=folder, family=config.family)
    return {ours: layouts[ours].read(held) for ours in needed if needed[ours].keys() <= held.keys()}


def export_architecture(config: ModelConfig, names: set[str], head: Head | None = None) -> str:
    """Return the transformers class for a network that has the parameters `names`.

    Raises:
        ValueError: there is none.
    """
    if config.family == "gpt2":
        if config.layernorm == "post":
            raise ValueError("GPT-2 with layernorm post has no Hugging Face counterpart")
        return "GPT2LMHeadModel"
    heads = frozenset(name.partition(".")[0] for name in names) - {"encoder"}
    if "head" in heads and head is not None:
        ending = HEADS[head.kind][0]
    elif heads in ARCHITECTURES:
        ending = ARCHITECTURES[heads]
    else:
        found = ", ".join(sorted(heads))
        raise ValueError(f"no class of transformers is known for a BERT with {found}")
    return ("Bert" if config.layernorm == "post" else "MegatronBert") + ending


def export_config(
    config: ModelConfig,
    *,
    architecture: str,
    tokenizer: PreTrainedTokenizerFast | None,
    labels: tuple[str, ...] = (),
) -> PreTrainedConfig:
    """Return the transformers configuration of our network; its vocabulary is ours, padding and
    all, and `tokenizer_vocab_size` the tokenizer's own.
    """
    kinds = ("bos", "eos", "pad") if config.family == "gpt2" else ("pad",)
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds}
    activation = EXPORTED_ACTIVATIONS[config.activation]
    shared: dict[str, Any] = tokens | {
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tokenizer_vocab_size": None if tokenizer is None else len(tokenizer),
    }
    if config.family == "gpt2":
        return GPT2Config(
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_positions=config.max_seq_len,
            n_inner=config.feedforward_size,
            activation_function=activation,
            layer_norm_epsilon=config.layernorm_eps,
            resid_pdrop=config.hidden_dropout,
            embd_pdrop=config.hidden_dropout,
            attn_pdrop=config.attention_dropout,
            **shared,
        )
    if labels:
        shared["id2label"] = dict(enumerate(labels))
        shared["label2id"] = {label: index for index, label in enumerate(labels)}
    cls = BertConfig if config.layernorm == "post" else MegatronBertConfig
    return cls(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_seq_len,
        intermediate_size=config.feedforward_size,
        type_vocab_size=config.num_token_types,
        hidden_act=activation,
        layer_norm_eps=config.layernorm_eps,
        hidden_dropout_prob=config.hidden_dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        **shared,
    )


def export_tokenizer(
    tokenizer: PreTrainedTokenizerFast, config: ModelConfig
) -> PreTrainedTokenizerFast:
    """Return a copy of the tokenizer that gives a client of transformers what our network takes.

    It knows the longest sequence. GPT-2's adds no special tokens, and `<|endoftext|>`, or what ends
    a document, begins one too.
    """
    exported = copy.deepcopy(tokenizer)
    backend = exported.backend_tokenizer
    backend.no_truncation()  # what earlier calls left
    backend.no_padding()
    exported.model_max_length = exported.init_kwargs["model_max_length"] = config.max_seq_len
    if config.family == "gpt2":
        if backend.num_special_tokens_to_add(is_pair=False):
            backend.post_processor = ByteLevel(trim_offsets=False)  # adds nothing
        names = ["input_ids", "attention_mask"]
        exported.model_input_names = exported.init_kwargs["model_input_names"] = names
        exported.bos_token = exported.bos_token or exported.eos_token
    return exported


def write_folder(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    head: Head | None = None,
) -> str:
    """Write weights, configuration and tokenizer into `folder`; return the transformers class.

    Raises:
        ValueError: the network has no counterpart, or the tokenizer does not fit its vocabulary.
    """
    architecture = export_architecture(config, set(tensors), head)
    tokenizer = tokenizer and export_tokenizer(tokenizer, config)
    exported = export_config(
        config, architecture=architecture, tokenizer=tokenizer, labels=_labels(tensors, head)
    )
    exported.dtype = next(iter(tensors.values())).dtype
    exported.save_pretrained(folder)
    if config.family == "gpt2":
        GenerationConfig.from_model_config(exported).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    layouts = parameter_layouts(config, head)
    prefix = PREFIXES["bert"] if architecture.endswith("BertModel") else ""
    pieces: list[tuple[Layout, StoredTensor]] = [
        (layouts[name], stored) for name, stored in tensors.items()
    ]
    write_safetensors(folder / WEIGHTS, pieces, prefix=prefix)
    return architecture


def _labels(tensors: Mapping[str, StoredTensor], head: Head | None) -> tuple[str, ...]:
    """Return a classifier's labels; transformers counts its classes by them."""
    if head is None or head.kind != "classification":
        return ()
    num_labels = tensors["head.weight"].shape[0]
    fits = len(head.labels) == num_labels
    return head.labels if fits else tuple(f"LABEL_{index}" for index in range(num_labels))

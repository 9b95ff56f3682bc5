"""Tiny tasks for the tests: rows in the official formats, an encoder to finetune, a job."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForPreTraining,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetModel,
)

TEXT = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] . , ? the a cat dog bird sat ran on mat log river who what"
    " where did is red blue green big small it there was no yes and"
)
WORDS = TEXT.split()
NOUNS, COLOURS = ("cat", "dog", "bird"), ("red", "blue", "green")


def write_bert(folder: Path, **changes: Any) -> Path:
    """Write a random BERT of transformers with its vocabulary; heads 4, divisible sizes."""
    shape = {
        "vocab_size": len(WORDS) + len(WORDS) % 2,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    BertForPreTraining(BertConfig(**shape | changes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def write_mnli(path: Path, num_rows: int) -> Path:
    """Rows whose label is told by the colours of the two sentences; lengths differ."""
    labels = ("entailment", "contradiction", "neutral")
    rows = []
    for i in range(num_rows):
        noun, colour = NOUNS[i % 3], COLOURS[i // 3 % 3]
        label = labels[i % 3]
        other = {"entailment": colour, "contradiction": COLOURS[(i // 3 + 1) % 3]}.get(label, "big")
        premise = f"the {noun} is {colour}" + " and it sat there" * (i % 4)
        rows.append({"premise": premise, "hypothesis": f"the {noun} is {other}", "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_squad(path: Path, num_paragraphs: int, *, version: str) -> Path:
    """Paragraphs of one question with an answer and, for 2.0, one without."""
    paragraphs = []
    for i in range(num_paragraphs):
        noun, colour = NOUNS[i % 3], COLOURS[i % 2]
        context = "it was there . " * (i % 5) + f"the {noun} is {colour} ."
        answer = {"text": colour, "answer_start": context.rindex(colour)}
        qas: list[dict[str, Any]] = [
            {"id": f"q{i}", "question": f"what is the {noun} ?", "answers": [answer]}
        ]
        if version == "2.0":
            qas[0]["is_impossible"] = False
            qas.append(
                {"id": f"n{i}", "question": "who ran ?", "answers": [], "is_impossible": True}
            )
        paragraphs.append({"context": context, "qas": qas})
    data = [{"title": "animals", "paragraphs": paragraphs}]
    path.write_text(json.dumps({"version": version, "data": data}))
    return path


def write_race(path: Path, num_passages: int) -> Path:
    """Passages of one question, of both levels."""
    rows = []
    for i in range(num_passages):
        colour = i % 3
        rows.append(
            {
                "id": f"{('middle', 'high')[i % 2]}{i}.txt",
                "article": f"the {NOUNS[i % 3]} is {COLOURS[colour]} ." + " it sat ." * (i % 3),
                "questions": [f"the {NOUNS[i % 3]} is _ ."],
                "options": [[*COLOURS, "big"]],
                "answers": ["ABCD"[colour]],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_baseline(folder: Path, kind: str) -> Path:
    """Write a tiny random RoBERTa, ALBERT or XLNet with a tokenizer framed as theirs is."""
    names = {"roberta": ("<s>", "</s>", "<pad>"), "xlnet": ("<cls>", "<sep>", "<pad>")}
    cls, sep, pad = names.get(kind, ("[CLS]", "[SEP]", "[PAD]"))
    # RoBERTa's padding is 1: its positions are counted from 2 on
    words = [cls, pad, sep, "<unk>", "<mask>", *WORDS[5:]]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = {
        "roberta": (f"{cls} $A {sep}", f"{cls} $A {sep} {sep} $B {sep}"),
        "albert": (f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1"),
        "xlnet": (f"$A {sep} {cls}:2", f"$A {sep} $B:1 {sep}:1 {cls}:2"),
    }[kind]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(cls, 0), (sep, 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token=cls,
        sep_token=sep,
        pad_token=pad,
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left" if kind == "xlnet" else "right",
    ).save_pretrained(folder)
    shape = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 66,
        "pad_token_id": 1,
    }
    if kind == "roberta":
        model: Any = RobertaModel(RobertaConfig(type_vocab_size=1, **shape))
    elif kind == "albert":
        model = AlbertModel(AlbertConfig(embedding_size=8, **shape))
    else:
        sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "pad_token_id": 1}
        model = XLNetModel(XLNetConfig(vocab_size=len(words), **sizes))
    model.save_pretrained(folder)
    return folder

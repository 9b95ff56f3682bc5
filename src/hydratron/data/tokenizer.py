"""Tokenizers: trained on a text here, or loaded; what the objectives need to know of one."""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
)

from hydratron.data.special_tokens import SpecialTokens

TokenizerKind = Literal["wordpiece", "bpe", "character"]
TOKENIZER_KINDS: tuple[TokenizerKind, ...] = ("wordpiece", "bpe", "character")

_ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "eos_token": "<|endoftext|>",
}
_SPECIALS = list(_ROLES.values())
_CONFIG = "tokenizer_config.json"
_SETTINGS = (_CONFIG, "added_tokens.json", "special_tokens_map.json")  # what transformers reads
_NO_LIMIT = 10**30  # what transformers takes for "no maximum length"


def train_tokenizer(
    kind: TokenizerKind, texts: Iterable[str], *, vocab_size: int, lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `vocab_size` entries; the same texts give the same tokenizer.

    `wordpiece` is BERT's (Devlin et al. 2019), `bpe` the byte-level one of GPT-2 (Radford et al.
    2019), `character` has a token for each of the most frequent characters and collapses runs of
    white space. Each has the special tokens of both families, so that each serves both objectives.
    The texts are held in memory. ValueError for another kind and a `vocab_size` below what the kind
    needs.
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"tokenizer {kind!r} is not one of {', '.join(TOKENIZER_KINDS)}")
    train = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "character": _train_character}[kind]
    backend = train(list(texts), vocab_size, lowercase)
    if backend.get_vocab_size() > vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} is less than the {backend.get_vocab_size()} entries that a "
            f"{kind} tokenizer needs for special tokens and single characters"
        )
    return _wrap(backend)


def _train_wordpiece(texts: list[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    trained = _wordpiece({}, lowercase)
    characters = sorted(set().union(*(trained.normalizer.normalize_str(text) for text in texts)))
    # The trainer meets "##x" in the order of a hash map with a random seed, so that ids, and
    # through ties even entries, differ from run to run. Known beforehand they do not; rebuilt
    # below, they are no special tokens.
    inner = [f"##{c}" for c in characters if unicodedata.category(c)[0] not in "PZC"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIALS + inner,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return _wordpiece(trained.get_vocab(), lowercase)


def _wordpiece(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix="##"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _train_bpe(texts: list[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    backend = _byte_level_bpe({}, [])
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _train_character(texts: list[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")]
    normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps] if lowercase else steps)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    characters = sorted(counts, key=lambda character: (-counts[character], character))
    room = vocab_size - len(_SPECIALS)
    if room < 1:
        raise ValueError(
            f"vocab_size {vocab_size} leaves no room beside {len(_SPECIALS)} special tokens"
        )
    entries = _SPECIALS + characters[:room]
    model = models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    vocab = backend.get_vocab()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=_NO_LIMIT,
        **{role: token for role, token in _ROLES.items() if token in vocab},
    )
    return add_frame(tokenizer)


def add_frame(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let `tokenizer` give `[CLS] a [SEP] b [SEP]` and token types where it is called; return it.

    So clients of transformers see what BERT was trained on. Nothing is changed where a tokenizer
    adds special tokens already, or lacks these two.
    """
    backend, ends = tokenizer.backend_tokenizer, (tokenizer.sep_token, tokenizer.cls_token)
    if None in ends or backend.num_special_tokens_to_add(is_pair=True):
        return tokenizer
    vocab = tokenizer.get_vocab()
    frame = processors.BertProcessing(*((str(token), vocab[str(token)]) for token in ends))
    before = backend.post_processor
    backend.post_processor = processors.Sequence([before, frame]) if before else frame
    names = ["input_ids", "token_type_ids", "attention_mask"]
    # the second is what save_pretrained writes
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def load_tokenizer(spec: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder, a `tokenizer.json`, or by its Hugging Face Hub name.

    A folder holds tokenizer.json, or vocab.txt (BERT), or vocab.json and merges.txt (GPT-2; also
    under their first names, encoder.json and vocab.bpe). A configuration beside these is read as
    transformers reads it. ValueError, one line, for anything else.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return _wrap(_backend_from_file(path))
    if path.is_dir():
        return _load_folder(path)
    if spec.startswith((".", "~", os.sep)) or spec.count("/") > 1 or path.suffix == ".json":
        raise ValueError(f"tokenizer {spec!r}: no such file or folder")
    return _load_with(AutoTokenizer, spec, "is no file, no folder, and not to be had from the Hub")


def _load_with(
    auto: type[AutoTokenizer] | type[PreTrainedTokenizerFast], spec: str, failure: str
) -> PreTrainedTokenizerFast:
    """What transformers makes of a folder or name, without running code that lies there."""
    try:
        tokenizer = auto.from_pretrained(spec, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"tokenizer {spec!r} {failure}: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {spec!r} has no fast version (tokenizer.json)")
    return tokenizer


def _read_json(path: Path, what: str = "JSON") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path}: not {what}: {error}") from error


def _backend_from_file(path: Path) -> Tokenizer:
    state = _read_json(path, "a tokenizer.json")
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path}: not a tokenizer.json: it describes no model")
    return Tokenizer.from_str(json.dumps(state))


def _load_folder(folder: Path) -> PreTrainedTokenizerFast:
    settings = {name: folder / name for name in _SETTINGS if (folder / name).is_file()}
    config = {name: _read_json(path) for name, path in settings.items()}.get(_CONFIG, {})
    if not isinstance(config, dict):
        raise ValueError(f"{folder / _CONFIG}: not a JSON object")
    failure = "cannot be read"
    if (folder / "tokenizer.json").is_file():
        if _CONFIG not in settings:
            return _wrap(_backend_from_file(folder / "tokenizer.json"))
        # the configuration says which token plays which role
        return _load_with(PreTrainedTokenizerFast, str(folder), failure)
    is_named = "tokenizer_class" in config or "auto_map" in config
    if (folder / "vocab.txt").is_file():
        if settings:
            return _load_with(AutoTokenizer if is_named else BertTokenizer, str(folder), failure)
        return _load_wordpiece(folder / "vocab.txt")
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).is_file() and (folder / merges).is_file():
            if settings and vocab == "vocab.json":
                return _load_with(
                    AutoTokenizer if is_named else GPT2Tokenizer, str(folder), failure
                )
            return _load_bpe(folder / vocab, folder / merges)
    raise ValueError(
        f"tokenizer {str(folder)!r} holds neither tokenizer.json, nor vocab.txt, nor vocab.json "
        "with merges.txt"
    )


def _load_wordpiece(path: Path) -> PreTrainedTokenizerFast:
    # a line feed alone ends an entry: U+2028 and the like are entries of published vocabularies
    text = path.read_bytes().decode("utf-8").removesuffix("\n")
    entries = [line.removesuffix("\r") for line in text.split("\n")]
    vocab = {entry: i for i, entry in enumerate(entries)}
    if "[UNK]" not in vocab:
        raise ValueError(f"{path}: no [UNK], this is not a WordPiece vocabulary")
    # an uncased vocabulary is one without a capital letter: no other file would tell
    cased = any(entry != entry.lower() for entry in entries if not entry.startswith("["))
    return _wrap(_wordpiece(vocab, lowercase=not cased))


def _load_bpe(vocab_path: Path, merges_path: Path) -> PreTrainedTokenizerFast:
    vocab = _read_json(vocab_path)
    merges = [
        (left, right)
        for line in merges_path.read_text(encoding="utf-8").split("\n")
        if not line.startswith("#version") and line.count(" ") == 1
        for left, right in [line.split(" ")]
    ]
    return _wrap(_byte_level_bpe(vocab, merges))


def special_tokens(
    tokenizer: PreTrainedTokenizerFast, *, objective: Literal["mlm", "clm"] = "mlm"
) -> SpecialTokens:
    """Ids of the special tokens that the objective needs, and of those that there are.

    `mlm` needs pad, cls, sep and mask; `clm` needs eod, which also pads where there is no pad
    token. ValueError naming a missing token and the objective.
    """
    tokens = {
        "pad": tokenizer.pad_token,
        "cls": tokenizer.cls_token,
        "sep": tokenizer.sep_token,
        "mask": tokenizer.mask_token,
        "eod": tokenizer.eos_token,
    }
    vocab = tokenizer.get_vocab()
    ids = {name: -1 if token is None else vocab[str(token)] for name, token in tokens.items()}
    for name in ("pad", "cls", "sep", "mask") if objective == "mlm" else ("eod",):
        if ids[name] < 0:
            raise ValueError(
                f"the tokenizer has no {name} token, which the objective {objective} needs"
            )
    if ids["pad"] < 0:
        ids["pad"] = ids["eod"]
    return SpecialTokens(**ids, all_ids=tuple(sorted(map(int, tokenizer.all_special_ids))))


def word_start_table(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """bool [len(tokenizer)]: True where a token begins a word.

    WordPiece: all but the ##-tokens. Byte-level BPE and SentencePiece: those with the leading space
    (Ġ or ▁), so that punctuation belongs to the word before it; the first token of a segment begins
    a word too, which the samples see to. Anything else, such as characters: every token. Special
    tokens always do.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, models.WordPiece):
        prefix = model.continuing_subword_prefix
        table = np.array([not token.startswith(prefix) for token in tokens])
    else:
        marks = [mark for mark in "Ġ▁" if any(token.startswith(mark) for token in tokens)]
        table = np.array([not marks or token.startswith(marks[0]) for token in tokens])
    table[list(tokenizer.all_special_ids)] = True
    return table


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256, in hex, of what decides the ids of a text and which of them are special."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # calls with truncation= or padding= leave these two behind in the tokenizer
    state = {name: value for name, value in state.items() if name not in ("truncation", "padding")}
    # BERT's frame is what every text of an encoder is put in, by the tokenizer or by us
    match state["post_processor"]:
        case {"type": "BertProcessing"}:
            state["post_processor"] = None
        case {"type": "Sequence", "processors": [before, {"type": "BertProcessing"}]}:
            state["post_processor"] = before
    text = json.dumps([state, tokenizer.special_tokens_map], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

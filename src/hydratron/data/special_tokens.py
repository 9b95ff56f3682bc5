"""The ids that the samples of an objective are framed and masked with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens.

    -1 stands for one that the tokenizer lacks and the objective does not need.
    """

    pad: int
    cls: int
    sep: int
    mask: int
    eod: int  # end of document
    all_ids: tuple[int, ...]  # these and all others, such as [UNK]: never masked, never drawn

"""The shape of a small output layer, shared by tests and benchmarks so that both speak of the same thing."""

from typing import NamedTuple

__all__ = ["TINY", "HeadShape"]


class HeadShape(NamedTuple):
    """One training step's output layer."""

    name: str
    tokens: int  # predicting positions in one step on one device
    embed: int  # width of the hidden states
    vocab: int  # rows of the head
    topk: int  # events per position


TINY = HeadShape("tiny", tokens=2048, embed=128, vocab=2048, topk=10)

"""Shapes of real language-model heads, shared by tests and benchmarks so that both speak of the same thing."""

from typing import NamedTuple

__all__ = ["HEADS", "TINY", "HeadShape"]


class HeadShape(NamedTuple):
    """One training step's output layer."""

    name: str
    tokens: int  # predicting positions in one step on one device
    embed: int  # width of the hidden states
    vocab: int  # rows of the head
    topk: int  # events per position


TINY = HeadShape("tiny", tokens=2048, embed=128, vocab=2048, topk=10)

HEADS = (
    HeadShape("llama2-7b", tokens=8192, embed=4096, vocab=32000, topk=32),
    HeadShape("mistral-7b-v0.3", tokens=8192, embed=4096, vocab=32768, topk=32),
    HeadShape("gpt2-xl", tokens=8192, embed=1600, vocab=50257, topk=32),
    HeadShape("llama3-8b", tokens=8192, embed=4096, vocab=128256, topk=32),
    HeadShape("qwen2.5-7b", tokens=8192, embed=3584, vocab=152064, topk=32),
    HeadShape("gemma2-2b", tokens=8192, embed=2304, vocab=256000, topk=32),
)

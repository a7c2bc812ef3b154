"""Rotary position embeddings: what a config says, and the frequencies that follow from it.

The five kinds that checkpoints use are read from both forms in which Hugging Face keeps
them: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5). Export writes
both, because transformers 4 reads the new form silently as theta 10000. Anything unknown is an error: a
wrong rotation gives a model that works a little worse, which nobody notices.

References: linear and dynamic NTK as in transformers; llama3 as released with Llama 3.1; YaRN,
arXiv:2309.00071, equations 19 to 23.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError, nearest

__all__ = ["ROPE_KINDS", "RopeConfig", "rope_frequencies", "rope_from_hf", "rope_tables", "rope_to_hf"]

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}
ROPE_KINDS = tuple(_REQUIRED)


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding; fields are named as in Hugging Face configs, and None where not used."""

    kind: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    partial_rotary_factor: float | None = None  # share of a head's channels that is rotated; None: all

    def __post_init__(self) -> None:
        if self.kind not in _REQUIRED:
            raise InputError(
                f"unknown RoPE kind {self.kind!r}; known are {', '.join(ROPE_KINDS)}.{nearest(self.kind, ROPE_KINDS)}"
            )
        missing = [name for name in _REQUIRED[self.kind] if getattr(self, name) is None]
        if missing:
            raise InputError(f"RoPE of kind {self.kind!r} needs {', '.join(missing)}")
        if self.rope_theta <= 0 or (self.factor is not None and self.factor < 1):
            raise InputError(f"rope_theta must be > 0 and factor >= 1, got {self.rope_theta} and {self.factor}")
        if self.partial_rotary_factor is not None and not 0 < self.partial_rotary_factor <= 1:
            raise InputError(f"partial_rotary_factor must lie in (0, 1], got {self.partial_rotary_factor}")


def rope_from_hf(config: Mapping[str, Any], *, max_positions: int) -> RopeConfig:
    """Returns the rotary embedding of a Hugging Face config, in either of its forms.

    Raises:
        InputError: an unknown kind or key, a missing key, or two forms that contradict each other.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    theta = config.get("rope_theta")
    found = [_read({"rope_theta": theta, **block}, max_positions) for block in (old, new) if block is not None]
    if new is not None and theta is not None and float(new.get("rope_theta", theta)) != float(theta):
        raise InputError(f"rope_theta = {theta} contradicts rope_parameters = {new}; remove the wrong one")
    if len(found) == 2 and found[0] != found[1]:
        raise InputError(f"rope_scaling = {old} contradicts rope_parameters = {new}; remove the wrong one")
    return found[-1] if found else _read({"rope_theta": theta}, max_positions)


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """Returns the config entries of a rotary embedding, for transformers 4 and 5 at once."""
    own = ("kind", "rope_theta", "partial_rotary_factor")  # the last one is written by the families that have it
    values = {f.name: getattr(rope, f.name) for f in fields(rope) if f.name not in own}
    scaling = {"rope_type": rope.kind} | {name: value for name, value in values.items() if value is not None}
    return {
        "rope_theta": rope.rope_theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.rope_theta} | scaling,
    }


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns inverse frequencies `[head_dim / 2]` (radians per position) and the factor on cos and sin.

    The dynamic kind depends on the length that is read: this is its value within the trained length.
    """
    inverse = rope.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        inverse = inverse / _float(rope.factor)
    if rope.kind == "llama3":
        inverse = _llama3(rope, inverse)
    if rope.kind == "yarn":
        return _yarn(rope, inverse).astype(np.float32), _yarn_attention_factor(rope)
    return inverse.astype(np.float32), 1.0


def rope_tables(
    rope: RopeConfig, positions: jax.Array, *, head_dim: int, max_positions: int
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin `[B, T, head_dim / 2]` in float32 for `positions` `[B, T]`.

    The dynamic kind takes the length of each row as its largest position + 1, so that a row's result does
    not depend on its neighbours in the batch (transformers takes the largest of the batch).
    """
    inverse, scale = rope_frequencies(rope, head_dim)
    frequencies = jnp.asarray(inverse)[None, None, :]
    if rope.kind == "dynamic":
        length = jnp.maximum(positions.max(axis=-1) + 1, max_positions).astype(jnp.float32)
        stretch = _float(rope.factor) * length / max_positions - (_float(rope.factor) - 1)
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / (head_dim - 2)
        frequencies = frequencies * stretch[:, None, None] ** -jnp.asarray(exponents)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _read(block: Mapping[str, Any], max_positions: int) -> RopeConfig:
    kind = block.get("rope_type", block.get("type", "default"))
    if kind not in _REQUIRED:
        known = ", ".join(ROPE_KINDS)
        raise InputError(
            f"unknown RoPE kind {kind!r} in the model config; known are {known}.{nearest(str(kind), known)}"
        )
    allowed = {"rope_theta", "rope_type", "type", *_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    harmless = {"partial_rotary_factor": 1.0}
    extra = [
        name
        for name, value in block.items()
        if name not in allowed and value is not None and value != harmless.get(name)
    ]
    # transformers 5 writes these for kinds that do not use them
    extra = [name for name in extra if name not in ("original_max_position_embeddings", "factor")]
    if extra:
        raise InputError(f"RoPE of kind {kind!r} does not know {', '.join(sorted(extra))} (got {dict(block)})")
    values = {name: block[name] for name in allowed - {"rope_type", "type"} if block.get(name) is not None}
    if kind == "yarn":
        values.setdefault("original_max_position_embeddings", max_positions)
    return RopeConfig(kind=kind, **values)


def _float(value: float | None) -> float:
    return 1.0 if value is None else float(value)


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, blended in between."""
    low, high = _float(rope.low_freq_factor), _float(rope.high_freq_factor)
    turns = _float(rope.original_max_position_embeddings) * inverse / (2 * math.pi)  # within the old context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inverse * (kept + (1 - kept) / _float(rope.factor))


def _yarn(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """YaRN, equations 19 to 22: a linear ramp over dimensions between kept and divided frequencies."""
    half = inverse.shape[0]
    original = _float(rope.original_max_position_embeddings)

    def dimension(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(rope.rope_theta)

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    divided = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return inverse * (1 - divided) + inverse / _float(rope.factor) * divided


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """YaRN, equation 23 (the square root of the inverse temperature, applied to cos and sin)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    growth = 0.1 * math.log(_float(rope.factor))
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * growth + 1) / (rope.mscale_all_dim * growth + 1)
    return growth + 1

"""Any other causal language model as a source, through `AutoModelForCausalLM` and torch (the extra `torch`).

For architectures that fusejax does not compute itself. Every segment becomes a row of its own, padded on the right,
so that a causal model needs no mask. Logits are turned into the K likeliest tokens and the mass
outside on the device, in float32, a few rows of positions at a time. Weights are read from safetensors only.

A model's own code runs only where the user has named the model in `trust_remote_code`, and from its directory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.errors import InputError
from fusejax.sources.rows import Span, spans
from fusejax.types import TopK

__all__ = ["load_torch_model", "torch_score"]

_CHUNK_ENTRIES = 2**26  # float32 logits held at once: 256 MiB


def load_torch_model(directory: Path, *, dtype: str = "float32", run_its_code: bool = False) -> Any:
    """Returns the torch model of a Hugging Face directory, on the accelerator where torch sees one.

    Raises:
        InputError: torch is not installed; transformers cannot load the model, with its reason.
    """
    torch = _torch()
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            trust_remote_code=run_its_code,
            use_safetensors=True,
            local_files_only=True,
        )
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        own = "if the model comes with its own code and you trust it, repeat its name in `trust_remote_code`"
        hint = "" if run_its_code else f"; {own}"
        raise InputError(f"{directory}: transformers cannot load this model ({reason}){hint}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device)


def torch_score(
    model: Any, *, top_k: int, valid_vocab: int | None = None
) -> Callable[..., tuple[np.ndarray, TopK | None]]:
    """Returns a function of (tokens, labels, positions, segment_ids), each `[B, T]`, that runs the model.

    It returns the log-probability `[B, T]` (float32, nats) of each label and the `TopK` `[B, T, top_k]`, None if
    top_k is 0; ids from `valid_vocab` on get no probability. The results at padding mean nothing.
    """
    torch = _torch()

    def score(
        tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray
    ) -> tuple[np.ndarray, TopK | None]:
        found = spans(segment_ids, positions)
        longest = max((stop - start for _, start, stop in found), default=1)
        ids, targets = np.zeros((2, max(1, len(found)), longest), np.int64)
        for i, (row, start, stop) in enumerate(found):
            ids[i, : stop - start], targets[i, : stop - start] = tokens[row, start:stop], labels[row, start:stop]
        parts = []
        with torch.inference_mode():
            logits = model(torch.as_tensor(ids, device=model.device), use_cache=False).logits
            target = torch.as_tensor(targets, device=model.device)
            width = max(1, _CHUNK_ENTRIES // (len(ids) * logits.shape[-1]))
            for start in range(0, longest, width):
                window = slice(start, start + width)
                parts.append(_score_logits(torch, logits[:, window, :valid_vocab], target[:, window], top_k))
        joined = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        realised, kept, logprobs, residual = (_spread(part, found, tokens.shape) for part in joined)
        return realised, TopK(kept, logprobs, residual) if top_k else None

    return score


def _score_logits(torch: Any, logits: Any, targets: Any, top_k: int) -> tuple[np.ndarray, ...]:
    """Returns realised logprob, ids, logprobs and residual of logits `[B, T, V]`."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    realised = logprobs.gather(-1, targets[..., None])[..., 0]
    count = min(top_k, logits.shape[-1])
    # torch.topk leaves ties open: a stable sort keeps the lower id, as elsewhere in fusejax
    values, ids = (part[..., :count] for part in torch.sort(logprobs, dim=-1, descending=True, stable=True))
    residual = torch.logsumexp(logprobs.scatter(-1, ids, -torch.inf), dim=-1)
    short = [(0, 0), (0, 0), (0, top_k - count)]
    return (
        realised.cpu().numpy(),
        np.pad(ids.to(torch.int32).cpu().numpy(), short, constant_values=-1),
        np.pad(values.cpu().numpy(), short, constant_values=-np.inf),
        residual.cpu().numpy(),
    )


def _spread(part: np.ndarray, found: list[Span], shape: tuple[int, ...]) -> np.ndarray:
    """Puts the rows of segments back where they were."""
    whole = np.zeros((*shape, *part.shape[2:]), part.dtype)
    for i, (row, start, stop) in enumerate(found):
        whole[row, start:stop] = part[i, : stop - start]
    return whole


def _torch() -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "this model needs torch, which is not installed: pip install 'fusejax[torch]', or use a model that fusejax "
            "computes itself (docs/export.md lists them)"
        ) from error
    return torch

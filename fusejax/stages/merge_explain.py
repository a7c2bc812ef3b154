"""What a merge would do, from headers alone: `fusejax merge ... --explain`."""

import math
from typing import Any

from fusejax.io.stream_read import dtype_of
from fusejax.merging import MERGE_METHODS
from fusejax.merging.registry import resolve
from fusejax.stages.merge_files import Job
from fusejax.stages.merge_scan import input_refs, summed_steps
from fusejax.stages.merge_statistics import is_chunked, statistics_passes

__all__ = ["explain", "explanation_text"]

_SOURCES = {
    "sce": "of every matrix: its targets' squared changes, over the selected elements",
    "varm": "of every unit: its targets' squared changes",
    "linear": "given weights",
    "task_arithmetic": "given weights",
}


def explain(job: Job) -> dict[str, Any]:
    """Returns what would be done, as a JSON object."""
    plan, method = job.plan, job.recipe.method
    summed = {step.output for step in summed_steps(plan, job.models)}
    tensors = [_tensor(job, step, step.output in summed) for step in plan.tensors]
    changes = sorted({f"{source} -> {t['dtype']}" for t in tensors for source in t["from"] if source != t["dtype"]})
    outputs = {step.output for step in plan.tensors}
    heads = [n for n in outputs if n.endswith(("lm_head.weight", "embed_out.weight"))]
    return {
        "name": job.read.get("name"),
        "method": method,
        "coefficients": _SOURCES.get(method, "none per matrix"),
        "tensors": len(tensors),
        "matrices": sum(len(t["shape"]) > 1 for t in tensors),
        "parameters": sum(math.prod(t["shape"]) for t in tensors),
        "bytes_to_read": sum(t["read"] for t in tensors),
        "bytes_to_write": sum(t["written"] for t in tensors),
        "streamed_in_chunks": sum(t["chunked"] for t in tensors),
        "whole_matrices": sum(not t["chunked"] for t in tensors),
        "dtype_changes": changes,
        "tied": [] if heads else sorted(n for n in outputs if n.endswith(("embed_tokens.weight", "wte.weight"))),
        "vocabulary": {"rows": len(plan.tokens), "source": job.recipe.tokenizer} if plan.rows else None,
        "layers": plan.num_layers,
        "copied_from": plan.template,
        "models": {name: str(place) for name, place in job.directories.items()},
        "notes": list(plan.notes),
        "by_tensor": tensors,
    }


def _tensor(job: Job, step: Any, summed: bool) -> dict[str, Any]:
    refs = input_refs(step)
    stored = [job.models[ref.model].tensors[ref.name] for ref in refs]
    _, values = resolve(step.method, step.parameters, len(step.targets), step.base is not None)
    dtypes = [tensor.dtype for tensor in stored]
    chunked = is_chunked([*dtypes, step.dtype])
    shape = list(stored[0].shape)
    if step.vocabulary and job.plan.rows:
        shape[0] = len(job.plan.tokens)
    size = sum(math.prod(t.shape) * dtype_of(t.dtype).itemsize for t in stored)
    # The look at the inputs, which may give statistics as well, and the result.
    passes = 2 + (statistics_passes(step.method, values) - summed if chunked else 0)
    return {
        "name": step.output,
        "shape": shape,
        "dtype": step.dtype,
        "from": sorted(set(dtypes)),
        "parameters": {n: v for n, v in step.parameters.items() if n in MERGE_METHODS[step.method].parameters},
        "sources": [f"{ref.model}:{ref.name}" for ref in refs],
        "read": size * passes,
        "written": math.prod(shape) * dtype_of(step.dtype).itemsize,
        "chunked": chunked,
    }


def explanation_text(found: dict[str, Any]) -> str:
    """Returns the same for people."""
    lines = [
        (f"stage {found['name']}, " if found["name"] else "")
        + f"{found['method']}: {found['tensors']} tensors ({found['matrices']} matrices), "
        f"{found['parameters']:,} parameters; nothing has been read but headers",
        f"  coefficients      {found['coefficients']}",
        f"  to read           {found['bytes_to_read']:,} bytes (some of them more than once)",
        f"  to write          {found['bytes_to_write']:,} bytes",
        f"  in chunks         {found['streamed_in_chunks']} tensors; whole: {found['whole_matrices']}",
        f"  dtype changes     {', '.join(found['dtype_changes']) or 'none'}",
        f"  tied              {', '.join(found['tied']) + ' is also the head' if found['tied'] else 'none'}",
        f"  config, tokenizer {found['copied_from']}",
    ]
    if found["vocabulary"]:
        lines.append(f"  vocabulary        {found['vocabulary']['rows']} rows ({found['vocabulary']['source']})")
    if found["layers"] is not None:
        lines.append(f"  layers            {found['layers']}")
    lines += [f"  note: {note}" for note in found["notes"]]
    return "\n".join(lines)

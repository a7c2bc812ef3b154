"""Carries a merge plan out on tensors in memory, as an engine would on files."""

from fusejax.merging import merge_leaf
from fusejax.merging.vocabulary import align_rows

__all__ = ["carry_out"]


def carry_out(plan, models):
    """Yields (step, (base, targets), merged) for every output tensor; models: {name: {tensor name: array}}."""
    for step in plan.tensors:
        refs = [*([step.base] if step.base else []), *step.targets]
        arrays = {ref.model: models[ref.model][ref.name] for ref in refs}
        if step.vocabulary and plan.rows:
            rows = {name: plan.rows[name] for name in arrays}
            default = plan.default_model
            if default is not None and default not in arrays:  # it stands in, though the method does not merge it
                arrays[default], rows[default] = models[default][refs[0].name], plan.rows[default]
            arrays = align_rows(arrays, rows, default=default)
        base = arrays[step.base.model] if step.base else None
        targets = [arrays[ref.model] for ref in step.targets]
        merged = merge_leaf(step.output, base, targets, method=step.method, params=step.parameters, dtype=step.dtype)
        yield step, (base, targets), merged

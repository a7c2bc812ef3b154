"""The table of merge methods: one row per method.

A method is one pure function on one matrix, `(base [...], targets [J, ...], *, parameters) -> merged [...]`,
in float32; it knows neither trees nor layers nor files. To add a method, write the function and its row here.
"""

from collections.abc import Mapping

from fusejax.merging.average import linear, linear_coefficients, passthrough
from fusejax.merging.drop import DROP_VARIANTS, dare_linear, dare_ties, della, della_linear
from fusejax.merging.sce import SCE_VARIANTS, sce, sce_coefficients
from fusejax.merging.schema import MergeMethod, Parameter
from fusejax.merging.spherical import karcher, multislerp, nuslerp, slerp
from fusejax.merging.stock import model_stock
from fusejax.merging.swap import RAM_VARIANTS, arcee_fusion, nearswap, ram
from fusejax.merging.task_vectors import breadcrumbs, breadcrumbs_ties, task_arithmetic, ties
from fusejax.merging.varm import GRANULARITIES, varm, varm_coefficients, varm_energy, varm_unit

__all__ = ["MERGE_METHODS"]

_SOUPS, _SCE, _VARM = (
    "https://arxiv.org/abs/2203.05482",
    "https://arxiv.org/abs/2408.07990",
    "https://arxiv.org/abs/2402.16107",
)
_SLERP = "https://doi.org/10.1145/325334.325242"
_NUSLERP = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"
_MULTISLERP = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
_KARCHER = "https://doi.org/10.1002/cpa.3160300502"
_TASK, _TIES = "https://arxiv.org/abs/2212.04089", "https://arxiv.org/abs/2306.01708"
_DARE, _DELLA = "https://arxiv.org/abs/2311.03099", "https://arxiv.org/abs/2406.11617"
_CRUMBS, _STOCK = "https://arxiv.org/abs/2312.06795", "https://arxiv.org/abs/2403.19522"
_NEARSWAP = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
_FUSION = "https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration"
_RAM, _STACK = "https://arxiv.org/abs/2601.13572", "https://arxiv.org/abs/2312.15166"

_WEIGHTS = Parameter("weight of every target", 1.0, per_target=True, traced=True)
_SCALE = Parameter("factor of the merged task vector (lambda)", 1.0, traced=True)
_DENSITY = Parameter("share of each task vector that is kept", 1.0, low=0.0, high=1.0, per_target=True)
_NORMALIZED = {"weights": _WEIGHTS, "normalize": Parameter("divide by the sum of the weights", True)}
_SUMMED = {"weights": _WEIGHTS, "normalize": Parameter("divide by the sum of the weights", False)}
_AGREED = {"weights": _WEIGHTS, "normalize": Parameter("divide by the weights of the kept elements", False)}
_NOT_ZERO = ("weights", "normalize")
_CRUMB_SHARES = {
    "density": _DENSITY,
    "gamma": Parameter("share of the largest elements that is dropped", 0.01, low=0.0, high=1.0, per_target=True),
    "scale": _SCALE,
}


def _dropping(density: float) -> dict[str, Parameter]:
    return {
        "density": Parameter("probability to keep", density, low=0.0, high=1.0, per_target=True, traced=True),
        "rescale": Parameter("enlarge the kept elements for the dropped ones", True),
        "variant": Parameter("divide by the probability, or keep the L1 norm", "paper", choices=DROP_VARIANTS),
        "scale": _SCALE,
        "seed": Parameter("of the random draws", 0, low=0, high=2**32 - 1),
    }


_DELLA_SHARES = _dropping(0.5) | {
    "epsilon": Parameter("the probability's spread by rank", 0.15, low=0.0, high=0.5, per_target=True, traced=True)
}

MERGE_METHODS: Mapping[str, MergeMethod] = {
    "linear": MergeMethod(
        linear, _NORMALIZED, "weighted average of the targets", _SOUPS, coefficients=linear_coefficients,
        needs_base=False, uses_base=False, nonzero_sum=_NOT_ZERO,
    ),
    "sce": MergeMethod(
        sce,
        {
            "select_topk": Parameter("share of the varying elements that is selected", 1.0, low=0.0, high=1.0),
            "variant": Parameter("released code, equations, or mergekit's rule", "fuseai", choices=SCE_VARIANTS),
        },
        "select by variance, weigh by squared change, erase the minority direction", _SCE,
        coefficients=sce_coefficients,
    ),
    "varm": MergeMethod(
        varm, {"granularity": Parameter("unit that gets one weight", "matrix", choices=GRANULARITIES)},
        "average weighted by squared change from the pivot", _VARM, coefficients=varm_coefficients,
        unit=varm_unit, energy=varm_energy,
    ),
    "task_arithmetic": MergeMethod(
        task_arithmetic, _SUMMED | {"scale": _SCALE}, "sum of task vectors", _TASK, nonzero_sum=_NOT_ZERO
    ),
    "ties": MergeMethod(
        ties,
        {
            "weights": _WEIGHTS,
            "density": _DENSITY,
            "normalize": Parameter("divide by the weights of the kept elements", True),
            "rescale": Parameter("keep the L1 norm of each trimmed task vector", False),
            "scale": _SCALE,
        },
        "trimmed task vectors, merged where they agree with the elected sign", _TIES, nonzero_sum=_NOT_ZERO,
    ),
    "dare_linear": MergeMethod(
        dare_linear, _SUMMED | _dropping(1.0), "sum of randomly thinned task vectors", _DARE,
        nonzero_sum=_NOT_ZERO, random=True,
    ),
    "dare_ties": MergeMethod(
        dare_ties, _AGREED | _dropping(1.0), "randomly thinned task vectors, merged by elected signs", _DARE,
        nonzero_sum=_NOT_ZERO, random=True,
    ),
    "della_linear": MergeMethod(
        della_linear, _SUMMED | _DELLA_SHARES, "as dare_linear, keeping larger elements more often", _DELLA,
        nonzero_sum=_NOT_ZERO, spread=("density", "epsilon"), random=True,
    ),
    "della": MergeMethod(
        della,
        {"weights": _WEIGHTS, "normalize": Parameter("divide by the weights of the kept elements", True)}
        | _DELLA_SHARES,
        "as dare_ties, keeping larger elements more often", _DELLA,
        nonzero_sum=_NOT_ZERO, spread=("density", "epsilon"), random=True,
    ),
    "breadcrumbs": MergeMethod(
        breadcrumbs, _SUMMED | _CRUMB_SHARES, "sum of task vectors without their largest and smallest elements",
        _CRUMBS, nonzero_sum=_NOT_ZERO,
    ),
    "breadcrumbs_ties": MergeMethod(
        breadcrumbs_ties, _AGREED | _CRUMB_SHARES, "breadcrumbs, merged by elected signs", _CRUMBS,
        nonzero_sum=_NOT_ZERO,
    ),
    "slerp": MergeMethod(
        slerp, {"t": Parameter("0 is the start, 1 the end", 0.5, low=0.0, high=1.0, traced=True)},
        "arc from the first target (or the base, if there is one target) to the last", _SLERP,
        needs_base=False, max_targets=2,
    ),
    "nuslerp": MergeMethod(
        nuslerp,
        {
            "weights": _WEIGHTS,
            "flatten": Parameter("one angle per matrix", True),
            "row_wise": Parameter("without flatten: vectors along the first axis, not the last", False),
        },
        "arc between two targets, or between their task vectors", _NUSLERP,
        needs_base=False, min_targets=2, max_targets=2,
    ),
    "multislerp": MergeMethod(
        multislerp,
        {"weights": _WEIGHTS, "normalize_weights": Parameter("divide by the sum of the weights", True)},
        "mean direction of the targets or task vectors, with their mean length", _MULTISLERP,
        needs_base=False, min_targets=2, nonzero_sum=("weights", "normalize_weights"),
    ),
    "karcher": MergeMethod(
        karcher,
        {
            "max_iter": Parameter("steps at most", 10, low=1, high=1000),
            "tol": Parameter("a step this short ends it, in radians", 1e-5, low=0.0, high=1.0),
        },
        "mean of the directions on the sphere, with their mean length", _KARCHER,
        needs_base=False, uses_base=False,
    ),
    "model_stock": MergeMethod(
        model_stock, {"filter_wise": Parameter("one angle per row", False)},
        "from the base towards the targets' mean, by the angle between targets", _STOCK, min_targets=2,
    ),
    "nearswap": MergeMethod(
        nearswap, {"t": Parameter("largest step of an element", 1e-4, low=0.0, traced=True)},
        "the target's elements where they lie near the base's", _NEARSWAP, max_targets=1,
    ),
    "arcee_fusion": MergeMethod(
        arcee_fusion, {}, "the target's elements of outlying importance", _FUSION, max_targets=1
    ),
    "ram": MergeMethod(
        ram,
        {
            "epsilon": Parameter("a change is larger than this", 1e-5, low=0.0, traced=True),
            "variant": Parameter("plain, or unique changes enlarged", "ram", choices=RAM_VARIANTS),
            "r": Parameter("ramplus_tl: strength of the enlargement", 0.1, low=0.0, traced=True),
            "alpha": Parameter("ramplus_tl: limit of shared over unique", 0.2, low=0.0, traced=True),
        },
        "unique changes added, shared ones averaged", _RAM,
    ),
    "passthrough": MergeMethod(
        passthrough, {"scale": Parameter("factor of the copy", 1.0, traced=True)}, "copy of one target", _STACK,
        needs_base=False, uses_base=False, max_targets=1,
    ),
}  # fmt: skip

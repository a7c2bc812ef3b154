"""Quantiles and bootstrap errors: beside an explicit resampling, and beside what statistics says."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from fusejax.evaluation import document_quantiles, standard_errors

LN2 = math.log(2)


def _evaluation(nats, sizes, indices=None):
    indices = range(len(nats)) if indices is None else indices
    each = zip(indices, nats, sizes, strict=True)
    return SimpleNamespace(documents=[SimpleNamespace(index=i, nll_nats=n, n_bytes=s) for i, n, s in each])


def test_quantiles_of_documents():
    found = document_quantiles(_evaluation([LN2 * v * 5 for v in range(11)], [5] * 11))
    assert found == pytest.approx({"count": 11, "p10": 1.0, "median": 5.0, "p90": 9.0})
    assert document_quantiles(_evaluation([], [])) == {"count": 0}


def test_of_equal_lengths_the_error_is_that_of_a_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 0.5, 400)
    found = standard_errors({"m": _evaluation(values * LN2 * 7, [7] * 400)}, ["d"] * 400, [str(i) for i in range(400)])
    assert found["m"]["d"] == pytest.approx(values.std(ddof=1) / 20, rel=0.1)
    assert found["m"]["mean"] == found["m"]["d"]


def test_beside_an_explicit_resampling_with_pieces_kept_together():
    rng = np.random.default_rng(1)
    nats, sizes = rng.gamma(5, 2, 60), rng.integers(5, 50, 60)
    origins = [f"o{i // 3}" for i in range(60)]  # three pieces each
    found = standard_errors({"m": _evaluation(nats, sizes)}, ["d"] * 60, origins, draws=4000)["m"]["d"]
    groups = [range(3 * g, 3 * g + 3) for g in range(20)]
    ratios = []
    for _ in range(4000):
        drawn = [i for g in rng.integers(0, 20, 20) for i in groups[g]]
        ratios.append(sum(nats[i] for i in drawn) / LN2 / sum(sizes[i] for i in drawn))
    assert found == pytest.approx(np.std(ratios, ddof=1), rel=0.06)


def test_the_mean_over_domains_and_what_has_no_error():
    rng = np.random.default_rng(2)
    domains = ["a"] * 50 + ["b"] * 80 + ["c"]
    model = _evaluation(rng.gamma(5, 2, 131), [9] * 131)
    names = [str(i) for i in range(131)]
    found = standard_errors({"m": model}, domains, names)["m"]
    assert set(found) == {"a", "b"}, "one document has no spread, and so the mean has none"
    two = _evaluation([d.nll_nats for d in model.documents[:130]], [9] * 130)
    both = standard_errors({"m": two, "again": two}, domains[:130], names[:130])
    assert both["m"] == pytest.approx(both["again"], rel=1e-9), "the same draws for every model"
    assert both["m"]["mean"] == pytest.approx(math.hypot(both["m"]["a"], both["m"]["b"]) / 2, rel=0.1)
    assert standard_errors({"m": two}, domains[:130], names[:130])["m"] == pytest.approx(both["m"], rel=1e-9)
    assert standard_errors({"m": _evaluation([], [])}, [], []) == {"m": {}}


def test_a_document_that_was_not_scored_counts_nowhere():
    one = _evaluation([1.0, 2.0, 3.0], [4, 4, 4], indices=[0, 2, 3])
    found = standard_errors({"m": one}, ["a"] * 4, list("wxyz"))
    same = standard_errors({"m": _evaluation([1.0, 2.0, 3.0], [4, 4, 4])}, ["a"] * 3, list("wyz"))
    assert found == same

"""Which model to trust where, beside the definitions written out."""

import math

import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.evaluation import (
    DocumentScore,
    Evaluation,
    choose,
    ensemble_evaluations,
    lowest,
    weights_from_bits_per_byte,
)


def _evaluation(nats, *, indices=None):
    """Documents of one label each, of 4 bytes."""
    indices = range(len(nats)) if indices is None else indices
    each = zip(indices, nats, strict=True)
    return Evaluation(
        tuple(DocumentScore(i, np.array([-n], np.float32), np.array([0], np.int32), 4) for i, n in each), 0
    )


def test_weights_are_the_softmax_of_minus_bits_per_byte():
    table = np.array([[2.0, 3.5, 2.0], [900.0, 1.0, 2.0]])
    found = weights_from_bits_per_byte(table)
    for row, weights in zip(table.tolist(), found.tolist(), strict=True):
        parts = [math.exp(-value + min(row)) for value in row]
        assert weights == pytest.approx([part / sum(parts) for part in parts], rel=1e-12)
    for bad in ([1.0, math.nan], [math.inf, 1.0], []):
        with pytest.raises(InputError, match="finite numbers"):
            weights_from_bits_per_byte(np.array(bad))


def test_every_document_may_have_weights_of_its_own():
    one, two = _evaluation([1.0, 2.0, 3.0]), _evaluation([3.0, 0.5, 3.5])
    weights = np.array([[1, 3], [0, 1], [0.5, 0.5]])
    mixed = ensemble_evaluations([one, two], weights=weights)
    for document, a, b, (u, v) in zip(mixed.documents, one.documents, two.documents, weights.tolist(), strict=True):
        expected = -math.log((u * math.exp(-a.nll_nats) + v * math.exp(-b.nll_nats)) / (u + v))
        assert document.nll_nats == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="weights are of 2 documents, 3 were scored"):
        ensemble_evaluations([one, two], weights=weights[:2])


def test_one_model_per_document_is_never_better_than_the_oracle():
    rng = np.random.default_rng(0)
    models = [_evaluation(rng.gamma(2, 1, 40)) for _ in range(3)]
    own = np.array([[d.nll_nats for d in model.documents] for model in models]).T
    oracle = choose(models, lowest(own))
    assert oracle.nll_nats == pytest.approx(own.min(axis=1).sum(), rel=1e-12)
    for seed in range(5):
        other = choose(models, lowest(np.random.default_rng(seed).random((40, 3))))
        assert other.nll_nats >= oracle.nll_nats
    assert lowest(np.array([[1.0, 1.0], [2.0, 1.0]])).tolist() == [0, 1], "of equal ones the first"


def test_refusals():
    models = [_evaluation([1.0, 2.0]), _evaluation([1.0, 2.0], indices=[0, 2])]
    with pytest.raises(InputError, match="different documents"):
        choose(models, np.array([0, 0]))
    with pytest.raises(InputError, match="for 1 documents, 2 were scored"):
        choose(models[:1], np.array([0]))

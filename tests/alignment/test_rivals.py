"""Positions by number and chunks of text, by hand: plain documents and documents with trained spans."""

from typing import NamedTuple

import numpy as np
import pytest

from fusejax.alignment import align_by_chunks, align_by_index, align_masked
from fusejax.errors import InputError
from fusejax.types import VocabMap

SAME = VocabMap(np.arange(50, dtype=np.int32), np.arange(50, dtype=np.int32))


class Encoded(NamedTuple):
    """A document as the target reads it."""

    tokens: np.ndarray
    labels: np.ndarray
    byte_ends: np.ndarray
    n_bytes: int
    spans: np.ndarray | None = None


def _encoded(ends, n_bytes, spans=None):
    labels = np.arange(1, len(ends) + 1, dtype=np.int32)
    return Encoded(labels - 1, labels, np.array(ends, np.int32), n_bytes, None if spans is None else np.array(spans))


def _captured(ends, k=3, spans=None):
    count, rng = len(ends), np.random.default_rng(0)
    p = -np.sort(-rng.dirichlet(np.ones(k + 1), count)[:, :k], axis=1)
    arrays = {
        "tokens": np.arange(count, dtype=np.int32),
        "labels": np.arange(1, count + 1, dtype=np.int32),
        "byte_ends": np.array(ends, np.int32),
        "topk_ids": rng.integers(0, 50, (count, k)).astype(np.int32),
        "topk_logprobs": np.log(p).astype(np.float32),
        "residual_logprob": np.log(1 - p.sum(1)).astype(np.float32),
        "realised_logprob": -np.arange(1.0, count + 1).astype(np.float32),
    }
    return arrays if spans is None else arrays | {"spans": np.array(spans)}


@pytest.mark.parametrize(("theirs", "ours"), [(5, 3), (3, 5), (0, 2)])
def test_positions_are_paired_as_far_as_the_shorter_reaches(theirs, ours):
    source = _captured(range(theirs))
    arrays = align_by_index(source, _encoded(range(ours), 9), SAME, n_bytes=9).arrays
    both = min(theirs, ours)
    np.testing.assert_array_equal(arrays["status"], np.arange(ours) < both)
    np.testing.assert_array_equal(arrays["ids"][:both], np.tile(np.arange(3), (both, 1)))
    np.testing.assert_array_equal(arrays["logprobs"][:both], source["topk_logprobs"][:both])
    np.testing.assert_array_equal(arrays["residual_logprob"][:both], source["residual_logprob"][:both])
    assert (arrays["ids"][both:] == -1).all() and (arrays["logprobs"][both:] == -np.inf).all()


def test_chunks_lie_between_neighbouring_common_boundaries():
    # Bytes read:  source 0 2 4 | 7 | 9     target 0 1 3 4 | 7 | 8: both stand at 0, 4 and 7.
    found = align_by_chunks(_captured([0, 2, 4, 7, 9]), _encoded([0, 1, 3, 4, 7, 8], 11), SAME)
    np.testing.assert_array_equal(found.arrays["ids"][:, 0], [-1, -1, 3, 1, -1, -1])
    np.testing.assert_array_equal(found.arrays["logprobs"][:, 0], [-np.inf, -np.inf, -3, -3, -np.inf, -np.inf])
    np.testing.assert_array_equal(found.arrays["status"], [0, 0, 1, 1, 0, 0])
    assert found.report.aligned == found.header["aligned"] == 2


def test_a_chunk_that_is_too_unlikely_is_none():
    source = _captured([0, 3, 5])
    source["realised_logprob"][0] = -200
    arrays = align_by_chunks(source, _encoded([0, 3, 5], 6), SAME).arrays
    np.testing.assert_array_equal(arrays["ids"][:, 0], [-1, 1, -1])


def test_spans_are_counted_by_themselves():
    """Two trained spans of bytes [0, 2) and [2, 5); between them the target has two tokens more, the source one."""
    source = _captured([0, 1, 2, 2, 2, 4], spans=[0, 0, 0, -1, 1, 1])
    target = _encoded([0, 2, 2, 2, 2, 3, 4], 5, spans=[0, 0, -1, -1, 1, 1, 1])
    by_number = align_masked(source, target, SAME, n_bytes=5, align=align_by_index).arrays
    np.testing.assert_array_equal(by_number["mask"], [1, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(by_number["status"], [1, 1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(by_number["logprobs"][[0, 1, 4, 5]], source["topk_logprobs"][[0, 1, 4, 5]])
    chunks = align_masked(source, target, SAME, n_bytes=5, align=align_by_chunks).arrays
    # "0-2" (source: two tokens), the stop of the first span, "2-4" (target: two tokens); what follows 4 is no chunk.
    np.testing.assert_array_equal(chunks["ids"][:, 0], [1, 1, -1, -1, -1, 2, -1])
    np.testing.assert_array_equal(chunks["logprobs"][[0, 1, 5], 0], [-3, -3, -5])


def test_another_text_is_refused():
    for align in (align_by_index, align_by_chunks):
        with pytest.raises(InputError, match="capture it again"):
            align(_captured([0, 1]), _encoded([0, 1], 3), SAME, n_bytes=2)

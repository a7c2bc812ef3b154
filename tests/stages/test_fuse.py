"""Fusing one document of sources that differ."""

import numpy as np
import pytest

from fusejax.config import FusionConfig
from fusejax.io.store import Record
from fusejax.stages.fuse import fuse_document


def _aligned(entries, *, realised):
    arrays = {
        "tokens": np.array([1, 5, 6], np.int32),
        "labels": np.array([5, 6, 2], np.int32),
        "byte_ends": np.array([0, 2, 4], np.int32),
        "ids": np.tile(np.arange(entries, dtype=np.int32), (3, 1)),
        "logprobs": np.full((3, entries), -np.log(entries + 1), np.float16),
        "residual_logprob": np.full(3, -np.log(entries + 1), np.float16),
        "status": np.ones(3, np.int8),
        "source_byte_ends": np.array([0, 2, 4], np.int32),
        "source_realised": np.full(3, realised, np.float32),
    }
    return Record("d", {"n_bytes": 4}, arrays)


@pytest.mark.parametrize("method", ["min_ce", "avg_ce"])
def test_sources_with_fewer_entries_leave_the_rest_unused(method):
    records = [_aligned(4, realised=-2.0), _aligned(2, realised=-1.0)]
    fused = fuse_document(records, FusionConfig(method=method))
    small = fused["ids"][:, -1], fused["logprobs"][:, -1]
    assert fused["ids"].shape == (3, 1 if method == "min_ce" else 2, 4)
    np.testing.assert_array_equal(small[0], np.tile([0, 1, -1, -1], (3, 1)))
    np.testing.assert_array_equal(np.isneginf(small[1]), np.tile([False, False, True, True], (3, 1)))
    assert (fused["ids"].dtype, fused["logprobs"].dtype) == (np.int32, np.float16)

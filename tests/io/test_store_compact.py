"""The compact record: integers come back exactly, distributions nearly, and nothing is silently bent."""

import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.errors import InputError
from fusejax.io.store_entries import NARROW_IDS, WIDE_IDS, decode_entries, encode_entries
from fusejax.io.store_record import Record, pack_record, record_length, unpack_record

_INTEGERS = ("tokens", "labels", "byte_ends", "topk_ids")


def _captured(rng, positions, entries, *, vocab=300, spread=3.0, first_id=0):
    """A record as `capture` makes it, from random logits."""
    logits = rng.normal(size=(positions, vocab)) * spread
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    kept, rest = (np.take_along_axis(logprobs, part, 1) for part in (order[:, :entries], order[:, entries:]))
    labels = order[np.arange(positions), rng.integers(0, min(3 * entries, vocab), positions)].astype(np.int32)
    with np.errstate(divide="ignore"):
        residual = np.log(np.exp(rest).sum(1))
    arrays = {
        "tokens": np.concatenate([[7], labels[:-1] + first_id])[:positions].astype(np.int32),
        "labels": labels + np.int32(first_id),
        "byte_ends": np.cumsum(rng.integers(0, 9, positions)).astype(np.int32),
        "topk_ids": (order[:, :entries] + first_id).astype(np.int32),
        "topk_logprobs": kept.astype(np.float32),
        "residual_logprob": residual.astype(np.float32),
        "realised_logprob": logprobs[np.arange(positions), labels].astype(np.float32),
    }
    return Record("a/1/é", {"n_bytes": 5, "nll_nats": 1.25}, arrays)


def _round_trip(record):
    data = pack_record(record, codec="compact")
    assert record_length(data) == len(record.arrays["tokens"])
    again = unpack_record(data)
    assert (again.doc_id, again.header) == (record.doc_id, record.header)
    assert again.arrays.keys() == record.arrays.keys()
    for name, array in record.arrays.items():
        assert again.arrays[name].shape == array.shape
        if array.dtype.kind == "i":
            assert again.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(again.arrays[name], array, err_msg=name)
        else:
            assert again.arrays[name].dtype == np.float32
    return again


def _divergence(record, again):
    """[N] KL(stored || read) over the entries and the rest, in nats."""
    rows = []
    for arrays in (record.arrays, again.arrays):
        joined = np.concatenate([arrays["topk_logprobs"], arrays["residual_logprob"][:, None]], 1).astype(np.float64)
        rows.append(joined - np.log(np.exp(joined).sum(1, keepdims=True)))
    p, q = rows
    with np.errstate(invalid="ignore"):
        return np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(1)


@pytest.mark.parametrize(("entries", "vocab"), [(300, 400), (1500, 1500)])
def test_records_of_hundreds_of_entries(entries, vocab):
    record = _captured(np.random.default_rng(0), 20, entries, vocab=vocab)
    again = _round_trip(record)
    assert _divergence(record, again).max() < 5e-4
    far = np.argmax(record.arrays["topk_ids"] == record.arrays["labels"][:, None], axis=1) > 255
    assert far.any()  # labels whose rank does not fit the byte that ranks have
    np.testing.assert_allclose(again.arrays["realised_logprob"], record.arrays["realised_logprob"], rtol=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 40), st.integers(1, 40), st.floats(0.1, 12), st.integers(0, 2**32 - 1))
def test_integers_are_exact_and_little_divergence_is_lost(positions, entries, spread, seed):
    record = _captured(np.random.default_rng(seed), positions, entries, spread=spread)
    again = _round_trip(record)
    if positions:
        divergence = _divergence(record, again)
        assert divergence.max() < 2e-4
        steps = np.diff(again.arrays["topk_logprobs"], axis=1)
        assert not (steps > 0).any()  # still falling
        near = np.abs(again.arrays["realised_logprob"] - record.arrays["realised_logprob"])
        assert (near <= 2e-3 + 1e-3 * np.abs(record.arrays["realised_logprob"])).all()
        mass = np.exp(again.arrays["topk_logprobs"]).sum(1) + np.exp(again.arrays["residual_logprob"])
        np.testing.assert_allclose(mass, 1.0, atol=1e-4)


@pytest.mark.parametrize("spread", [0.5, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("entries", [10, 32])
def test_the_divergence_is_far_below_the_promise(entries, spread):
    record = _captured(np.random.default_rng(0), 1000, entries, spread=spread)
    lost = _divergence(record, _round_trip(record))
    assert lost.mean() < 2e-5
    assert np.quantile(lost, 0.99) < 6e-5
    assert lost.max() < 1e-4


def test_the_size_of_a_record():
    record = _captured(np.random.default_rng(0), 2000, 10)
    assert len(pack_record(record, codec="compact")) / 2000 < 36
    record = _captured(np.random.default_rng(0), 1000, 32)
    assert len(pack_record(record, codec="compact")) / 1000 < 105


@pytest.mark.parametrize("first_id", [NARROW_IDS - 300, NARROW_IDS - 299, 2**20, WIDE_IDS - 300])
def test_wide_ids_widen_the_record_by_themselves(first_id):
    record = _captured(np.random.default_rng(1), 50, 4, first_id=first_id)
    again = _round_trip(record)
    assert _divergence(record, again).max() < 2e-4
    _, width = encode_entries(record.arrays["topk_ids"], record.arrays["topk_logprobs"])
    assert width == (3 if record.arrays["topk_ids"].max() < NARROW_IDS else 4)


def test_an_id_that_no_entry_holds_is_refused():
    record = _captured(np.random.default_rng(1), 9, 2, first_id=WIDE_IDS)
    with pytest.raises(InputError, match=r"record 'a/1/é': ids reach"):
        pack_record(record, codec="compact")


def test_rising_entries_are_sorted():
    record = _captured(np.random.default_rng(1), 9, 3)
    turned = {name: record.arrays[name][:, ::-1] for name in ("topk_ids", "topk_logprobs")}
    again = unpack_record(pack_record(record._replace(arrays=record.arrays | turned), codec="compact"))
    for name, array in _round_trip(record).arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    with pytest.raises(InputError, match="sort the entries"):
        encode_entries(turned["topk_ids"], turned["topk_logprobs"])


def test_unused_entries_with_mass_are_refused():
    record = _captured(np.random.default_rng(1), 9, 3)
    ids = record.arrays["topk_ids"].copy()
    ids[4, 2] = -1
    with pytest.raises(InputError, match="unused"):
        pack_record(record._replace(arrays=record.arrays | {"topk_ids": ids}), codec="compact")


def test_aligned_records_with_empty_positions():
    rng = np.random.default_rng(2)
    source = _captured(rng, 60, 5).arrays
    ids, logprobs, residual = (source[n].copy() for n in ("topk_ids", "topk_logprobs", "residual_logprob"))
    empty = rng.random(60) < 0.3
    part = rng.integers(1, 5, 60)
    for row in range(60):
        stop = 0 if empty[row] else part[row]
        outside = np.exp(logprobs[row, stop:].astype(np.float64)).sum() + np.exp(residual[row].astype(np.float64))
        ids[row, stop:], logprobs[row, stop:], residual[row] = -1, -np.inf, np.log(outside)
    arrays = {
        "tokens": source["tokens"], "labels": source["labels"], "byte_ends": source["byte_ends"],
        "ids": ids, "logprobs": logprobs, "residual_logprob": residual, "status": (~empty).astype(np.int8),
        "source_byte_ends": np.arange(70, dtype=np.int32), "source_realised": -np.ones(70, np.float32),
        "chain_logprob": np.where(empty, -np.inf, -rng.exponential(size=60)).astype(np.float32),
    }  # fmt: skip
    again = _round_trip(Record("d", {"n_bytes": 1}, arrays)).arrays
    np.testing.assert_array_equal(np.isinf(again["logprobs"]), ids < 0)
    np.testing.assert_array_equal(again["residual_logprob"][empty], 0.0)
    np.testing.assert_allclose(again["chain_logprob"], arrays["chain_logprob"], rtol=1e-3)
    np.testing.assert_allclose(np.exp(again["logprobs"]), np.exp(logprobs), atol=0.02)


def test_fused_records_with_several_distributions():
    rng = np.random.default_rng(3)
    parts = [_captured(rng, 40, 6).arrays for _ in range(3)]
    arrays = {
        "tokens": parts[0]["tokens"], "labels": parts[0]["labels"], "byte_ends": parts[0]["byte_ends"],
        "mask": np.ones(40, np.int8),
        "ids": np.stack([p["topk_ids"] for p in parts], 1),
        "logprobs": np.stack([p["topk_logprobs"] for p in parts], 1),
        "residual_logprob": np.stack([p["residual_logprob"] for p in parts], 1),
        "partition": np.tile(np.arange(3, dtype=np.int32), (40, 1)), "weights": rng.random((40, 3)).astype(np.float32),
    }  # fmt: skip
    again = _round_trip(Record("d", {}, arrays)).arrays
    np.testing.assert_array_equal(again["weights"], arrays["weights"])
    np.testing.assert_allclose(np.exp(again["logprobs"]), np.exp(arrays["logprobs"]), atol=0.02)


def test_entries_that_do_not_sum_to_one_keep_their_mass():
    record = _captured(np.random.default_rng(4), 30, 4)
    halved = record.arrays | {"topk_logprobs": record.arrays["topk_logprobs"] - np.float32(np.log(2))}
    again = _round_trip(record._replace(arrays=halved)).arrays
    mass = np.exp(halved["topk_logprobs"].astype(np.float64)).sum(1)
    np.testing.assert_allclose(np.exp(again["topk_logprobs"]).sum(1), mass, rtol=5e-3)
    del halved["residual_logprob"]
    again = _round_trip(record._replace(arrays=halved)).arrays
    np.testing.assert_allclose(np.exp(again["topk_logprobs"]).sum(1), mass, rtol=5e-3)


def test_entries_that_are_the_whole_vocabulary():
    record = _captured(np.random.default_rng(4), 30, 12, vocab=12)
    assert np.isneginf(record.arrays["residual_logprob"]).all()
    again = _round_trip(record)
    np.testing.assert_allclose(np.exp(again.arrays["topk_logprobs"]).sum(1), 1.0, atol=1e-5)
    np.testing.assert_allclose(np.exp(again.arrays["topk_logprobs"]), np.exp(record.arrays["topk_logprobs"]), atol=0.02)


def test_impossible_entries_stay_impossible():
    ids = np.array([[4, 5, 6, 7]], np.int32)
    logprobs = np.array([[-0.1, -3.0, -np.inf, -np.inf]], np.float32)
    data, width = encode_entries(ids, logprobs)
    mass = np.log(np.exp(logprobs).sum(1))
    found, read = decode_entries(data, width=width, rows=1, entries=4, log_mass=mass)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_allclose(read, logprobs, atol=0.02)


_OLD = (
    b"MoLmLI{*Lxt41V`{G1f*Da0Hlez66Cv5pBS2#j?M@P`6O9abM0$Lbg&#UB1(GA0~O5c9x%Lo+3;!2?nP3;+Nm0000307MA@ECB$32LPl300;m"
    b"8*aZMs1OQYC0F(#-bO!*W1^~2^V`TX6FyX<0eMcKkF#T-+0PUu&{Xp%z(E"
)  # of a record of format FJR2


def test_records_of_the_earlier_compact_format_are_read():
    found = unpack_record(base64.b85decode(_OLD)).arrays
    given = [[-0.5, -1.5, -3.0, -6.0], [-1.2, -1.3, -1.9, -2.5], [-0.01, -5.0, -8.0, -12.0]]
    np.testing.assert_array_equal(found["topk_ids"], [[3, 9, 1, 7], [2, 0, 5, 4], [9, 8, 7, 6]])
    np.testing.assert_array_equal(found["labels"], [9, 2, 30])
    np.testing.assert_allclose(found["topk_logprobs"], given, rtol=0.02)
    np.testing.assert_allclose(found["realised_logprob"], [-1.5, -1.2, -9.0], atol=1e-3)


def test_a_later_format_is_refused_by_its_number():
    data = pack_record(_captured(np.random.default_rng(6), 12, 3), codec="compact")
    with pytest.raises(InputError, match="format FJR9, this fusejax reads FJR1 to FJR3"):
        unpack_record(b"FJR9" + data[4:])


def test_other_codecs_set_the_dtype():
    record = _captured(np.random.default_rng(5), 8, 3)
    for codec in ("float16", "float32"):
        again = unpack_record(pack_record(record, codec=codec))
        for name, array in record.arrays.items():
            expected = array if name in _INTEGERS else array.astype(codec)
            assert again.arrays[name].dtype == expected.dtype
            np.testing.assert_array_equal(again.arrays[name], expected)
    with pytest.raises(ValueError, match="codec 'zip'"):
        pack_record(record, codec="zip")


def test_every_flipped_bit_is_found():
    data = pack_record(_captured(np.random.default_rng(6), 12, 3), codec="compact")
    for position in np.random.default_rng(7).integers(0, len(data) * 8, 64):
        bad = bytearray(data)
        bad[position // 8] ^= 1 << (position % 8)
        with pytest.raises(InputError):
            unpack_record(bytes(bad))

"""A served model: the documented formats of vLLM and SGLang, and servers that fail in every way."""

from types import SimpleNamespace

import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.io.manifest import verify_directory
from fusejax.io.store import Record, RecordReader, RecordWriter
from fusejax.sources.backends_served import Endpoint, ask_models, prompt_scores, served_score
from fusejax.sources.capture import capture_shard, record_of
from fusejax.sources.open import describe_source, open_source
from tests.sources.fake_server import FakeModel, serving

V, K = 40, 3


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def endpoint(url: str, **changes) -> Endpoint:
    return Endpoint(url, **{"timeout": 20.0, "attempts": 3, "first_wait": 0.01, "workers": 2, **changes})


def documents(count: int) -> list[SimpleNamespace]:
    rng = np.random.default_rng(1)
    made = []
    for _ in range(count):
        ids = rng.integers(0, V, int(rng.integers(2, 14))).astype(np.int32)
        ends = np.arange(1, len(ids), dtype=np.int32)
        made.append(SimpleNamespace(tokens=ids[:-1], labels=ids[1:], byte_ends=ends, n_bytes=len(ids), exact=True))
    return made


def captured(score, docs, *, top_k: int = K):
    return list(capture_shard(score, docs, top_k=top_k, context=8, batch_tokens=16, dtype="float32"))


def score_of(url: str, *, top_k: int = K, **changes):
    at = endpoint(url, **changes)
    return served_score(at, ask_models(at, "served"), top_k=top_k, valid_vocab=V)


@pytest.mark.parametrize("sglang", [False, True], ids=["vllm", "sglang"])
def test_what_is_stored_is_what_the_server_computes(sglang) -> None:
    model, docs = FakeModel(V, sglang=sglang), documents(5)
    with serving(model) as url:
        found = captured(score_of(url), docs)
    for document, got in zip(docs, found, strict=True):
        dense = model.logprobs[document.tokens]
        order = np.argsort(-dense, axis=-1, kind="stable")[:, :K]
        np.testing.assert_array_equal(got.topk.ids, order)
        np.testing.assert_allclose(got.topk.logprobs, np.take_along_axis(dense, order, -1), atol=1e-6)
        rest = 1 - np.exp(np.take_along_axis(dense, order, -1).astype(np.float64)).sum(-1)
        np.testing.assert_allclose(np.exp(got.topk.residual_logprob), rest, atol=1e-6)
        own = dense[np.arange(len(document.labels)), document.labels]
        np.testing.assert_allclose(got.realised_logprob, own, atol=1e-6)
    assert {request["path"] for request in model.requests} == {"/generate" if sglang else "/v1/completions"}
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    for request in model.requests:  # as both servers document them
        if sglang:
            assert request["sampling_params"] == neutral | {"max_new_tokens": 1}
            assert (request["return_logprob"], request["logprob_start_len"], request["top_logprobs_num"]) == (
                True,
                0,
                K,
            )
        else:
            assert (request["model"], request["prompt_logprobs"], request["max_tokens"]) == ("served", K, 1)
            assert {name: request[name] for name in neutral} == neutral


@pytest.mark.parametrize("sglang", [False, True], ids=["vllm", "sglang"])
def test_without_top_k_only_the_realised_tokens_are_asked(sglang) -> None:
    model = FakeModel(V, sglang=sglang)
    ones = np.ones((1, 4), np.int32)
    labels = np.array([[1, 1, 1, 2]], np.int32)
    with serving(model) as url:
        realised, topk = score_of(url, top_k=0)(ones, labels, np.arange(4)[None], ones)
    assert topk is None
    np.testing.assert_allclose(realised[0], model.logprobs[1][labels[0]], atol=1e-6)


def test_packed_documents_are_asked_one_by_one() -> None:
    model = FakeModel(V)
    ids = np.random.default_rng(0).integers(0, V, (1, 8)).astype(np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 0, 0]], np.int32)
    with serving(model) as url:
        realised, topk = score_of(url)(ids[:, :-1], ids[:, 1:], positions, segments)
        with pytest.raises(ValueError, match="do not count from 0"):
            score_of(url)(ids[:, :-1], ids[:, 1:], positions + 1, segments)
    np.testing.assert_allclose(realised[0, :5], model.logprobs[ids[0, :5], ids[0, 1:6]], atol=1e-6)
    assert sorted(len(request["prompt"]) for request in model.requests) == [3, 4]
    assert (topk.ids[0, 5:] == -1).all()


@pytest.mark.parametrize("fault", ["500", "busy", "cut", "html", "slow"])
def test_a_server_that_recovers_is_asked_again(fault) -> None:
    model, docs = FakeModel(V), documents(1)
    with serving(model) as url:
        undisturbed = captured(score_of(url), docs)
        model.faults = [fault, fault]
        again = captured(score_of(url, timeout=0.3 if fault == "slow" else 20.0), docs)
    assert not model.faults
    np.testing.assert_array_equal(again[0].topk.logprobs, undisturbed[0].topk.logprobs)


@pytest.mark.parametrize(
    ("fault", "words", "requests"),
    [
        ("500", "did not answer 3 times .*HTTP 500: oops", 3),
        ("cut", "did not answer 3 times", 3),
        ("400", "max allowed.*--max-logprobs", 1),
        ("302", "HTTP 302", 1),
        ("wrong", "not as documented", 1),
        ("plain", "no prompt_logprobs", 1),
    ],
)
def test_a_server_that_refuses_or_stays_broken_is_an_input_error(fault, words, requests) -> None:
    model = FakeModel(V)
    model.faults = [fault] * 9
    # four positions, so a prompt of five tokens
    docs = [SimpleNamespace(tokens=np.arange(4), labels=np.arange(1, 5), byte_ends=np.arange(4), n_bytes=4, exact=True)]
    with serving(model) as url, pytest.raises(InputError, match=words):
        captured(score_of(url), docs)
    assert len(model.requests) == requests


def test_no_server_is_an_input_error() -> None:
    with serving(FakeModel(V)) as url:
        pass
    with pytest.raises(InputError, match="check that the server runs"):
        ask_models(endpoint(url), "served")


def test_a_capture_that_a_server_cut_goes_on_with_the_same_bytes(tmp_path) -> None:
    model, docs = FakeModel(V), documents(9)

    def run(directory, url):
        writer = RecordWriter(directory, kind="captured", settings={"k": K}, parents={}, shard_size=2)
        score = score_of(url, workers=1)
        for first in range(writer.resume_at, len(docs), 2):
            shard = docs[first : first + 2]
            for i, (document, got) in enumerate(zip(shard, captured(score, shard), strict=True)):
                writer.write(Record(str(first + i), *record_of(document, got)))
        return writer.finish(facts={"documents": len(docs)})

    with serving(model) as url:
        whole = run(tmp_path / "whole", url)
        asked = len(model.requests)
        model.requests.clear()
        model.faults = [""] * 6 + ["500"] * 3
        with pytest.raises(InputError, match="did not answer"):
            run(tmp_path / "cut", url)
        cut = len(model.requests)
        assert run(tmp_path / "cut", url).files == whole.files
    assert verify_directory(tmp_path / "cut") == []
    assert len(model.requests) - cut < asked  # what was stored is not asked again
    assert len(list(RecordReader(tmp_path / "cut", kind="captured"))) == 9


def test_the_key_is_sent_and_stored_nowhere(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FUSEJAX_API_KEY", "very-secret")
    model = FakeModel(V)
    with serving(model) as url:
        source = describe_source(tmp_path, name="served", url=url)
        assert "very-secret" not in repr(source)
        captured(open_source(source, top_k=K, valid_vocab=V, context=8), documents(1))
        moved = describe_source(tmp_path, name="served", url="http://elsewhere:1/v1")
    assert {request["key"] for request in model.requests} == {"Bearer very-secret"}
    assert moved.fingerprint == source.fingerprint
    assert describe_source(tmp_path, name="served", url=url, revision="2").fingerprint != source.fingerprint


def test_a_window_longer_than_the_server_reads_is_refused(tmp_path) -> None:
    model = FakeModel(V)
    model.max_model_len = 16
    with serving(model) as url, pytest.raises(InputError, match=r"capture.context to 14"):
        open_source(describe_source(tmp_path, name="x", url=url), top_k=K, valid_vocab=V, context=15)


def test_an_answer_of_another_length_is_refused(monkeypatch) -> None:
    docs = [SimpleNamespace(tokens=np.arange(4), labels=np.arange(1, 5), byte_ends=np.arange(4), n_bytes=4, exact=True)]
    model = FakeModel(V)
    monkeypatch.setattr(model, "entries", lambda prompt, k: [None] + [[(9, -1.0)]] * (len(prompt) - 2))
    with serving(model) as url, pytest.raises(InputError, match="scores 4 tokens of a prompt of 5"):
        captured(score_of(url), docs)


def test_one_of_several_served_models_must_be_named() -> None:
    model = FakeModel(V)
    model.models = ["a", "b"]
    with serving(model) as url:
        assert ask_models(endpoint(url), "b").name == "b"
        with pytest.raises(InputError, match=r"serves \['a', 'b'\]"):
            ask_models(endpoint(url), "c")


def test_what_vllm_writes_for_minus_infinity_is_no_entry() -> None:
    entries = [{0: np.log(0.9), 1: -9999.0, 2: -9999.0}, {0: -0.1, 1: -9999.0}]
    realised, topk = prompt_scores(entries, np.array([0, 1]), top_k=3, valid_vocab=5)
    assert topk.ids.tolist() == [[0, -1, -1], [0, -1, -1]]
    np.testing.assert_allclose(np.exp(topk.residual_logprob[0]), 0.1, rtol=1e-5)
    assert realised[1] == -np.inf  # which the capture refuses, naming the document


def test_padded_ids_count_to_the_residual_and_a_full_top_k_keeps_the_floor() -> None:
    entries = [{0: np.log(0.5), 7: np.log(0.3), 1: np.log(0.1)}, {0: 0.0, 1: -30.0}]
    realised, topk = prompt_scores(entries, np.array([1, 0]), top_k=2, valid_vocab=5)
    assert topk.ids.tolist() == [[0, -1], [0, 1]]
    np.testing.assert_allclose(np.exp(topk.residual_logprob), [0.5, 2**-23], rtol=1e-5)
    np.testing.assert_allclose(realised, [np.log(0.1), 0.0], rtol=1e-6)
    with pytest.raises(InputError, match="same tokenizer"):
        prompt_scores(entries, np.array([3, 0]), top_k=2, valid_vocab=5)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "jax", "url": "http://x/v1"},
        {"backend": "openai"},
        {"backend": "tf"},
        {"trust_remote_code": "other"},
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options) -> None:
    with pytest.raises(InputError):
        describe_source(tmp_path, name="served", **options)

"""Torch as a backend: the scores of JAX where both compute a model, other models by their class, clear errors."""

import sys

import jax
import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.io.hf import save_hf_model
from fusejax.models import ModelConfig, init_params
from fusejax.sources.backends_torch import load_torch_model
from fusejax.sources.open import describe_source, open_source

CFG = ModelConfig(48, 32, 40, 2, 4, 2, initializer_range=0.3, max_positions=32)


def batch() -> tuple[np.ndarray, ...]:
    """A row of two packed documents, a shorter one, and a row of padding."""
    ids = np.random.default_rng(0).integers(0, 40, (3, 13)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 7, [1] * 7 + [0] * 5, [0] * 12], np.int32)
    positions = np.array([[*range(5), *range(7)], [*range(7)] + [0] * 5, [0] * 12], np.int32)
    return ids[:, :-1], ids[:, 1:], positions, segments


@pytest.mark.parametrize("top_k", [0, 5, 60])
def test_both_backends_give_the_same_scores(tmp_path, top_k) -> None:
    pytest.importorskip("torch")
    save_hf_model(tmp_path / "m", CFG, jax.tree.map(np.asarray, init_params(CFG, jax.random.key(0))))
    found = []
    for backend in ("jax", "torch"):
        source = describe_source(tmp_path / "m", name="m", backend=backend)
        assert (source.backend, source.max_positions, source.vocab_size) == (backend, 32, 48)
        found.append(open_source(source, top_k=top_k, valid_vocab=40, context=12)(*batch()))
    (realised, topk), (again, topk_again) = found
    used = batch()[3] > 0
    np.testing.assert_allclose(again[used], np.asarray(realised)[used], atol=2e-5)
    assert (topk is None) == (topk_again is None) == (top_k == 0)
    if topk is not None:
        np.testing.assert_array_equal(topk_again.ids[used], np.asarray(topk.ids)[used])
        np.testing.assert_allclose(topk_again.logprobs[used], np.asarray(topk.logprobs)[used], atol=2e-5)
        np.testing.assert_allclose(
            topk_again.residual_logprob[used], np.asarray(topk.residual_logprob)[used], atol=1e-4
        )


def test_an_architecture_that_fusejax_does_not_compute_is_run_by_torch(tmp_path) -> None:
    pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    source = describe_source(tmp_path / "gpt2", name="gpt2")
    assert (source.backend, source.max_positions, source.run_its_code) == ("torch", 32, False)
    realised, topk = open_source(source, top_k=4, valid_vocab=48, context=12)(*batch())
    used = batch()[3] > 0
    mass = np.exp(topk.logprobs[used].astype(np.float64)).sum(-1) + np.exp(topk.residual_logprob[used])
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert np.isfinite(realised).all()


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"fusejax\[torch\]"):
        load_torch_model(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not 'gpt2'; torch can, and is not installed: .*fusejax\[torch\]"):
        describe_source(tmp_path, name="gpt2")


def test_the_code_of_a_model_runs_only_where_it_is_named(tmp_path) -> None:
    pytest.importorskip("torch")
    directory = tmp_path / "own"
    directory.mkdir()
    mark = tmp_path / "ran"
    (directory / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}'
    )
    (directory / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    source = describe_source(directory, name="own")
    with pytest.raises(InputError, match="repeat its name in `trust_remote_code`"):
        open_source(source, top_k=1, valid_vocab=8, context=4)
    assert not mark.exists() and not source.run_its_code
    assert describe_source(directory, name="own", trust_remote_code="own").run_its_code


def test_pickled_weights_are_not_read(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load this model"):
        load_torch_model(tmp_path)

"""Generation says what the training model says, whatever the batch, the family and the way it is cut into pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.io.models import open_model
from fusejax.io.tokenizers import load_tokenizer
from fusejax.models.generation import Sampling, _choose, continue_generation, generate, start_generation
from tests.models.test_families import FAMILIES
from tests.models.tiny import TINY, tiny_logits, tiny_params
from tests.paths import DATA, needs_data

PROMPTS = [[5, 9, 11, 3, 8, 30, 2], [7], [4, 4, 60]]
NO_STOP = jnp.asarray([-1], jnp.int32)


def oracle(params, cfg, prompt, steps):
    """Greedy continuation by the whole model at every step, and the log-probability of each token."""
    ids, logprobs = list(prompt), []
    for _ in range(steps):
        tokens = jnp.asarray([ids + [0] * (24 - len(ids))], jnp.int32)
        segments = (jnp.arange(24) < len(ids)).astype(jnp.int32)[None]
        found = tiny_logits(params, cfg, tokens, jnp.arange(24, dtype=jnp.int32)[None], segments)
        last = jax.nn.log_softmax(found[0, len(ids) - 1])
        ids.append(int(jnp.argmax(last)))
        logprobs.append(float(last[ids[-1]]))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_a_batch_with_a_cache_says_what_the_whole_model_says_of_each_row(name):
    cfg = TINY if name == "llama" else FAMILIES[name]
    params = tiny_params(cfg)
    state = start_generation(params, cfg, PROMPTS, max_new_tokens=9, multiple=4)
    width = int(state.count)
    for steps in (2, 7):  # in two pieces
        state = continue_generation(params, state, NO_STOP, cfg=cfg, steps=steps)
    assert int(state.count) == width + 9
    for row, prompt in enumerate(PROMPTS):
        ids, logprobs = oracle(params, cfg, prompt, 9)
        assert np.asarray(state.tokens)[row, width:].tolist() == ids
        np.testing.assert_allclose(np.asarray(state.logprobs)[row, width:], logprobs, atol=2e-5)


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    params = tiny_params()
    free = generate(params, TINY, PROMPTS, max_new_tokens=8)
    stop = free[0][3]
    stopped = generate(params, TINY, PROMPTS, max_new_tokens=8, stop_ids=[stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[0]) <= 3


def test_sampling_follows_the_distribution_and_its_limits():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(**options):
        drawn = jax.vmap(lambda key: _choose(logits[None], key, Sampling(**options))[0])(keys)
        return np.bincount(np.asarray(drawn), minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03)
    assert shares(temperature=1.0, top_p=1e-6)[0] == 1 == shares(temperature=0.0)[0]
    squared = np.asarray([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.03)


def test_the_seed_decides_a_sample_and_padding_rows_of_the_head_are_never_chosen():
    params = tiny_params()
    hot = Sampling(temperature=5.0)
    one, again, other = (
        generate(params, TINY, PROMPTS, max_new_tokens=12, sampling=hot, seed=seed, valid_vocab=16)
        for seed in (1, 1, 2)
    )
    assert one == again != other
    assert max(map(max, one + other)) < 16


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "at least one token"),
        ([[64]], {}, "vocabulary has 64"),
        ([[1] * 2040], {"max_new_tokens": 9}, "2048 positions"),
        ([[1]], {"sampling": Sampling(top_p=0.0)}, "top_p"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, options, words):
    with pytest.raises(InputError, match=words):
        generate(tiny_params(), TINY, prompts, **({"max_new_tokens": 2} | options))


@needs_data
def test_a_real_model_continues_a_story_as_transformers_does():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = DATA / "models" / "stories260K"
    model, tokenizer = open_model(directory), load_tokenizer(directory)
    text = "Once upon a time, there was a little"
    prompt = [int(i) for i in tokenizer.encode(text, end=False).tokens]
    prompt.append(int(tokenizer.encode(text, end=False).labels[-1]))
    ours = generate(jax.tree.map(jnp.asarray, model.params), model.config, [prompt], max_new_tokens=40)[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert ours == expected[0, len(prompt) :].tolist()

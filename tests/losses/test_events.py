import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.losses import expand_events, fold_events
from tests.losses.groups import compressed, random_symbols


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_event_gets_all_its_members_or_none(seed):
    rng = np.random.default_rng(seed)
    symbol_of = random_symbols(rng, 40, 12)
    ids = np.stack([rng.permutation(np.unique(symbol_of))[:5] for _ in range(7)]).astype(np.int32)
    for room in (4, 12, 64):
        members, event, folded = (np.asarray(x) for x in expand_events(ids, compressed(symbol_of), max_members=room))
        assert members.shape == event.shape == (7, room)
        assert ((members >= 0) == (event >= 0)).all()
        for t in range(7):
            missing = 0
            for k, symbol in enumerate(ids[t]):
                got, want = members[t][event[t] == k], np.flatnonzero(symbol_of == symbol) if symbol >= 0 else []
                missing += len(want) > 0 and len(got) == 0
                assert len(got) == 0 or got.tolist() == list(want)
            assert folded[t] == missing
            assert room < 40 or missing == 0


def test_stacked_partitions_are_chosen_per_position():
    first, second = np.arange(6, dtype=np.int32), np.array([0, 0, 0, 3, 3, 3], np.int32)
    stacked = type(compressed(first))(*(np.stack(x) for x in zip(compressed(first), compressed(second), strict=True)))
    ids = jnp.array([[3, 0], [3, 0], [3, 0]])
    members, event, _ = expand_events(ids, stacked, max_members=6, partition=jnp.array([0, 1, -1]))
    assert members.tolist() == [[3, 0, -1, -1, -1, -1], [3, 4, 5, 0, 1, 2], [-1] * 6]
    assert event.tolist() == [[0, 1, -1, -1, -1, -1], [0, 0, 0, 1, 1, 1], [-1] * 6]


def test_folding_keeps_the_total():
    logprobs, residual = jnp.log(jnp.array([[0.5, 0.3, 0.1]])), jnp.log(jnp.array([0.1]))
    kept, rest = fold_events(logprobs, residual, jnp.array([[0, 0, 2, -1]]))
    np.testing.assert_allclose(jnp.exp(kept), [[0.5, 0.0, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(rest), [0.4], rtol=1e-6)


def test_importing_the_losses_loads_nothing_heavy():
    code = "import sys, fusejax.losses; print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"flax", "optax", "orbax", "torch", "transformers", "datasets", "pydantic"} & set(out)

"""The state before a step is handed to it: two states at once would double what training holds."""

import jax
import numpy as np

from fusejax.data.loader import FusionLoader
from fusejax.train.loop import _compile
from fusejax.train.optimizer import make_optimizer
from fusejax.train.step import init_train_state, make_train_step

from .toy import toy_loss, toy_params, toy_records


def test_the_loop_gives_each_state_away():
    optimizer = make_optimizer(1e-3, weight_decay=0.0)
    state = init_train_state(toy_params(), optimizer)
    batch = FusionLoader(toy_records(60), batch_size=8, seq_len=12).batch(0)
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
    compiled, _, _ = _compile(make_train_step(toy_loss, optimizer), state, batch, None, limited=False)
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * size

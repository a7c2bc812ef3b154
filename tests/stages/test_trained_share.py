"""Masks that were lost on the way are noticed in the first steps."""

import pytest

from fusejax.errors import InputError
from fusejax.stages.trained_share import ShareAlarm


def watch(shares, *, wanted, steps=3):
    alarm = ShareAlarm(
        "train fused", {"bytes": 100} | ({} if wanted is None else {"trained_bytes": wanted}), steps=steps
    )
    for step, share in enumerate(shares, 1):
        alarm(step, {"trained_share": share})


def test_no_trained_token_in_the_first_steps_is_an_error():
    with pytest.raises(InputError, match=r"train fused: none of the tokens of 3 steps .* wants 40%"):
        watch([0, 0, 0], wanted=40)
    watch([0, 0], wanted=40)  # too early to tell
    watch([0, 0.1, 0, 0, 0, 0], wanted=40)  # one prompt longer than a batch is none


def test_all_tokens_are_trained_where_the_corpus_says_otherwise(capsys):
    watch([1, 1, 1, 1], wanted=40)
    assert capsys.readouterr().err.count("WARNING: 100 % of the tokens are trained") == 1


@pytest.mark.parametrize(("shares", "wanted"), [([1, 1, 1], None), ([1, 1, 1], 100), ([1, 0.4, 1], 40)])
def test_nothing_is_said_where_the_share_is_what_is_wanted(shares, wanted, capsys):
    watch(shares, wanted=wanted)
    assert capsys.readouterr().err == ""

"""Mistakes in late stages are told before the first one."""

import pytest

from fusejax.errors import InputError
from fusejax.stages.run import run_stages
from tests.stages.tiny import make_config


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"seq_len": 128}, r"seq_len is 128, but .*target has 64 positions"),
        ("mesh", {"data": 64}, r"`mesh`: .*needs 64 devices"),
        ("mesh", {"tensor": 8}, r"(?s)`mesh`: .*kv_heads = 1 over tensor = 8"),
        ("merge", {"method": "scee"}, r"unknown merge method 'scee'"),
        ("merge", {"parameters": {"select_topp": 1}}, r"Did you mean 'select_topk'"),
    ],
)
def test_a_mistake_of_a_late_stage_is_told_first(tmp_path, section, change, message):
    config = make_config(tmp_path)
    part = getattr(config, section).model_copy(update=change)
    with pytest.raises(InputError, match=message):
        run_stages(config.model_copy(update={section: part}))
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_target_without_tokenizer_is_told_before_capture(tmp_path):
    config = make_config(tmp_path)
    for path in (tmp_path / "target").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"target has no tokenizer.json"):
        run_stages(config)
    assert not (tmp_path / "run" / "corpus").exists()

"""The README's Python runs, its configuration is valid, and its first screen has what a newcomer needs."""

import yaml

from fusejax.config import RunConfig
from fusejax.merging import MERGE_METHODS
from tests.paths import ROOT
from tests.repo.markdown import snippets

README = ROOT / "README.md"


def test_python_snippets_run_in_order():
    names: dict = {}
    codes = snippets(README, "python")
    assert len(codes) >= 2
    for number, code in enumerate(codes, start=1):
        exec(compile(code, f"README.md, Python snippet {number}", "exec"), names)
    assert names["loss"].shape == ()
    assert 0 < float(names["loss"]) < 20
    assert names["source_of"].tolist() == [-1, 0, -1, 1]
    assert names["merged"]["w"].tolist() == [[2.0] * 4] * 4


def test_the_example_configuration_is_valid():
    (example,) = snippets(README, "yaml")
    config = RunConfig.model_validate(yaml.safe_load(example))
    assert [source.name for source in config.sources] == ["source-a", "source-b"]


def test_the_first_screen_has_an_example_and_the_two_commands():
    top = "\n".join(README.read_text(encoding="utf-8").splitlines()[:32])
    for expected in ("fusion_loss(", "bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert expected in top


def test_every_merge_method_has_its_paper_in_the_table():
    text = README.read_text(encoding="utf-8")
    missing = [name for name, method in MERGE_METHODS.items() if method.paper not in text]
    assert not missing, f"no row with the paper of {missing}"

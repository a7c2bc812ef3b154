"""Every public name resolves, is documented, and says the shapes of its arrays."""

import inspect
import re

import pytest

import fusejax
from tests.paths import ROOT

NAMES = [name for name in fusejax.__all__ if name != "__version__"]
ON_ARRAYS = [
    *("align_positions", "avg_ce", "coarse_map", "exact_map", "fusion_loss", "min_ce", "topk_from_logits", "transport")
]
SHAPE = re.compile(r"\[[^\[\]]*[A-Z.][^\[\]]*\]")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_and_is_documented(name):
    value = getattr(fusejax, name)
    assert not inspect.ismodule(value), f"fusejax.{name} is a module that hides the public function of that name"
    assert inspect.getdoc(value), f"fusejax.{name} has no docstring"
    assert name in dir(fusejax)


@pytest.mark.parametrize("name", ON_ARRAYS)
def test_functions_on_arrays_say_their_shapes(name):
    assert SHAPE.search(inspect.getdoc(getattr(fusejax, name))), (
        f"fusejax.{name}: no shape such as [T, K] in its docstring"
    )


@pytest.mark.parametrize("name", NAMES)
def test_options_are_keyword_only(name):
    """Arrays are positional, options keyword-only: a positional parameter with a default is an option."""
    value = getattr(fusejax, name)
    if not inspect.isfunction(value):
        return
    wrong = [
        p.name
        for p in inspect.signature(value).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
    ]
    assert not wrong, f"fusejax.{name}: {wrong} should be keyword-only"


def test_every_field_of_a_type_says_its_shape():
    text = (ROOT / "fusejax" / "types.py").read_text(encoding="utf-8")
    fields = re.findall(r"^    (\w+): Array(.*)$", text, flags=re.MULTILINE)
    assert len(fields) > 10
    assert not [name for name, rest in fields if not re.match(r"\s*# \[.*\] \w+", rest)]


def test_merge_is_merge_trees():
    assert fusejax.merge is fusejax.merge_trees


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        _ = fusejax.fuse


def test_the_origins_are_the_public_names():
    assert set(fusejax._ORIGIN) == set(NAMES)
    assert len(fusejax.__all__) <= 25

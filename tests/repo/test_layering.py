"""Imports point down only, neighbours do not import each other, and each third party has its fence."""

import pytest

from tests.paths import ROOT
from tests.repo.tree import imports, module_name, sources, third_parties

# Longest prefix wins. A unit may import its own unit and every lower layer.
LAYERS = {
    "fusejax.cli": 6,
    "fusejax.__main__": 6,
    "fusejax.stages": 6,
    "fusejax.data": 5,
    "fusejax.sources": 5,
    "fusejax.evaluation": 5,
    "fusejax.report": 5,
    "fusejax.train": 5,
    "fusejax.io": 4,
    "fusejax.train.step": 3,
    "fusejax.train.optimizer": 3,
    "fusejax.models": 3,
    "fusejax.distributions": 2,
    "fusejax.losses": 2,
    "fusejax.alignment": 2,
    "fusejax.merging": 2,
    "fusejax.parallel": 2,
    "fusejax.data.packing": 2,
    "fusejax.config": 1,
    "fusejax.types": 0,
    "fusejax.errors": 0,
}
EXCEPTIONS = {("fusejax.losses", "fusejax.distributions"), ("fusejax.losses", "fusejax.parallel")}

# Third party -> where it may be imported. What is not listed here is free (numpy, jax: see below).
FENCES = {
    "flax": ("fusejax.models.llama",),
    "optax": ("fusejax.train",),
    "orbax": ("fusejax.io.checkpoint",),
    "transformers": ("fusejax.io", "fusejax.data"),
    "tokenizers": ("fusejax.io", "fusejax.data"),
    "sentencepiece": ("fusejax.io", "fusejax.data"),
    "google": ("fusejax.io", "fusejax.data"),
    "datasets": ("fusejax.data",),
    "pyarrow": ("fusejax.data",),
    "grain": ("fusejax.data",),
    "safetensors": ("fusejax.io.hf",),
    "array_record": ("fusejax.io.store",),
    "pydantic": ("fusejax.config",),
    "tyro": ("fusejax.cli", "fusejax.config"),
    "matplotlib": ("fusejax.report",),
    "tensorboardX": ("fusejax.train",),
    "lm_eval": ("fusejax.evaluation",),
    "torch": ("fusejax.sources",),
    "tensorflow": (),
}
FORBIDDEN_STDLIB = {"pickle", "shelve", "marshal"}
WITHOUT_JAX = ("fusejax.alignment", "fusejax.types", "fusejax.errors", "fusejax.config")
SHELL_ONLY = ("fusejax.cli", "fusejax.stages", "fusejax.config", "fusejax.__main__")

FILES = [pytest.param(p, id=module_name(p)) for p in sources("fusejax")]
KERNEL_FILES = [pytest.param(p, id=module_name(p)) for p in sources("pallas_kernels")]


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def unit(name: str) -> str | None:
    """Returns the entry of `LAYERS` that a module belongs to."""
    return max((prefix for prefix in LAYERS if below(name, prefix)), key=len, default=None)


@pytest.mark.parametrize("path", FILES)
def test_every_module_has_a_layer(path):
    name = module_name(path)
    assert name == "fusejax" or unit(name), f"{name} belongs to no layer: add it to LAYERS and to the design"


@pytest.mark.parametrize("path", FILES)
def test_imports_point_down(path):
    name = module_name(path)
    own = unit(name)
    wrong = []
    for target, line in imports(path):
        other = unit(target)
        if name == "fusejax" or other is None or other == own or (own, other) in EXCEPTIONS:
            continue
        if LAYERS[other] >= LAYERS[own]:
            wrong.append(f"line {line}: {own} (layer {LAYERS[own]}) imports {target} (layer {LAYERS[other]})")
        if other == "fusejax.config" and not any(below(name, prefix) for prefix in SHELL_ONLY):
            wrong.append(f"line {line}: a configuration object below the stages; take the values instead")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES)
def test_the_public_facade_is_not_used_inside(path):
    """`from fusejax import TopK` would hide which layer is used; only the shell may ask for the version."""
    wrong = [
        line
        for target, line in imports(path)
        if target == "fusejax" and LAYERS[unit(module_name(path)) or "fusejax.cli"] < 4
    ]
    assert not wrong, f"lines {wrong} import from the facade `fusejax`; import from the defining module"


@pytest.mark.parametrize("path", FILES)
def test_third_parties_stay_inside_their_fences(path):
    name = module_name(path)
    wrong = [
        f"line {line}: {top} belongs in {' or '.join(FENCES[top]) or 'no file'}"
        for top, line in third_parties(path)
        if top in FENCES and not any(below(name, prefix) for prefix in FENCES[top])
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES)
def test_kernels_are_reached_through_losses_only(path):
    wrong = [line for target, line in imports(path) if below(target, "pallas_kernels")]
    assert not wrong or below(module_name(path), "fusejax.losses"), f"lines {wrong} import pallas_kernels"


@pytest.mark.parametrize("path", FILES)
def test_alignment_and_types_need_no_jax(path):
    if any(below(module_name(path), prefix) for prefix in WITHOUT_JAX):
        wrong = [line for top, line in third_parties(path) if top in {"jax", "jaxlib", "flax", "optax", "orbax"}]
        assert not wrong, f"lines {wrong} import jax"


@pytest.mark.parametrize("path", FILES + KERNEL_FILES)
def test_nothing_unpickles(path):
    wrong = [f"line {line}: {name}" for name, line in imports(path) if name.split(".")[0] in FORBIDDEN_STDLIB]
    assert not wrong, "\n".join(wrong)
    text = path.read_text(encoding="utf-8")
    assert "trust_remote_code=True" not in text
    assert "allow_pickle=True" not in text


@pytest.mark.parametrize("path", KERNEL_FILES)
def test_kernels_import_jax_only(path):
    wrong = [f"line {line}: {name}" for name, line in imports(path) if below(name, "fusejax")]
    wrong += [f"line {line}: {top}" for top, line in third_parties(path) if top not in {"jax", "jaxlib", "numpy"}]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES + KERNEL_FILES)
def test_the_library_leaves_global_state_alone(path):
    """No `jax.config.update`: it would change the program that imports the library."""
    assert "jax.config.update" not in path.read_text(encoding="utf-8")


def test_the_rules_see_the_tree():
    """The tests above would pass on an empty list: the tree is there and the walker finds known imports."""
    assert len(FILES) > 10
    assert KERNEL_FILES
    found = dict(imports(ROOT / "fusejax" / "stages" / "env.py"))
    assert "jax" in found
    assert "fusejax" in found
    assert unit("fusejax.train.step") == "fusejax.train.step"
    assert unit("fusejax.train.loop") == "fusejax.train"

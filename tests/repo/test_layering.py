"""Imports point down only, neighbours do not import each other, and each third party has its fence."""

import pytest

from tests.paths import ROOT
from tests.repo.tree import imports, module_name, sources, third_parties

pytestmark = pytest.mark.once

# Longest prefix wins. A unit may import its own unit and every lower layer.
LAYERS = {
    "fusejax.cli": 6,
    "fusejax.__main__": 7,
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
    "fusejax.train.moments": 2,
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
    # the torch backend runs models by their transformers class
    "transformers": ("fusejax.io", "fusejax.data", "fusejax.sources.backends_torch"),
    "tokenizers": ("fusejax.io", "fusejax.data"),
    "sentencepiece": ("fusejax.io", "fusejax.data"),
    "google": ("fusejax.io", "fusejax.data"),
    "datasets": ("fusejax.data",),
    "jinja2": ("fusejax.data",),
    "pyarrow": ("fusejax.data",),
    "grain": ("fusejax.data",),
    "safetensors": ("fusejax.io.hf",),
    "array_record": ("fusejax.io.store", "fusejax.io.array_records"),
    "pydantic": ("fusejax.config", "fusejax.cli"),
    "tyro": ("fusejax.cli", "fusejax.stages"),
    "matplotlib": ("fusejax.report",),
    "tensorboardX": ("fusejax.train",),
    "lm_eval": ("fusejax.evaluation",),
    "torch": ("fusejax.sources.backends_torch",),
    "tensorflow": (),
}
FORBIDDEN_STDLIB = {"pickle", "shelve", "marshal"}
WITHOUT_JAX = ("fusejax.alignment", "fusejax.types", "fusejax.errors", "fusejax.config")
SHELL_ONLY = ("fusejax.cli", "fusejax.stages", "fusejax.config", "fusejax.__main__")

FILES = sources("fusejax")
KERNEL_FILES = sources("pallas_kernels")


def below(name: str, *prefixes: str) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def unit(name: str) -> str | None:
    """Returns the entry of `LAYERS` that a module belongs to."""
    return max((prefix for prefix in LAYERS if below(name, prefix)), key=len, default=None)


def level(name: str) -> int:
    """Returns the layer of a module; the facade `fusejax/__init__.py` may import everything."""
    found = unit(name)
    return 99 if found is None else LAYERS[found]


def all_imports(files=FILES):
    """Yields (place in the file, importing module, imported module)."""
    for path in files:
        for target, line in imports(path):
            yield f"{path.relative_to(ROOT)}:{line}", module_name(path), target


def all_third_parties(files=FILES):
    """Yields (place in the file, importing module, third-party package)."""
    for path in files:
        for top, line in third_parties(path):
            yield f"{path.relative_to(ROOT)}:{line}", module_name(path), top


def show(problems) -> str:
    return "\n" + "\n".join(problems)


def test_every_module_has_a_layer():
    homeless = [module_name(path) for path in FILES if module_name(path) != "fusejax" and not unit(module_name(path))]
    assert not homeless, f"add to LAYERS and to the design: {homeless}"


def test_imports_point_down():
    wrong = []
    for place, name, target in all_imports():
        own, other = unit(name), unit(target)
        if name == "fusejax" or other is None or other == own or (own, other) in EXCEPTIONS:
            continue
        if level(target) >= level(name):
            wrong.append(f"{place}: {own} (layer {level(name)}) imports {target} (layer {level(target)})")
    assert not wrong, show(wrong)


def test_configuration_objects_stay_in_the_shell():
    wrong = [
        f"{place}: take the values, not the configuration"
        for place, name, target in all_imports()
        if below(target, "fusejax.config") and not below(name, *SHELL_ONLY)
    ]
    assert not wrong, show(wrong)


def test_the_public_facade_is_not_used_inside():
    """`from fusejax import TopK` would hide which layer is used; only the shell may ask for the version."""
    wrong = [
        f"{place}: import from the defining module"
        for place, name, target in all_imports()
        if target == "fusejax" and level(name) < LAYERS["fusejax.io"]
    ]
    assert not wrong, show(wrong)


def test_third_parties_stay_inside_their_fences():
    wrong = [
        f"{place}: {top} belongs in {' or '.join(FENCES[top]) or 'no file'}"
        for place, name, top in all_third_parties()
        if top in FENCES and not below(name, *FENCES[top])
    ]
    assert not wrong, show(wrong)


def test_kernels_are_reached_through_losses_only():
    wrong = [
        f"{place}: only losses import {target}"
        for place, name, target in all_imports()
        if below(target, "pallas_kernels") and not below(name, "fusejax.losses")
    ]
    assert not wrong, show(wrong)


def test_alignment_and_types_need_no_jax():
    wrong = [
        f"{place}: {top}"
        for place, name, top in all_third_parties()
        if below(name, *WITHOUT_JAX) and top in {"jax", "jaxlib", "flax", "optax", "orbax"}
    ]
    assert not wrong, show(wrong)


def test_nothing_unpickles_and_nothing_runs_code_of_a_model():
    files = FILES + KERNEL_FILES
    wrong = [f"{p}: {target}" for p, _, target in all_imports(files) if target.split(".")[0] in FORBIDDEN_STDLIB]
    for path in files:
        text = path.read_text(encoding="utf-8")
        wrong += [
            f"{path.relative_to(ROOT)}: {bad}" for bad in ("trust_remote_code=True", "allow_pickle=True") if bad in text
        ]
    assert not wrong, show(wrong)


def test_kernels_import_jax_only():
    wrong = [f"{place}: {t}" for place, _, t in all_imports(KERNEL_FILES) if below(t, "fusejax")]
    wrong += [f"{p}: {top}" for p, _, top in all_third_parties(KERNEL_FILES) if top not in {"jax", "jaxlib", "numpy"}]
    assert not wrong, show(wrong)


def test_the_library_leaves_global_state_alone():
    """No `jax.config.update`: it would change the program that imports the library."""
    wrong = [
        str(p.relative_to(ROOT)) for p in FILES + KERNEL_FILES if "jax.config.update" in p.read_text(encoding="utf-8")
    ]
    assert not wrong, show(wrong)


def test_processes_wait_for_each_other_in_one_place():
    """A collective has no time-out: barriers that end are `fusejax.parallel.processes`' alone."""
    names = ("multihost_utils", "sync_global_devices", "wait_at_barrier")
    wrong = [
        f"{path.relative_to(ROOT)}: {name}; use barrier or collect of fusejax.parallel.processes"
        for path in FILES
        for name in names
        if module_name(path) != "fusejax.parallel.processes" and name in path.read_text(encoding="utf-8")
    ]
    assert not wrong, show(wrong)


def test_the_rules_see_the_tree():
    """The tests above would pass on an empty list: the tree is there and the walker finds known imports."""
    assert len(FILES) > 50
    assert KERNEL_FILES
    found = dict(imports(ROOT / "fusejax" / "stages" / "env.py"))
    assert {"jax", "fusejax"} <= set(found)
    assert unit("fusejax.train.step") == "fusejax.train.step"
    assert unit("fusejax.train.loop") == "fusejax.train"
    assert (
        level("fusejax.data.corpus") > level("fusejax.io.hf") > level("fusejax.losses.fusion") > level("fusejax.types")
    )

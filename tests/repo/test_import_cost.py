"""What an import loads, measured in a fresh interpreter."""

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

HEAVY = {
    *("flax", "optax", "orbax", "transformers", "tokenizers", "sentencepiece", "datasets", "pyarrow", "torch"),
    *("tensorflow", "pydantic", "tyro", "matplotlib", "rich", "safetensors", "array_record", "grain", "pandas"),
}


def loaded_by(statement: str) -> set[str]:
    """Returns the top-level modules in `sys.modules` after a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import fusejax; dir(fusejax); fusejax.__version__",
        "from fusejax import TopK, InputError",
        "import fusejax.types",
    ],
)
def test_the_package_and_its_types_load_neither_jax_nor_numpy(statement):
    assert not loaded_by(statement) & {"jax", "jaxlib", "numpy", *HEAVY}


def test_alignment_loads_numpy_only():
    loaded = loaded_by("import fusejax.alignment")
    assert "fusejax" in loaded
    assert not loaded & {"jax", "jaxlib", *HEAVY}


@pytest.mark.parametrize("module", ["losses", "distributions", "merging"])
def test_the_pure_core_loads_nothing_heavier_than_jax(module):
    loaded = loaded_by(f"import fusejax.{module}")
    assert "fusejax" in loaded
    assert not loaded & HEAVY


def test_losses_load_jax_and_nothing_else():
    jax_alone = loaded_by("import jax, jax.numpy, jax.experimental.pallas")
    more = loaded_by("import fusejax.losses") - jax_alone - set(sys.stdlib_module_names)
    assert more <= {"fusejax", "pallas_kernels"}

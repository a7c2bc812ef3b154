"""Where the shared test material lies: real tokenizers, models and corpora, and golden files.

A user's machine has only the project, so tests that need the material skip there, and say why.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("FUSEJAX_DATA", ROOT.parent / "shared" / "data"))
GOLDEN = Path(os.environ.get("FUSEJAX_GOLDEN", ROOT.parent / "shared" / "golden"))

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real tokenizers and models are not at {DATA}")
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden files are not at {GOLDEN}")

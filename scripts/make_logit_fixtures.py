"""Writes tests/models/fixtures: logits of tiny models of every family, computed by transformers with torch.

    python scripts/make_logit_fixtures.py

Needs the extra `torch`. The tests without torch compare with these files, the tests with torch make them again.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.models.families import CONFIGS, FIXTURES
from tests.models.references import reference


def main() -> None:
    FIXTURES.mkdir(exist_ok=True)
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as scratch:
            found = reference(name, Path(scratch))
        path = FIXTURES / f"{name}.npz"
        described = json.dumps({"config": found["config"], "shapes": found["shapes"]}, sort_keys=True)
        np.savez_compressed(path, logits=found["logits"], described=np.array(described))
        print(f"{path.name}: {path.stat().st_size} bytes, logits up to {np.abs(found['logits']).max():.1f}")


if __name__ == "__main__":
    main()

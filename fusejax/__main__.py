"""`python -m fusejax` is the `fusejax` command."""

__all__: list[str] = []

import sys

from fusejax.cli import main

sys.exit(main())

"""Whether progress is worth showing."""

import sys


def is_watched() -> bool:
    """Whether somebody sees what is written to stderr: a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules

"""The package fast, for tests; or, in a copy without it, what skips the test that uses it.

Such a copy is declared by WITHOUT_FAST=1 in the environment: otherwise a missing fast/ is an error, not a skip.
"""

import importlib
import os
import sys

import pytest

WITHOUT_FAST = os.environ.get("WITHOUT_FAST") == "1"
needs_fast = pytest.mark.skipif(WITHOUT_FAST, reason="without fast/")


class Missing:
    def __getattr__(self, name):
        if name.startswith("_"):  # pytest looks at what it collects
            raise AttributeError(name)
        pytest.skip("without fast/")


if WITHOUT_FAST:
    fast = Missing()
else:
    for name in ("bf16", "decode", "embed", "merges", "rows", "words", "workspace"):
        importlib.import_module(f"fast.{name}")
    fast = sys.modules["fast"]

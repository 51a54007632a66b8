"""Helpers for the tests, imported as `tests.support.NAME`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

# A conftest.py of a folder may be imported before the options are parsed, so that the variable is not yet set.
LONG = "--stress" in sys.argv or bool(os.environ.get("STRESS"))
"""Whether this is the long form (`make stress`), for counts that grow with it; whole tests are marked `stress`."""

"""Helpers for the tests, imported as `tests.support.NAME`."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

LONG = bool(os.environ.get("STRESS"))
"""Whether this is the long form (`make stress`), for counts that grow with it; whole tests are marked `stress`."""

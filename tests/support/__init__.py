"""Helpers of the tests, imported as `tests.support.NAME`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

"""Small datasets, written with Pillow."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data.__main__ import main
from pdrunet_jax.runtime import cli
from tests.support.small_data import noise, save, shapes


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes `count` images of noise with masks (0 and 255) into images/ and masks/; `mask(i)` gives other ones."""

    def write(count: int = 6, mask: Callable[[int], np.ndarray | Image.Image] | None = None) -> Path:
        for index in range(count):
            save(noise(index), tmp_path / "data" / "images" / f"x{index:03}.png")
            drawn = mask(index) if mask else (shapes(index) > 0).astype(np.uint8) * 255
            save(drawn, tmp_path / "data" / "masks" / f"x{index:03}.png")
        return tmp_path / "data"

    return write


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., object]:
    """Runs `python -m pdrunet_jax.data` with arguments, in this process; returns exit code, output and errors."""
    monkeypatch.setattr(cli, "configure_malloc", lambda: False)

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["data", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), shown.out, shown.err)

    return command

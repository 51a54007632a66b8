"""Wrong options, configurations and data: one message, exit code 2, no output."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.live import Place


def bad_image(data: Path) -> None:
    """Write a small dataset in which two images are not images."""
    for number in range(8):
        for kind in ("images", "masks"):
            (data / kind).mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((32, 32), np.uint8)
            pixels[8:24, 4 + number : 20] = 255
            pixels[0, 0] = number if kind == "images" else 0
            Image.fromarray(pixels).save(data / kind / f"p{number}.png")
    for number in (2, 5):
        (data / "images" / f"p{number}.png").write_bytes(b"no image at all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim.learning-rat", "1"], ["learning-rat"]),
        (["--optim.learning-rate", "fast"], ["learning-rate"]),
        (["--optim.learning-rate", "-1"], ["optim.learning_rate"]),
        (["--config", "key.toml"], ["key.toml", "optim.learning_rat", "did you mean learning_rate?"]),
        (["--config", "absent"], ["--config absent"]),
        (["--data.root", "absent", "--data.phantoms", "0"], ["absent"]),
        (["--data.root", "bad", "--data.phantoms", "0"], ["p2.png", "p5.png"]),
    ],
    ids=["option", "type", "bound", "key", "configuration", "folder", "images"],
)
def test_bad_input_is_one_message_and_exit_code_2(place: Place, options: list[str], message: list[str]) -> None:
    (place.path / "key.toml").write_text("[optim]\nlearning_rat = 1\n")
    bad_image(place.path / "bad")
    result = place.train(*options, workdir=place.path / "never")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for part in message:
        assert part in result.stderr
    assert not (place.path / "never" / "checkpoints").exists()

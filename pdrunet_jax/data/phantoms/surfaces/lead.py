"""Objects in the beam other than the patient: lead letters, rulers, calibration balls, collimator blades; bowel gas."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pdrunet_jax.data.phantoms.surfaces.raster import Picture, resized

_LINES = ("AP", "LAT", "PA", "STANDING", "WB", "SUPINE", "XR", "12", "JM", "3")


def collimator(shape: tuple[int, int], rng: np.random.Generator) -> Picture | None:
    """Share (H, W) of the beam that the collimator lets through; None where the field is wider than the picture."""
    if rng.random() < 0.25:
        return None
    rows, columns = _grid(shape)
    angle = np.radians(rng.normal(0, 2.0))
    across = np.cos(angle) * columns + np.sin(angle) * rows
    along = np.cos(angle) * rows - np.sin(angle) * columns
    # Each pair of blades is closed or not; a narrow limb is often taken in a narrow field.
    inward = np.full(shape, np.inf, np.float32)
    reach = (0.1, 0.33) if rng.random() < 0.3 else (-0.02, 0.22)  # of a small field on a large detector
    for place, side, closed in zip((across, along), shape[::-1], rng.random(2) < 0.75, strict=True):
        if not closed:
            continue
        first, second = (0.5 - rng.uniform(*reach, 2) * (rng.random(2) < 0.8)) * side
        inward = np.minimum(inward, np.minimum(place + first, second - place))
    if not np.isfinite(inward).all():
        return None
    penumbra = rng.uniform(0.5, 2.0) if rng.random() < 0.6 else rng.uniform(2, 14) * max(shape) / 512
    leak = 10 ** rng.uniform(-3.5, -2)
    return np.asarray(leak + (1 - leak) * np.clip(inward / penumbra + 0.5, 0, 1), np.float32)


def marker(
    shape: tuple[int, int], side: str, busy: NDArray[np.bool_], field: NDArray[np.bool_], rng: np.random.Generator
) -> Picture:
    """Lead (H, W) in mm of a letter R or L, perhaps with a second line, where it hides least of `busy` (H, W)."""
    letter = {"right": "R", "left": "L"}.get(side, "R" if rng.random() < 0.5 else "L")
    text = letter if rng.random() < 0.6 else f"{letter}\n{_LINES[int(rng.integers(len(_LINES)))]}"
    height = int(max(7, rng.uniform(0.035, 0.085) * max(shape)))
    image = Image.new("F", (6 * height, 4 * height))
    font = ImageFont.load_default(height)
    weight = 1 if rng.random() < 0.5 else 0
    ImageDraw.Draw(image).multiline_text(
        (3 * height, 2 * height), text, 1.0, font, anchor="mm", spacing=2, align="center", stroke_width=weight
    )
    if (mirrored := rng.random() < 0.15) or rng.random() < 0.5:
        turn = float(rng.choice([0, 0, 90, -90, 180])) + float(rng.normal(0, 8))
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
        image = image.rotate(turn, Image.Resampling.BILINEAR)
    box = image.getbbox()
    drawn = np.asarray(image.crop(box) if box else image)[: shape[0] // 3, : shape[1] // 3]
    if rng.random() < 0.3:  # the letters sit on a small plate
        drawn = np.pad(drawn, max(2, height // 6), constant_values=0.02)
    best, least = (0, 0), np.inf
    for _ in range(8):
        top = int(rng.integers(0, max(1, shape[0] - drawn.shape[0])))
        left = int(rng.integers(0, max(1, shape[1] - drawn.shape[1])))
        part = np.s_[top : top + drawn.shape[0], left : left + drawn.shape[1]]
        hidden = float(busy[part].mean() + 0.6 * (~field[part]).mean())
        if hidden < least:
            best, least = (top, left), hidden
    lead = np.zeros(shape, np.float32)
    lead[best[0] : best[0] + drawn.shape[0], best[1] : best[1] + drawn.shape[1]] = drawn * rng.uniform(0.2, 1.0)
    return lead


def ruler(shape: tuple[int, int], pitch: float, rng: np.random.Generator) -> Picture:
    """Lead (H, W) in mm of a ruler along the picture, with a mark each cm and a number each 5 cm."""
    image = Image.new("F", shape[::-1])
    draw = ImageDraw.Draw(image)
    left = int(rng.choice([rng.uniform(0.02, 0.12), rng.uniform(0.45, 0.55), rng.uniform(0.85, 0.95)]) * shape[1])
    font = ImageFont.load_default(max(6, min(14, 9 / pitch)))
    first = int(rng.integers(0, 30))
    for index in range(int(shape[0] * pitch / 10) + 1):
        row = index * 10 / pitch
        tall = (index + first) % 5 == 0
        draw.line((left, row, left + (8 if tall else 4) / pitch, row), 1.0)
        if tall:
            draw.text((left + 9 / pitch, row), str(first + index), 1.0, font, anchor="lm")
    if rng.random() < 0.6:
        draw.line((left, 0, left, shape[0]), 1.0)
    return np.asarray(image, np.float32) * np.float32(rng.uniform(0.05, 0.4))


def cushion(shape: tuple[int, int], rng: np.random.Generator) -> Picture:
    """A cushion, table or stand behind the patient (H, W), in mm of soft tissue: a rectangle, slightly turned."""
    rows, columns = _grid(shape)
    angle = np.radians(rng.choice([0, 90]) + rng.normal(0, 8))
    place = rng.uniform(-0.5, 0.5, 2) * shape
    across = np.cos(angle) * (columns - place[1]) + np.sin(angle) * (rows - place[0])
    along = np.cos(angle) * (rows - place[0]) - np.sin(angle) * (columns - place[1])
    half = rng.uniform((0.1, 0.3), (0.5, 1.2)) * max(shape)
    inward = np.minimum(half[0] - np.abs(across), half[1] - np.abs(along)) / rng.uniform(0.5, 12)
    return np.asarray(np.clip(inward + 0.5, 0, 1) * rng.uniform(0.5, 8), np.float32)


def calibration_ball(shape: tuple[int, int], pitch: float, rng: np.random.Generator) -> Picture:
    """Steel (H, W) in mm of a ball of 25 mm near an edge of the picture."""
    rows, columns = _grid(shape)
    radius = 12.5 * 1.1
    place = np.array(shape) * rng.uniform(0.3, 0.45, 2) * rng.choice([-1, 1], 2)
    distance = np.hypot(rows - place[0], columns - place[1]) * pitch
    return np.asarray(2 * np.sqrt(np.maximum(radius**2 - distance**2, 0)), np.float32)


def bowel_gas(shape: tuple[int, int], pitch: float, rng: np.random.Generator) -> Picture:
    """Depth (H, W) in mm of gas in the bowel: a few soft-edged loops."""
    cells = np.maximum(np.array(shape) * pitch / 28, 4).astype(int)
    coarse = rng.standard_normal(tuple(cells))
    smooth = resized(coarse.astype(np.float32), shape)
    return np.asarray(np.tanh(np.maximum(smooth - 0.7, 0)) * rng.uniform(10, 45), np.float32)


def _grid(shape: tuple[int, int]) -> tuple[Picture, Picture]:
    """Rows (H, 1) and columns (1, W), counted from the middle."""
    rows = np.arange(shape[0], dtype=np.float32)[:, None] - np.float32((shape[0] - 1) / 2)
    return rows, np.arange(shape[1], dtype=np.float32)[None] - np.float32((shape[1] - 1) / 2)

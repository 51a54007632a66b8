"""Tiles of the kernels of `fast/pallas.py`: which pixels and channels a program reads and writes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton

MOST_ROWS = 8
"""Most pixels of one phase that a tile is high."""

LEAST_CHANNELS = 16
"""Least side of a matrix product in Triton; channels are masked to it, or to the next power of two."""


class Tiles(NamedTuple):
    """How programs divide images into tiles for convolutions at a dilation.

    A tile covers `rows` x `columns` pixels of each of `phase_rows` x `phase_columns` neighbouring phases, all powers of
    two. Where phases are large a tile is in a single phase, so that its nine taps overlap; small phases share a tile.
    In a kernel these are int32 scalars, so that one kernel serves all dilations.
    """

    dilation: Any
    phase_columns: Any
    columns: Any
    phase_rows: Any
    rows: Any
    column_blocks: Any
    """Tiles to cover the phases of a row, ..."""
    column_tiles: Any
    """... the pixels in a row of a phase, ..."""
    row_blocks: Any
    """... the phases of a column, ..."""
    row_tiles: Any
    """... and the pixels in a column of a phase."""
    trips: Any
    """Tiles of a program."""

    @classmethod
    def of(cls, shape: tuple[int, ...], dilation: int, pixels: int) -> "Tiles":
        """Tiles of so many pixels, a power of two, for images of `shape` (N, H, W, C)."""
        height, width = (-(-side // dilation) for side in shape[1:3])
        rows = min(MOST_ROWS, _power_of_two(height), pixels)
        columns = min(pixels // rows, _power_of_two(width))
        phase_columns = min(pixels // (rows * columns), _power_of_two(dilation))
        phase_rows = pixels // (rows * columns * phase_columns)
        sides = (dilation, phase_columns), (width, columns), (dilation, phase_rows), (height, rows)
        blocks = [-(-number // size) for number, size in sides]
        return cls._make((dilation, phase_columns, columns, phase_rows, rows, *blocks, 1))

    @property
    def number(self) -> int:
        """Number of tiles of an image."""
        return self.column_blocks * self.column_tiles * self.row_blocks * self.row_tiles

    def place(self, index: jax.Array, shape: tuple[int, ...], pixels: int) -> "Pixels":
        """Locate the pixels of a tile in images (N, H, W, C). Neighbouring programs share rows."""
        parts = []
        for count in (self.column_blocks, self.column_tiles, self.row_blocks, self.row_tiles):
            parts.append(lax.rem(index, count))
            index = lax.div(index, count)
        pixel = lax.iota(jnp.int32, pixels)
        within = []
        for count in (self.phase_columns, self.columns, self.phase_rows):
            within.append(pixel & (count - 1))
            pixel = lax.shift_right_logical(pixel, lax.population_count(count - 1))
        phase_column, phase_row = parts[0] * self.phase_columns + within[0], parts[2] * self.phase_rows + within[2]
        column = (parts[1] * self.columns + within[1]) * self.dilation + phase_column
        row = (parts[3] * self.rows + pixel) * self.dilation + phase_row
        inside = (phase_row < self.dilation) & (phase_column < self.dilation) & (index < shape[0])
        return Pixels(index, row, column, inside & (row < shape[1]) & (column < shape[2]), shape[1], shape[2])


class Pixels(NamedTuple):
    """Pixels of a tile, (P,) each."""

    image: jax.Array
    row: jax.Array
    column: jax.Array
    inside: jax.Array
    height: int
    width: int

    def shifted(self, rows: jax.Array, columns: jax.Array) -> "Pixels":
        """The pixels so many rows and columns further; those outside the image are zero padding."""
        row, column = self.row + rows, self.column + columns
        inside = self.inside & (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)
        return self._replace(row=row, column=column, inside=inside)

    def load(self, ref: Any, channels: "Channels") -> tuple[jax.Array, jax.Array]:
        """Values (P, C) of an activation, zero outside, and the mask of the inside."""
        mask = self.inside[:, None] & channels.used[None]
        at = ref.at[self.image, self.row[:, None], self.column[:, None], channels.place[None]]
        return triton.load(at, mask=mask, other=0), mask

    def store(self, ref: Any, channels: "Channels", values: jax.Array) -> None:
        """Store values (P, C) in an activation, in its dtype; nothing outside."""
        mask = self.inside[:, None] & channels.used[None]
        at = ref.at[self.image, self.row[:, None], self.column[:, None], channels.place[None]]
        triton.store(at, values.astype(ref.dtype), mask=mask)


class Channels(NamedTuple):
    """Channels of an activation, masked to a size that Triton can multiply."""

    place: jax.Array
    used: jax.Array

    @classmethod
    def of(cls, count: int, most: int | None = None, block: Any = 0) -> "Channels":
        """All of `count` channels, or the block of this number of at most `most`."""
        size = min(padded(count), most or padded(count))
        index = lax.iota(jnp.int32, size) + block * size
        return cls(index, index < count)

    def vector(self, ref: Any) -> jax.Array:
        """A vector, (1, C), zero where masked."""
        return triton.load(ref.at[self.place], mask=self.used, other=0)[None]

    def store(self, ref: Any, program: jax.Array, vectors: tuple[jax.Array, ...]) -> None:
        """Store a program's vectors, (C,) each, in (programs, vectors, C)."""
        for row, vector in enumerate(vectors):
            triton.store(ref.at[program, row, self.place], vector, mask=self.used)


def padded(channels: int) -> int:
    """The number that this many channels are masked to."""
    return max(LEAST_CHANNELS, _power_of_two(channels))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

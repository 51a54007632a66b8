"""What varies between drawn X-rays, by names with which each can be left out."""

from typing import Literal, get_args

Variation = Literal[
    "shape", "growth", "cortex", "soft-tissue", "implants", "collimation", "objects", "noise", "exposure", "seams"
]
VARIATIONS: tuple[Variation, ...] = get_args(Variation)
"""In the order in which X-rays are made:

- shape: bones are uneven, and joint spaces narrow;
- growth: growth plates;
- cortex: bones have a dense wall around spongy bone and marrow; without it they are of one density;
- soft-tissue: muscle and fat;
- implants: metal and casts;
- collimation: blades and shutters;
- objects: letters, rulers, balls, cushions, text;
- noise: quantum noise;
- exposure: energy, scatter, blur, grids, processing, window, file format, inverted greys; without it all pictures are
  made alike;
- seams: panels of long pictures.
"""

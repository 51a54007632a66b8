"""From path lengths to what a detector measures: attenuation at several energies, scatter, blur and quantum noise."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pdrunet_jax.data.phantoms.surfaces.raster import Picture, resized

ENERGIES = (30.0, 40.0, 50.0, 60.0, 80.0, 100.0)
"""Photon energies in keV at which a spectrum is sampled."""

MATERIALS: dict[str, tuple[float, tuple[float, ...]]] = {
    "muscle": (1.05, (0.3783, 0.2685, 0.2262, 0.2048, 0.1823, 0.1693)),
    "fat": (0.95, (0.3063, 0.2396, 0.2123, 0.1974, 0.1800, 0.1688)),
    "bone": (1.92, (1.331, 0.6655, 0.4242, 0.3148, 0.2229, 0.1855)),
    "titanium": (4.54, (4.972, 2.214, 1.213, 0.7661, 0.4052, 0.2721)),
    "steel": (7.87, (8.176, 3.629, 1.958, 1.205, 0.5952, 0.3717)),
    "lead": (11.35, (30.32, 14.36, 8.041, 5.021, 2.419, 5.549)),
    "plaster": (1.10, (1.563, 0.7622, 0.4731, 0.3426, 0.2341, 0.1909)),
}
"""Density in g/cm^3, and mass attenuation coefficients in cm^2/g at `ENERGIES`.

J. H. Hubbell and S. M. Seltzer, NIST Standard Reference Database 126, tables 3 and 4: skeletal muscle, adipose tissue
and cortical bone of ICRU report 44; iron stands for steel. Plaster is loose gypsum, CaSO4 + 2 H2O, by its elements.
"""
_ALUMINIUM = (2.70, (1.128, 0.5685, 0.3681, 0.2778, 0.2018, 0.1704))
_CAESIUM_IODIDE = (4.51, (9.045, 22.97, 12.87, 7.92, 3.677, 2.035))


def spectrum(peak: float, filter_mm: float) -> NDArray[np.float64]:
    """Share of each of `ENERGIES` in the signal of a caesium iodide detector, without a patient.

    Kramers' law for a tube at `peak` kV, filtered by `filter_mm` of aluminium; a photon counts with its energy.
    """
    energy = np.array(ENERGIES)
    emitted = np.maximum(peak / energy - 1, 0)
    filtered = emitted * np.exp(-_ALUMINIUM[0] * np.array(_ALUMINIUM[1]) * filter_mm / 10)
    absorbed = filtered * (1 - np.exp(-_CAESIUM_IODIDE[0] * np.array(_CAESIUM_IODIDE[1]) * 0.05))
    # The samples at 80 and 100 keV stand for twice as wide a band as the others.
    signal = absorbed * energy * (1, 1, 1, 1, 2, 2)
    return np.asarray(signal / signal.sum())


def primary(lengths: Mapping[str, Picture], shares: NDArray[np.float64]) -> Picture:
    """Share of the open beam that passes through materials, given as path lengths (H, W) in mm."""
    total: Picture | None = None
    for index, share in enumerate(shares):
        if share < 1e-4:
            continue
        exponent: Picture | None = None
        for material, length in lengths.items():
            density, coefficients = MATERIALS[material]
            part = length * np.float32(-density * coefficients[index] / 10)
            exponent = part if exponent is None else exponent + part
        assert exponent is not None
        passed = np.float32(share) * np.exp(exponent)
        total = passed if total is None else total + passed
    assert total is not None
    return total


def measured(
    signal: Picture,
    rng: np.random.Generator,
    *,
    scatter: float,
    spread: float,
    blur: float,
    grain: float,
    quanta: float,
) -> Picture:
    """Add scatter, blur and noise to the primary signal (H, W), as shares of the open beam.

    Args:
        signal: what passes, (H, W).
        rng: for the noise.
        scatter: scattered radiation relative to the primary.
        spread: width of the scatter's blur, in pixels.
        blur: width of focal spot and detector together, in pixels.
        grain: width of the detector's blur of the noise, in pixels.
        quanta: photons a pixel of the open beam; the noise is Poisson's, by its normal approximation.
    """
    step = max(1, round(spread / 4))
    coarse = ndimage.uniform_filter(signal, step)[::step, ::step] if step > 1 else signal
    coarse = ndimage.gaussian_filter(coarse, spread / step, mode="nearest")
    haze = np.maximum(resized(coarse, signal.shape), 0)
    seen = ndimage.gaussian_filter(signal, blur, truncate=3) if blur > 0.2 else signal
    seen = (seen + np.float32(scatter) * haze) / np.float32(1 + scatter)
    noise = rng.standard_normal(signal.shape, np.float32)
    if grain > 0.3:  # less fine, and as strong as before
        noise = ndimage.gaussian_filter(noise, grain, truncate=3) * np.float32(max(1.0, 3.545 * grain))
    return np.maximum(seen + np.sqrt(seen / np.float32(quanta)) * noise, np.float32(0.3 / quanta)).astype(np.float32)

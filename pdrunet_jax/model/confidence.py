"""Confidence in a segmentation without its truth: the Dice that the probabilities themselves lead to expect.

The soft Dice confidence of Borges et al., "Soft Dice Confidence: A Near-Optimal Confidence Estimator for Selective
Prediction in Semantic Segmentation", arXiv:2402.10665 (2024).
"""

import numpy as np


def confidences(probability: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
    """Confidence in each foreground class of a segmentation, from 0 to 1.

    For a class with probabilities p and mask m it is 2 sum(p m) / (sum(p) + sum(m)): about the Dice to expect if the
    probabilities are calibrated. It falls with every pixel whose probability moves away from the mask. Where the mask
    lacks the class it is 1 - max(p), the confidence that the class is absent.

    Args:
        probability: As in `Prediction`: foreground (H, W); (H, W, K), background first; or (H, W, K) of overlapping
            classes. The mean over passes or models, whose disagreement then lowers the confidence.
        mask: Class indices (H, W), 0 is background; or (H, W, K) layers of overlapping classes.

    Returns:
        One number for each class, in the order of the classes.
    """
    if probability.ndim == 2:
        pairs = [(probability, mask > 0)]
    elif mask.ndim == 2:
        pairs = [(probability[..., index], mask == index) for index in range(1, probability.shape[-1])]
    else:
        pairs = [(probability[..., index], mask[..., index] > 0) for index in range(mask.shape[-1])]
    return tuple(_confidence(channel, inside) for channel, inside in pairs)


def _confidence(channel: np.ndarray, inside: np.ndarray) -> float:
    area = int(inside.sum())
    if not area:
        return min(max(1.0 - float(channel.max()), 0.0), 1.0)  # resized probabilities may leave the range by rounding
    # Sums in float64: float32 loses digits over millions of pixels.
    total = float(channel.sum(dtype=np.float64))
    return min(2.0 * float(channel[inside].sum(dtype=np.float64)) / (total + area), 1.0)

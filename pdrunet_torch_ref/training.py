"""Losses of the PyTorch twin, built from PyTorch's own functions, and its training step."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdrunet_torch_ref.model import dropout_masks

IGNORE_INDEX = -100

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""loss(logits (N, K, H, W), target (N, H, W), valid (N, H, W), bool) -> scalar.

With K = 1 the target is the foreground probability, otherwise the class index, int64.
"""


def make_loss(
    name: str,
    outputs: int,
    *,
    class_weights: Sequence[float] = (),
    dice_weight: float = 0.5,
    gamma: float = 2.0,
    alpha: float = 0.3,
    smooth: float = 1.0,
) -> Loss:
    """The loss `name` as defined by `pdrunet_jax.config.LossConfig`; raises `ValueError` for an unknown name.

    `class_weights` starts with the background and has two numbers for one output. `gamma` belongs to the focal loss,
    `alpha` to the Tversky index, `smooth` to Dice and Tversky; `dice_weight` is the share of Dice in bce_dice and
    ce_dice.
    """
    weights = tuple(class_weights) or (1.0,) * max(outputs, 2)

    def entropy(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return cross_entropy(logits, target, valid, weights)

    def dice(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return soft_dice(logits, target, valid, weights, smooth)

    def both(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return dice_weight * dice(logits, target, valid) + (1 - dice_weight) * entropy(logits, target, valid)

    losses: dict[str, Loss] = {
        "bce": entropy,
        "ce": entropy,
        "dice": dice,
        "bce_dice": both,
        "ce_dice": both,
        "focal": lambda logits, target, valid: focal(logits, target, valid, weights, gamma),
        "tversky": lambda logits, target, valid: soft_tversky(logits, target, valid, weights, alpha, smooth),
    }
    if name not in losses:
        raise ValueError(f"loss {name!r} is unknown; it is one of {', '.join(losses)}")
    return losses[name]


def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted mean over valid pixels of `binary_cross_entropy_with_logits` or `cross_entropy`."""
    if logits.shape[1] == 1:
        weight = weights[1] * target + weights[0] * (1 - target)
        chosen, truth, weight = logits[:, 0][valid], target[valid], weight[valid]
        return F.binary_cross_entropy_with_logits(chosen, truth, weight, reduction="sum") / weight.sum()
    index = torch.where(valid, target, IGNORE_INDEX)
    return F.cross_entropy(logits, index, logits.new_tensor(weights), ignore_index=IGNORE_INDEX)


def focal(logits: Tensor, target: Tensor, valid: Tensor, weights: Sequence[float], gamma: float) -> Tensor:
    """Mean over valid pixels of w (1 - p_t)^gamma CE (Lin et al., 2017), for one output."""
    logit, truth = logits[:, 0][valid], target[valid]
    p = torch.sigmoid(logit)
    missed = p * (1 - truth) + (1 - p) * truth
    weight = weights[1] * truth + weights[0] * (1 - truth)
    return (weight * missed**gamma * F.binary_cross_entropy_with_logits(logit, truth, reduction="none")).mean()


def soft_dice(logits: Tensor, target: Tensor, valid: Tensor, weights: Sequence[float], smooth: float) -> Tensor:
    """1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s) per image and foreground class, averaged with `weights`."""
    p, t, weight = _foreground(logits, target, valid, weights)
    index = (2 * (p * t).sum((2, 3)) + smooth) / (p.sum((2, 3)) + t.sum((2, 3)) + smooth)
    return 1 - (index * weight).sum(1).mean() / weight.sum()


def soft_tversky(
    logits: Tensor, target: Tensor, valid: Tensor, weights: Sequence[float], alpha: float, smooth: float
) -> Tensor:
    """1 - (TP + s/2) / (TP + alpha FP + (1 - alpha) FN + s/2) per image and foreground class (Salehi et al., 2017)."""
    p, t, weight = _foreground(logits, target, valid, weights)
    both = (p * t).sum((2, 3))
    false_positive, false_negative = p.sum((2, 3)) - both, t.sum((2, 3)) - both
    index = (both + smooth / 2) / (both + alpha * false_positive + (1 - alpha) * false_negative + smooth / 2)
    return 1 - (index * weight).sum(1).mean() / weight.sum()


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the arrays, layers and blocks of `model` whose names match one of `patterns`, as `train.freeze` does.

    Their parameters need no gradient. `train_step` leaves a normalisation without trainable parameters in evaluation
    mode, so that it uses its running statistics and keeps them.
    """
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        inside = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if any(fnmatchcase(each, pattern) for each in inside for pattern in patterns):
            parameter.requires_grad_(False)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    images: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """Update `model` once in training mode; returns the loss before the update, detached.

    Args:
        model: the twin; its gradients are kept afterwards.
        optimizer: over its parameters.
        loss: from `make_loss`.
        images: (N, C, H, W).
        target: (N, H, W), as `loss` expects it.
        valid: pixels to include, (N, H, W), bool; None for all.
        masks: boolean keep masks (N, filters, H, W) of the two dropout layers; None leaves dropout random (build the
            model with `dropout=0` for none).
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not any(each.requires_grad for each in module.parameters()):
            module.eval()
    optimizer.zero_grad(set_to_none=True)
    everything = torch.ones(target.shape, dtype=torch.bool, device=target.device)
    with dropout_masks(model, masks):
        value = loss(model(images), target, everything if valid is None else valid)
    value.backward()
    optimizer.step()
    return value.detach()


def channels_last(model: nn.Module) -> nn.Module:
    """Convert the kernels of `model` to NHWC memory order, PyTorch's fast layout; pass images in the same order.

    Names, shapes and results do not change.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _foreground(
    logits: Tensor, target: Tensor, valid: Tensor, weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Probability and truth of the foreground classes, (N, K', H, W), zero where invalid, and their weights (K',)."""
    inside = valid[:, None].to(logits.dtype)
    if logits.shape[1] == 1:
        p, t = torch.sigmoid(logits), target[:, None].to(logits.dtype)
    else:
        p = torch.softmax(logits, 1)[:, 1:]
        t = F.one_hot(torch.where(valid, target, 0), logits.shape[1]).permute(0, 3, 1, 2)[:, 1:].to(logits.dtype)
    weight = logits.new_tensor(weights[1:])
    return p * inside, t * inside, weight if weight.sum() > 0 else torch.ones_like(weight)

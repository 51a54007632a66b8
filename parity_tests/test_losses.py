"""Level 4: losses and their gradients, metrics, and preprocessing."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from torchmetrics.functional import classification as reference

from parity_tests.support import jax_side, torch_side
from parity_tests.support.budget import Budget
from parity_tests.support.case import Objective
from parity_tests.support.cases import DTYPES
from parity_tests.support.compare import largest, relative
from parity_tests.support.torch_side import on_torch
from pdrunet_jax.config import LossConfig
from pdrunet_jax.data.images import resize_image
from pdrunet_jax.evaluate import metrics
from pdrunet_jax.predict import inference
from pdrunet_jax.train.losses import make_loss

Data = tuple[np.ndarray, Objective]

SHAPE = (3, 9, 11)

LOSSES = [
    *((name, 1) for name in ("bce", "dice", "bce_dice", "focal", "tversky")),
    *((name, outputs) for name in ("ce", "dice", "ce_dice", "tversky") for outputs in (2, 5)),
]


def make_data(name: str, outputs: int, dtype: str, kind: str, weights: tuple[float, ...] = ()) -> Data:
    """Return logits (N, H, W, K) and the loss `name`. `kind`: soft targets, ignored pixels, or an empty image."""
    rng = np.random.default_rng(outputs)
    logits = (3 * rng.standard_normal((*SHAPE, outputs))).astype(dtype)
    logits.flat[::97] *= 30  # saturated probabilities
    target = rng.integers(0, max(outputs, 2), SHAPE)
    valid = np.ones(SHAPE, bool)
    if kind == "ignored":
        valid = rng.random(SHAPE) < 0.8
        target[~valid] = 255
    if kind == "empty":
        target[0] = 0
    if outputs == 1:
        truth = (rng.random(SHAPE) if kind == "soft" else np.where(valid, target, 0)).astype(dtype)
    else:
        truth = target.astype(np.int32)
    return logits, Objective(name, outputs, truth, valid, weights)


def compare_loss(budget: Budget, dtype: str, ours: Objective, theirs: Objective, logits: np.ndarray, kind: str) -> None:
    value, gradient = jax.value_and_grad(jax_side.loss_of(ours))(jnp.asarray(logits))
    want, want_gradient = on_torch(torch_side.loss_and_gradient, logits, theirs)
    assert value.dtype == dtype
    where = f"{theirs.name} {theirs.outputs} {kind}{' weighted' if theirs.class_weights else ''}"
    budget.hold(4, "loss", dtype, {"value": relative(np.asarray(value), want)}, where)
    budget.hold(4, "loss gradient", dtype, {"gradient": relative(np.asarray(gradient), want_gradient)}, where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "weighted"), [("plain", False), ("ignored", False), ("empty", False), ("ignored", True)]
)
@pytest.mark.parametrize(("name", "outputs"), LOSSES)
def test_loss_and_gradient_agree(
    name: str, outputs: int, kind: str, weighted: bool, dtype: str, budget: Budget
) -> None:
    weights = tuple(0.5 + 0.75 * i for i in range(max(outputs, 2))) if weighted else ()
    logits, objective = make_data(name, outputs, dtype, kind, weights)
    compare_loss(budget, dtype, objective, objective, logits, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bce", "dice", "bce_dice", "focal", "tversky"])
def test_losses_agree_on_soft_targets(name: str, dtype: str, budget: Budget) -> None:
    logits, objective = make_data(name, 1, dtype, "soft")
    compare_loss(budget, dtype, objective, objective, logits, "soft")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "outputs", "kind"), [("bce", 1, "plain"), ("ce", 5, "ignored")])
def test_unweighted_entropies_are_one_call_of_pytorch(
    name: str, outputs: int, kind: str, dtype: str, budget: Budget
) -> None:
    """Compare with torch.nn.functional directly, without the twin."""
    logits, objective = make_data(name, outputs, dtype, kind)
    compare_loss(budget, dtype, objective, dataclasses.replace(objective, name=f"torch {name}"), logits, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ce", "ce of two", "pos_weight"])
def test_class_weights_are_those_of_pytorchs_own_losses(kind: str, dtype: str, budget: Budget) -> None:
    """The mean is over the weights, as in CrossEntropyLoss(weight=...), for one output too."""
    rng, outputs = np.random.default_rng(0), 3 if kind == "ce" else 1
    weights = (0.5, 7.5, 2.0)[
        : max(outputs, 2)
    ]  # of few bits: PyTorch adds them up one by one, in single precision too
    logits = (3 * rng.standard_normal((*SHAPE, outputs))).astype(dtype)
    target = rng.choice(len(weights), SHAPE, p=(0.8, 0.2) if outputs == 1 else (0.7, 0.1, 0.2))
    truth = target.astype(dtype if outputs == 1 else np.int32)
    loss = make_loss(LossConfig(name="ce" if outputs == 3 else "bce", class_weights=weights), outputs)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits), jnp.asarray(truth), jnp.ones(SHAPE, bool))
    theirs = logits if outputs == 3 else logits[..., 0]
    want, slope = on_torch(torch_side.weighted_entropy, kind, theirs, truth, weights)
    budget.hold(4, "loss", dtype, {"value": relative(np.asarray(value), want)}, f"weights as in {kind}")
    slope = slope if outputs == 3 else slope[..., None]
    budget.hold(4, "loss gradient", dtype, {"gradient": relative(np.asarray(gradient), slope)}, f"weights as in {kind}")


def test_weights_divided_by_the_number_of_pixels(caught: Callable[..., str]) -> None:
    """BCEWithLogitsLoss(pos_weight=...) as it stands has another scale."""
    rng, weights = np.random.default_rng(0), (0.6, 7.5)
    logits, truth = rng.standard_normal(SHAPE), rng.choice(2, SHAPE, p=(0.8, 0.2)).astype(np.float64)
    loss = make_loss(LossConfig(name="bce", class_weights=weights), 1)
    value = loss(jnp.asarray(logits[..., None]), jnp.asarray(truth), jnp.ones(SHAPE, bool))
    want, _ = on_torch(torch_side.weighted_entropy, "mean over pixels", logits, truth, weights)
    error = {"value": relative(np.asarray(value), want)}
    caught(lambda budget: budget.hold(4, "loss", "float64", error, "mean over pixels"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bce", "dice", "focal", "tversky"])
def test_losses_of_overlapping_classes_are_those_of_each_class(name: str, dtype: str, budget: Budget) -> None:
    """Combined from PyTorch's losses with one output, by each class's weight and number of valid pixels."""
    rng, weights = np.random.default_rng(0), np.array([0.5, 1.25, 2.0])
    logits = (3 * rng.standard_normal((*SHAPE, 3))).astype(dtype)
    target = rng.integers(0, 2, logits.shape).astype(dtype)
    valid = rng.random(logits.shape) < (0.5, 0.8, 1.0)
    loss = make_loss(LossConfig(name=name, class_weights=tuple(weights.tolist())), 3, multilabel=True)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits), jnp.asarray(target), jnp.asarray(valid))
    pixels = valid.sum(axis=(0, 1, 2))
    shares = {"bce": weights * pixels / (weights * pixels).sum(), "focal": weights * pixels / pixels.sum()}
    want, wanted = 0.0, []
    for place, share in enumerate(shares.get(name, weights / weights.sum())):
        alone = Objective(name, 1, target[..., place], valid[..., place], ())
        part, slope = on_torch(torch_side.loss_and_gradient, logits[..., place : place + 1], alone)
        want += share * part
        wanted.append(share * slope[..., 0])
    budget.hold(
        4, "loss", dtype, {"value": relative(np.asarray(value), np.asarray(want, dtype))}, f"{name} overlapping"
    )
    errors = {"gradient": relative(np.asarray(gradient), np.stack(wanted, axis=-1).astype(dtype))}
    budget.hold(4, "loss gradient", dtype, errors, f"{name} overlapping")


METRICS = {
    "dice": ("f1_score", metrics.dice),
    "iou": ("jaccard_index", metrics.iou),
    "precision": ("precision", metrics.precision),
    "recall": ("recall", metrics.recall),
    "specificity": ("specificity", metrics.specificity),
}


@pytest.mark.parametrize("classes", [1, 4])
def test_metrics_agree_with_torchmetrics(classes: int, budget: Budget) -> None:
    rng = np.random.default_rng(classes)
    shape = (4, 21, 15)
    prediction, target = (rng.integers(0, classes + 1, shape) for _ in range(2))
    valid = rng.random(shape) < 0.8
    counts = metrics.confusion(*(jnp.asarray(a) for a in (prediction, target, valid)), classes)
    theirs = torch.from_numpy(np.where(valid, target, -1))
    errors = {}
    for image in range(shape[0]):
        for index in range(1, classes + 1):
            # One class against the rest, with -1 for ignored pixels: the plainest form of each metric.
            truth = torch.where(theirs[image] < 0, -1, (theirs[image] == index).long())
            guess = torch.from_numpy((prediction[image] == index).astype(np.int64))
            stats = reference.binary_stat_scores(guess, truth, ignore_index=-1)[:4]
            ours = [counts.tp, counts.fp, counts.tn, counts.fn]
            for count, got, want in zip(["tp", "fp", "tn", "fn"], ours, stats, strict=True):
                errors[f"{count} of class {index} in image {image}"] = abs(int(got[image, index - 1]) - int(want))
            for name, (their_name, function) in METRICS.items():
                want = float(getattr(reference, f"binary_{their_name}")(guess, truth, ignore_index=-1))
                got = float(function(counts)[image, index - 1])
                errors[f"{name} of class {index} in image {image}"] = abs(got - want)
    budget.hold(4, "metrics", "float32", errors, f"{classes} classes")  # torchmetrics computes in float32


class PassOn(nnx.Module):
    """A network that returns its input."""

    multilabel = False

    @property
    def members(self) -> tuple[nnx.Module, ...]:
        return (self,)

    def __call__(self, images: jax.Array) -> jax.Array:
        return images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(256, 256), (64, 96), (97, 61), (400, 300)])
def test_preprocessing_is_bit_equal_to_pillow_and_torchvision_scaling(
    size: tuple[int, int], channels: int, budget: Budget
) -> None:
    """torchvision's `Resize` on a Pillow image is Pillow's own `resize`; its `ToTensor` divides by 255 in float32."""
    pixels = np.random.default_rng(0).integers(0, 256, (301, 207, channels), np.uint8)
    ours = resize_image(pixels, size)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    theirs = torch.from_numpy(np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR)).reshape(*size, channels))
    scaled = inference.forward(PassOn(), ours[None])
    errors = {
        "resize": largest(ours.astype(np.float64), theirs.double().numpy()),
        "scaling": largest(np.asarray(scaled[0]), (theirs.to(torch.float32) / 255).numpy()),
    }
    budget.hold(4, "preprocessing", "float32", errors, f"{size[0]}x{size[1]}x{channels}")

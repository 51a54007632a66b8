"""Every setting, declared once: frozen dataclasses, read from TOML and the command line, checked together.

The types and bounds below are the only declaration; `pydantic` checks them, `tyro` turns them into options and their
docstrings into `--help`.

Configurations in and out: TOML files, plain dictionaries, and the difference between two of them.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pdrunet_jax.runtime.errors import UserError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
MaskValue = Annotated[
    int | str, BeforeValidator(lambda value: ",".join(map(str, value)) if isinstance(value, list) else value)
]
"""A grey value, palette index or "#rrggbb" colour, or several with commas between them; TOML may list them."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are read."""

    __pydantic_config__ = STRICT

    root: str = "data"
    """Dataset folder: with a manifest.csv, or in one of the layouts of docs/data.md."""
    size: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=2)] = (256,)
    """Height and width in pixels that images are resized to; one number for both."""
    classes: dict[str, MaskValue] = dataclasses.field(default_factory=dict)
    """Mask coding: class names with their grey value, palette index or "#rrggbb" colour; 1,2 gives a class several.
    Overrides dataset.toml; left out, a mask must be binary."""
    ignore: MaskValue | None = None
    """Mask value or colour that is left out of loss and metrics; 1,2 gives several."""
    threshold: Annotated[int, Field(gt=0, le=255)] | None = None
    """Grey value (of 255) from which a soft-edged binary mask counts as foreground; 128 when left out."""
    soft_masks: bool = False
    """Train on unrounded, bilinearly resized binary masks, as the public code does."""
    patient_regex: str | None = None
    """Regular expression whose first group (or whole match) in the image's path is the patient."""
    val_fraction: Rate = 0.2
    """Share of the patients that validate, where the dataset declares no split."""
    test_fraction: Rate = 0.2
    """Share of the patients that test, where the dataset declares no split."""
    split_seed: int = 0
    """Seed of that split."""
    cache: Literal["auto", "memory", "none"] = "auto"
    """Keep decoded images as uint8 in memory: auto does so when they fit in a quarter of it."""
    threads: Count = 4
    """Threads that decode images; the order of samples does not depend on it."""
    phantoms: Count = 0
    """Draw this many synthetic X-rays into data.root when it does not exist yet; 0 draws none."""

    @property
    def height_width(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.size[0], self.size[-1]


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, drawn on the device for each sample and epoch. Zero switches one off."""

    __pydantic_config__ = STRICT

    flip_horizontal: Fraction = 0.0
    """Probability of a left-right flip."""
    flip_vertical: Fraction = 0.0
    """Probability of a top-bottom flip."""
    rotate: NonNegative = 0.0
    """Largest rotation either way, in degrees."""
    scale: Rate = 0.0
    """Largest relative change of size: 0.1 draws a factor from 1/1.1 to 1.1."""
    translate: Rate = 0.0
    """Largest shift as a share of each side."""
    shear: NonNegative = 0.0
    """Largest shear either way, in degrees."""
    elastic: NonNegative = 0.0
    """Standard deviation of a smooth random displacement, in pixels."""
    gamma: NonNegative = 0.0
    """Largest |log2| of the exponent applied to intensities: 0.5 draws from 0.71 to 1.41."""
    contrast: Rate = 0.0
    """Largest relative change of contrast around the image's mean."""
    brightness: NonNegative = 0.0
    """Largest shift of intensity, in units of the full range."""
    noise: NonNegative = 0.0
    """Largest standard deviation of added Gaussian noise, in units of the full range."""
    blur: NonNegative = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """PDR-UNet and its independent options (docs/architecture.md)."""

    __pydantic_config__ = STRICT

    in_channels: Positive = 1
    """Image channels: 1 for grey, 3 for RGB."""
    outputs: Positive | None = None
    """1: sigmoid; 2 or more: softmax over exclusive classes, background included. Left out, it follows the dataset:
    1 for one class, n + 1 for n."""
    filters: Positive = 40
    """Channels of every hidden convolution."""
    shortcut: Literal["input", "conv1"] = "input"
    """Where a block's residual starts: at its input (the public code) or after its first convolution (the paper's
    figure)."""
    norm: Literal["batch", "none"] = "batch"
    """Normalisation after every 3x3 convolution."""
    dropout: Rate = 0.3
    """Rate of the two dropouts in the bottleneck."""
    conv: Literal["auto", "plain", "fused", "polyphase"] = "auto"
    """Execution path of the 3x3 convolutions; the results agree."""
    init: Literal["torch", "he"] = "torch"
    """Initial weights: PyTorch's default distributions, or He normal with zero biases."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    __pydantic_config__ = STRICT

    name: Literal["bce", "dice", "bce_dice", "focal", "tversky", "ce", "ce_dice"] | None = None
    """bce*, focal and tversky are for one output (tversky for classes too), ce* for two or more. Left out: bce_dice
    or ce_dice."""
    dice_weight: Fraction = 0.5
    """Share of the Dice term in bce_dice and ce_dice; the rest is cross-entropy."""
    class_weights: tuple[NonNegative, ...] = ()
    """A weight for each class of the (soft)max, background first; for one output, background and foreground."""
    focal_gamma: NonNegative = 2.0
    """Focusing exponent of the focal loss."""
    tversky_alpha: NonNegative = 0.3
    """Weight of false positives in the Tversky index; false negatives weigh 1 - alpha."""
    smooth: NonNegative = 1.0
    """Added to numerator and denominator of soft Dice and Tversky, in pixels: keeps empty masks finite."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How it is minimised."""

    __pydantic_config__ = STRICT

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """sgd uses Nesterov momentum unless nesterov is false."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "polynomial", "onecycle"] = "constant"
    """Learning rate over the steps after the warm-up; onecycle brings its own warm-up over 30 % of the run."""
    warmup_steps: Count = 0
    """Steps of linear increase from zero."""
    final_fraction: Fraction = 0.0
    """Last learning rate of cosine and polynomial as a share of the peak."""
    power: PositiveFloat = 0.9
    """Exponent of the polynomial schedule."""
    b1: Rate = 0.9
    """Adam's decay of the gradient average."""
    b2: Rate = 0.999
    """Adam's decay of the squared-gradient average."""
    eps: PositiveFloat = 1e-8
    """Adam's addition to the denominator."""
    weight_decay: NonNegative = 0.0
    """adam, sgd: L2 penalty as in PyTorch; adamw: decoupled decay."""
    momentum: Rate = 0.9
    """SGD momentum."""
    nesterov: bool = True
    """Nesterov's form of SGD momentum."""
    clip_norm: NonNegative = 0.0
    """Largest global norm of the gradient; 0 does not clip."""
    ema: Rate = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and exported; 0 keeps none."""
    accumulate: Positive = 1
    """Micro-batches whose gradients are averaged before each update; they divide the batch."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    __pydantic_config__ = STRICT

    weights: str | None = None
    """Start from these trained weights instead of random ones: run folder, checkpoint, .safetensors or public .pth."""
    steps: Positive = 10_000
    """Updates of the weights."""
    batch_size: Positive = 8
    """Images in each update."""
    eval_batch_size: Positive | None = None
    """Images in each validation batch; as batch_size when left out."""
    precision: Literal["float32", "tf32", "bfloat16", "float64"] = "float32"
    """Arithmetic of the convolutions. bfloat16 keeps parameters, statistics and loss in float32."""
    remat: bool = False
    """Save memory: keep only what enters each block, and compute the rest a second time for the gradient."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: Positive = 500
    """Steps between validations."""
    save_every: Positive = 500
    """Steps between checkpoints."""
    keep_latest: Positive = 2
    """Latest checkpoints that are kept."""
    keep_best: Positive = 1
    """Best checkpoints, by validation Dice, that are kept as well."""
    samples: Count = 4
    """Validation images drawn with their prediction at each validation."""
    spike: Literal["off", "stop", "skip"] = "off"
    """A loss far above those before: train on it as on any other, stop before its update, or skip its batch."""
    spike_factor: Annotated[float, Field(gt=1)] = 5.0
    """How many times the median of the last losses counts as far above."""
    spike_window: Positive = 50
    """Losses that this median is taken of; before there are as many, none is a spike."""
    deterministic: bool = False
    """On GPUs: bit-equal repetition, at some cost in speed. CPUs always repeat."""


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """What is written down beside the local metrics.jsonl."""

    __pydantic_config__ = STRICT

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online when logged in, else offline."""
    project: str = "pdrunet-jax"
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    name: str | None = None
    """W&B run name; the run folder's name when left out."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    artifact: bool = False
    """Upload best.safetensors as a W&B artifact at the end."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    __pydantic_config__ = STRICT

    seed: int = 0
    """Seed of initial weights, order of samples, augmentation and dropout."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Check `values` and make them a `Config`; what is left out keeps its default.

    `source` names the file or option in the message. Raises `UserError` that lists every unknown key, wrong type and
    value out of bounds.
    """
    try:
        config = _adapter().validate_python(values)
    except ValidationError as error:
        problems = "\n".join(f"  - {_explain(item)}" for item in error.errors())
        raise UserError(f"{source} cannot be used:\n{problems}") from None
    _check_combinations(config, source)
    return config


def check(config: Config, source: str) -> Config:
    """Check the bounds of a `Config` that was assembled without them, for example from the command line."""
    return from_dict(to_dict(config, none=True), source)


def to_dict(config: Config, *, none: bool = False) -> dict[str, Any]:
    """`config` as nested dictionaries; settings that are None are left out (TOML has no null) unless `none`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if none or item is not None}
        return list(value) if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def to_toml(config: Config, header: str = "") -> str:
    """`config` as TOML text below `header`, which becomes comment lines."""
    comment = "".join(f"# {line}\n" if line else "#\n" for line in header.splitlines())
    return comment + tomli_w.dumps(to_dict(config))


def load(name: str | Path) -> Config:
    """The configuration `name`: a file, then `configs/NAME.toml`, then the copy inside the installed package.

    Raises `UserError` if there is none or if it cannot be used.
    """
    path = Path(name)
    if path.suffix == ".toml" and not path.is_file():
        raise UserError(f"--config {name}: there is no such file")
    if path.is_file():
        return read(path)
    local = Path("configs") / f"{name}.toml"
    if local.is_file():
        return read(local)
    shipped = resources.files("pdrunet_jax") / "configs"
    if not shipped.is_dir():  # an editable install, where the configurations lie beside the package
        shipped = resources.files("pdrunet_jax").joinpath("..", "configs")
    names = sorted(item.name.removesuffix(".toml") for item in shipped.iterdir() if item.name.endswith(".toml"))
    if str(name) in names:
        return parse((shipped / f"{name}.toml").read_text(encoding="utf-8"), f"configuration {name}")
    raise UserError(
        f"--config {name}: no file of that name, no configs/{name}.toml and none shipped; "
        f"the shipped ones are {', '.join(names)}"
    )


def read(path: Path) -> Config:
    """The configuration in a TOML file; raises `UserError` that names it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Config:
    """TOML `text` as a `Config`; raises `UserError` that names `source`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; refused") from None
    values.pop("environment", None)  # a run's config.toml records versions there; they are no settings
    return from_dict(values, source)


def diff(old: Config, new: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """The settings that differ, one line each: `optim.learning_rate: 0.001 -> 0.003`.

    `ignore` holds settings (`train.steps`) and sections (`tracking`) that may differ.
    """
    before, after = _flat(to_dict(old, none=True)), _flat(to_dict(new, none=True))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in ignore and key.split(".")[0] not in ignore
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return result


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _explain(item: Any) -> str:
    """One pydantic error in the words of a user of TOML and options."""
    location = [str(part) for part in item["loc"]]
    name = ".".join(location)
    if item["type"] == "unexpected_keyword_argument":
        known = to_dict(Config(), none=True)
        for part in location[:-1]:
            known = known.get(part, {})
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"unknown setting {name}; {hint}"
    return f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"


def _check_combinations(config: Config, source: str) -> None:
    """What no single setting shows."""
    problems = []
    if config.train.batch_size % config.optim.accumulate:
        problems.append(
            f"optim.accumulate = {config.optim.accumulate} does not divide train.batch_size = {config.train.batch_size}"
        )
    if config.optim.warmup_steps >= config.train.steps:
        problems.append(f"optim.warmup_steps = {config.optim.warmup_steps} leaves nothing of train.steps")
    if config.data.val_fraction + config.data.test_fraction >= 1:
        problems.append("data.val_fraction and data.test_fraction together leave nothing to train on")
    if config.data.soft_masks and len(config.data.classes) > 1:
        problems.append("data.soft_masks is for one class; data.classes declares more")
    if problems:
        raise UserError(f"{source} cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))

"""Configuration: every setting as a field of a frozen dataclass, read from TOML files and the command line.

The types and bounds below are the only declaration of a setting. `pydantic` checks them; `tyro` turns the fields into
options and their docstrings into `--help`.
"""

import dataclasses
import difflib
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.run_folder import MOST_STEPS

OF_A_PROCESS = ("tracking", "data.root", "data.surfaces", "data.threads", "data.cache")
"""Settings that each of several processes may have for itself. The data must have the same fingerprint."""

OF_THE_END = ("train.steps", "train.patience", "optim.restarts")
"""Settings that decide when a run ends, and the learning rate on the way there."""

MAY_CHANGE = (
    *OF_A_PROCESS,
    *OF_THE_END,
    *("train.log_every", "train.save_every", "train.keep_latest", "train.keep_best", "train.samples"),
    "train.eval_batch_size",
)
"""Settings that a resumed run may change: without effect on its results, or on its end alone. The data must still have
the fingerprint that the checkpoints were saved with."""

WIRING = ("name", "in_channels", "outputs", "filters", "shortcut", "norm", "depth", "down", "up")
"""Options of networks that decide which arrays there are and what they mean; not each network has all."""

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

FOLD = r"^[1-9][0-9]{0,3}/[1-9][0-9]{0,3}$"

Positive = Annotated[int, Field(gt=0, le=MOST_STEPS)]
Count = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Side = Annotated[int, Field(gt=0, le=1 << 16)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Depth = Annotated[int, Field(ge=1, le=8)]
Down = Literal["max", "stride"]
Up = Literal["transposed", "bilinear", "bilinear_corners"]
_LISTS = BeforeValidator(lambda value: ",".join(map(str, value)) if isinstance(value, list) else value)
MaskValue = Annotated[int | str, _LISTS]
"""A grey value, palette index or "#rrggbb" colour, or several of them separated by commas or in a TOML list."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Dataset: location, image size, mask coding, split."""

    __pydantic_config__ = STRICT

    root: str = "data"
    """Dataset folder: one with a manifest.csv, or any layout listed in docs/data.md."""
    size: Annotated[tuple[Side, ...], Field(min_length=1, max_length=2)] = (256,)
    """Height and width in pixels to which images are resized; one number sets both."""
    fit: Literal["stretch", "pad"] = "stretch"
    """How images of other proportions are brought to data.size. stretch changes the ratio of their sides; pad keeps it
    and fills up with black, which counts in neither loss nor scores."""
    spacing: PositiveFloat | None = None
    """Resample all images to this many mm per pixel, then pad to data.size. Needs data.fit = pad, and the pixel spacing
    of every image: from its file (DICOM), the manifest or dataset.toml."""
    classes: dict[str, MaskValue] = dataclasses.field(default_factory=dict)
    """Mask coding: class names with their grey value, palette index or "#rrggbb" colour; "1,2" gives a class several.
    Overrides dataset.toml. Without either, masks must be binary."""
    ignore: Annotated[int | str | None, _LISTS] = None
    """Mask value or colour to exclude from loss and metrics; "1,2" excludes several."""
    threshold: Annotated[int, Field(gt=0, le=255)] | None = None
    """Lowest grey value (1 to 255) that is foreground in a soft-edged binary mask; 128 if unset."""
    swap_on_flip: tuple[tuple[str, str], ...] | None = None
    """Pairs of classes that change places in a mirror image, such as femur_left femur_right. Overrides dataset.toml.
    If unset: those whose names differ in left and right alone."""
    multilabel: bool = False
    """Classes overlap: each has an output of its own, with a sigmoid. A mask value may belong to several classes, or
    each class has its own mask files: masks/CLASS/NAME.png or masks/NAME_CLASS.png."""
    soft_masks: bool = False
    """Train on bilinearly resized binary masks without rounding them, as the public code does."""
    patient_regex: str | None = None
    """Regular expression that finds the patient in an image's path: its first group, or the whole match."""
    val_fraction: Rate = 0.2
    """Share of patients in the validation set, if the dataset declares no split."""
    test_fraction: Rate = 0.2
    """Share of patients in the test set, if the dataset declares no split."""
    split_seed: Seed = 0
    """Seed of the random split."""
    fold: Annotated[str, Field(pattern=FOLD)] | None = None
    """K/N: cut the patients into N folds and test on the K-th; the others train and validate. Declared test images are
    held out of all folds. `train --folds N` sets this for every run."""
    cache: Literal["auto", "memory", "none"] = "auto"
    """Cache of decoded images, as uint8. auto caches them in memory if they fit in a quarter of it."""
    threads: Threads = 4
    """Threads that decode images and, with data.surfaces, processes that draw them, at most one a core; the order of
    samples does not depend on their number."""
    phantoms: Count = 0
    """Number of synthetic X-rays to draw into data.root if it does not exist; 0 draws none."""
    surfaces: str | None = None
    """Folder of bone surfaces: training images are drawn from them while training, none of them twice, and data.root
    has images to validate and test on; see docs/phantoms.md. data.phantoms are drawn from them too."""

    @property
    def height_width(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.size[0], self.size[-1]

    @property
    def fold_of(self) -> tuple[int, int] | None:
        """(2, 5) for the fold 2/5; None without folds."""
        if self.fold is None:
            return None
        number, count = map(int, self.fold.split("/"))
        return number, count

    def under(self, arguments: Sequence[str]) -> "DataConfig":
        """These settings as defaults of command-line `arguments`.

        Classes given there are a whole new set, which has nothing to do with the ignore value and the threshold here.
        """
        if any(argument.split("=")[0] == "--data.classes" for argument in arguments):
            return self.without_coding()
        return self

    def without_coding(self) -> "DataConfig":
        """These settings without what they say about masks."""
        return dataclasses.replace(self, classes={}, ignore=None, threshold=None, swap_on_flip=None)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training images, drawn on the device per sample and epoch. 0 turns a transform off."""

    __pydantic_config__ = STRICT

    flip_horizontal: Fraction = 0.0
    """Probability of a left-right flip."""
    flip_vertical: Fraction = 0.0
    """Probability of a top-bottom flip."""
    rotate: NonNegative = 0.0
    """Maximum rotation in either direction, in degrees."""
    scale: Rate = 0.0
    """Maximum relative change of size: 0.1 draws a factor between 1/1.1 and 1.1."""
    translate: Rate = 0.0
    """Maximum shift, as a fraction of each side."""
    shear: NonNegative = 0.0
    """Maximum shear in either direction, in degrees."""
    elastic: NonNegative = 0.0
    """Standard deviation of a smooth random displacement field, in pixels."""
    gamma: NonNegative = 0.0
    """Maximum |log2| of the gamma exponent: 0.5 draws an exponent between 0.71 and 1.41."""
    contrast: Rate = 0.0
    """Maximum relative change of contrast around the image mean."""
    brightness: NonNegative = 0.0
    """Maximum intensity shift, as a fraction of the full range."""
    noise: NonNegative = 0.0
    """Maximum standard deviation of Gaussian noise, as a fraction of the full range."""
    blur: NonNegative = 0.0
    """Maximum standard deviation of a Gaussian blur, in pixels."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Network architecture; see docs/architecture.md."""

    __pydantic_config__ = STRICT

    name: Literal["pdrunet", "unet", "fusionnet"] = "pdrunet"
    """Network: PDR-UNet, or one to compare it with, U-Net or FusionNet (docs/baselines.md)."""
    in_channels: Side = 1
    """Image channels: 1 for grey, 3 for RGB."""
    outputs: Side | None = None
    """Output channels. 1: sigmoid; 2 or more: softmax over exclusive classes, background included.
    If unset: 1 for a dataset with one class, n + 1 for n classes, n with data.multilabel."""
    filters: Side = 40
    """Channels of every hidden layer; in unet and fusionnet of the first level, and each further level doubles them."""
    shortcut: Literal["input", "conv1"] = "input"
    """Start of a block's residual connection: its input (the public code) or its first convolution (the paper)."""
    norm: Literal["batch", "none"] = "batch"
    """Normalisation after each 3x3 convolution."""
    depth: Depth = 4
    """Levels of unet and fusionnet below the first: each halves the resolution."""
    down: Down = "max"
    """How unet and fusionnet halve the resolution: maximum over 2x2 pixels, or a 3x3 convolution with stride 2."""
    up: Up = "transposed"
    """How unet and fusionnet double the resolution: transposed convolution, or bilinear resizing and a 1x1 convolution.
    bilinear_corners aligns the centres of the corner pixels (PyTorch's align_corners)."""
    dropout: Rate = 0.3
    """Dropout rate of the two dropout layers of pdrunet and unet; fusionnet has none."""
    conv: Literal["auto", "plain", "fused", "polyphase", "native", "pallas"] = "auto"
    """Execution path of the 3x3 convolutions. Affects speed and memory only; results agree up to rounding.
    native is for one CPU and needs a C++ compiler; auto takes it where it can. pallas is for pdrunet on one NVIDIA GPU
    and trains more slowly than auto, which never takes it."""
    init: Literal["torch", "he"] = "torch"
    """Weight initialisation: PyTorch's defaults, or He normal with zero biases."""

    def conflicts(self) -> list[str]:
        """List options that the network does not have."""
        others = [f"model.{option} is no option of {self.name}" for option in self._absent() if self._given(option)]
        if self.conv == "pallas" and self.name != "pdrunet":
            others.append(f"model.conv = pallas is for pdrunet; use model.conv = auto with {self.name}")
        return others

    def of(self, name: str) -> dict[str, Any]:
        """These options for the network `name`, without those that it lacks."""
        absent = ModelConfig(name=name)._absent()  # type: ignore[arg-type]
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key not in absent}
        return {**kept, "name": name}

    def wiring(self) -> dict[str, Any]:
        """The options that decide which arrays the network has and what they mean."""
        return {option: getattr(self, option) for option in WIRING if option not in self._absent()}

    def _absent(self) -> tuple[str, ...]:
        return ("depth", "down", "up") if self.name == "pdrunet" else ("shortcut",)

    def _given(self, option: str) -> bool:
        return bool(getattr(self, option) != getattr(type(self), option))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Loss."""

    __pydantic_config__ = STRICT

    name: Literal["bce", "dice", "bce_dice", "focal", "tversky", "ce", "ce_dice"] | None = None
    """Loss function. bce, bce_dice and focal need one output or data.multilabel, ce and ce_dice exclusive classes; dice
    and tversky take either. If unset: bce_dice for one output and data.multilabel, else ce_dice."""
    dice_weight: Fraction = 0.5
    """Weight of the Dice term in bce_dice and ce_dice; cross-entropy has the rest."""
    class_weights: Literal["balanced"] | tuple[NonNegative, ...] = ()
    """Class weights in the loss, background first: one per output, or two for a single output. With data.multilabel
    one per class, without background, or two per class: outside and inside it. balanced: computed from the training
    masks, so that each class has the same weight in all (docs/going_on.md)."""
    focal_gamma: NonNegative = 2.0
    """Focusing exponent of the focal loss."""
    tversky_alpha: NonNegative = 0.3
    """Weight of false positives in the Tversky index; false negatives have 1 - alpha."""
    smooth: NonNegative = 1.0
    """Smoothing of soft Dice and Tversky, in pixels, added to numerator and denominator; keeps empty masks finite."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    __pydantic_config__ = STRICT

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "polynomial", "onecycle"] = "constant"
    """Learning-rate schedule after the warm-up. onecycle includes a warm-up over 30 % of the run."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from zero."""
    restarts: tuple[Positive, ...] = ()
    """Steps at which the schedule starts again, each time for the steps up to the next restart or the end."""
    final_fraction: Fraction = 0.0
    """Final learning rate of cosine and polynomial, as a fraction of the peak."""
    power: PositiveFloat = 0.9
    """Exponent of the polynomial schedule."""
    b1: Rate = 0.9
    """Adam beta1: decay of the first moment."""
    b2: Rate = 0.999
    """Adam beta2: decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Adam epsilon."""
    weight_decay: NonNegative = 0.0
    """Weight decay: L2 penalty for adam and sgd, as in PyTorch; decoupled for adamw."""
    momentum: Rate = 0.9
    """SGD momentum."""
    nesterov: bool = True
    """Use Nesterov momentum in sgd."""
    clip_norm: NonNegative = 0.0
    """Maximum global gradient norm; 0 turns clipping off."""
    ema: Rate = 0.0
    """Decay of an exponential moving average (EMA) of the weights and of batch normalisation's running statistics, used
    for validation and export; 0 turns it off."""
    accumulate: Positive = 1
    """Gradient accumulation: micro-batches per update; must divide train.batch_size."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training loop."""

    __pydantic_config__ = STRICT

    weights: str | None = None
    """Weights to start from instead of random ones: run folder, checkpoint, .safetensors or public .pth, or a name of
    weights that come with the package."""
    freeze: tuple[str, ...] = ()
    """Layers of train.weights to freeze, by name or pattern: e1 or 'encoder_*' (docs/going_on.md). Their weights and
    running statistics stay as they are."""
    steps: Positive = 10_000
    """Weight updates in the whole run."""
    patience: Count = 0
    """Early stopping: end after this many validations without a better Dice; 0 turns it off."""
    batch_size: Positive = 8
    """Images per update."""
    eval_batch_size: Positive | None = None
    """Images per validation batch; train.batch_size if unset."""
    precision: Literal["float32", "tf32", "bfloat16", "float64"] = "float32"
    """Precision of the convolutions. bfloat16 keeps weights, statistics and loss in float32; float64 is for tests."""
    remat: bool = False
    """Rematerialisation, to save memory: keep only block inputs and recompute the rest for the gradient."""
    log_every: Positive = 10
    """Steps between lines in metrics.jsonl."""
    eval_every: Positive = 500
    """Steps between validations."""
    save_every: Positive = 500
    """Steps between checkpoints."""
    keep_latest: Positive = 2
    """Number of latest checkpoints to keep."""
    keep_best: Positive = 1
    """Number of best checkpoints, by validation Dice, to keep in addition."""
    samples: Count = 4
    """Validation images to draw with their predictions at each validation."""
    deterministic: bool = False
    """Bit-identical repetition on GPUs, at some cost in speed. CPU runs always repeat."""


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases (W&B), in addition to the local metrics.jsonl."""

    __pydantic_config__ = STRICT

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B mode. auto: as WANDB_MODE says; else online when logged in, or offline."""
    project: str = "pdrunet-jax"
    """W&B project. The default gives way to WANDB_PROJECT."""
    entity: str | None = None
    """W&B user or team; WANDB_ENTITY if unset."""
    name: str | None = None
    """W&B run name; WANDB_NAME or the name of the run folder if unset."""
    tags: tuple[str, ...] = ()
    """W&B tags; WANDB_TAGS if unset."""
    artifact: bool = False
    """Upload best.safetensors as a W&B artifact when training ends."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    __pydantic_config__ = STRICT

    seed: Seed = 0
    """Seed of initial weights, sample order, augmentation and dropout."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)


def load(name: str | Path) -> Config:
    """Load a configuration by path or name.

    Looks for a file `name`, then `configs/NAME.toml`, then a shipped configuration NAME. Raises `UserError` if there is
    none or it is invalid.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.exists():
            raise UserError(f"--config {name}: no such file")
        return read(path)
    for candidate in (path, Path("configs") / f"{name}.toml"):
        if candidate.is_file():
            return read(candidate)
    shipped = resources.files("pdrunet_jax") / "configs"
    if not shipped.is_dir():  # an editable install: the configurations are next to the package
        shipped = resources.files("pdrunet_jax").joinpath("..", "configs")
    names = sorted(item.name.removesuffix(".toml") for item in shipped.iterdir() if item.name.endswith(".toml"))
    if str(name) in names:
        return parse((shipped / f"{name}.toml").read_text(encoding="utf-8"), f"configuration {name}")
    raise UserError(
        f"--config {name}: no such file, and no configs/{name}.toml; give a TOML file or one of the shipped "
        f"configurations: {', '.join(names)}"
    )


def read(path: Path) -> Config:
    """Read a TOML file; raises `UserError` that names it."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Config:
    """Parse TOML `text`; raises `UserError` that names `source`."""
    try:
        values = tomllib.loads(text)
    except ValueError as error:  # also a number of thousands of digits
        raise UserError(f"{source} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; refused") from None
    values.pop("environment", None)  # versions recorded in a run's config.toml, not settings
    return from_dict(values, source)


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Build and check a `Config` from nested dictionaries; missing settings keep their defaults.

    Settings of removed features are dropped where they are off, so that run folders of earlier versions stay readable.
    Raises `UserError` that names `source` (a file or option) and lists every unknown key, wrong type and value out of
    bounds.
    """
    train = values.get("train")
    if isinstance(train, Mapping) and train.get("spike", "off") == "off":  # version 0.1 wrote it into every config.toml
        kept = {key: value for key, value in train.items() if key not in ("spike", "spike_factor", "spike_window")}
        values = {**values, "train": kept}
    try:
        config = _adapter().validate_python(values)
    except ValidationError as error:
        raise DataError(f"{source} is not a valid configuration", map(_explain, error.errors())) from None
    problems = [
        f"{key}: NUL characters are not allowed" for key, item in _flat(values).items() if "\0" in f"{key}{item}"
    ]
    if problems := problems or _conflicts(config):
        raise DataError(f"{source} is not a valid configuration", problems)
    return config


def check(config: Config, source: str) -> Config:
    """Check a `Config` built without validation, for example from the command line; raises as `from_dict`."""
    return from_dict(to_dict(config, none=True), source)


def to_dict(config: Config, *, none: bool = False) -> dict[str, Any]:
    """Convert to nested dictionaries, without settings that are None (TOML has no null) unless `none`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if none or item is not None}
        return list(value) if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def to_toml(config: Config, header: str = "") -> str:
    """Format as TOML, with the lines of `header` as comments at the top."""
    comment = "".join(f"# {line}\n" if line else "#\n" for line in header.splitlines())
    return comment + tomli_w.dumps(to_dict(config))


def diff(old: Config, new: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """List the settings that differ, one line each: `optim.learning_rate: 0.001 -> 0.003`.

    `ignore` names settings (`train.steps`) and sections (`tracking`) to leave out.
    """
    before, after = _flat(to_dict(old, none=True)), _flat(to_dict(new, none=True))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in ignore and key.split(".")[0] not in ignore
    ]


def settings_digest(config: Config) -> str:
    """SHA-256 of the settings that decide the result of a run, all but `MAY_CHANGE`.

    Settings at their default are left out, so that a setting added later changes no digest.
    """
    return hashlib.sha256("\n".join(diff(Config(), config, ignore=MAY_CHANGE)).encode()).hexdigest()


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
    """Describe a pydantic error in terms of settings."""
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


def _conflicts(config: Config) -> list[str]:
    """List settings that are valid one by one but not together."""
    train, optim, data = config.train, config.optim, config.data
    problems = config.model.conflicts()
    if config.model.name != "pdrunet" and min(data.size) < (least := 2 ** (config.model.depth + 1)):
        problems.append(f"data.size must be at least {least} for model.depth = {config.model.depth}")
    if train.batch_size % optim.accumulate:
        problems.append(f"optim.accumulate = {optim.accumulate} must divide train.batch_size = {train.batch_size}")
    if optim.warmup_steps >= train.steps:
        problems.append(f"optim.warmup_steps = {optim.warmup_steps} must be less than train.steps = {train.steps}")
    starts = (0, *optim.restarts, train.steps)
    if optim.restarts and min(after - before for before, after in pairwise(starts)) <= optim.warmup_steps:
        problems.append(
            f"optim.restarts = {list(optim.restarts)} must rise, be less than train.steps = {train.steps}, and leave "
            f"more than optim.warmup_steps = {optim.warmup_steps} steps each"
        )
    if train.freeze and train.weights is None:
        problems.append("train.freeze keeps layers as they are, and without train.weights they would be random")
    if data.val_fraction + data.test_fraction >= 1:
        problems.append("data.val_fraction + data.test_fraction must be less than 1, to leave patients to train on")
    if data.fold_of and not (data.fold_of[0] <= data.fold_of[1] >= 2):
        problems.append(f"data.fold = {data.fold}: give K/N with N of at least 2 and K from 1 to N, such as 2/5")
    if data.spacing is not None and data.fit != "pad":
        problems.append("data.spacing keeps the scale of images, and data.fit = stretch changes it; set data.fit = pad")
    if data.surfaces is not None:
        problems += [
            f"data.{name} is not for training images that are drawn from data.surfaces; leave it out"
            for name in ("soft_masks", "spacing")
            if getattr(data, name)
        ]
    if data.soft_masks and data.fit == "pad":
        problems.append("data.soft_masks has no value for padding; set data.fit = stretch, or switch soft masks off")
    if data.soft_masks and data.multilabel:
        problems.append("data.soft_masks needs one class, and data.multilabel several; switch one of them off")
    if data.soft_masks and len(data.classes) > 1:
        problems.append("data.soft_masks needs a dataset with one class, and data.classes declares several")
    return problems

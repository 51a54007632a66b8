"""Load trained weights from a run folder, one of its checkpoints, a weights file, or the Hugging Face Hub."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from pydantic import Field, TypeAdapter, ValidationError

from pdrunet_jax import config
from pdrunet_jax.config import WIRING, Depth, Down, ModelConfig, Side, Up
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.build import build
from pdrunet_jax.model.ensemble import Ensemble
from pdrunet_jax.model.files import read_weights
from pdrunet_jax.model.folds import find_folds, started_folds
from pdrunet_jax.model.hub import locate, require_config
from pdrunet_jax.model.shipped import resolve_weights, shipped_names
from pdrunet_jax.model.sides import mirror_of
from pdrunet_jax.model.weights import from_public, to_public
from pdrunet_jax.runtime.devices import start_devices
from pdrunet_jax.runtime.digest import CONTENT, SETTINGS, content_digest
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import is_present
from pdrunet_jax.runtime.run_folder import RunFolder

Which = Literal["best", "latest"]

_FORMS: dict[str, TypeAdapter[Any]] = {
    "size": TypeAdapter(Annotated[tuple[Side, ...], Field(min_length=1, max_length=2)] | None),
    "class_names": TypeAdapter(tuple[str, ...] | None),
    "multilabel": TypeAdapter(Annotated[bool, Field(strict=True)] | None),
    "fit": TypeAdapter(Literal["stretch", "pad"] | None),
    "spacing": TypeAdapter(Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None),
    "depth": TypeAdapter(Depth | None),
    "down": TypeAdapter(Down | None),
    "up": TypeAdapter(Up | None),
}
"""Options that weights may state and arrays do not show, or not always."""

MODEL_OPTIONS = (*WIRING, "dropout")
"""Options of the network that are stored with its weights."""

_OF_A_FOLD = ("step", "val_dice", "threshold")
"""Options in which the weights of folds may differ."""

PUBLIC_DEFAULTS: dict[str, Any] = {"name": "pdrunet", "shortcut": "input", "dropout": 0.3}
"""Options of the public code, which its files do not state."""


class Loaded(NamedTuple):
    """Weights, and everything that their source says about them."""

    options: dict[str, Any]
    """`MODEL_OPTIONS` that the network has, and entries that training added: size, class_names, ..."""
    params: nnx.State[Any, Any]
    stats: nnx.State[Any, Any]
    notes: tuple[str, ...]
    """Sentences on anything unwrapped, dropped, widened or assumed."""
    source: str = ""
    """The file of a PyTorch checkpoint, which others have written; empty for what this package writes."""
    members: tuple["Loaded", ...] = ()
    """The weights of each fold, if this is an ensemble; the arrays here are those of the first."""
    files: tuple[Path, ...] = ()
    """The file that all this is from; none for a checkpoint."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) that the weights were trained at, where known."""
        size = self.options.get("size")
        return (int(size[0]), int(size[-1])) if size else None

    @property
    def fit(self) -> Literal["stretch", "pad"]:
        """How images are brought to that size, as `data.fit`; weights that state nothing were trained stretched."""
        return "pad" if self.options.get("fit") == "pad" else "stretch"

    @property
    def spacing(self) -> float | None:
        """Mm per pixel that images are resampled to, as `data.spacing`."""
        return self.options.get("spacing")

    @property
    def multilabel(self) -> bool:
        """Whether classes overlap, as `data.multilabel`."""
        return bool(self.options.get("multilabel", False))


def load_model(
    weights: str | Path,
    *,
    shortcut: str | None = None,
    up: str | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    conv: str = "auto",
    which: Which = "best",
) -> Network:
    """Load a trained network, ready to be called on images (N, H, W, C) in [0, 1].

    Args:
        weights: a run folder, a checkpoint in it, a `.safetensors` file, or a PyTorch checkpoint of the public network,
            as training scripts save it: what is taken of it and what is left is printed on standard error. A folder
            with all folds of a cross-validation gives an `Ensemble`, which averages their probabilities. A folder that
            `export --format hub` wrote, or `hf://OWNER/NAME` on the Hugging Face Hub, which is downloaded once. Or a
            name of weights that come with the package, where no path has that name.
        shortcut: "conv1" for a `.pth` with the paper's wiring, which such files cannot state; other sources state it.
        up: likewise "bilinear_corners" for a `.pth` of a network with bilinear resizing that aligns the corners.
        dtype: arithmetic of the convolutions; the parameters' dtype when None.
        param_dtype: dtype of parameters and logits; None keeps the file's (float64 only where JAX has it enabled).
        conv: execution path, as `model.conv`.
        which: "best" or "latest" checkpoint of a run folder. A damaged one gives way to an intact one, with a warning.

    Raises:
        UserError: the source does not exist, is damaged, or does not hold a PDR-UNet; every wrong array is named. Or
            folds are missing, or not of one training.
    """
    loaded = load_any(weights, shortcut=shortcut, up=up, which=which)
    return build_loaded(loaded, dtype=dtype, param_dtype=param_dtype, conv=conv)


def build_loaded(
    loaded: Loaded, *, dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None, conv: str = "auto"
) -> Network:
    """Build the network of `load_weights`. Arguments and errors as for `load_model`."""
    if loaded.members:
        options = {"dtype": dtype, "param_dtype": param_dtype, "conv": conv}
        return Ensemble([build_loaded(member, **options) for member in loaded.members])  # type: ignore[arg-type]
    report(loaded)
    start_devices()
    chosen = _param_dtype(loaded.params, param_dtype)
    options = {name: loaded.options[name] for name in MODEL_OPTIONS if name in loaded.options}

    def make() -> Network:
        settings = ModelConfig(**options, conv=conv)  # type: ignore[arg-type] # checked by the network
        return build(
            settings,
            dtype=dtype,
            param_dtype=chosen,
            size=loaded.size,
            fit=loaded.fit,
            spacing=loaded.spacing,
            multilabel=loaded.multilabel,
            rngs=nnx.Rngs(0),
        )

    def place(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array.astype(chosen) if array.dtype.kind == "f" else array)

    graph = nnx.graphdef(nnx.eval_shape(make))  # shapes only: no initial weights are drawn
    model: Network = nnx.merge(graph, jax.tree.map(place, loaded.params), jax.tree.map(place, loaded.stats))
    model.mirror = mirror_of(loaded.options, model.outputs)
    return model


def report(loaded: Loaded) -> None:
    """Print on standard error what was taken of a file that others have written, and what was left or assumed."""
    for note in loaded.notes if loaded.source else ():
        print(f"{loaded.source}: {note}", file=sys.stderr)


def load_any(
    weights: str | Path, *, shortcut: str | None = None, up: str | None = None, which: Which = "best"
) -> Loaded:
    """Read `weights` as `load_weights` does, or those of all folds in a folder of folds, for an ensemble.

    The options are those of the first fold, with the mean of the thresholds that the folds found. Arguments and errors
    as for `load_model`.
    """
    runs = find_folds(weights)
    if not runs:
        return load_weights(weights, shortcut=shortcut, up=up, which=which)
    members = tuple(load_weights(run.path, shortcut=shortcut, up=up, which=which) for run in runs)
    first, *_ = (own := [{**each.options, **dict.fromkeys(_OF_A_FOLD)} for each in members])
    if unlike := [str(run.path) for run, options in zip(runs, own, strict=True) if options != first]:
        raise UserError(f"{', '.join(unlike)}: other classes or another network than in {runs[0].path}")
    options = {key: value for key, value in members[0].options.items() if key not in _OF_A_FOLD}
    if all("threshold" in each.options for each in members):
        mean = np.mean([each.options["threshold"] for each in members], axis=0).round(6)
        options["threshold"] = mean.tolist()
    return members[0]._replace(options=options, members=members)


def load_weights(
    weights: str | Path, *, shortcut: str | None = None, up: str | None = None, which: Which = "best"
) -> Loaded:
    """Read the arrays of one network into host memory, in the dtype that they are stored in.

    Arguments and errors as for `load_model`, and `UserError` for a folder of folds.
    """
    if which not in ("best", "latest"):
        raise ValueError(f"which = {which!r}; it is best or latest")
    path = locate(resolve_weights(weights))
    if not path.exists():
        names = shipped_names() if str(weights) == path.stem else []  # a bare name, unlike the path of a file
        known = f", and the weights that come with pdrunet-jax are {', '.join(names)}" if names else ""
        raise UserError(f"{path}: there is no such file or folder{known}")
    if runs := started_folds(path):
        example = next(iter(runs.values())).path
        raise UserError(f"{path} holds {len(runs)} folds, and this takes one network: name a fold, as in {example}")
    best = path / "best.safetensors"
    if not path.is_dir():
        loaded = _from_file(path)
        require_config(path, loaded.options)
    elif which == "best" and os.path.lexists(best):
        loaded = _from_best(best)
    else:
        loaded = _from_checkpoint(path, which)
    settings = loaded.options.pop(SETTINGS, None)
    if run := find_run(path):
        _require_own(loaded.options, settings, run, best if which == "best" and os.path.lexists(best) else path)
    return _with_assumptions(loaded, path, {"shortcut": shortcut, "up": up})


def _with_assumptions(loaded: Loaded, path: Path, given: Mapping[str, str | None]) -> Loaded:
    """Complete the options by those `given` and, with a note, by assumptions on what a file does not state.

    Raises `UserError` if the file states something else, or the network has no such option.
    """
    stated, assumed = loaded.options, dict[str, str]()
    if loaded.source and stated.get("up") == "bilinear":  # the arrays do not show whether corners are aligned
        stated = {key: value for key, value in stated.items() if key != "up"}
        assumed["up"] = "bilinear"
    if stated["name"] == "pdrunet" and "shortcut" not in stated:
        assumed["shortcut"] = PUBLIC_DEFAULTS["shortcut"]
    for name, value in given.items():
        if value is not None and value != stated.get(name, value if name in assumed else None):
            has = f"{name} = {stated[name]!r}" if name in stated else f"no option {name}"
            raise UserError(f"{path} has {has}; leave the option {value!r} out")
    chosen = {name: value for name, value in given.items() if value is not None}
    options = {**PUBLIC_DEFAULTS, **assumed, **stated, **chosen}
    sources = {"shortcut": "the public code's wiring", "up": "without aligned corners"}
    notes = tuple(
        f"assumed {name} = {value!r}, {sources[name]}, which the file does not state"
        for name, value in assumed.items()
        if name not in chosen
    )
    return loaded._replace(options=options, notes=loaded.notes + notes)


def find_run(weights: str | Path) -> RunFolder | None:
    """Find the run folder that `weights` is or belongs to; None if there is none."""
    path = Path(weights)
    places = [path, path.parent if path.name == "best.safetensors" else path]
    if path.absolute().parent.name == "checkpoints":
        places.append(path.absolute().parent.parent)
    return next((RunFolder(place) for place in places if is_present(place / "config.toml")), None)


def restore_weights(path: str | Path, which: Which = "best") -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read parameters and statistics, as nested dictionaries of arrays, and model options from a checkpoint.

    `choose_intact` finds the checkpoint. Its averaged weights are taken where the run keeps an average. The options are
    `extra["options"]` of the checkpoint; what an older one lacks comes from the run's config.toml. Raises `UserError`
    if no checkpoint is intact.
    """
    from pdrunet_jax.runtime.checkpoint import choose_intact, read_meta, read_state  # Orbax, needed here only

    folder = choose_intact(Path(path), which)
    state, meta = read_state(folder), read_meta(folder)
    options: dict[str, Any] = {}
    run = RunFolder(folder.parent.parent)
    if is_present(run.config_file):
        settings = config.read(run.config_file)
        options = config.to_dict(settings)["model"]
        if "options" not in meta["extra"]:  # before version 0.2
            options |= {"size": list(settings.data.height_width)}
            options |= {"class_names": list(settings.data.classes)} if settings.data.classes else {}
    params, stats = state.get("ema") or state["params"], state.get("ema_stats") or state.get("stats", {})
    options |= meta["extra"].get("options", {})
    options |= {SETTINGS: meta["extra"][SETTINGS]} if SETTINGS in meta["extra"] else {}
    return params, stats, options


def _from_best(best: Path) -> Loaded:
    """Load a run folder's best weights; if that file is damaged, the checkpoint that it was made from."""
    from pdrunet_jax.runtime.checkpoint import is_checkpoint

    try:
        return _from_file(best)
    except UserError as error:
        if not is_checkpoint(best.parent):
            raise
        print(f"warning: {error}; using the best checkpoint instead", file=sys.stderr)
        return _from_checkpoint(best.parent, "best")


def _from_file(path: Path) -> Loaded:
    file = read_weights(path)
    stated = file.options.pop(CONTENT, None)
    if stated is not None and stated != content_digest(file.arrays, file.options):
        raise UserError(f"{path} is damaged: its arrays or options are not what was written")
    imported = from_public(file.arrays, str(path))
    _check_options(file.options, imported.options, path)
    notes, source = file.notes + imported.notes, "" if file.options else str(path)
    options = {**file.options, **imported.options} | {key: file.options[key] for key in ("up",) if key in file.options}
    return Loaded(options, imported.params, imported.stats, notes, source, files=(path,))


def _from_checkpoint(path: Path, which: Which) -> Loaded:
    from pdrunet_jax.runtime.checkpoint import is_checkpoint

    if not is_checkpoint(path):
        raise UserError(f"{path} is not a run folder: it has neither best.safetensors nor a checkpoint")
    params, stats, options = restore_weights(path, which)
    # To the public names and back: one place checks that every array is there and has its shape.
    imported = from_public(to_public(params, stats, dead_block=False), str(path))
    _check_options(options, imported.options, path)
    return Loaded({**imported.options, **options}, imported.params, imported.stats, imported.notes)


def _require_own(stated: Mapping[str, Any], settings: str | None, run: RunFolder, path: Path) -> None:
    """Raise `DataError` if weights in a run folder are of another network or other settings than the run.

    `settings` is the digest stored with them; older weights have none.
    """
    try:
        own = config.read(run.config_file)
    except UserError:  # a damaged config.toml: whoever needs its settings reports that
        return
    wanted = {name: getattr(own.model, name) for name in WIRING} | {"size": list(own.data.height_width)}
    wanted |= {"fit": own.data.fit, "spacing": own.data.spacing, "multilabel": own.data.multilabel}
    problems = [
        f"{name} is {value} in config.toml, {stated[name]} in the weights"
        for name, value in wanted.items()
        if value is not None and stated.get(name, value) != value
    ]
    if not problems and settings not in (None, config.settings_digest(own)):
        problems = ["settings of data or training differ"]
    if problems:
        remedy = "restore the one that was replaced or edited, or move the weights out of the folder"
        raise DataError(f"{path} and {run.config_file} are not of one run; {remedy}", problems)


def _check_options(stated: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Raise `UserError` where the options that the source states contradict its arrays."""
    problems = [
        f"{name} is stated as {stated[name]!r}, but the arrays show {value!r}"
        for name, value in found.items()
        if stated.get(name, value) not in (value, f"{value}_corners" if name == "up" else value)
    ]
    if stated.get("shortcut", "input") not in ("input", "conv1"):
        problems.append(f"shortcut is stated as {stated['shortcut']!r}; it is 'input' or 'conv1'")
    rate = stated.get("dropout", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        problems.append(f"dropout is stated as {rate!r}; it is a number from 0 to below 1")
    for name, form in _FORMS.items():
        try:
            form.validate_python(value := {**found, **stated}.get(name))
        except ValidationError as error:
            problems.append(f"{name} is {value!r:.100}; {error.errors()[0]['msg']}")
    if stated.get("multilabel") and found.get("outputs") == 1:
        problems.append("multilabel is stated as true, which needs several outputs")
    if problems:
        raise DataError(f"{path} contradicts itself", problems)


def _param_dtype(params: nnx.State[Any, Any], wanted: DTypeLike | None) -> np.dtype[Any]:
    stored = jax.tree.leaves(params)[0].dtype
    chosen = jnp.dtype(stored if wanted is None else wanted)
    possible = jax.dtypes.canonicalize_dtype(chosen)  # float32 for float64, unless JAX has 64 bits enabled
    if wanted is not None and possible != chosen:
        raise UserError(f"param_dtype = {chosen} needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")
    return possible

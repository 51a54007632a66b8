"""What several processes of one run have to agree on: settings, data, where to resume, when to stop."""

import dataclasses
import tomllib
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import tomli_w
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pdrunet_jax import config as config_io
from pdrunet_jax.config import Config
from pdrunet_jax.model.sharding import check_images
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.devices import ROWS, make_mesh
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder, environment
from pdrunet_jax.runtime.stop import SIGNALS, StopFlag
from pdrunet_jax.train.loop import train

if TYPE_CHECKING:
    from pdrunet_jax.config import Config
    from pdrunet_jax.data.dataset import Dataset
    from pdrunet_jax.runtime.run_folder import RunFolder
    from pdrunet_jax.train.options import TrainOptions

MAY_CHANGE = ("tracking", "data.root", "data.threads", "data.cache")
"""Settings that a resumed run may change: none of them has a part in the result. Wherever the data lie now, their
fingerprint has to be the one that the checkpoints were saved with."""


def record(run: RunFolder, config: Config, device: str = "") -> None:
    """Write config.toml, or compare `config` with the one the run was started with.

    A restart adds its time and the versions that changed. Raises `UserError` with the difference, and when the
    present config.toml cannot be read.
    """
    header = "What this run uses; written by the program. Start it again with the same settings to resume."
    now = environment(device)
    if run.config.exists():
        changed = config_io.diff(config_io.read(run.config), config, ignore=MAY_CHANGE)
        if changed:
            raise UserError(
                f"{run.path} holds a run with other settings:\n"
                + "\n".join(f"  - {line}" for line in changed)
                + "\nGive the earlier settings to resume it, or choose another --workdir for a new run."
            )
        started: dict[str, Any] = tomllib.loads(run.config.read_text(encoding="utf-8")).get("environment", {})
        other = {key: value for key, value in now.items() if started.get(key) != value}
        now = {**started, "restarts": [*started.get("restarts", []), other]}
    with writing(run.config):
        atomic_write(run.config, config_io.to_toml(config, header) + "\n" + tomli_w.dumps({"environment": now}))


def open_run(path: str | Path, config: Config, device: str = "") -> RunFolder:
    """Make the run folder `path` with its config.toml, or reopen it if it holds a run with the same settings.

    Raises `UserError` with the difference if the settings differ (those of `MAY_CHANGE` may), or when another process
    has the folder; `RunError` when it cannot be written.
    """
    run = RunFolder(path)
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"--workdir {run.path} is a file; give a folder")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with run.lock():
            record(run, config, device)
    except OSError as error:
        raise RunError(f"{error.filename or run.path}: cannot be written ({error.strerror})") from None
    return run


def require_same_settings(group: Group, config: Config) -> None:
    """Raise `UserError` with the difference if this process has other settings than the first."""
    text = group.broadcast(config_io.to_toml(config))
    changed = config_io.diff(config_io.parse(text, "the first process's settings"), config, ignore=MAY_CHANGE)
    if changed:
        raise UserError(
            f"process {group.index} has other settings than the first one:\n"
            + "\n".join(f"  - {line}" for line in changed)
            + "\nGive all processes the same."
        )


class AgreedStop(StopFlag):
    """The flags of all processes as one, which is set in all of them at the same place of the program.

    Each `ask` sends this process's flag to the others, as a computation of the devices behind those of the steps, and
    receives what was sent two asks ago: the devices never wait for it. All processes have to ask equally often.
    """

    BEHIND = 2

    def __init__(self, own: StopFlag) -> None:
        super().__init__()
        self._own = own
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        self._spread = NamedSharding(mesh, PartitionSpec("devices"))
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._sent: deque[jax.Array] = deque()

    def ask(self) -> bool:
        """Exchange flags; whether any process was asked to stop before its last ask but one."""
        names = ["", "request", *(number.name for number in SIGNALS)]
        flags = np.full(jax.local_device_count(), names.index(self._own.signal or ""), np.int32)
        self._sent.append(self._highest(jax.make_array_from_process_local_data(self._spread, flags)))
        if len(self._sent) > self.BEHIND:
            self.signal = self.signal or names[int(self._sent.popleft())] or None
        return bool(self)


def choose_devices(batch_size: int, height: int, rows: int = 1) -> tuple[Mesh | None, str]:
    """The devices to train on, and what the first line should say of them: nothing for a single one.

    All of them share each batch: of one process as many as divide it, of several processes every one. A single device
    needs no mesh.

    Args:
        batch_size: images in each batch.
        height: rows of an image.
        rows: devices that share an image.

    Raises:
        UserError: the devices cannot share the batch, or the images, like this.
    """
    devices, processes = jax.devices(), jax.process_count()
    total = len(devices)
    if processes == 1:
        shares = max((n for n in range(1, total // max(rows, 1) + 1) if batch_size % n == 0), default=1)
        chosen = devices[: shares * rows] if rows > 0 and total >= rows else devices
    else:
        chosen = devices
    if len(chosen) == 1 and rows == 1:
        return None, f"1 of {total} devices: no other number divides train.batch_size {batch_size}" if total > 1 else ""
    mesh = make_mesh(rows, chosen)
    check_images(mesh, batch_size, height)
    used = f"{len(chosen)} devices"
    if len(chosen) < total:
        used = f"{len(chosen)} of {total} devices: more do not divide train.batch_size {batch_size}"
    if processes > 1:
        used = f"{processes} processes with {total // processes} device{'s' if total > processes else ''} each"
    return mesh, f"{used}{f', {mesh.shape[ROWS]} to an image' if rows > 1 else ''}"


def _run(arguments: "TrainOptions", group: Group, stop: StopFlag) -> int:
    """Check everything, then train and score; the exit code."""
    from pdrunet_jax.data.dataset import open_dataset, require_same_data
    from pdrunet_jax.runtime import devices as startup
    from pdrunet_jax.runtime.devices import Placement
    from pdrunet_jax.runtime.run_folder import RunFolder
    from pdrunet_jax.train.final import final_evaluation

    config = arguments.settings
    require_same_settings(group, config)
    device = startup.configure_jax(config.train.precision, config.train.deterministic)
    mesh, devices = choose_devices(config.train.batch_size, config.data.height_width[0], arguments.rows)
    device = ", ".join(filter(None, (device, devices)))
    group.log(device)
    with group.first_before_others():  # it may have to draw phantoms
        dataset = open_dataset(config.data)
    require_same_data(group, dataset)
    for note in dataset.notes:
        group.log(note)
    outputs = _outputs(config, dataset)
    if not dataset.of("val"):
        raise UserError(
            f"{dataset.root} has no validation images, which choose the best weights: raise --data.val-fraction, "
            "or give some patients the split val"
        )
    group.wait()  # nothing is written before all have found the same
    run = RunFolder(arguments.run_folder)
    if group.is_main and config.train.weights is not None and not run.config.exists():
        from pdrunet_jax.model.load import load_same

        # Before the folder is made, which would hold on to settings that cannot be used.
        load_same(config.train.weights, {**dataclasses.asdict(config.model), "outputs": outputs})
    agreed = AgreedStop(stop) if group.count > 1 else stop
    run = open_run(arguments.run_folder, config, device) if group.is_main else run
    with run.lock() if group.is_main else nullcontext():
        tracker = None if agreed else train(config, run, dataset, outputs, agreed, group, Placement(mesh))
        if tracker is not None and group.is_main:
            final_evaluation(config, run, dataset, tracker, stop)
    return cli.STOPPED if stop or agreed else 0


def _outputs(config: "Config", dataset: "Dataset") -> int:
    """`model.outputs`, checked against the classes of the dataset, or what follows from them."""
    classes = len(dataset.class_names)
    outputs = config.model.outputs or dataset.outputs
    if max(outputs - 1, 1) != classes:
        raise UserError(
            f"--model.outputs {outputs} does not fit the {classes} classes of {dataset.root} "
            f"({', '.join(dataset.class_names)}): leave it out, or give {classes + 1}"
        )
    if config.data.soft_masks and outputs != 1:
        raise UserError("data.soft_masks needs one output; set --model.outputs 1 or leave soft masks out")
    return outputs

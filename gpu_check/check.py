"""Compile the network for one card that is not there, and compare the programs with their budgets.

Every figure is read off the compiled program. The least times are estimates by the roofline model, not measurements.
"""

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
# Faster, and without effect on the kernels that XLA chooses.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_llvm_disable_expensive_passes=true"

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export as jax_export
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding

from gpu_check.hlo import Program
from pdrunet_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from pdrunet_jax.export.stablehlo import GraphSpec, build_stablehlo
from pdrunet_jax.predict.engines.network import compiled_forward
from pdrunet_jax.runtime.devices import MATMUL_PRECISION, batch_sharding, make_mesh, replicated
from pdrunet_jax.train.step import build_model, create_state, make_train_step

HERE = Path(__file__).parent
SHAPE = 128, 2
"""Image size and batch that the budgets are for."""
SLACK = 1.15
"""Factor between what was compiled when the budget was set, and the budget."""

PEAK = {
    "h100": (3.35e12, {"bfloat16": 989e12, "tf32": 495e12, "float32": 67e12}),
    "a100": (2.04e12, {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12}),
}
"""Memory bandwidth in bytes/s and peak in dense flop/s, from the data sheets of the SXM cards with 80 GB."""


CHANNELS_FIRST = {("a100", "float32"), ("a100", "tf32")}
"""Where XLA transposes to channels first for convolutions: of float32 arrays, whatever their products' precision."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile."""

    kind: str
    """train, infer or artifact."""
    path: str
    precision: str
    remat: bool = False
    devices: int = 1
    size: int | None = None
    """Image size in pixels, if it is always the same."""

    @property
    def name(self) -> str:
        """For example `train auto bfloat16 remat`."""
        devices = f"{self.devices} devices" if self.devices > 1 else ""
        size = f"at {self.size}" if self.size else ""
        return " ".join(filter(None, (self.kind, self.path, self.precision, "remat" * self.remat, devices, size)))


CASES = [
    *(Case("train", path, precision) for path in ("auto", "polyphase") for precision in ("bfloat16", "float32")),
    Case("train", "auto", "tf32"),
    *(Case("train", "auto", precision, remat=True) for precision in ("bfloat16", "float32")),
    Case("train", "auto", "bfloat16", devices=8),
    *(Case("infer", path, precision) for path in ("auto", "plain") for precision in ("bfloat16", "float32")),
    Case("artifact", "plain", "float32"),
    Case("train", "pallas", "bfloat16"),
    Case("train", "pallas", "bfloat16", remat=True),
    Case("train", "pallas", "float32"),
    *(Case("infer", "pallas", precision) for precision in ("bfloat16", "float32")),
    Case("train", "auto", "bfloat16", size=100),  # no multiple of the dilations from 8 on
]
LONG_FORM = [
    Case("train", "polyphase", "float32"),
    Case("train", "auto", "tf32"),
    Case("train", "auto", "float32", remat=True),
    Case("train", "pallas", "bfloat16", remat=True),
    Case("train", "pallas", "float32"),
]
"""Cases left out by default: combinations of a path with a precision or rematerialisation, each of which is checked in
another case. TF32, and training by the Pallas kernels in float32, are compiled only with them."""
CONTROL = Case("train", "plain", "bfloat16")
"""Must fail: XLA computes its filter gradients as convolutions with an image in the place of a kernel."""


def check(
    target: str, *, size: int, batch: int, only: Sequence[str], every: bool, update: bool, output: str | None
) -> int:
    """Compile the cases for the card `target`; returns 1 if one does not keep its budget. Options as in `__main__`."""
    # The package asks for the platform while it traces.
    jax.default_backend = lambda: "gpu"
    budgets = HERE / "budgets" / f"{target}.json"
    use = budgets.is_file() and (size, batch) == SHAPE and not update
    known = json.loads(budgets.read_text(encoding="utf-8")) if use else {}
    found, failures = {}, []
    for case in [*CASES, CONTROL]:
        wanted = any(word in case.name for word in only) if only else every or update or case not in LONG_FORM
        if not wanted:
            continue
        began = time.monotonic()
        figures = found[case.name] = measure(case, target, case.size or size, batch)
        problems = list(problems_of(figures, known.get(case.name), (target, case.precision) in CHANNELS_FIRST))
        if case == CONTROL:
            problems = [] if figures["wide windows"] else ["the negative control has no wide window"]
        failures += [f"{target} {case.name}: {problem}" for problem in problems]
        shown = f"{figures['launches']:,} launches, {figures['passes']:.0f} passes, {figures['temporary']:.0f} kept"
        seconds = time.monotonic() - began
        print(f"{'FAIL' if problems else 'ok':4} {target} {case.name}: {shown} ({seconds:.0f} s)", flush=True)
    for failure in failures:
        print(f"error: {failure}")
    for path in filter(None, (Path(output) if output else None, budgets if update else None)):
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # of the cases left out now
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept | found, indent=2) + "\n", encoding="utf-8")
    return int(bool(failures))


def problems_of(figures: Mapping[str, Any], known: Mapping[str, Any] | None, channels_first: bool) -> Iterator[str]:
    """What is wrong with a program, given the figures of the one that its budget comes from."""
    if figures["wide windows"]:
        yield f"{figures['wide windows']} convolutions have an image in the place of a kernel"
    for target in figures["calls"]:
        if re.search("callback|onednn|ynn", target, re.IGNORECASE):
            yield f"it calls {target}: the host, or a library of the CPU"
    if foreign := [layout for layout in figures["layouts"] if not (layout.startswith("b01f") or channels_first)]:
        yield f"convolutions are laid out as {', '.join(foreign)}, not as the activations (b01f)"
    for name in ("launches", "passes", "temporary") if known else ():
        if figures[name] > (most := SLACK * known[name]):
            yield f"{figures[name]:,.0f} {name}, over the budget of {most:,.0f}"
    if known and figures["all-reduces"] != known["all-reduces"]:
        yield f"{figures['all-reduces']} sums over devices, {known['all-reduces']} expected"


def measure(case: Case, target: str, size: int, batch: int) -> dict[str, Any]:
    """Compile a case for the card `target`; returns its figures, with passes and memory in units of one activation."""
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION[case.precision])
    config = Config(
        model=ModelConfig(conv=case.path),
        data=DataConfig(size=(size,)),
        train=TrainConfig(batch_size=batch * case.devices, precision=case.precision, remat=case.remat),
    )
    topology = (HERE / "targets" / f"{target}.txtpb").read_text(encoding="utf-8")
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=topology, topology=f"1x1x{case.devices}"
    ).devices
    compiled = {"train": compile_step, "infer": compile_inference, "artifact": compile_artifact}[case.kind](
        config, devices
    )
    program = Program(compiled.as_text())
    activation = batch * size * size * config.model.filters * (2 if case.precision == "bfloat16" else 4)
    bandwidth, peaks = PEAK[target]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {
        "launches": program.launches,
        "passes": program.bytes / activation,
        "temporary": temporary / activation,
        "gigabytes": program.bytes / 1e9,
        "temporary gigabytes": temporary / 1e9,
        "least milliseconds": 1e3 * program.seconds(bandwidth, peaks[case.precision]),
        "wide windows": program.wide_windows,
        "all-reduces": program.all_reduces,
        "calls": dict(program.targets),
        "layouts": dict(program.layouts),
    }


def compile_step(config: Config, devices: Sequence[Any]) -> Any:
    """Compile the training step."""
    size, batch = config.data.height_width, config.train.batch_size
    mesh = make_mesh(devices) if len(devices) > 1 else None
    alone = SingleDeviceSharding(devices[0])
    whole, part = (replicated(mesh), batch_sharding(mesh)) if mesh else (alone, alone)
    graph, state = create_state(config, build_model(config, 1))
    data = {
        "image": jax.ShapeDtypeStruct((batch, *size, 1), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((batch, *size), jnp.uint8),
        "index": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "epoch": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    return make_train_step(config, graph, 1, mesh).lower(shapes(state, whole), shapes(data, part)).compile()


def compile_inference(config: Config, devices: Sequence[Any]) -> Any:
    """Compile the forward pass of evaluation and prediction."""
    where = SingleDeviceSharding(devices[0])
    graph, state = nnx.split(build_model(config, 1))
    images = jax.ShapeDtypeStruct((config.train.batch_size, *config.data.height_width, 1), jnp.uint8, sharding=where)
    return compiled_forward().lower(graph, shapes(state, where), images).compile()


def compile_artifact(config: Config, devices: Sequence[Any]) -> Any:
    """Compile the CUDA part of an exported StableHLO artifact."""
    size = config.data.height_width
    data = build_stablehlo(build_model(config, 1), GraphSpec(size, 0.5, tall_first=True))
    where = SingleDeviceSharding(devices[0])
    images = jax.ShapeDtypeStruct((config.train.batch_size, *size, 1), jnp.uint8, sharding=where)
    return jax.jit(jax_export.deserialize(bytearray(data)).call).lower(images).compile()


def shapes(tree: Any, where: Sharding) -> Any:
    """Shapes and types of arrays, placed `where`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


if __name__ == "__main__":
    sys.exit(check(**json.loads(sys.argv[1])))

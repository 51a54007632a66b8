"""python -m benchmarks.predict_commands: whole predict commands beside ten-line scripts that do the same by hand.

Every run is a process of its own; commands and scripts take turns, and medians count. The scripts read an image with
Pillow, resize it, run the network, resize the probability and write the mask: no checks, records, tables or resuming.
The store of the commands is warm. Wall time is what a user waits for; CPU time depends less on what else runs.
"""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks import machine, output

SIZE, SIDE = 256, 512  # of the network's input, and of the images

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
{prepare}
for path in sorted(Path(sys.argv[1]).glob("*.png")):
    image = Image.open(path).convert("L")
    x = np.asarray(image.resize(({size}, {size}), Image.Resampling.BILINEAR), np.float32)[None, None] / np.float32(255)
    logits = {run}
    probability = Image.fromarray(1 / (1 + np.exp(-logits[0, 0]))).resize(image.size, Image.Resampling.BILINEAR)
    Image.fromarray((np.asarray(probability) > 0.5).astype(np.uint8) * 255).save(Path(sys.argv[2]) / path.name)
"""
ENGINES = {
    "onnxruntime": (
        "import onnxruntime\n"
        'session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])',
        'session.run(None, {"images": x})[0]',
    ),
    "openvino": (
        'import openvino\nnetwork = openvino.compile_model("network.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        "network(x)[0]",
    ),
    "torch": (
        "import torch\nfrom pdrunet_torch_ref import PDRUNet\n"
        'network = PDRUNet(filters={filters}, dead_block=False)\nnetwork.load_state_dict(torch.load("weights.pth"))\n'
        "network.eval().to(memory_format=torch.channels_last)\ntorch.set_grad_enabled(False)",
        "network(torch.from_numpy(x).contiguous(memory_format=torch.channels_last)).numpy()",
    ),
}
"""How a script prepares the network and runs it."""


LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps({"wall_s": seconds, "cpu_s": cpu, "peak_mib": usage.ru_maxrss / 1024}))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process that starts another: Linux counts the memory of the one that starts it in a process's peak."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure whole predict commands and scripts, on one image and on many."""

    images: int = 50
    """Images of 512x512 pixels."""
    filters: int = 40
    """Channels of every hidden layer."""
    rounds: int = 5
    """Runs per figure; the median is reported."""
    only: str = ""
    """Run only contenders whose name contains this."""
    output: Path | None = None
    """JSON file for the results."""


def make_inputs(folder: Path, options: Options) -> None:
    """Images, weights in all formats, and scripts."""
    import torch
    from flax import nnx

    from pdrunet_jax.config import ModelConfig
    from pdrunet_jax.data.phantoms.phantom import draw
    from pdrunet_jax.model.build import build
    from pdrunet_jax.model.files import write_safetensors
    from pdrunet_jax.model.layers import split_state
    from pdrunet_jax.model.weights import to_public
    from pdrunet_jax.predict.engines.loading import network_graph

    model = build(ModelConfig(filters=options.filters), rngs=nnx.Rngs(0))
    arrays = to_public(*split_state(model)[1:], dead_block=False)
    write_safetensors(folder / "weights.safetensors", arrays, {"shortcut": "input", "dropout": 0.3, "size": [SIZE]})
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}, folder / "weights.pth")
    (folder / "network.onnx").write_bytes(network_graph(model, (SIZE, SIZE)))
    for name, count in (("one", 1), ("many", options.images)):
        (folder / name).mkdir()
        for number in range(count):
            Image.fromarray(draw(number, size=SIDE).image).save(folder / name / f"{number:03}.png")
    for name, (prepare, run) in ENGINES.items():
        prepare = prepare.replace("{filters}", str(options.filters))
        (folder / f"script_{name}.py").write_text(SCRIPT.format(prepare=prepare, run=run, size=SIZE))


def contenders(inputs: str, out: str) -> dict[str, list[str]]:
    """Command lines by name."""
    predict = ["-m", "pdrunet_jax.predict", inputs, "--weights", "weights.safetensors", "--output", out]
    kinds = {
        "jax": ["--engine", "jax"],
        "onnxruntime": ["--engine", "onnxruntime"],
        "openvino": ["--engine", "openvino"],
        "openvino bfloat16": ["--engine", "openvino", "--precision", "bfloat16"],
    }
    commands = {f"predict {kind}": [*predict, *more, "--no-overlay"] for kind, more in kinds.items()}
    if inputs == "many":
        commands |= {f"predict {kind}, overlays": [*predict, *more] for kind, more in kinds.items()}
    return commands | {f"script {name}": [f"script_{name}.py", inputs, out] for name in ENGINES}


def timed(command: Sequence[str], folder: Path) -> dict[str, float]:
    """Wall and CPU seconds of a process, and its peak memory."""
    environment = machine.environment(XDG_CACHE_HOME=str(folder / "cache"), JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, sys.executable, *command],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def masks(folder: Path) -> list[np.ndarray]:
    """The masks that a contender has written, in order."""
    files = sorted(path for path in folder.glob("*.png") if not path.name.endswith("_overlay.png"))
    return [np.asarray(Image.open(file)) > 0 for file in files]


def measure(folder: Path, inputs: str, options: Options) -> dict[str, Any]:
    """All contenders on the images of one folder."""
    commands = {name: each for name, each in contenders(inputs, "out").items() if options.only in name}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    written: dict[str, list[np.ndarray]] = {}
    for number in range(options.rounds + 1):  # the first round fills the store and the system's file cache
        for name, command in commands.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out").mkdir()
            run = timed(command, folder)
            if number:
                runs[name].append(run)
            written[name] = masks(folder / "out")
    reference = next(iter(written.values()))
    return {
        name: {
            **{key: statistics.median(run[key] for run in each) for key in each[0]},
            "differing_pixels": sum(int((a != b).sum()) for a, b in zip(written[name], reference, strict=True)),
            "runs": each,
        }
        for name, each in runs.items()
    }


def table(results: dict[str, Any]) -> str:
    """The medians as a Markdown table."""
    lines = ["| | wall | CPU | peak memory | pixels that differ |", "|---|---|---|---|---|"]
    for name, each in results.items():
        lines.append(
            f"| {name} | {each['wall_s']:.2f} s | {each['cpu_s']:.2f} s | {each['peak_mib']:.0f} MiB | "
            f"{each['differing_pixels']:,} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.predict_commands")
    versions = {name: metadata.version(name) for name in ("onnxruntime", "openvino", "pillow")}
    result: dict[str, Any] = {"machine": {**machine.facts(), **versions}, "settings": dataclasses.asdict(options)}
    result["settings"].pop("output")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options)
        for inputs, title in (("one", "one image"), ("many", f"{options.images} images")):
            result[inputs] = measure(folder, inputs, options)
            print(f"{title} of {SIDE}x{SIDE}, network at {SIZE}x{SIZE}\n\n{table(result[inputs])}\n", flush=True)
    output.write(result, options.output)


if __name__ == "__main__":
    main()

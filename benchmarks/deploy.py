"""python -m benchmarks.deploy: the ways out of a model side by side: size of the file, seconds an image, agreement.

Every way is a process of its own that has loaded its file; the processes take turns, and medians count. Masks are
compared with those of `pdrunet_jax.segment`. Wall time is what a user waits for; CPU time depends less on what else
runs. The page is measured in Chromium where that, Node.js and the page's template are present.
"""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks import machine, output

IMAGES = 5
SESSION = Path("web/test/session.js")

SERVER = """
import json, sys, time
import numpy as np
images = np.load("images.npy")
started = time.perf_counter()
{load}
np.asarray(segment(images[0]))
print(json.dumps(time.perf_counter() - started), flush=True)
for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    mask = np.asarray(segment(images[int(line)]))
    spent = [time.perf_counter() - wall, time.process_time() - cpu]
    print(json.dumps([*spent, int((mask != np.load("masks.npy")[int(line)]).sum())]), flush=True)
"""
_SHAPED = "segment = lambda image: run(image[None, ..., None])"
OPENVINO = (
    'import openvino\nnetwork = openvino.Core().compile_model("model.onnx", "CPU"{hint})\n'
    f'run = lambda images: network({{{{"images": images}}}})["mask"][0]\n{_SHAPED}'
)
WAYS = {
    "Python": (
        "weights.safetensors",
        'import pdrunet_jax\nmodel = pdrunet_jax.load_model("weights.safetensors")\n'
        "segment = lambda image: pdrunet_jax.segment(model, image).mask",
    ),
    "hub": (
        "hub/model.safetensors",
        'import pdrunet_jax\nmodel = pdrunet_jax.load_model("hub")\n'
        "segment = lambda image: pdrunet_jax.segment(model, image).mask",
    ),
    "ONNX, onnxruntime": (
        "model.onnx",
        'import onnxruntime\nsession = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
        f'run = lambda images: session.run(["mask"], {{"images": images}})[0][0]\n{_SHAPED}',
    ),
    "ONNX, OpenVINO float32": ("model.onnx", OPENVINO.format(hint=', {"INFERENCE_PRECISION_HINT": "f32"}')),
    "ONNX, OpenVINO's default": ("model.onnx", OPENVINO.format(hint="")),
    "StableHLO": (
        "model.stablehlo",
        'import jax\nfrom jax import export\nfile = bytearray(open("model.stablehlo", "rb").read())\n'
        "call = jax.jit(export.deserialize(file).call)\n"
        f'run = lambda images: call(images)["mask"][0]\n{_SHAPED}',
    ),
}
"""The file of each way, and how a process loads it and segments an image (H, W)."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure size, speed and agreement of everything that a model can be exported to."""

    weights: Path | None = None
    """Weights of a trained model. Default: random weights, whose probabilities cross 0.5 all over the image."""
    size: int = 256
    """Side of the network's input."""
    side: int = 512
    """Side of the images."""
    filters: int = 40
    """Channels of every hidden layer of random weights."""
    rounds: int = 7
    """Images for each way; the median is reported."""
    output: Path | None = None
    """JSON file for the results."""


def prepare(folder: Path, options: Options) -> None:
    """Write images, masks and the file of each way to `folder`."""
    from flax import nnx

    import pdrunet_jax
    from pdrunet_jax.config import ModelConfig
    from pdrunet_jax.data.phantoms.phantom import draw
    from pdrunet_jax.export.__main__ import ExportOptions, export
    from pdrunet_jax.export.page import TEMPLATE
    from pdrunet_jax.model.build import build
    from pdrunet_jax.model.files import write_safetensors
    from pdrunet_jax.model.layers import split_state
    from pdrunet_jax.model.weights import to_public

    weights = folder / "weights.safetensors"
    if options.weights is not None:
        export(ExportOptions(str(options.weights), "hub", folder / "trained"))
        shutil.copy(folder / "trained/model.safetensors", weights)
    else:
        network = build(ModelConfig(filters=options.filters), rngs=nnx.Rngs(0))
        stated = {"shortcut": "input", "dropout": 0.3, "size": [options.size]}
        write_safetensors(weights, to_public(*split_state(network)[1:], dead_block=False), stated)
    images = np.stack([draw(number, size=options.side).image for number in range(IMAGES)])
    np.save(folder / "images.npy", images)
    model = pdrunet_jax.load_model(weights)
    np.save(folder / "masks.npy", np.stack([pdrunet_jax.segment(model, image).mask for image in images]))
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    files = {"onnx": "model.onnx", "stablehlo": "model.stablehlo", "hub": "hub"}
    for form, name in files.items() | ({("html", "page.html")} if TEMPLATE.exists() else set()):
        export(ExportOptions(str(weights), form, folder / name))  # type: ignore[arg-type]


def measure(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of each way in `WAYS`."""
    servers = {
        name: subprocess.Popen(
            [sys.executable, "-c", SERVER.format(load=load)],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, (_, load) in WAYS.items()
    }

    def ask(name: str, line: str = "") -> Any:
        server = servers[name]
        assert server.stdin
        assert server.stdout
        server.stdin.write(line)
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    loaded = {name: ask(name) for name in servers}
    found: dict[str, list[Any]] = {name: [] for name in servers}
    for number in range(rounds):
        for name in servers:
            found[name].append(ask(name, f"{number % IMAGES}\n"))
    for server in servers.values():
        server.communicate()
    return {
        name: {
            "bytes": (folder / WAYS[name][0]).stat().st_size,
            "first_s": loaded[name],
            "wall_s": statistics.median(wall for wall, _, _ in runs),
            "cpu_s": statistics.median(cpu for _, cpu, _ in runs),
            "pixels_that_differ": sum(wrong for _, _, wrong in runs[:IMAGES]),
        }
        for name, runs in found.items()
    }


def measure_page(folder: Path) -> dict[str, Any] | None:
    """Figures of the page in Chromium; None where it cannot be run."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    page, node = folder / "page.html", shutil.which("node")
    if not (browser and node and page.exists()):
        return None
    (folder / "downloads").mkdir()
    files = [folder / f"{number}.png" for number in range(IMAGES)]
    command = [node, SESSION, browser, page, folder / "downloads", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as place:
        shutil.unpack_archive(folder / "downloads/all.zip", place)
        masks = [np.asarray(Image.open(Path(place) / f"{number}_mask.png")) for number in range(IMAGES)]
    seconds = [float(state.split()[0]) for state in json.loads(done.stdout)["states"].values()]
    wrong = int((np.stack(masks) != np.load(folder / "masks.npy")).sum())
    figures = {"first_s": seconds[0], "wall_s": statistics.median(seconds[1:]), "pixels_that_differ": wrong}
    return {"bytes": page.stat().st_size, **figures}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.deploy")
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options)
        ways = measure(Path(name), options.rounds)
        if page := measure_page(Path(name)):
            ways["page, Chromium"] = page
    for way, figures in ways.items():
        print(f"{way}: {', '.join(f'{key} {value:.4g}' for key, value in figures.items())}")
    pixels = IMAGES * options.side**2
    stated = {key: value for key, value in vars(options).items() if key not in ("weights", "output")}
    output.write({"machine": machine.facts(), "options": stated, "pixels": pixels, "ways": ways}, options.output)


if __name__ == "__main__":
    main()

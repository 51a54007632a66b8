"""OpenVINO segments what the model segments, at its first call too."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.data.images import resize_image
from pdrunet_jax.export.onnx_graph import build_onnx
from pdrunet_jax.export.stablehlo import GraphSpec, pillow_resizes_tall_first
from pdrunet_jax.predict.inference import segment
from tests.support.tiny import brightness_model

for package in ("onnx", "openvino"):
    pytest.importorskip(package)

SIZE = (48, 64)
ROUNDING = 1e-6  # of probabilities, between two implementations
SHAPES = ((481, 390), (300, 70), (31, 40), (701, 4801))  # the second vertically first
PROGRAM = """
import json, sys, numpy as np, openvino
segment = openvino.Core().compile_model("model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
found = []
for number in range(int(sys.argv[1])):
    files = np.load(f"{number}.npz")
    result = segment({"images": files["image"]})
    seen = np.rint((result["logits"] + 16) / 32 * 255)
    found.append([int((seen != files["seen"]).sum()), int((result["mask"][0] != files["mask"])[files["sure"]].sum())])
print(json.dumps(found))
"""


@pytest.mark.parametrize("processes", [2, pytest.param(20, marks=pytest.mark.stress)])
def test_the_first_call_in_a_fresh_process_is_right(processes: int, tmp_path: Path) -> None:
    """The pixels that the network sees show through a model whose logits are 32 times its input, less 16."""
    model, spec = brightness_model(), GraphSpec(SIZE, 0.5, pillow_resizes_tall_first())
    (tmp_path / "model.onnx").write_bytes(build_onnx(model, spec))
    for number, shape in enumerate(SHAPES):
        image = np.random.default_rng(number).integers(0, 256, (*shape, 1), np.uint8)
        want = segment(model, image, size=SIZE)
        sure = np.abs(want.probability - 0.5) > ROUNDING
        seen = resize_image(image, SIZE)
        np.savez(tmp_path / f"{number}.npz", image=image[None], seen=seen[None], mask=want.mask, sure=sure)
    for _ in range(processes):
        command = [sys.executable, "-c", PROGRAM, str(len(SHAPES))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [[0, 0]] * len(SHAPES)

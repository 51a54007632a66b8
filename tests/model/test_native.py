"""The compiled kernels by themselves, and what happens where they cannot be compiled."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pdrunet_jax.model.execution import Execution, note_on
from pdrunet_jax.model.fast import native, native_library
from pdrunet_jax.model.fast.block import BackwardNorm, Norm
from pdrunet_jax.runtime.errors import UserError

needs_kernels = pytest.mark.skipif(native_library.problem() is not None, reason=str(native_library.problem()))

SHAPES = [
    # Batch, height, width, inputs, outputs, dilation, side of the kernel.
    (2, 13, 18, 3, 7, 1, 3),
    (1, 40, 70, 20, 11, 4, 3),
    (2, 9, 100, 5, 23, 32, 3),  # a dilation beyond the height
    (1, 37, 33, 12, 12, 3, 3),
    (1, 70, 5, 4, 4, 1, 3),  # more rows than a unit of work, narrower than a vector
    (1, 3, 600, 6, 5, 2, 3),  # a row at a time
    (2, 7, 9, 40, 1, 1, 1),
    (1, 1, 1, 4, 4, 2, 3),
]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def convolve(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """The convolution of activations (N, H, C, W), by XLA."""
    dimensions = ("NHCW", "HWIO", "NHCW")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", rhs_dilation=(dilation, dilation), dimension_numbers=dimensions
    )


def per_channel(v: jax.Array) -> jax.Array:
    return v[None, None, :, None]


def normalise(x: jax.Array, norm: Norm) -> jax.Array:
    return (x - per_channel(norm.mean)) * per_channel(norm.factor) + per_channel(norm.shift)


def close(got: Any, want: Any) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * max(1.0, float(np.abs(other).max())))


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_a_kernel_takes_along_is_computed_as_written(shape: tuple[int, ...]) -> None:
    n, height, width, inputs, outputs, dilation, side = shape
    x, kernel = random(0, n, height, inputs, width), random(1, side, side, inputs, outputs)
    g, more = random(2, n, height, outputs, width), random(3, n, height, inputs, width)
    norm, bias = Norm(*random(4, 3, inputs)), random(5, outputs)
    z, (mean, var) = native.forward(x, kernel, dilation, norm=norm, moments=True)
    want = convolve(jax.nn.relu(normalise(x, norm)), kernel, dilation)
    close((z, mean, var), (want, want.mean((0, 1, 3)), want.var((0, 1, 3))))
    plain = convolve(x, kernel, dilation)
    close(native.forward(x, kernel, dilation, bias=bias)[0], jax.nn.relu(plain + per_channel(bias)))
    close(native.forward(x, kernel, dilation, bias=bias, added=g)[0], jax.nn.relu(plain + per_channel(bias) + g))

    # Gradients: through the normalisation that follows, and through that and the ReLU that precede.
    back = BackwardNorm(random(6, *g.shape), *random(7, 4, outputs))
    d_z = per_channel(back.factor) * g - per_channel(back.slope) * (back.z - per_channel(back.mean))
    d_z -= per_channel(back.offset)
    pull = jax.vjp(lambda x, kernel: convolve(x, kernel, dilation), jax.nn.relu(normalise(x, norm)), kernel)[1]
    d_y, d_kernel = pull(d_z)
    d_y = jnp.where(normalise(x, norm) > 0, d_y + more, 0)
    sums = d_y.sum((0, 1, 3)), (d_y * (x - per_channel(norm.mean))).sum((0, 1, 3))
    close(native.gradients(g, x, kernel, dilation, back=back, norm=norm, added=more), (d_y, d_kernel, sums))
    close(
        native.gradients(g, x, kernel, dilation)[:2],
        jax.vjp(lambda x, kernel: convolve(x, kernel, dilation), x, kernel)[1](g),
    )


@needs_kernels
@pytest.mark.parametrize("skip", ["none", "plain", "normalised"])
def test_the_last_relu_of_a_block_and_its_gradient(skip: str) -> None:
    z, more, g = (random(i, 2, 5, 3, 21) for i in range(3))
    norm, other = Norm(*random(3, 3, 3)), Norm(*random(4, 3, 3))
    given = {"none": (), "plain": (more,), "normalised": (more, other)}[skip]
    y = normalise(z, norm)
    y += {"none": 0, "plain": more, "normalised": jax.nn.relu(normalise(more, other))}[skip]
    close(native.end(z, norm, *given), jax.nn.relu(y))
    d_y = jnp.where(y > 0, g, 0)
    sums = d_y.sum((0, 1, 3)), (d_y * (z - per_channel(norm.mean))).sum((0, 1, 3))
    close(native.end_gradient(g, z, norm, *given), (d_y, sums))


@needs_kernels
def test_a_layer_without_normalisation_has_the_gradients_of_the_written_one() -> None:
    operands = random(0, 2, 9, 4, 17), random(1, 3, 3, 4, 6), random(2, 6), random(3, 2, 9, 6, 17)

    def written(x: jax.Array, kernel: jax.Array, bias: jax.Array, added: jax.Array) -> jax.Array:
        return jax.nn.relu(convolve(x, kernel, 2) + per_channel(bias) + added)

    (got, back), (want, written_back) = jax.vjp(lambda *a: native.layer(*a, 2), *operands), jax.vjp(written, *operands)
    close((got, back(got)), (want, written_back(want)))


@needs_kernels
def test_the_same_operands_give_the_same_bits_and_nan_is_not_lost() -> None:
    x, g = (random(i, 4, 64, 8, 64).astype(jnp.float32) for i in range(2))
    kernel = random(2, 3, 3, 8, 8).astype(jnp.float32)
    first = [np.asarray(a) for a in jax.tree.leaves(native.gradients(g, x, kernel, 4))]
    for _ in range(5):
        for one, other in zip(first, jax.tree.leaves(native.gradients(g, x, kernel, 4)), strict=True):
            assert (one == np.asarray(other)).all()
    norm = Norm(*jnp.ones((3, 8), jnp.float32))
    z, (mean, _) = native.forward(x.at[1, 2, 3, 4].set(jnp.nan), kernel, 4, norm=norm, moments=True)
    assert np.isnan(np.asarray(z)[1, 2, :, 4]).all()
    assert np.isnan(np.asarray(mean)).all()
    assert not np.isnan(np.asarray(z)[0]).any()


@needs_kernels
def test_float16_is_refused_rather_than_misread() -> None:
    with pytest.raises(ValueError, match="take float32 and float64, not float16"):
        native.forward(jnp.zeros((1, 4, 2, 4), jnp.float16), jnp.zeros((3, 3, 2, 2), jnp.float16), 1)


# Where the kernels cannot be compiled, or are damaged.


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and a source that compiles at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "kernels.cc"
    source.write_text("".join(f'extern "C" void {call}() {{}}\n' for call in native_library.FUNCTIONS))
    monkeypatch.setattr(native_library, "SOURCE", source)
    monkeypatch.setattr(native_library, "_problems", {})
    return source


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler -O2", r"there is no C\+\+ compiler \(no-such-compiler\)"),
        ("false", "/false does not compile kernels.cc: no message"),
    ],
)
def test_without_a_compiler_auto_takes_another_path_and_says_so(
    compiler: str, reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert Execution.of("auto").path == "fused"
    assert re.search(f"convolutions run on XLA's kernels, .*: .*{reason}$", note_on("auto") or "")
    assert note_on("fused") is None
    with pytest.raises(UserError, match=f"and .*{reason}; use model.conv = auto"):
        Execution.of("native")


@needs_kernels
def test_a_source_that_does_not_compile_is_named(fresh: Path) -> None:
    fresh.write_text("int main() { return nothing; }\n")
    with pytest.raises(native_library.UnavailableError, match=r"does not compile kernels.cc: .*nothing"):
        native_library._open()


def test_a_compiler_that_does_not_end_is_stopped_with_what_it_started(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "slow-c++"
    compiler.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native_library, "_SECONDS", 1)
    with pytest.raises(native_library.UnavailableError, match=r"slow-c\+\+ does not end within 1 s"):
        native_library._open()
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")  # gone, or about to be
    assert not state.exists() or state.read_text().rsplit(")")[1].split()[0] == "Z"


@needs_kernels
def test_a_damaged_library_is_made_again_and_a_whole_one_is_not(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    native_library._open()
    (stored,) = (tmp_path / "cache" / "pdrunet_jax" / "prepared").iterdir()
    before = stored.read_bytes()
    stored.write_bytes(before[:-100])
    native_library._open()
    assert "is removed and made again: its content is not what was written" in capsys.readouterr().err
    assert len(stored.read_bytes()) == len(before)

    def refuse(command: list[str]) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(native_library, "_compile", refuse)
    native_library._open()

"""Damage to the newest checkpoint, by disks and by people: always found, and an older checkpoint is used."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.model.load import load_model
from pdrunet_jax.runtime.checkpoint import Checkpoints
from pdrunet_jax.runtime.digest import DIGEST
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.train.verify import verify
from tests.support.live import LONG, SAVE_EVERY, STEPS, Place, assert_same_run, record, resumed_at

OLDER, NEWEST = 3, 6
META = Path("meta/metadata")
BITS = 1 if not LONG else 8
"""Number of bits flipped in each file, one at a time."""


def state(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"params": random.normal(size=(3, 3, 4, 4)).astype(np.float32), "step": np.int32(seed)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    checkpoints = Checkpoints(folder, keep_latest=3, keep_best=1)
    for step in (OLDER, NEWEST):
        checkpoints.save(step, state(step), {"at": step}, val_dice=0.5)
    return folder


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def largest(checkpoint: Path) -> Path:
    return max((checkpoint / name for name in files_of(checkpoint)), key=lambda path: path.stat().st_size)


def emptied(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def edited_digest(change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        (checkpoint / DIGEST).write_text(change((checkpoint / DIGEST).read_text()))

    return edit


def replaced_by(content: Callable[[Path], None]) -> Callable[[Path], None]:
    def replace(checkpoint: Path) -> None:
        shutil.rmtree(checkpoint)
        content(checkpoint)

    return replace


def swap(checkpoint: Path) -> None:
    one, two = checkpoint / META, largest(checkpoint)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def hidden(checkpoint: Path, name: str) -> None:
    (checkpoint / name).rename(checkpoint / f"{name}.bak")


KINDS: dict[str, Callable[[Path], None]] = {
    "its largest file cut by a byte": lambda c: os.truncate(largest(c), largest(c).stat().st_size - 1),
    "its largest file cut in half": lambda c: os.truncate(largest(c), largest(c).stat().st_size // 2),
    "its largest file emptied": lambda c: os.truncate(largest(c), 0),
    "its largest file overwritten with zeros": lambda c: largest(c).write_bytes(bytes(largest(c).stat().st_size)),
    "its largest file 8 GiB long": lambda c: os.truncate(largest(c), 1 << 33),
    "its largest file longer by a byte": lambda c: largest(c).write_bytes(largest(c).read_bytes() + b"\0"),
    "its largest file missing": lambda c: largest(c).unlink(),
    "its largest file a folder": lambda c: (p := largest(c)).unlink() or p.mkdir(),
    "its largest file a broken link": lambda c: (p := largest(c)).unlink() or p.symlink_to("nowhere"),
    "its metadata emptied": lambda c: os.truncate(c / META, 0),
    "its metadata missing": lambda c: (c / META).unlink(),
    "its metadata of another step": lambda c: shutil.copy(c.parent / str(OLDER) / META, c / META),
    "its metadata with other line ends": lambda c: (c / META).write_bytes((c / META).read_bytes() + b"\r\n"),
    "two files swapped": swap,
    "state missing": lambda c: shutil.rmtree(c / "state"),
    "state renamed": lambda c: hidden(c, "state"),
    "meta missing": lambda c: shutil.rmtree(c / "meta"),
    "Orbax's marker missing": lambda c: (c / "_CHECKPOINT_METADATA").unlink(),
    "the digest missing": lambda c: (c / DIGEST).unlink(),
    "the digest renamed": lambda c: hidden(c, DIGEST),
    "the digest emptied": lambda c: os.truncate(c / DIGEST, 0),
    "the digest cut at a line": edited_digest(lambda text: "".join(text.splitlines(keepends=True)[:3])),
    "the digest without its guard": edited_digest(lambda text: text[: text.rindex("#")]),
    "the digest without a file": edited_digest(lambda text: text.split("\n", 1)[1]),
    "the digest in capitals": edited_digest(str.upper),
    "the digest no text": lambda c: (c / DIGEST).write_bytes(b"\xff\xfe" * 100),
    "the digest of the older checkpoint": lambda c: shutil.copy(c.parent / str(OLDER) / DIGEST, c / DIGEST),
    "an empty folder": emptied,
    "folders without files": lambda c: [(c / name).unlink() for name in files_of(c)] and None,
    "a copy of the older checkpoint": replaced_by(lambda c: shutil.copytree(c.parent / str(OLDER), c)),
    "a file": replaced_by(lambda c: c.write_text("not a folder")),
    "a broken link": replaced_by(lambda c: c.symlink_to("nowhere")),
}


def flipped_bits(checkpoint: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield one flipped bit in each file in turn; in the long form several, evenly spaced."""
    for name in files_of(checkpoint):
        bits = (checkpoint / name).stat().st_size * 8
        for number in range(BITS):
            bit = (2 * number + 1) * bits // (2 * BITS)
            yield f"bit {bit} of {name} flipped", lambda c, name=name, bit=bit: flip(c / name, bit)


def test_every_kind_of_damage_to_the_newest_checkpoint_is_found_and_the_one_before_is_used(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [*KINDS.items(), *flipped_bits(whole / str(NEWEST))]
    assert len(kinds) >= 30
    missed = []
    for name, harm in kinds:
        case = Path(shutil.copytree(whole, tmp_path / "case"))
        harm(case / str(NEWEST))
        checkpoints = Checkpoints(case, keep_latest=3, keep_best=1)
        restored = checkpoints.restore(state(0))
        warning = capsys.readouterr().err
        intact = restored is not None and np.array_equal(restored.state["params"], state(OLDER)["params"])
        if not (intact and restored.step == OLDER and f"{case / str(NEWEST)} is damaged" in warning):
            missed.append(name)
        shutil.rmtree(case)
    assert missed == []
    record("damage", kinds=len(kinds), detected=len(kinds) - len(missed))


def test_a_step_that_was_damaged_can_be_saved_again_and_what_was_there_is_kept_aside(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a file", "a broken link", "an empty folder", "the digest missing"):
        case = Path(shutil.copytree(whole, tmp_path / name))
        KINDS[name](case / str(NEWEST))
        checkpoints = Checkpoints(case, keep_latest=3, keep_best=1)
        checkpoints.restore(state(0))
        checkpoints.save(NEWEST, state(NEWEST), {"at": NEWEST})
        restored = Checkpoints(case, keep_latest=3, keep_best=1).restore(state(0))
        assert restored is not None
        assert restored.step == NEWEST
        assert os.path.lexists(case / f"{NEWEST}.damaged")
    assert "set aside" in capsys.readouterr().err


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_had_not_been(place: Place) -> None:
    run = Path(shutil.copytree(place.undisturbed, place.path / "damaged"))
    newest = run / "checkpoints" / str(STEPS)
    os.truncate(largest(newest), 100)
    result = place.train(workdir=run)
    assert result.returncode == 0, result.stderr
    assert f"warning: checkpoint {newest} is damaged" in result.stderr
    assert resumed_at(result.stdout) == STEPS - SAVE_EVERY
    assert_same_run(run, place.undisturbed)


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_an_intact_checkpoint_a_run_ends_with_2_and_nothing_is_overwritten(place: Place) -> None:
    run = Path(shutil.copytree(place.undisturbed, place.path / "all-damaged"))
    for checkpoint in (run / "checkpoints").iterdir():
        flip(checkpoint / META, 3)
    kept = ("checkpoints", "best.safetensors", "metrics.jsonl", "report.html", "evaluation")
    before = {path: data for path, data in everything(run).items() if path.relative_to(run).parts[0] in kept}
    result = place.train(workdir=run)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith(f"error: no checkpoint in {run / 'checkpoints'} is intact")
    after = {path: data for path, data in everything(run).items() if path.relative_to(run).parts[0] in kept}
    assert after == before


def test_weights_come_from_what_is_intact(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(place.undisturbed, place.path / "weights"))
    best = load_model(run)
    latest = load_model(run, which="latest")
    flip(run / "best.safetensors", 8 * 20_000)  # in an array: the file can still be parsed
    assert np.array_equal(load_model(run).final_conv.kernel[...], best.final_conv.kernel[...])
    assert "best.safetensors is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="is damaged"):
        load_model(run / "best.safetensors")
    flip(run / "checkpoints" / str(STEPS) / META, 3)
    older = load_model(run, which="latest")
    assert f"{STEPS} is damaged" in capsys.readouterr().err
    assert not np.array_equal(older.final_conv.kernel[...], latest.final_conv.kernel[...])


def test_verify_names_every_damaged_file_and_changes_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(place.undisturbed, place.path / "verified"))
    before = everything(run)
    assert verify(run) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert [line for line in lines if line.startswith("checkpoints/")] == [f"checkpoints/{s}: intact" for s in steps]
    assert everything(run) == before

    newest = run / "checkpoints" / str(STEPS)
    flip(newest / META, 3)
    (newest / "_CHECKPOINT_METADATA").unlink()
    flip(run / "best.safetensors", 8 * 20_000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    (run / "config.toml").write_text("[optim\n")
    with pytest.raises(RunError) as caught:
        verify(run)
    for part in (
        f"{newest}: ",
        "meta/metadata does not match its digest",
        "_CHECKPOINT_METADATA is missing",
        "best.safetensors: is ",
    ):
        assert part in str(caught.value)
    assert f"metrics.jsonl: no JSON object with a step in line {len(lines_of_text(run))}" in str(caught.value)
    assert "config.toml: is not valid TOML" in str(caught.value)
    with pytest.raises(UserError, match="not a run folder"):
        verify(run / "samples")


def lines_of_text(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_verify_is_a_command(place: Place) -> None:
    result = place.train("--verify", str(place.undisturbed))
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{place.undisturbed} is intact" in result.stdout
    assert json.loads((place.undisturbed / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS

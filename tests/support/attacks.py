"""Attack every command with hostile files, links, limits and options: `python -m tests.support.attacks SPEC`.

SPEC is a JSON file: the folder to work in, a finished run with its data and configuration, seed, count. Each attack is
a command in a forked process, in a fresh copy of the inputs. It must end within `MOST_SECONDS` without a traceback or
a crash, use less than `MOST_BYTES`, and change nothing but its own targets. Prints a JSON line for each attack.
"""

import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from pdrunet_jax.runtime import cli
from tests.support.attack_kinds import LIMITS, LINKS, OPTIONS, SCENES, Scene, damage, files_of, lower, obey_permissions
from tests.support.labelme_files import annotate, box, shape

MOST_SECONDS = 20
"""Of processor time, since the machine may be busy; ten times as much by the clock."""
MOST_BYTES = 2 << 30


@dataclass
class Outcome:
    """What came of an attack."""

    number: int
    scene: str
    what: str
    code: int = 0
    seconds: float = 0.0
    mebibytes: int = 0
    faults: list[str] = field(default_factory=list)
    output: str = ""


def prepare(base: Path, place: Path) -> None:
    """Make the inputs of all scenes in `base`/work from the finished run in `place`, and what must not be touched."""
    work = base / "work"
    for name in ("data", "undisturbed"):
        shutil.copytree(place / name, work / {"undisturbed": "run"}.get(name, name))
    shutil.copytree(work / "data", work / "plain", ignore=shutil.ignore_patterns("manifest.csv"))
    text = (place / "tiny.toml").read_text()
    (work / "tiny.toml").write_text(text)
    pictures = sorted((work / "data/images").glob("*.png"))
    shutil.copy(pictures[0], work / "x.png")
    for number, picture in enumerate(pictures[:3]):
        annotate(work / f"labelme/{number}.json", f"{number}.png", [shape("femur", box(1, 1, 9, 9))], (32, 32))
        shutil.copy(picture, work / f"labelme/{number}.png")
    for number, picture in enumerate(pictures[:5]):
        study = f"{'valid' if number > 2 else 'train'}/XR_HUMERUS/patient0000{number}/study1_positive"
        (work / "mura" / study).mkdir(parents=True)
        shutil.copy(picture, work / "mura" / study / "image1.png")
        mask = work / "masks" / f"{study.replace('/', '_')}_image1.png"
        mask.parent.mkdir(exist_ok=True)
        Image.fromarray(np.uint8(255) * (np.asarray(Image.open(picture)) > 99)).save(mask)
    for folder in ("outside", "home"):
        (base / folder).mkdir()
        (base / folder / ".bashrc").write_text("echo untouched\n")
    (base / "outside/folder").mkdir()
    for arguments in (("run", "w.pth"), ("run", "t.pth", "--to-torch-training-state")):
        command = ["convert", *arguments]
        assert attempt(command, work, base / "out.txt", lambda: None)[0] == 0, (base / "out.txt").read_text()
    command = [*SCENES["predict"].arguments[:5], "segmented"]
    assert attempt(command, work, base / "out.txt", lambda: None)[0] == 0, (base / "out.txt").read_text()


def snapshot(base: Path, scene: Scene) -> dict[str, str]:
    """Everything in `base` by its path, without the targets of the scene."""
    allowed = tuple(base / "work" / target for target in scene.targets)
    found = {}
    for path in [*(base / "outside").rglob("*"), *(base / "home").rglob("*"), *(base / "work").rglob("*")]:
        if path in allowed or any(target in path.parents for target in allowed):
            continue
        kind = os.lstat(path).st_mode
        content = f"{stat.S_IFMT(kind)}"
        if stat.S_ISLNK(kind):
            content += os.readlink(path)
        elif stat.S_ISREG(kind) and os.lstat(path).st_size < 1 << 26:
            content += hashlib.sha256(path.read_bytes()).hexdigest()
        found[os.fsdecode(path)] = content
    return found


def attempt(arguments: list[str], work: Path, output: Path, limit: Callable[[], object]) -> tuple[int, float, int]:
    """Run a command in a forked process; returns exit code (or minus the signal), CPU seconds and peak in bytes."""
    process = os.fork()
    if process == 0:
        child(arguments, work, output, limit)
    end = time.monotonic() + 10 * MOST_SECONDS
    while True:
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def child(arguments: list[str], work: Path, output: Path, limit: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        os.chdir(work)
        lower(resource.RLIMIT_CPU, MOST_SECONDS)
        lower(resource.RLIMIT_DATA, 3 << 30)  # more than is allowed, less than the machine has
        sys.argv = [f"pdrunet {arguments[0]}", *arguments[1:]]
        main = importlib.import_module(f"pdrunet_jax.{arguments[0]}.__main__").main
        limit()
        cli.run(main)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attack(number: int, draw: random.Random, base: Path) -> Outcome:
    """Make the inputs of attack `number` and run it."""
    work = base / "work"
    limit: Callable[[], object] = lambda: None  # noqa: E731
    kind = ("file", "file", "option", "file", "link", "file", "limit", "file")[number % 8]
    name = draw.choice([name for name, scene in SCENES.items() if scene.inputs])
    added: tuple[str, ...] = ()
    if kind == "option":
        name, *rest = OPTIONS[number // 8 % len(OPTIONS)]
        added, what = tuple(rest), " ".join(rest)[:60]
    elif kind == "link":
        name, place = LINKS[number // 8 % len(LINKS)]
        first = min(path.stem for path in (work / "data/images").iterdir())
        path = work / place.replace("FIRST", first)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(base / "outside" / ("folder" if "." not in path.name and path.name != "lock" else ".bashrc"))
        what = f"a link at {place}"
    elif kind == "limit":
        what = list(LIMITS)[number // 8 % len(LIMITS)]
        limit = LIMITS[what]
    else:
        path = draw.choice(files_of(work, SCENES[name]))
        what = f"{path.relative_to(work)}: {damage(draw, path, base)}"
        if "unreadable" in what:
            limit = obey_permissions
    scene = SCENES[name]
    before = snapshot(base, scene)
    outcome = Outcome(number, name, what)
    output = base / "out.txt"
    outcome.code, outcome.seconds, peak = attempt([*scene.arguments, *added], work, output, limit)
    outcome.mebibytes = peak >> 20
    outcome.output = output.read_bytes().decode(errors="replace")
    after = snapshot(base, scene)
    outcome.faults = list(judged(outcome, before, after))
    outcome.output = outcome.output[-1500:] if outcome.faults else outcome.output[-200:]
    return outcome


def judged(outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    if "Traceback" in outcome.output:
        yield "traceback"
    # Where not even addresses for threads are left, the C++ libraries abort.
    aborted = outcome.code == -signal.SIGABRT and "memory" in outcome.what
    if outcome.code not in (0, 1, 2, 75) and not aborted:
        yield f"ended by signal {-outcome.code}" if outcome.code < 0 else f"exit code {outcome.code}"
    if outcome.seconds > MOST_SECONDS:
        yield "hang"
    if outcome.mebibytes > MOST_BYTES >> 20:
        yield "memory"
    if outcome.code in (1, 2) and "error: " not in outcome.output and "usage" not in outcome.output:
        silent = "standard output" in outcome.what
        if not silent and "╭" not in outcome.output:
            yield "no message"
    described = any(f"data/{name}: " in outcome.what for name in ("manifest.csv", "dataset.toml"))
    if outcome.code == 0 and described and outcome.what.endswith(("a folder", "no regular file", "to nowhere")):
        yield "taken for an absent file"
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if changed:
        yield f"changed {', '.join(sorted(changed)[:3])}"


def main(spec: dict[str, Any]) -> None:
    """Run the attacks of `spec`."""
    warnings.simplefilter("ignore")
    for command in cli.COMMANDS:
        importlib.import_module(f"pdrunet_jax.{command}.__main__")
    for module in ("pdrunet_jax.train.run", "pdrunet_jax.train.verify", "torch"):
        importlib.import_module(module)
    folder, start = Path(spec["folder"]), Path(spec["folder"]) / "good"
    (start / "work").mkdir(parents=True)
    os.environ["HOME"] = str(start / "home")
    os.umask(0o022)
    prepare(start, Path(spec["place"]))
    for number in spec["numbers"]:
        base = folder / f"attack-{number}"
        shutil.copytree(start, base, symlinks=True)
        os.environ["HOME"] = str(base / "home")
        outcome = attack(number, random.Random(f"{spec['seed']} {number}"), base)
        print(json.dumps(asdict(outcome)), flush=True)
        for path in base.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        if not outcome.faults:
            shutil.rmtree(base)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

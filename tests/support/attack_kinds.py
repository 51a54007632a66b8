"""Attacks on the commands: which command, on what, and with what."""

import ctypes
import os
import random
import resource
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NOBODY = 65527
"""A user without an entry in passwd."""


@dataclass(frozen=True)
class Scene:
    """A command, the files that an attack damages, and the only paths that the command may change."""

    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ("out",)


TRAIN = ("train", "--config", "tiny.toml")
SCENES = {
    "verify": Scene(("train", "--verify", "run"), ("run/**/*",), ()),
    "resume": Scene((*TRAIN, "--workdir", "run"), ("run/**/*", "run/*", "data/**/*"), ("run",)),
    "train": Scene((*TRAIN, "--workdir", "out/run", "--train.steps", "1"), ("tiny.toml", "data/*", "data/**/*")),
    "start": Scene(
        (*TRAIN, "--workdir", "out/run", "--train.steps", "1", "--train.weights", "run"),
        ("run/best.safetensors", "run/config.toml"),
    ),
    "predict": Scene(
        ("predict", "data/images", "--weights", "run", "--output", "out", "--probability", "--contours", "--labelme"),
        ("data/images/*", "run/best.safetensors", "run/config.toml"),
    ),
    "predict again": Scene(
        ("predict", "data/images", "--weights", "run", "--output", "segmented"), ("segmented/*",), ("segmented",)
    ),
    "evaluate": Scene(
        ("evaluate", "--weights", "run", "--data.root", "data"),
        ("run/*", "data/*", "data/**/*", "run/evaluation/test/*"),
        ("run/evaluation", "evaluation"),
    ),
    "compare": Scene(
        ("evaluate", "--weights", "run", "--data.root", "data", "--output", "out", "--against", "run/evaluation/test"),
        ("run/evaluation/test/*",),
    ),
    "convert": Scene(("convert", "run", "out/w.safetensors"), ("run/*", "run/checkpoints/*/*")),
    "convert latest": Scene(("convert", "run", "out/new", "--which", "latest"), ("run/checkpoints/**/*",)),
    "convert .pth": Scene(("convert", "w.pth", "out/w.safetensors"), ("w.pth",)),
    "to torch": Scene(("convert", "run", "out/t.pth", "--to-torch-training-state"), ("run/**/*",)),
    "from torch": Scene(("convert", "t.pth", "out/run"), ("t.pth",)),
    "export": Scene(
        ("export", "--weights", "run", "--format", "stablehlo", "--output", "out/m.bin", "--check-image", "x.png"),
        ("run/best.safetensors", "run/config.toml", "x.png"),
    ),
    "check": Scene(("data", "check", "data", "--output", "out"), ("data/*", "data/**/*")),
    "split": Scene(("data", "split", "plain"), ("plain/*", "plain/**/*"), ("plain/manifest.csv",)),
    "labelme": Scene(("data", "import-labelme", "labelme", "out/new"), ("labelme/*",)),
    "mura": Scene(("data", "import-mura", "mura", "out/new", "--masks", "masks"), ("mura/**/*", "masks/*")),
    "phantom": Scene(("data", "phantom", "out/new", "--count", "2", "--size", "64"), ()),
}

OPTIONS = (
    *(("train", f"--{name}", value) for name, value in (("train.steps", "1e21"), ("train.steps", "9" * 400))),
    *(("train", "--seed", value) for value in (str(1 << 70), "-1", "9" * 5000)),
    ("train", "--data.threads", "100000"),
    ("train", "--data.size", "2000000000"),
    ("train", "--data.root", "x" * 5000),
    ("train", "--data.patient-regex", "(" * 2000),
    ("train", "--optim.learning-rate", "nan"),
    ("train", "--workdir", "/dev/null/x"),
    ("predict", "--threshold", "nan"),
    ("predict", "--tolerance", "nan"),
    ("predict", "--size", "0"),
    ("predict", "--size", "1000000000"),
    ("predict", "--shard", "1/" + "9" * 5000),
    ("predict", "--tile", "9" * 30),
    ("predict", "--output", "o" * 300),
    ("predict", "--weights", "/dev/zero"),
    ("evaluate", "--batch-size", "9" * 20),
    ("evaluate", "--tolerance", "1e400"),
    ("evaluate", "--data.root", "/proc/self"),
    ("check", "--pictures", "9" * 30),
    ("check", "--data.classes", "bone", "9" * 30),
    ("split", "--split-seed", "9" * 5000),
    ("phantom", "--seed", "-1"),
    ("phantom", "--size", "9" * 30),
    ("phantom", "--count", "9" * 30),
    ("export", "--size", "9" * 30),
    ("labelme", "--classes", "femur", "9" * 30),
    ("verify", "--verify", "/proc/self"),
)
"""A scene, and options appended to its arguments."""

LINKS = (
    *(("resume", f"run/{name}") for name in ("lock", "metrics.jsonl", "best.safetensors", "report.html")),
    *(("resume", f"run/{name}") for name in ("config.toml", "checkpoints.txt", "evaluation", "checkpoints/tmp-x")),
    *(("train", f"out/run/{name}") for name in ("lock", "config.toml", "checkpoints", "metrics.jsonl")),
    *(("predict", f"out/{name}") for name in ("areas.csv", "FIRST_mask.png", "FIRST_overlay.png", "FIRST.json")),
    *(("evaluate", f"run/{name}") for name in ("evaluation", "evaluation/test/report.html", "evaluation/test/cases")),
    *(("check", f"out/{name}") for name in ("check.html", "contact_sheet.png", ".check.html.tmp")),
    *(("split", f"plain/{name}") for name in ("manifest.csv", ".manifest.csv.tmp", "dataset.toml")),
    *(("convert", f"out/{name}") for name in ("w.safetensors", ".w.safetensors.tmp")),
    ("to torch", "out/t.pth"),
    ("export", "out/m.bin"),
    ("labelme", "out/new"),
    ("evaluate", "run/evaluation/test"),
)
"""A scene, and a path where a link out of the folder lies in wait."""

WORDS = (
    "NaN",
    "-1",
    "1e999",
    "5e-324",
    "null",
    '"',
    "{",
    "[[",
    "\\ud800",
    "9" * 5000,
    "9" * 400,
    "../..",
    "\0",
    "1e9",
)
LIMITS: dict[str, Callable[[], object]] = {
    "files of 2 KiB at most": lambda: lower(resource.RLIMIT_FSIZE, 2048),
    "16 open files": lambda: lower(resource.RLIMIT_NOFILE, 16),
    "48 open files": lambda: lower(resource.RLIMIT_NOFILE, 48),
    "no more memory": lambda: lower(resource.RLIMIT_AS, used() + (64 << 20)),
    "512 MiB more memory": lambda: lower(resource.RLIMIT_AS, used() + (512 << 20)),
    "a full standard output": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "a closed standard output": lambda: os.close(1),
    "no home": lambda: (os.environ.pop("HOME"), os.setresuid(NOBODY, os.geteuid(), 0)),
}


def lower(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def obey_permissions() -> None:
    """Give up root's right to read and write any file."""
    library = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    library.capget(header, sets)
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    library.capset(header, sets)


def used() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def files_of(work: Path, scene: Scene) -> list[Path]:
    return sorted({path for pattern in scene.inputs for path in work.glob(pattern) if path.is_file()})


def damage(draw: random.Random, path: Path, base: Path) -> str:
    """Put something hostile in the place of an input."""
    data, kind = path.read_bytes(), draw.randrange(16)
    if kind < 3 and data:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 3, 30))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(bytes(changed))
        return "bytes changed"
    if kind < 5:
        path.write_bytes(data[: draw.randrange(len(data) + 1)])
        return "cut"
    if kind < 9:
        text = data.decode("latin-1")
        for _ in range(draw.randint(1, 3)):
            at = draw.randint(0, len(text))
            text = text[:at] + draw.choice((*WORDS, "[" * 100_000)) + text[at + draw.randint(0, 8) :]
        path.write_bytes(text.encode("latin-1"))
        return "hostile words"
    if kind == 9:
        path.write_bytes(
            draw.choice((b"", b"\xff\xfe\x00", bytes(1000), b"version https://git-lfs.github.com/spec/v1\n"))
        )
        return "other content"
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    if kind == 10:
        path.mkdir()
        return "a folder"
    if kind == 11:
        target = draw.choice(
            (path.name, "nowhere", base / "outside/.bashrc", base / "outside/folder", "/proc/self/mem")
        )
        path.symlink_to(target)
        return f"a link to {os.path.basename(target)}"
    if kind == 12:
        path.write_bytes(data)
        os.rename(path, os.fsencode(path.parent) + b"/\xff\xfe" + os.fsencode(path.name))
        return "a name that is not UTF-8"
    if kind == 13:
        path.write_bytes(data)
        path.chmod(0)
        path.parent.chmod(draw.choice((0o755, 0o300)))
        return f"unreadable (was {mode:o})"
    if kind == 14:
        special(draw, path)
        return "no regular file"
    with path.open("wb") as file:
        file.truncate(1 << 42)
    return "4 TiB of zeros"


def special(draw: random.Random, path: Path) -> None:
    which = draw.randrange(3)
    if which == 0:
        os.mkfifo(path)
    elif which == 1:
        path.symlink_to("/dev/zero")
    else:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
        os.chdir(here)

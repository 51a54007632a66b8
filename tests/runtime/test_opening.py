"""Only regular files up to a size are opened, and nothing blocks."""

import os
import socket
from pathlib import Path

import pytest

from pdrunet_jax import config
from pdrunet_jax.model.files import read_weights
from pdrunet_jax.runtime.digest import DIGEST, faults
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.opening import read_regular
from pdrunet_jax.runtime.run_folder import read_entries


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short


@pytest.mark.usefixtures("short")
def test_what_is_no_regular_file_is_refused_by_its_kind() -> None:
    os.mkfifo("pipe.png")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket.png")
    os.symlink("/dev/zero", "device.png")
    os.symlink("pipe.png", "link.png")
    Path("folder.png").mkdir()
    kinds = {"pipe": "pipe", "socket": "socket", "device": "device", "link": "pipe", "folder": "folder"}
    for name, kind in kinds.items():
        with pytest.raises(OSError, match=f"a {kind}, not a file"):
            read_regular(Path(f"{name}.png"))
    listening.close()
    assert read_regular(Path("/proc/self/pagemap")) == b""  # its size is 0, its content endless


@pytest.mark.usefixtures("short")
def test_a_file_may_be_as_large_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("sparse.png", "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(OSError, match="larger than 1024 MiB"):
        read_regular(Path("sparse.png"))
    Path("two.png").write_bytes(bytes(2 << 20))
    monkeypatch.setenv("PDRUNET_MAX_FILE_MIB", "1")
    with pytest.raises(OSError, match="larger than 1 MiB"):
        read_regular(Path("two.png"))
    monkeypatch.setenv("PDRUNET_MAX_FILE_MIB", "2")
    assert len(read_regular(Path("two.png"))) == 2 << 20
    for wrong in ("0", "-1", "much", "9" * 5000):
        monkeypatch.setenv("PDRUNET_MAX_FILE_MIB", wrong)
        with pytest.raises(UserError, match="whole number of MiB"):
            read_regular(Path("two.png"))


@pytest.mark.usefixtures("short")
def test_pipes_do_not_stop_the_readers_of_configurations_weights_digests_and_metrics() -> None:
    for name in ("c.toml", "w.safetensors", "w.pth", "metrics.jsonl", DIGEST):
        os.mkfifo(name)
    with pytest.raises(UserError, match="a pipe"):
        config.read(Path("c.toml"))
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(UserError, match=name):
            read_weights(Path(name))
    with pytest.raises(OSError, match="a pipe"):
        read_entries(Path("metrics.jsonl"))
    assert any("a pipe" in fault for fault in faults(Path(".")))

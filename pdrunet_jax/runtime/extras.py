"""How to install the optional dependencies: the package is in no index, so its name alone installs nothing."""

from importlib import metadata
from pathlib import Path


def how_to_install(extra: str) -> str:
    """The command that adds an extra of pyproject.toml to this installation, of a checkout or of a wheel."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    try:
        version = metadata.version("pdrunet-jax")
    except metadata.PackageNotFoundError:
        version = "VERSION"
    return f"pip install 'pdrunet_jax-{version}-py3-none-any.whl[{extra}]'"

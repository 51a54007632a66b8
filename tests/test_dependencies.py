"""What the packages import and what pyproject.toml declares are the same distributions."""

import ast
import re
import sys
import tomllib
from importlib import metadata

from tests.support import ROOT

PACKAGES = ("pdrunet_jax", "pdrunet_torch_ref")
NOT_IMPORTED = {
    "flatbuffers": "needed by jax.export",
    "onnx": "imported by name",
    "onnxruntime": "imported by name",
    "openvino": "imported by name",
    "pylibjpeg": "a plugin of pydicom",
    "pylibjpeg-openjpeg": "a plugin of pydicom",
    "python-gdcm": "a plugin of pydicom",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported() -> set[str]:
    """Distributions that the packages import, by their normalised names."""
    modules = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    owners = metadata.packages_distributions()
    others = modules - set(sys.stdlib_module_names) - set(PACKAGES)
    return {normalised(owners.get(module, [module])[0]) for module in others}


def normalised(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def declared() -> set[str]:
    extras = PROJECT["optional-dependencies"]
    names = ("torch", "dicom", "nrrd", "nifti", "volumes", "surfaces", "export", "onnxruntime", "openvino", "hub")
    optional = [item for extra in names for item in extras[extra]]
    return {normalised(item) for item in PROJECT["dependencies"] + optional}


def test_every_distribution_that_is_imported_is_declared() -> None:
    assert imported() - declared() == set()


def test_every_declared_distribution_is_imported_or_has_a_reason() -> None:
    assert declared() - imported() == set(NOT_IMPORTED)


def test_every_declared_distribution_has_a_tested_version() -> None:
    pinned = {normalised(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    development = {normalised(item) for item in PROJECT["optional-dependencies"]["dev"]} - {"pdrunet-jax"}
    assert (declared() | development) - pinned == set()


def test_no_message_or_page_installs_the_package_by_its_name() -> None:
    """It is in no index: `pip install '.[dicom]'` in the checkout works, or `how_to_install`."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "pdrunet_jax").rglob("*.py")]
    assert [path.name for path in texts if "pip install 'pdrunet-jax" in path.read_text(encoding="utf-8")] == []
    calls = re.findall(r"how_to_install\(['\"](\w+)", "".join(path.read_text(encoding="utf-8") for path in texts))
    assert set(calls) >= {"torch", "dicom", "export", "hub", "cuda12"}
    assert set(calls) <= PROJECT["optional-dependencies"].keys()

"""Packages import only packages to their left in ORDER, and the package folder stays small."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT

PACKAGE = ROOT / "pdrunet_jax"
ORDER = (
    *("runtime", "config", "model", "data", "predict", "evaluate", "train", "compare", "convert", "export", "weights"),
)
DEFERRED = ("model/load.py", "train/__main__.py", "compare/__main__.py")
"""May import other packages inside functions: `load_model` works without Orbax, SIGTERM is handled from the start."""


def modules(tree: ast.AST) -> Iterator[str]:
    """Every module that an import statement names; `from a import b` may mean the module a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"{getattr(node, 'module', '')}.{alias.name}".lstrip(".") for alias in node.names)


def faults(path: Path) -> Iterator[str]:
    """Imports of a file of the package that break the layout."""
    name, tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())
    own = name.split("/")[0].removesuffix(".py")
    later = {module for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for module in modules(node)}
    for module in modules(tree):
        package, part = [*module.split("."), "", ""][1:3]
        if not module.startswith("pdrunet_jax.") or package == own:
            continue
        if package not in ORDER[: ORDER.index(own)] or (package, part) == ("model", "fast"):
            yield f"{name} imports {module}"
        elif module in later and name not in DEFERRED:
            yield f"{name} imports {module} inside a function"


def test_packages_import_only_those_to_their_left() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert [fault for path in sorted(files) for fault in faults(path)] == []


def test_the_package_folder_has_at_most_12_entries() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= 12, entries

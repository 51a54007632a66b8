"""Build hook of Hatch: wheels and source archives hold the page's template, which Node.js builds and git ignores."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TEMPLATE = Path("pdrunet_jax/export/page.html")


class PageHook(BuildHookInterface[Any]):
    """Build the template if it is missing. Without npm, the package is built without it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel or a source archive is built; editable installations use the checkout's own."""
        root = Path(self.root)
        if version == "editable" or (root / TEMPLATE).exists():
            return
        npm = shutil.which("npm")
        if npm is None or not (root / "web").is_dir():
            self.app.display_warning(f"no npm: built without {TEMPLATE}, which export --format html needs")
            return
        for command in ([npm, "ci", "--no-audit", "--no-fund"], [npm, "run", "build", "--", str(root / TEMPLATE)]):
            subprocess.run(command, cwd=root / "web", check=True)

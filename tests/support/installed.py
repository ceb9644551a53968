"""bytecache as others have it: built distributions, and fresh environments that hold the wheel.

Nothing is downloaded. An environment sees the packages of this one in one of two ways: all of them (`everything`), or
only what the wheel's metadata ask for without extras, with what those ask for (`requirements`), each as a link.
"""

import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.support.places import ROOT

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def build(folder: Path, source: Path = ROOT, *targets: str) -> list[Path]:
    """Wheel and sdist of the tree at `source`, written to `folder`; `targets`: `wheel` and `sdist`, default both."""
    chosen = [argument for target in targets for argument in ("-t", target)]
    call = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), *chosen]
    subprocess.run(call, cwd=source, check=True, capture_output=True, text=True)
    return sorted(folder.iterdir())


class Environment:
    """A virtual environment that holds the wheel."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        """Make it at `folder`, without pip, and install `wheel`, without what it needs."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site_packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        call = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(call, check=True, capture_output=True, text=True)

    def everything(self) -> "Environment":
        """Let it see all packages of this environment, save bytecache: a path file names their folder."""
        # Path files of a folder that a path file adds are not read, so that the editable bytecache stays unseen.
        (self.site_packages / "packages.pth").write_text(f"{SITE_PACKAGES}\n")
        return self

    def requirements(self) -> "Environment":
        """Let it see what the wheel's metadata ask for without extras, with what those ask for, and no more."""
        wheel = next(self.site_packages.glob("bytecache-*.dist-info"))
        for package in requirements_of(PathDistribution(wheel)):
            for top in {Path(str(file)).parts[0] for file in package.files or []}:
                link = self.site_packages / top
                if top not in ("..", "__pycache__") and (SITE_PACKAGES / top).exists() and not link.exists():
                    link.symlink_to(SITE_PACKAGES / top)
        return self

    def run(self, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Its Python, started in `cwd` without the variables that would show it this repository."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        call = [str(self.python), *map(str, arguments)]
        return subprocess.run(call, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)


def requirements_of(package: Distribution) -> list[Distribution]:
    """Every distribution that `package` asks for without extras, directly or not, as installed here."""
    installed: dict[tuple[str, str], Distribution] = {}
    waiting = [(package, "")]
    while waiting:
        asking, extra = waiting.pop()
        for text in asking.requires or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            for wanted in ("", *requirement.extras):
                name = re.sub(r"[-_.]+", "-", requirement.name).lower()
                if (name, wanted) not in installed:
                    installed[name, wanted] = distribution(requirement.name)
                    waiting.append((installed[name, wanted], wanted))
    return list({id(each): each for each in installed.values()}.values())

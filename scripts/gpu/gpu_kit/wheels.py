"""Wheels for the GPU machine: fetched with pip, once, from where pip is configured to look."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT_SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "ep_rebalance",
    "kernels",
    "dashboards",
)
SETUPTOOLS_NEEDED = 77
WHEEL_NAME = re.compile(
    r"(?P<name>[^-]+)-(?P<version>[^-]+)(-\d[^-]*)?"
    r"-(?P<pythons>[^-]+)-(?P<abis>[^-]+)-(?P<platforms>[^-]+)\.whl"
)


class FetchError(Exception):
    """pip did not deliver; the text holds the end of what it said."""


@dataclass(frozen=True, slots=True)
class Target:
    """What wheels have to run on.

    python: its version, such as 3.12. glibc: the C library's, such as 2.35. Linux on x86-64.
    """

    python: str
    glibc: str

    @property
    def platforms(self) -> list[str]:
        """Every platform tag that the machine takes: pip compares them letter by letter."""
        major, minor = (int(part) for part in self.glibc.split("."))
        tags = [f"manylinux_{major}_{n}_x86_64" for n in range(minor, 4, -1)]
        older = [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]
        return [*tags, *older, "linux_x86_64"]

    def takes(self, pythons: str, abis: str, platforms: str) -> bool:
        """Whether a wheel with these tags, each a list joined by dots, runs there."""
        if platforms != "any" and not set(platforms.split(".")) & set(self.platforms):
            return False
        digits = self.python.replace(".", "")
        for tag in pythons.split("."):
            if tag in ("py3", f"cp{digits}"):
                return True
            is_stable = tag.startswith("py3") or (abis == "abi3" and tag.startswith("cp3"))
            if is_stable and int(tag[3:]) <= int(digits[1:]):
                return True
        return False

    def pip_options(self) -> list[str]:
        """For `pip download`."""
        options = ["--only-binary=:all:", "--python-version", self.python, "--implementation", "cp"]
        for platform in self.platforms:
            options += ["--platform", platform]
        return options


def held(folders: Sequence[Path], requirement: str, target: Target) -> Path | None:
    """The wheel of a requirement NAME==VERSION that lies in one of the folders already."""
    name, version = requirement.split("==")
    for folder in folders:
        for path in sorted(folder.glob("*.whl")):
            match = WHEEL_NAME.fullmatch(path.name)
            if (
                match
                and _normal(match["name"]) == _normal(name)
                and match["version"] == version
                and target.takes(match["pythons"], match["abis"], match["platforms"])
            ):
                return path
    return None


def fetch(
    requirements: Sequence[str], cache: Path, target: Target, also_in: Sequence[Path]
) -> list[Path]:
    """A wheel of each requirement NAME==VERSION; without their own requirements.

    cache: where wheels are kept that had to be fetched. also_in: folders to look into before. Raises
    FetchError.
    """
    folders = [*also_in, cache]
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in requirements if held(folders, name, target) is None]
    if missing:
        pip("download", "--no-deps", *target.pip_options(), "--dest", str(cache), *missing)
    wheels = {name: held(folders, name, target) for name in requirements}
    unknown = [name for name, wheel in wheels.items() if wheel is None]
    if unknown:
        raise FetchError(f"pip fetched no wheel of the name expected for {', '.join(unknown)}")
    return [wheel for wheel in wheels.values() if wheel is not None]


def build_project(root: Path, into: Path) -> Path:
    """The wheel of the sources as they are now; built from a copy, which leaves no build folder here.

    Raises FetchError.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy, built = Path(folder) / "source", Path(folder) / "wheel"
        for name in PROJECT_SOURCES:
            _copy(root / name, copy / name)
        pip("wheel", "--no-deps", *_isolation(), "--wheel-dir", str(built), str(copy))
        (wheel,) = built.glob("*.whl")
        return Path(shutil.copy(wheel, into))


def pip(*arguments: str) -> None:
    """Raises FetchError."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise FetchError(re.sub(r"://[^/@\s]+@", "://***@", said))


def _isolation() -> list[str]:
    """None if there is a setuptools that builds this project: then no index is asked for one."""
    try:
        release = int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return []
    return ["--no-build-isolation"] if release >= SETUPTOOLS_NEEDED else []


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""The wheel holds every module and every data file of the source tree, and works unpacked."""

import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from ep_rebalance.version import source_digest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "ep_rebalance": ROOT / "ep_rebalance",
    "ep_rebalance/dashboards": ROOT / "dashboards",
    "ep_rebalance/kernels": ROOT / "kernels",
}
SHIPPED_SUFFIXES = {".py", ".typed", ".json", ".yaml", ".yml", ".html", ".css", ".js"}
# Importing these needs no engine and no torch: replay works where neither is installed.
LIGHT_MODULES = [
    "",
    "api.page",
    "commands.app",
    "config",
    "load",
    "migration",
    "offline",
    "placement",
    "planning",
    "topology",
]

IMPORT_WITHOUT_ENGINES = """
import importlib, sys
sys.path.insert(0, {unpacked!r})
sys.modules.update(torch=None, vllm=None)  # importing either raises ImportError
for name in {names!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({unpacked!r}), module.__file__
"""


def source_files() -> set[str]:
    return {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.suffix in SHIPPED_SUFFIXES or (path.suffix == ".md" and folder.name == "dashboards")
    }


def light_modules() -> list[str]:
    return [f"ep_rebalance.{name}".rstrip(".") for name in LIGHT_MODULES]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes into the folder that it builds."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("ep_rebalance", "dashboards", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [ROOT / "LICENSE", ROOT / "pyproject.toml", *ROOT.glob("README.md")]:
        shutil.copy(path, copy)
    out = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("ep_rebalance-*.whl")
    return path


def test_wheel_holds_the_source_tree_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == source_files()
    assert {"ep_rebalance/kernels/__init__.py", "ep_rebalance/dashboards/__init__.py"} <= packed
    assert "ep_rebalance/py.typed" in packed


def test_entry_points_name_modules_of_the_wheel(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (listing,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        parser = ConfigParser()
        parser.read_string(archive.read(listing).decode())
    assert set(parser) >= {"console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"}
    for section in parser.values():
        for target in section.values():
            module = target.partition(":")[0].replace(".", "/")
            assert {f"{module}.py", f"{module}/__init__.py"} & names, target


def test_unpacked_wheel_imports_without_torch_and_vllm(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    names = [*light_modules(), "ep_rebalance.kernels", "ep_rebalance.dashboards"]
    program = IMPORT_WITHOUT_ENGINES.format(unpacked=str(tmp_path), names=names)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_unpacked_wheel_is_of_the_same_sources_as_this_checkout(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    kernel = tmp_path / "ep_rebalance" / "kernels" / "tiles.py"
    assert digest_of(tmp_path) == source_digest()
    kernel.write_text(kernel.read_text() + "\n# changed\n")
    assert digest_of(tmp_path) != source_digest()


def digest_of(unpacked: Path) -> str:
    program = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r}); "
        "from ep_rebalance.version import source_digest; print(source_digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=unpacked, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

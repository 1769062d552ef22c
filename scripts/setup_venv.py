"""Makes .venv: vLLM for CPU, this package (editable) and the development tools.

Started by scripts/setup, with the standard library only. Packages come from where pip is
configured to look (pip.conf and PIP_* variables), else from PyPI and PyTorch's CPU index.
A second run does nothing until one of the set-up files changes.
"""

import argparse
import ast
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from engine_overlay import make_overlay
from setup_steps import (
    CPU_TORCH,
    LOG,
    NETWORK_FAILURE,
    PYTHON,
    ROOT,
    STAMP,
    VENV,
    SetupError,
    explain,
    run,
    step,
)

UV = VENV / "bin" / "uv"
ALIAS = ROOT / "scripts" / "vllm_cpu_alias"
OVERRIDES = ROOT / "scripts" / "overrides.txt"
STAMPED_FILES = (
    ROOT / "pyproject.toml",
    ROOT / "scripts" / "setup",
    ROOT / "scripts" / "setup_steps.py",
    Path(__file__).resolve(),
    ALIAS / "pyproject.toml",
    OVERRIDES,
)

FREE_GIB_NEEDED = 5
# Options of pip that say where packages come from, and their names in uv.
SOURCE_OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}


def check_machine() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupError(
            f"this machine is {platform.system()} on {platform.machine()}; "
            "vLLM's CPU wheel exists for Linux on x86-64 only.",
            "use such a machine or container (docker run --platform linux/amd64 ...).",
        )
    if "avx2" not in Path("/proc/cpuinfo").read_text().split():
        raise SetupError(
            "the processor has no AVX2 (not in the flags of /proc/cpuinfo); "
            "vLLM's CPU kernels need it.",
            "use a processor from 2015 or later; in a virtual machine pass the host's CPU through.",
        )
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        raise SetupError(
            "the system library libnuma.so.1 is missing; vLLM's CPU kernels load it.",
            "on Debian or Ubuntu: sudo apt-get install libnuma1",
        ) from None
    free_gib = shutil.disk_usage(ROOT).free / 2**30
    if free_gib < FREE_GIB_NEEDED and not (VENV / "bin" / "vllm").exists():
        raise SetupError(
            f"{free_gib:.1f} GiB are free under {ROOT}; {FREE_GIB_NEEDED} GiB are needed.",
            "free some space, or clone the repository onto a larger disk.",
        )


def fingerprint() -> str:
    """Changes with the set-up files, the Python version and the place of the clone."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for path in STAMPED_FILES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current() -> bool:
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint()


def make_venv() -> None:
    """Makes the environment, or keeps the one made here with the same Python version."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    config = VENV / "pyvenv.cfg"
    described = config.read_text() if config.exists() else ""
    made_here = f"version = {version}." in described and f"-m venv {VENV}\n" in described
    if not (made_here and UV.exists() and PYTHON.exists()):
        shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(exist_ok=True)
    LOG.write_text("")
    STAMP.unlink(missing_ok=True)
    if not UV.exists():
        step(f"virtual environment, Python {version}", [sys.executable, "-m", "venv", VENV])
        step("uv", [PYTHON, "-m", "pip", "install", "--retries", "2", "uv"])


def pip_settings() -> dict[str, str]:
    """pip's settings by name; [install] beats [global], and PIP_* variables beat both."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in run([PYTHON, "-m", "pip", "config", "list"]).splitlines():
        if match := re.fullmatch(r"(global|install|:env:)\.([\w-]+)=(.*)", line):
            section, name, value = match.groups()
            sections[section][name] = ast.literal_eval(value)
    return sections["global"] | sections["install"] | sections[":env:"]


def source_arguments(settings: dict[str, str]) -> list[str]:
    """uv's arguments for pip's package sources: uv reads none of pip's configuration."""
    arguments = ["--index-strategy", "unsafe-best-match"]  # all indexes alike, as pip has it
    for name, option in SOURCE_OPTIONS.items():
        for value in settings.get(name, "").split():
            arguments += [option, value]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        arguments.append("--no-index")
    return arguments


def connection_environment(settings: dict[str, str]) -> dict[str, str]:
    """uv's environment variables for pip's certificate and proxy, where they are unset."""
    wanted = {"SSL_CERT_FILE": settings.get("cert"), "ALL_PROXY": settings.get("proxy")}
    env = {name: value for name, value in wanted.items() if value and name not in os.environ}
    return {"UV_HTTP_TIMEOUT": "120"} | env


def torch_arguments(install: list[str | Path], env: dict[str, str]) -> list[str]:
    """Those that make uv look in PyTorch's CPU index, unless pip's sources have the CPU build."""
    try:
        run([*install, "--dry-run", "--no-deps", CPU_TORCH], env)
    except subprocess.CalledProcessError as failure:
        if NETWORK_FAILURE.search(failure.output):
            raise explain("looking for PyTorch", failure.output) from None
        return ["--torch-backend", "cpu"]
    return []


def install_packages() -> None:
    settings = pip_settings()
    env = connection_environment(settings)
    install: list[str | Path] = [UV, "pip", "install", "--python", PYTHON]
    install += ["--override", OVERRIDES, *source_arguments(settings)]
    install += torch_arguments(install, env)
    step("PyTorch for CPU", [*install, CPU_TORCH], env)
    packages: list[str | Path] = ["--editable", ".[cpu,dev]", ALIAS]
    # A server is five processes, one started by the other: each would compile vLLM where
    # PYTHONDONTWRITEBYTECODE is set, as in many containers.
    packages.append("--compile-bytecode")
    step("vLLM for CPU, ep-rebalance and its tools", [*install, CPU_TORCH, *packages], env)


def verify() -> None:
    """Imports torch, transformers and vLLM, without plugins: a wrong build shows here."""
    step("trying the vllm command", [VENV / "bin" / "vllm", "--version"], {"VLLM_PLUGINS": ""})


def make_environment() -> None:
    """Does nothing if nothing has changed since the last time. Raises SetupError."""
    if is_current():
        return
    check_machine()
    start = time.monotonic()
    make_venv()
    install_packages()
    verify()
    STAMP.write_text(fingerprint())
    print(f"ready in {time.monotonic() - start:.0f} s: {VENV}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/setup",
        description="Makes .venv with vLLM for CPU, ep-rebalance (editable) and its tools. "
        "Runs in no time if nothing has changed since the last time.",
        epilog="PYTHON=python3.12 chooses the interpreter. Packages come from where pip is "
        "configured to look. 'make clean' removes what this makes.",
    )
    parser.add_argument(
        "--engines",
        action="store_true",
        help="also vLLM 0.33, which only tests need (a download of 336 MB)",
    )
    arguments = parser.parse_args()
    make_environment()
    if arguments.engines:
        make_overlay()


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"scripts/setup: {error}")

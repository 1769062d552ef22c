"""The three loads, each small enough to travel by itself.

a: vLLM without its compiled parts, but for three libraries cut to one GPU architecture.
b: what vLLM needs and a machine with PyTorch lacks, and this project.
c: NCCL that lets two ranks share a GPU (2.30.3 and newer).

The checkout travels with each: it holds the tests, the benchmarks and a small model.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_kit.archive import SUFFIX, pack
from gpu_kit.fatbin import NotCuttable, cut
from gpu_kit.wheels import Target, build_project, fetch

VLLM, NCCL = "vllm==0.33.0", "nvidia-nccl-cu13==2.30.7"
VLLM_LIBRARIES = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
)
NCCL_LIBRARY = "libnccl.so.2"
VLLM_FILES = (".py", ".json", ".txt", ".jinja", ".yaml", ".html", "METADATA", "WHEEL")
"""Ends of the names that are kept of vLLM's other files."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What goes into loads.

    architecture: 90 for H100 and H200. dependencies: a file of requirements NAME==VERSION. wheels:
    folders to look into before anything is fetched. more: further requirements for load b.
    """

    root: Path
    cache: Path
    target: Target
    architecture: int
    dependencies: Path
    vllm: str = VLLM
    nccl: str = NCCL
    wheels: tuple[Path, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def requirements(self) -> list[str]:
        """Of load b, but for this project."""
        return [*self.dependencies.read_text().split(), *self.more]

    def fetch(self, requirements: Sequence[str]) -> list[Path]:
        return fetch(requirements, self.cache, self.target, self.wheels)


def pack_vllm(recipe: Recipe, folder: Path, report: Report) -> None:
    """Load a."""
    (path,) = recipe.fetch([recipe.vllm])
    pack(folder / f"vllm{SUFFIX}", _vllm_files(path, recipe.architecture, report))


def pack_dependencies(recipe: Recipe, folder: Path, report: Report) -> None:
    """Load b."""
    for wheel in recipe.fetch(recipe.requirements):
        (folder / wheel.name).write_bytes(wheel.read_bytes())
    report(f"built {build_project(recipe.root, folder).name}")


def pack_nccl(recipe: Recipe, folder: Path, report: Report) -> None:
    """Load c."""
    (path,) = recipe.fetch([recipe.nccl])
    with zipfile.ZipFile(path) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(f"/{NCCL_LIBRARY}"))
        library = _cut(NCCL_LIBRARY, wheel.read(name), recipe.architecture, report)
    pack(folder / f"nccl{SUFFIX}", [(NCCL_LIBRARY, library)])


LOADS: dict[str, Callable[[Recipe, Path, Report], None]] = {
    "a": pack_vllm,
    "b": pack_dependencies,
    "c": pack_nccl,
}


def _vllm_files(path: Path, architecture: int, report: Report) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            if name in VLLM_LIBRARIES:
                yield name, _cut(Path(name).name, wheel.read(name), architecture, report)
            elif name.endswith(VLLM_FILES) and "/include/" not in name:
                yield name, wheel.read(name)
        absent = set(VLLM_LIBRARIES) - set(wheel.namelist())
    if absent:
        raise NotCuttable(f"{path.name} holds no {', '.join(sorted(absent))}")


def _cut(name: str, library: bytes, architecture: int, report: Report) -> bytes:
    try:
        result = cut(library, architecture)
    except NotCuttable as error:
        raise NotCuttable(f"{name}: {error}") from None
    report(
        f"{name}: {result.kept_bytes / 1e6:.1f} MB of CUDA code kept, "
        f"{result.zeroed_bytes / 1e6:.1f} MB zeroed"
    )
    return result.library

"""vLLM 0.33 for CPU is put together of the right files of two wheels, and of one wheel only."""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
WHEEL = {
    "vllm/__init__.py": "",
    "vllm/_version.py": "version = '0.33.0'",
    "vllm/config/vllm.py": "",
    "vllm/_C_stable_libtorch.abi3.so": "for CUDA",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": "for CUDA",
    "vllm/vllm-rs": "a program",
    "vllm-0.33.0.dist-info/METADATA": "Name: vllm\nVersion: 0.33.0\n",
    "vllm-0.33.0.dist-info/entry_points.txt": "[vllm.general_plugins]\n",
}


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch):
    """scripts/engine_overlay.py with an environment of its own, and what it downloads."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import engine_overlay

    for name, value in {"VENV": tmp_path, "OVERLAY": tmp_path / "overlay"}.items():
        monkeypatch.setattr(engine_overlay, name, value)
    installed = tmp_path / "lib" / "python3" / "site-packages" / "vllm"
    installed.mkdir(parents=True)
    for name in engine_overlay.COMPILED:
        (installed / f"{name}.abi3.so").write_text("for CPU")
    engine_overlay.OVERLAY.mkdir()

    packed = tmp_path / "packed"
    with zipfile.ZipFile(packed, "w") as wheel:
        for name, text in WHEEL.items():
            wheel.writestr(name, text)
    download = engine_overlay.OVERLAY / "vllm-0.33.0-any.whl"
    monkeypatch.setattr(engine_overlay, "step", lambda *_, **__: shutil.copy(packed, download))
    yield engine_overlay
    for name in ("engine_overlay", "setup_steps"):
        sys.modules.pop(name)


def test_another_wheel_than_the_one_that_was_tried_is_refused(overlay):
    with pytest.raises(overlay.SetupError, match="has the checksum"):
        overlay._download()


def test_python_files_are_of_the_wheel_and_libraries_of_the_cpu_build(overlay, monkeypatch):
    packed = (overlay.VENV / "packed").read_bytes()
    monkeypatch.setattr(overlay, "WHEEL_SHA256", hashlib.sha256(packed).hexdigest())
    overlay._unpack(overlay._download())
    overlay._link_compiled()
    package = overlay.OVERLAY / "vllm"
    assert (package / "config" / "vllm.py").exists()
    assert not (package / "vllm-rs").exists()
    libraries = sorted(package.rglob("*.so"))
    assert [path.name for path in libraries] == sorted(f"{n}.abi3.so" for n in overlay.COMPILED)
    assert {path.read_text() for path in libraries} == {"for CPU"}
    assert '"0.33.0+cpu"' in (package / "_version.py").read_text()
    metadata = overlay.OVERLAY / "vllm-0.33.0+cpu.dist-info" / "METADATA"
    assert "Version: 0.33.0+cpu" in metadata.read_text()

"""Reading a T5's files: nothing stays mapped, in any precision; and no lack of memory is called damage."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixart import load_text_encoder
from pixart.text.files import damaged, stored_tensors
from tests.support.tiny_text import save_t5_file, save_t5_folder, tiny_t5

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts the mappings in /proc")


def mappings(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


@linux
@pytest.mark.parametrize("precision", [None, "int8", "nf4", "fp8_e4m3fn"])
@pytest.mark.parametrize("kind", ["file", "shards", "pickle"])
def test_a_loaded_encoder_keeps_no_mapping(tmp_path: Path, precision: str | None, kind: str) -> None:
    if precision in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    model = tiny_t5()
    path = save_t5_file(model, tmp_path / "t5.safetensors") if kind == "file" else save_t5_folder(model, tmp_path / "t5", "20KB")
    if kind == "pickle":
        for file in path.glob("*.safetensors*"):
            file.unlink()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    encoder = load_text_encoder(path, precision=precision)
    assert torch.isfinite(encoder.encode(["a red circle"]).states).all()
    assert mappings(str(tmp_path)) == 0


@linux
def test_little_address_space_is_enough(tmp_path: Path) -> None:
    """Room for the weights three times; a mapping of the file for each of its tensors would need it 200 times."""
    path = save_t5_file(tiny_t5(layers=24, width=256), tmp_path / "t5.safetensors")
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pixart.text.weights import read_t5
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 3 * {path.stat().st_size} + 2**26,) * 2)
print(len(read_t5(Path({str(path)!r})).tensors))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 200, done.stderr[-400:]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("unable to mmap 9 bytes from file </m>: Cannot allocate memory (12)"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        OSError("The paging file is too small for this operation to complete. (os error 1455)"),
    ],
)  # fmt: skip
def test_no_memory_is_never_called_damage(tmp_path: Path, error: Exception, monkeypatch) -> None:
    path = save_t5_file(tiny_t5(), tmp_path / "t5.safetensors")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pixart.text.files.torch.empty", fail)
    with pytest.raises(ValueError, match="not enough memory.*not at fault") as caught:
        next(stored_tensors(path)).read()
    assert "damaged" not in str(caught.value) and "ownload" not in str(caught.value)
    assert "damaged or incomplete" in str(damaged(path, ValueError("header too small")))

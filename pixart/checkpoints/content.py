"""What a file is by its first bytes, whatever it is called; and what to say where one can't be read."""
from __future__ import annotations

import errno
import zipfile
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError, PixArtError

SAFETENSORS, PYTORCH = "safetensors", "pytorch"
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself allows no more
START = 512  # bytes that are looked at: a tar says what it is at 257
UNFINISHED = (".crdownload", ".part", ".partial", ".incomplete", ".download", ".aria2", ".!ut", ".tmp")
AGAIN = "the download failed or needs a login; download the file itself"
WEIGHTS = "here expected {expected}"
EXPECTED = ".safetensors or .pth"


class Stranger(NamedTuple):
    """A kind of file that holds no weights we read."""

    kind: str
    advice: str


GGUF = Stranger("a GGUF file", f"load it with ComfyUI-GGUF's own loader nodes; {WEIGHTS}")
WEB_PAGE = Stranger("a web page", AGAIN)
ARCHIVE = "unpack it first and choose the weight file inside"
_STARTS = {
    b"GGUF": GGUF,
    b"ggjt": Stranger("an old GGML file", WEIGHTS),
    b"version https://git-lfs": Stranger("a Git LFS pointer, not the weights", "run `git lfs pull`, or download the file itself"),
    b"\x89HDF": Stranger("an HDF5 file, as TensorFlow and Keras write", WEIGHTS),
    b"\x89PNG": Stranger("a PNG picture", WEIGHTS),
    b"\xff\xd8\xff": Stranger("a JPEG picture", WEIGHTS),
    b"GIF8": Stranger("a GIF picture", WEIGHTS),
    b"RIFF": Stranger("a WebP picture or another media file", WEIGHTS),
    b"%PDF": Stranger("a PDF document", WEIGHTS),
    b"\x93NUMPY": Stranger("a NumPy array", WEIGHTS),
    b"ftrt": Stranger("a TensorRT engine", f"it runs on one kind of card only; {WEIGHTS}"),
    b"\x1f\x8b": Stranger("a gzip archive", ARCHIVE),
    b"7z\xbc\xaf\x27\x1c": Stranger("a 7-Zip archive", ARCHIVE),
    b"Rar!": Stranger("a RAR archive", ARCHIVE),
    b"\xfd7zXZ": Stranger("an xz archive", ARCHIVE),
    b"\x28\xb5\x2f\xfd": Stranger("a zstd archive", ARCHIVE),
    b"BZh": Stranger("a bzip2 archive", ARCHIVE),
    b"SQLite format": Stranger("an SQLite database", WEIGHTS),
}
_NO_MEMORY = ("cannot allocate memory", "can't allocate memory", "not enough memory", "out of memory", "paging file", "os error 1455")
_WINDOWS_NO_MEMORY = (8, 14, 1455)  # ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_COMMITMENT_LIMIT


def content_of(path: Path, error: type[PixArtError] = CheckpointError, expected: str = EXPECTED) -> str:
    """SAFETENSORS or PYTORCH, by the file's bytes alone; raises `error` naming whatever else it is, and what to do.

    expected: what messages say is wanted.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(START)
    except OSError as reason:
        raise reading_error(path, reason, error) from reason
    if size == 0:
        raise error(f"{path}: the file is empty; download it again.")
    if path.suffix.lower() in UNFINISHED:
        raise error(f"{path}: its name says that the download isn't finished; wait for it, or download it again.")
    stranger = _stranger(start)
    if stranger:
        raise error(f"{path}: this is {stranger.kind}; {stranger.advice.format(expected=expected)}.")
    if _begins_header(start):
        return SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        return _zip_content(path, error, expected)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PYTORCH
    if path.suffix.lower() in (".safetensors", ".sft"):
        return SAFETENSORS  # whose reader says what is damaged
    raise error(
        f"{path}: neither safetensors nor a PyTorch file (it begins with {start[:8]!r}); {WEIGHTS.format(expected=expected)}. "
        "If it should be one, download it again."
    )


def called(path: Path) -> str:
    """A file as messages name it: with what it is, where its name says something else."""
    if not path.is_file() or path.suffix.lower() not in (".safetensors", ".sft") or content_of(path) == SAFETENSORS:
        return str(path)
    return f"{path} (a PyTorch file, whatever its name says)"


def _begins_header(start: bytes) -> bool:
    """A length in eight bytes, then JSON."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER


def _stranger(start: bytes) -> Stranger | None:
    for magic, stranger in _STARTS.items():
        if start.startswith(magic):
            return stranger
    if start[257:262] == b"ustar":
        return Stranger("a tar archive", ARCHIVE)
    if start[:1] == b"\x08" and start[2:3] == b"\x12":  # ir_version, then producer_name, as exporters write them
        return Stranger("an ONNX model", WEIGHTS)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return WEB_PAGE
    if text.startswith((b"{", b"[")) and start[8:9] != b"{":
        return Stranger("a JSON text, such as a hub's answer, a config or an index", "choose the weight file itself, or its folder")
    if len(start) > 16 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return Stranger(f"a text file (it begins with {start[:24].decode()!r})", AGAIN)
    return None


def _zip_content(path: Path, error: type[PixArtError], expected: str) -> str:
    """PyTorch's files are zip archives with a pickle named data.pkl."""
    wanted = WEIGHTS.format(expected=expected)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return PYTORCH  # whose reader says what is damaged
    if any(name.endswith("data.pkl") for name in names):
        if any("/code/" in name for name in names):
            raise error(f"{path}: this is a TorchScript program; {wanted}, weights alone.")
        return PYTORCH
    kind = "a NumPy archive" if any(name.endswith(".npy") for name in names) else "a zip archive"
    raise error(f"{path}: this is {kind} ({', '.join(names[:3])}); {ARCHIVE if kind == 'a zip archive' else wanted}.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, not the file, is at fault; torch and safetensors say so only in words."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if getattr(error, "winerror", None) in _WINDOWS_NO_MEMORY or any(words in str(error).lower() for words in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


def reading_error(path: Path, reason: BaseException, error: type[PixArtError] = CheckpointError, damage: str = "") -> PixArtError:
    """The sentence for a file that can't be read: no memory, no right to read it, or (`damage`: in which words) damaged."""
    said = first_line(reason)
    if is_out_of_memory(reason):
        return error(
            f"{path}: there is not enough memory to open it ({said}). The file itself is not at fault: close other programs, choose "
            "weights of a smaller precision, or, on Windows, enlarge the page file."
        )
    if isinstance(reason, PermissionError):
        return error(f"{path}: may not be read ({said}); change its permissions, or copy it to a place of your own.")
    if isinstance(reason, OSError) and reason.errno is not None and not damage:
        return error(f"{path}: can't be read ({said}).")
    return error(f"{path}: {damage or 'damaged or incomplete'} ({said}); download it again.")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

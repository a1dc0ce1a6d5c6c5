"""Tensors and one JSON document in a directory, such that a kill at any moment leaves the old state or the new one.

Two files cannot be replaced at once, so the document decides. It lists the tensor files with the digest of their
tensors; a listed `edits.safetensors` lies under that name or, not yet moved, under `edits.<digest>.safetensors`.

    1. write each tensor file under a temporary name, sync it, rename it to its name with the digest
    2. write the document under a temporary name, sync it, rename it to edit_config.json: now the state is new
    3. move the tensor files to their plain names, over the old ones; remove what the document does not list

Until 2 the old document finds its files untouched. From 2 on the new one finds each file under one of its two names: an
old file under the plain name is told apart by the digest in its header. Whoever saves next can finish step 3.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ctypes import c_char
from pathlib import Path
from typing import Any, TypeVar

import torch

from unike_kernels.edits_schema import EditsError, checked, listed, short

CONFIG_NAME = "edit_config.json"
MAX_FILE_BYTES = 5 * 10**9

_ON_HUB = [CONFIG_NAME, "edits*.safetensors"]
_PART = r"edits(?:-\d{5}-of-\d{5})?"
_PLAIN = re.compile(rf"{_PART}\.safetensors")
_LEFTOVER = re.compile(rf"{_PART}\.[0-9a-f]{{16}}\.safetensors(?:\.tmp)?|{re.escape(CONFIG_NAME)}\.tmp")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RECORD: dict[str, tuple[type, ...]] = {"name": (str,), "size": (int,), "digest": (str,)}
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
FLOATS = tuple(dtype for dtype in _DTYPES if dtype.is_floating_point)  # what edits' tensors may have
_FLOATS = tuple(_DTYPES[dtype] for dtype in FLOATS)

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]


class EditsFileError(EditsError):
    """Files that cannot be read as edits: absent, damaged, of another format, or contradicting each other."""


def write(directory: Path, document: dict[str, Any], tensors: dict[str, torch.Tensor], max_file_bytes: int) -> None:
    """Save both, replacing what was saved there; a failure or a kill leaves the old state or the new one.

    Tensors fill files of up to max_file_bytes (one larger tensor gets its own). Writers wait for each other where the
    file system has locks; where it has none, two at once may fail.
    """
    if directory.exists() and not directory.is_dir():
        raise EditsFileError(f"{directory} is a file; edits are saved into a directory")
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        _settle(directory)  # a killed writer's files may hold the very space that this one needs
        try:
            files = [_stage(directory, name, part) for name, part in _split(tensors, max_file_bytes)]
            _commit(directory, {**document, "files": files})
        finally:
            _settle(directory)


def read(directory: Path, parse: Callable[[dict[str, Any]], tuple[T, Shapes]]) -> tuple[T, dict[str, torch.Tensor]]:
    """The parsed document and its tensors, each of its own storage; parse says which shapes the document expects.

    Every name, dtype and size is compared with the files' headers before anything is loaded, and what was loaded with
    its digest. Anything amiss is an EditsFileError that names the file and the values. The directory is not changed.
    """
    try:
        return _read(directory, parse)
    except EditsFileError:
        if not directory.is_dir():
            raise
    # The files may have been another state's by the time they were opened: look again while nobody writes.
    with _locked(directory, shared=True):
        return _read(directory, parse)


def _read(directory: Path, parse: Callable[[dict[str, Any]], tuple[T, Shapes]]) -> tuple[T, dict[str, torch.Tensor]]:
    document = _document(directory)
    try:
        records = _records(document)
        parsed, shapes = parse({key: value for key, value in document.items() if key != "files"})
    except EditsError as err:
        raise EditsFileError(f"{directory / CONFIG_NAME}: {err}") from err

    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as opened:  # a file stays open from the check to the load, whatever happens to its name
        files = [_locate(directory, record, opened) for record in records]
        _check_headers(directory, shapes, files)
        for record, (path, file) in zip(records, files, strict=True):
            # Copies: what safetensors returns are views of the file itself.
            part = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a dict
            if (digest := _digest(part)) != record["digest"]:
                raise EditsFileError(
                    f"{path}: its tensors have digest {digest}, but {CONFIG_NAME} says {record['digest']}"
                )
            tensors |= part
    return parsed, tensors


# Writing


def _stage(directory: Path, name: str, part: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Step 1 for one file; returns its record."""
    part = _plain(part)
    digest = _digest(part)
    staged = directory / _staged_name(name, digest)
    temporary = staged.with_name(f"{staged.name}.tmp")
    size = _write_file(temporary, part, digest)
    os.replace(temporary, staged)
    return {"name": name, "size": size, "digest": digest}


def _write_file(path: Path, part: dict[str, torch.Tensor], digest: str) -> int:
    """A safetensors file straight from the tensors' memory, synced; returns its size.

    safetensors' own save_file (0.8) lets nobody but the owner read the file, and a kill leaves its `.tmp??????` behind.
    """
    names = sorted(part, key=lambda name: (-part[name].element_size(), name))  # wide ones first: all are aligned
    header: dict[str, Any] = {"__metadata__": {"digest": digest, "format": "pt"}}
    end = 0
    for name in names:
        tensor = part[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(part[name]))
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end


def _commit(directory: Path, document: dict[str, Any]) -> None:
    """Step 2."""
    _sync_names(directory)  # the document must never be on disk before the names it relies on
    temporary = directory / f"{CONFIG_NAME}.tmp"
    with open(temporary, "wb") as file:
        file.write(json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / CONFIG_NAME)
    _sync_names(directory)


def _settle(directory: Path) -> None:
    """Step 3, for whatever document is there: does no harm at any time, to a state old or new."""
    plain: set[str] | None = None
    if (directory / CONFIG_NAME).exists():
        try:
            records = _records(_document(directory))
        except EditsError:
            return  # not ours to judge which files a document that we cannot read relies on
        for record in records:
            staged = directory / _staged_name(record["name"], record["digest"])
            if staged.exists():
                os.replace(staged, directory / record["name"])
        plain = {record["name"] for record in records}
    for path in sorted(directory.iterdir()):
        stale = plain is not None and _PLAIN.fullmatch(path.name) and path.name not in plain
        if stale or _LEFTOVER.fullmatch(path.name):
            os.unlink(path)


def _split(tensors: dict[str, torch.Tensor], limit: int) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """(file name, tensors) of each file, in order."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if parts[-1] and filled + tensor.nbytes > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += tensor.nbytes
    if len(parts) == 1:
        return [("edits.safetensors", parts[0])]
    return [(f"edits-{i:05d}-of-{len(parts):05d}.safetensors", part) for i, part in enumerate(parts, 1)]


def _plain(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as a file can hold them: on the CPU, contiguous, no two in one storage."""
    out: dict[str, torch.Tensor] = {}
    storages = set()
    for name, tensor in part.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out


def _sync_names(directory: Path) -> None:
    """Make renames in a directory survive a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(directory: Path, shared: bool = False) -> Iterator[None]:
    """Wait until no writer is in the directory, nor (unless shared) a reader that waited too.

    The lock is the system's, so a killed process leaves none behind; where there are no locks, nobody waits.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it to processes forked meanwhile
        os.close(handle)


# Reading


def _document(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        text = path.read_bytes()
    except OSError as err:
        raise EditsFileError(f"{directory} holds no edits: {CONFIG_NAME} cannot be read ({err.strerror})") from err
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as err:  # RecursionError: brackets nested too deep
        raise EditsFileError(f"{path} is not JSON: {err}") from err
    if not isinstance(document, dict):
        raise EditsFileError(f"{path} must hold a JSON object, but holds {short(document)}")
    return document


def _records(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The document's list of files. Names are held to our own pattern: a document must not name files elsewhere."""
    files = document.get("files")
    if not isinstance(files, list) or not files:
        raise EditsError(f"files must be a list of tensor files, but is {short(files)}")
    for record in files:
        checked("a file's record", record, _RECORD)
        if not _PLAIN.fullmatch(record["name"]) or not _DIGEST.fullmatch(record["digest"]):
            raise EditsError(f"files lists {short(record)}, which is no tensor file of edits")
    if len({record["name"] for record in files}) < len(files):
        raise EditsError(f"files lists a name twice: {listed(record['name'] for record in files)}")
    return files


def _staged_name(name: str, digest: str) -> str:
    return f"{name.removesuffix('.safetensors')}.{digest[:16]}.safetensors"


def _locate(directory: Path, record: dict[str, Any], opened: ExitStack) -> tuple[Path, Any]:
    """The listed file, where it lies now, and open."""
    reasons = []
    # The name with the digest first: a writer who settles meanwhile moves the file from there to the plain name.
    for name in (_staged_name(record["name"], record["digest"]), record["name"]):
        path = directory / name
        try:
            size = path.stat().st_size
            if size != record["size"]:
                reasons.append(f"{path} has {size} bytes, but {CONFIG_NAME} says {record['size']}")
                continue
            file = opened.enter_context(_opened(path))
        except FileNotFoundError:
            continue
        digest = (file.metadata() or {}).get("digest")
        if digest == record["digest"]:
            return path, file
        reasons.append(f"{path} has digest {short(digest)}, but {CONFIG_NAME} says {record['digest']!r}")
    raise EditsFileError("; ".join(reasons) or f"{directory / record['name']} is absent, but {CONFIG_NAME} lists it")


def _check_headers(directory: Path, shapes: Shapes, files: list[tuple[Path, Any]]) -> None:
    """Raise an EditsFileError unless the files hold exactly these tensors."""
    found: dict[str, Path] = {}
    for path, file in files:
        for name in file.keys():  # noqa: SIM118  not a dict
            if name in found:
                raise EditsFileError(f"{path} and {found[name]} both hold {name!r}")
            if name not in shapes:
                raise EditsFileError(f"{path} holds {short(name)}, which {CONFIG_NAME} has no place for")
            header = file.get_slice(name)
            shape, dtype = header.get_shape(), header.get_dtype()
            if shape != list(shapes[name]):
                raise EditsFileError(f"{path}: {name} has shape {shape}, but {CONFIG_NAME} says {list(shapes[name])}")
            allowed = ("I64",) if name.endswith(".group_ptr") else _FLOATS
            if dtype not in allowed:
                raise EditsFileError(f"{path}: {name} has dtype {dtype}, but must have {' or '.join(allowed)}")
            found[name] = path
    if absent := [name for name in shapes if name not in found]:
        raise EditsFileError(f"{directory}: the tensor files lack {listed(absent)}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, RuntimeError) as err:  # torch gives a RuntimeError where it cannot map a file
        raise EditsFileError(f"{path} is not a readable safetensors file: {err}") from err


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes. tensors: contiguous, on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    """A contiguous CPU tensor's memory: no copy, no numpy, and any dtype. Valid while the tensor lives."""
    return (c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else b""


# The hub


def download(repo: str, revision: str | None, token: str | None) -> Path:
    """A local copy of a hub repository's edits, all of one commit."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as err:
        raise EditsFileError(f"{repo} is no directory; to look for it on the hub, install huggingface_hub") from err
    try:
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=_ON_HUB))
    except (OSError, ValueError) as err:  # all of the hub's errors are one of these
        raise EditsFileError(f"{repo} is no directory, and getting it from the hub failed: {err}") from err


def upload(
    folder: str, repo: str, *, revision: str | None, private: bool | None, token: str | None, message: str
) -> str:
    """Put what `write` wrote into a hub repository, in one commit; returns the commit's address."""
    try:
        from huggingface_hub import HfApi
    except ImportError as err:
        raise EditsError(f"to put edits into {repo} on the hub, install huggingface_hub") from err
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message, delete_patterns=_ON_HUB
        )
    except Exception as err:  # the hub's own are OSErrors or ValueErrors, those of the network below it of any kind
        raise EditsError(f"the edits could not be put into {repo} on the hub: {err}") from err
    return str(commit.commit_url)

"""No damage to saved edits goes unseen: flipped bytes, cut and missing files, and forged ones."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_edits
from tests.test_edits import same
from tests.test_edits_io import PLAIN, json_of, names
from unike_kernels import edits_io
from unike_kernels.edits import Edits, EditsFileError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    edits = make_edits(2, d=4, layers=(2, 3), n_items=2, gated=True)
    edits.save_pretrained(path)
    return path, edits


FLIPS = st.lists(st.tuples(st.integers(0, 2**30), st.integers(1, 255)), min_size=1, max_size=4)


def flipped(data: bytes, flips: list[tuple[int, int]], stop: int) -> bytes:
    out = bytearray(data)
    for position, bits in flips:
        out[position % stop] ^= bits
    return bytes(out)


@given(FLIPS, st.booleans())
@settings(max_examples=300)
def test_flipped_bytes_of_a_tensor_file_are_an_error(saved, tmp_path_factory, flips, in_header):
    source, edits = saved
    data = (source / "edits.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    damaged = flipped(data, flips, header if in_header else len(data))
    path = tmp_path_factory.mktemp("damaged")
    shutil.copy(source / "edit_config.json", path)
    (path / "edits.safetensors").write_bytes(damaged)
    if json_of(damaged) == json_of(data) and damaged[header:] == data[header:]:
        assert same(Edits.from_pretrained(path), edits)  # flips that cancel out, or that turn white space into another
    else:
        with pytest.raises(EditsFileError, match=r"edits\.safetensors"):
            Edits.from_pretrained(path)
    shutil.rmtree(path)


@given(FLIPS)
@settings(max_examples=300)
def test_flipped_bytes_of_the_document_never_change_a_tensor(saved, tmp_path_factory, flips):
    source, edits = saved
    data = (source / "edit_config.json").read_bytes()
    path = tmp_path_factory.mktemp("damaged")
    shutil.copy(source / "edits.safetensors", path)
    (path / "edit_config.json").write_bytes(flipped(data, flips, len(data)))
    try:
        loaded = Edits.from_pretrained(path)
    except EditsFileError:
        pass
    else:  # a letter of a prompt, a digit of a learning rate
        ours, theirs = loaded.named_tensors(), edits.named_tensors()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert [entry.neurons for entry in loaded.entries] == [entry.neurons for entry in edits.entries]
    shutil.rmtree(path)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_an_error(tmp_path, length):
    make_edits(2).save_pretrained(tmp_path)
    path = tmp_path / "edits.safetensors"
    size = path.stat().st_size
    os.truncate(path, length % size)
    with pytest.raises(EditsFileError) as caught:
        Edits.from_pretrained(tmp_path)
    assert f"{path} has {length % size} bytes, but edit_config.json says {size}" in str(caught.value)


def test_a_missing_or_swapped_file_is_an_error(tmp_path):
    make_edits(2, seed=1).save_pretrained(tmp_path / "a")
    make_edits(2, seed=2).save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b/edits.safetensors", tmp_path / "a")
    with pytest.raises(EditsFileError, match=r"a/edits\.safetensors has digest '.*', but edit_config\.json says '"):
        Edits.from_pretrained(tmp_path / "a")
    (tmp_path / "a/edits.safetensors").unlink()
    with pytest.raises(EditsFileError, match=r"edits\.safetensors is absent, but edit_config\.json lists it"):
        Edits.from_pretrained(tmp_path / "a")
    (tmp_path / "a/edits.safetensors").mkdir()
    with pytest.raises(EditsFileError, match=r"edits\.safetensors"):
        Edits.from_pretrained(tmp_path / "a")


def forge(path: Path, document=None, tensors=None, blob=None) -> None:
    """Change saved edits as a foreign writer might: the document has the new digest and size."""
    config, file = path / "edit_config.json", path / "edits.safetensors"
    data = json.loads(config.read_text())
    if tensors or blob:
        held = safetensors.torch.load_file(file)
        if tensors:
            held = tensors(held) or held
        digest = edits_io._digest(held)
        safetensors.torch.save_file(held, file, metadata={"format": "pt", "digest": digest})
        if blob:
            file.write_bytes(blob(file.read_bytes()))
        data["files"] = [{"name": file.name, "size": file.stat().st_size, "digest": digest}]
    if document:
        data = document(data) or data
    config.write_text(json.dumps(data))


def _set(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(data):
        part = data
        for key in keys:
            part = part[key]
        part[last] = value

    return change


def _declare(name, **changes):
    """A header that says something else about one tensor, in a file of the right layout otherwise."""

    def blob(data):
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header[name].update(changes)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return blob


def _tensor(name, change):
    def apply(held):
        held[name] = change(held[name]).contiguous()

    return apply


KEYS = "layers.2.keys"
FORGED = {
    "version": ({"document": _set("format_version", 2)}, "format_version is 2, but this package reads 1"),
    "version of text": ({"document": _set("format_version", "1")}, "format_version is '1', but this package reads 1"),
    "no version": (
        {"document": lambda d: {k: v for k, v in d.items() if k != "format_version"}},
        "lacks format_version",
    ),
    "unknown key": ({"document": _set("surprise", 1)}, "the document has unknown keys: ['surprise']; known: base, "),
    "unknown key of an entry": (
        {"document": _set("entries", 1, "x", 1)},
        "an entry has unknown keys: ['x']; known: id",
    ),
    "unknown key of the base": ({"document": _set("base", "x", 1)}, "base has unknown keys: ['x']; known: act"),
    "unknown key of the config": ({"document": _set("config", "x", 1)}, "config: unknown keys in the config: x"),
    "unknown key of a file": ({"document": _set("files", 0, "x", 1)}, "a file's record has unknown keys: ['x']"),
    "a list": ({"document": lambda d: [d]}, "must hold a JSON object"),
    "entries of text": ({"document": _set("entries", ["x"])}, "an entry must be a JSON object, but is 'x'"),
    "size of text": ({"document": _set("base", "hidden_size", "8")}, "base: hidden_size must be int, but is '8'"),
    "success of 1": ({"document": _set("entries", 0, "success", 1)}, "success must be bool, but is 1"),
    "steps of true": ({"document": _set("entries", 0, "steps", True)}, "steps must be int, but is True"),
    "loss of nan": ({"document": _set("entries", 0, "loss", float("nan"))}, "loss must be finite or None, but is nan"),
    "probe of text": ({"document": _set("base", "probe", ["x"])}, "probe must hold finite numbers, but has 'x'"),
    "layers of text": ({"document": _set("layers", ["2", 3])}, "layers must be whole numbers, but are ['2', 3]"),
    "layers unordered": ({"document": _set("layers", [3, 2])}, "distinct and in order, but are [3, 2]"),
    "layer unknown": ({"document": _set("entries", 0, "neurons", {"²": 2, "3": 2})}, "sizes, but has '²': 2"),
    "layer beyond": ({"document": _set("base", "num_layers", 3)}, "layer 3 does not exist: the base has 3 layers"),
    "config of a wrong type": ({"document": _set("config", "shift", {"k": "forty"})}, "edit_config.json: config: "),
    "config out of range": ({"document": _set("config", "shift", {"k": -1})}, "ShiftConfig.k must be at least 0"),
    "negative items": ({"document": _set("items", -1)}, "items must be at least 0, but is -1"),
    "endless encoders": ({"document": _set("encoder_maps", 10**15)}, "encoder_maps must be from 0 to 16, but is 1000"),
    "negative cases": ({"document": _set("calibration", "cases", -1)}, "cases must be at least 0, but is -1"),
    "negative wording": ({"document": _set("calibration", "wording", -1)}, "wording must be at least 0, but is -1"),
    "wording absent": ({"document": _set("calibration", "wording", 2)}, "the tensor files lack 'calibration.wording'"),
    "calibrated elsewhere": ({"document": _set("calibration", "layer", 3)}, "first edited layer, 2, but names 3"),
    "negative asking": ({"document": _set("calibration", "asking", -1)}, "asking must be at least 0, but is -1"),
    "asking absent": ({"document": _set("calibration", "asking", 2)}, "the tensor files lack 'calibration.asking'"),
    "two edits of one id": ({"document": _set("entries", 0, "id", "edit-0-1")}, "two edits have the id 'edit-0-1'"),
    "no files": ({"document": _set("files", [])}, "files must be a list of tensor files, but is []"),
    "a file elsewhere": (
        {"document": _set("files", 0, "name", "../other/edits.safetensors")},
        "which is no tensor file of edits",
    ),
    "a digest that is a path": (
        {"document": _set("files", 0, "digest", "../" * 30)},
        "which is no tensor file of edits",
    ),
    "a file twice": ({"document": lambda d: d["files"].append(d["files"][0])}, "files lists a name twice"),
    "fewer items": (
        {"document": _set("items", 4)},
        "shared.2.h_pos has shape [5, 8], but edit_config.json says [4, 8]",
    ),
    "sizes of a group": (
        {"document": _set("entries", 0, "neurons", {"2": 10**12, "3": 2})},
        "shape [6], but edit_config.json says [1000000000004]",
    ),
    "sizes that only the pointer tells": (
        {"document": lambda d: [_set("entries", e, "neurons", {"2": n, "3": 2})(d) for e, n in enumerate([1, 3])][2:]},
        "layers.2.group_ptr is [0, 2, 4, 6], but the entries' sizes give [0, 1, 4, 6]",
    ),
    "a gated base": ({"document": _set("base", "gated", True)}, "lack 'layers.2.up', 'layers.2.up_bias'"),
    "no calibration": (
        {"document": _set("calibration", None)},
        "'calibration.cases', which edit_config.json has no place for",
    ),
    "transposed": (
        {"tensors": _tensor(KEYS, lambda t: t.t())},
        f"{KEYS} has shape [8, 6], but edit_config.json says [6",
    ),
    "integers": ({"tensors": _tensor(KEYS, lambda t: t.int())}, f"{KEYS} has dtype I32, but must have F64 or F32 or"),
    "a float8": (
        {"tensors": _tensor(KEYS, lambda t: t.to(torch.float8_e4m3fn))},
        f"{KEYS} has dtype F8_E4M3, but must have",
    ),
    "mixed floats": ({"tensors": _tensor(KEYS, lambda t: t.half())}, "but layers.2.keys is torch.float16 on cpu"),
    "a pointer of floats": (
        {"tensors": _tensor("layers.3.group_ptr", lambda t: t.float())},
        "dtype F32, but must have I64",
    ),
    "a pointer that falls": (
        {"tensors": _tensor("layers.3.group_ptr", lambda t: t.flip(0))},
        "layers.3.group_ptr is [6, 4, 2, 0], but the entries' sizes give [0, 2, 4, 6]",
    ),
    "not finite": ({"tensors": _tensor(KEYS, lambda t: t / 0)}, f"{KEYS} holds values that are not finite, of edit"),
    "lacking": (
        {"tensors": lambda held: {k: v for k, v in held.items() if k != KEYS}},
        f"the tensor files lack '{KEYS}'",
    ),
    "too many": (
        {"tensors": _set("layers.4.keys", torch.zeros(1))},
        "holds 'layers.4.keys', which edit_config.json has",
    ),
    "huge": ({"blob": _declare(KEYS, shape=[10**15, 8])}, "edits.safetensors is not a readable safetensors file"),
    "huge, twice": ({"blob": _declare(KEYS, shape=[2**62, 8])}, "edits.safetensors is not a readable safetensors file"),
    "negative": ({"blob": _declare(KEYS, shape=[-6, -8])}, "edits.safetensors is not a readable safetensors file"),
    "another layout": ({"blob": _declare(KEYS, shape=[4, 12])}, f"{KEYS} has shape [4, 12], but edit_config.json says"),
    "overlapping": ({"blob": _declare(KEYS, data_offsets=[0, 192])}, "is not a readable safetensors file"),
    "a header beyond the file": (
        {"blob": lambda data: struct.pack("<Q", len(data)) + data[8:]},
        "edits.safetensors is not a readable safetensors file",
    ),
    "a header beyond everything": (
        {"blob": lambda data: struct.pack("<Q", 2**63) + data[8:]},
        "edits.safetensors is not a readable safetensors file",
    ),
    "not a header": ({"blob": lambda data: data[:8] + b"x" * (len(data) - 8)}, "is not a readable safetensors file"),
    "a pickle": ({"blob": lambda data: b"\x80\x04" + data[2:]}, "is not a readable safetensors file"),
    "no digest": (
        {"blob": lambda data: data.replace(b"digest", b"tsegid")},
        "has digest None, but edit_config.json says",
    ),
    "other values": ({"blob": lambda data: data[:-1] + b"\x01"}, "its tensors have digest "),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_an_error_that_names_it(name, tmp_path):
    changes, message = FORGED[name]
    make_edits(3).save_pretrained(tmp_path)
    forge(tmp_path, document=lambda data: None, tensors=lambda held: None)
    assert same(Edits.from_pretrained(tmp_path), make_edits(3))
    forge(tmp_path, **changes)
    with pytest.raises(EditsFileError) as caught:
        Edits.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"{", b"[" * 100_000, b"null", b'{"format_version": 1e999}', b"9" * 5000]
)
def test_a_document_that_is_none_is_an_error(text, tmp_path):
    make_edits(1).save_pretrained(tmp_path)
    (tmp_path / "edit_config.json").write_bytes(text)
    with pytest.raises(EditsFileError, match=r"edit_config\.json"):
        Edits.from_pretrained(tmp_path)
    make_edits(2).save_pretrained(tmp_path)  # but it can be replaced
    assert names(tmp_path) == PLAIN
    assert len(Edits.from_pretrained(tmp_path)) == 2


def test_sizes_are_checked_before_anything_is_loaded(tmp_path, monkeypatch):
    make_edits(3).save_pretrained(tmp_path)
    forge(tmp_path, document=_set("items", 4))

    class NoLoading:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)
            self.keys, self.metadata, self.get_slice = self.file.keys, self.file.metadata, self.file.get_slice

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_tensor(self, name):
            raise AssertionError("loaded before the check")

    safe_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", NoLoading)
    with pytest.raises(EditsFileError, match=r"shared\.2\.h_pos has shape \[5, 8\]"):
        Edits.from_pretrained(tmp_path)


def test_a_file_larger_than_memory_is_an_error(tmp_path):
    make_edits(3).save_pretrained(tmp_path)
    size = 1 << 42
    text = json.dumps({"__metadata__": {}, KEYS: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    file = tmp_path / "edits.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    try:
        os.truncate(file, 8 + len(text) + size)  # all hole: it takes no space
    except OSError:
        pytest.skip("the file system has no files of that size")
    forge(tmp_path, document=_set("files", 0, "size", file.stat().st_size))
    with pytest.raises(EditsFileError, match=r"edits\.safetensors"):
        Edits.from_pretrained(tmp_path)


def test_the_same_tensor_in_two_files_is_an_error(tmp_path):
    make_edits(1).save_pretrained(tmp_path, max_file_bytes=1)
    data = json.loads((tmp_path / "edit_config.json").read_text())
    name = "edits-99999-of-99999.safetensors"
    shutil.copy(tmp_path / data["files"][0]["name"], tmp_path / name)
    data["files"].append({**data["files"][0], "name": name})
    (tmp_path / "edit_config.json").write_text(json.dumps(data))
    with pytest.raises(EditsFileError, match=f"{name} and .* both hold 'layers.2.keys'"):
        Edits.from_pretrained(tmp_path)

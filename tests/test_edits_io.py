"""Edits on disk and on the hub: exact round trips, no damage unseen, and no moment at which a kill loses them."""

import builtins
import json
import multiprocessing
import os
import random
import shutil
import struct
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_edits
from tests.test_edits import assert_own_storage, edits_of_any_kind, same
from unike_kernels import edits_io
from unike_kernels.edits import Edits, EditsError, EditsFileError

PLAIN = ["edit_config.json", "edits.safetensors"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Round trips


@given(edits_of_any_kind(), st.sampled_from([1, 200, 1000, 5 * 10**9]))
@settings(max_examples=40)
def test_round_trip_is_exact(tmp_path_factory, edits, max_file_bytes):
    path = tmp_path_factory.mktemp("edits")
    edits.save_pretrained(path, max_file_bytes=max_file_bytes)
    loaded = Edits.from_pretrained(path)
    assert same(loaded, edits)
    assert_own_storage(loaded, edits)
    files = [name for name in names(path) if name != "edit_config.json"]
    if max_file_bytes == 5 * 10**9:
        assert files == ["edits.safetensors"]
    for name in files:
        start, header = json_of((path / name).read_bytes())
        assert start % 8 == 0
        for key, tensor in header.items():
            if key != "__metadata__":  # aligned: a mapped tensor can be used as it lies
                assert tensor["data_offsets"][0] % loaded.named_tensors()[key].element_size() == 0
        with safetensors.safe_open(path / name, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118  not a dict
        assert len(sizes) == 1 or sum(sizes) <= max_file_bytes
    shutil.rmtree(path)


def test_files_are_the_same_for_the_same_edits(tmp_path):
    edits = make_edits(3)
    edits.save_pretrained(tmp_path / "a")
    edits.to().save_pretrained(str(tmp_path / "b" / "c"))
    for name in PLAIN:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b/c" / name).read_bytes()
    document = json.loads((tmp_path / "a/edit_config.json").read_text())
    assert document["format_version"] == 1
    assert list(document) == sorted(document)
    assert document["entries"][1]["neurons"] == {"2": 2, "3": 2}
    assert [record["name"] for record in document["files"]] == ["edits.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_who_may_read_is_up_to_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        make_edits(1).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in PLAIN] == [0o640, 0o640]


def test_views_and_shared_storages_are_saved_as_they_look(tmp_path):
    edits = make_edits(3, gated=True)
    expected = edits.to()
    own = edits.layers[2]
    own.keys = expected.layers[2].keys.t().contiguous().t()  # strides of a transpose
    own.values = torch.cat([torch.zeros(2, 8), own.values])[2:]  # an offset
    own.up = own.up.clone().requires_grad_()
    edits.shared[3].h_sem = edits.shared[2].h_sem  # one tensor under two names
    expected.shared[3].h_sem = expected.shared[2].h_sem.clone()
    edits.save_pretrained(tmp_path)
    assert same(Edits.from_pretrained(tmp_path), expected)


def test_loaded_tensors_do_not_follow_the_file(tmp_path):
    edits = make_edits(3)
    edits.save_pretrained(tmp_path)
    loaded = Edits.from_pretrained(tmp_path)
    file = tmp_path / "edits.safetensors"
    before = file.read_bytes()
    for tensor in loaded.named_tensors().values():
        tensor.zero_()
    assert file.read_bytes() == before
    loaded = Edits.from_pretrained(tmp_path)
    file.write_bytes(bytes(len(before)))
    assert same(loaded, edits)


def test_a_smaller_save_leaves_nothing_of_a_larger_one(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "edits-of-mine.safetensors").write_text("mine too")
    mine = names(tmp_path)
    make_edits(3).save_pretrained(tmp_path, max_file_bytes=1)
    assert len(names(tmp_path)) == len(make_edits(3).named_tensors()) + 1 + len(mine)
    make_edits(1, layers=(3,)).save_pretrained(tmp_path)
    assert names(tmp_path) == sorted([*PLAIN, *mine])


# Kills. A step is a call that changes the file system, or could block; a kill before the n-th is tried for every n.


class Killed(BaseException):
    """No code catches this one, and from then on no step works: as if the process were gone."""


class Steps:
    """Counts the steps of a save, and ends the process, or fails once, at the n-th."""

    def __init__(self, monkeypatch, at=None, error=None):
        self.count, self.at, self.error = 0, at, error
        for name in ("replace", "unlink", "fsync", "open"):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        monkeypatch.setattr(edits_io, "open", self.opening, raising=False)

    def wrap(self, name, function, half=None):
        def step(*args, **kwargs):
            self.count += 1
            if self.at is not None and (self.count == self.at or (self.count > self.at and self.error is None)):
                if self.count == self.at and half:
                    half(*args)
                raise self.error or Killed
            return function(*args, **kwargs)

        return step

    def opening(self, path, mode):
        return Writing(self.wrap("open", builtins.open)(path, mode), self)


class Writing:
    """An open file whose first write is a step; a kill there leaves half of it on disk."""

    def __init__(self, file, steps):
        self.file, self.flush, self.fileno, self.plain_write = file, file.flush, file.fileno, file.write
        self.first_write = steps.wrap("write", file.write, self.half)

    def half(self, data):
        self.plain_write(data[: len(data) // 2])
        self.flush()

    def write(self, data):
        write, self.first_write = self.first_write, self.plain_write
        return write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


SMALL = {"d": 2, "layers": (2,), "n_items": 1, "n_cases": None, "encoder_maps": 0, "neurons": 1}
TWO_FILES = 80


def _state(number: int) -> Edits:
    return make_edits(2, seed=number, shared_seed=number, **SMALL)


def _limit(layout: str) -> int:
    return TWO_FILES if layout == "sharded" else edits_io.MAX_FILE_BYTES


def assert_one_of(path: Path, *states: Edits) -> int:
    """The index of the state that the directory holds."""
    loaded = Edits.from_pretrained(path)
    matches = [n for n, state in enumerate(states) if same(loaded, state)]
    assert len(matches) == 1
    return matches[0]


def kill_at_every_step(path: Path, prepare, save, check) -> int:
    """prepare(path); save(path) killed at its n-th step; check(path): for all n. Returns how many n there were."""
    for n in range(1, 1000):
        shutil.rmtree(path, ignore_errors=True)
        prepare(path)
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, at=n)
            with suppress(Killed):
                save(path)
        check(path, steps)
        if steps.count < n:
            return n
    raise AssertionError("a save without end")


@pytest.mark.parametrize("before", ["one file", "sharded"])
@pytest.mark.parametrize("after", ["one file", "sharded"])
def test_a_kill_leaves_the_old_edits_or_the_new_ones(tmp_path, before, after):
    old, new, next_one = _state(1), _state(2), _state(3)
    held = []

    def check(path, steps):
        held.append(assert_one_of(path, old, new))
        next_one.save_pretrained(path)
        assert names(path) == PLAIN
        assert_one_of(path, next_one)

    kill_at_every_step(
        tmp_path / "edits",
        lambda path: old.save_pretrained(path, max_file_bytes=_limit(before)),
        lambda path: new.save_pretrained(path, max_file_bytes=_limit(after)),
        check,
    )
    assert held == sorted(held)  # once new, always new
    assert held.count(0) >= 8
    assert held.count(1) >= 4


def test_a_kill_in_the_first_save_leaves_no_edits_or_all_of_them(tmp_path):
    new, held = _state(2), []

    def check(path, steps):
        try:
            held.append(assert_one_of(path, new))
        except EditsFileError as err:
            held.append(-1)
            assert "holds no edits: edit_config.json cannot be read (No such file or directory)" in str(err)
        new.save_pretrained(path)
        assert names(path) == PLAIN

    kill_at_every_step(tmp_path / "edits", lambda path: None, lambda path: new.save_pretrained(path), check)
    assert held == sorted(held)
    assert {-1, 0} == set(held)


def test_a_kill_after_a_kill(tmp_path):
    first, second, third = _state(1), _state(2), _state(3)
    wrecks = []  # what lies in a directory after a kill, each once

    def keep(path, steps):
        wreck = {file.name: file.read_bytes() for file in path.iterdir()}
        if wreck not in wrecks:
            wrecks.append(wreck)

    def second_save(path):
        second.save_pretrained(path, max_file_bytes=TWO_FILES)

    kill_at_every_step(tmp_path / "edits", first.save_pretrained, second_save, keep)
    assert len(wrecks) >= 8

    survivors = []
    for wreck in wrecks:

        def put(path, wreck=wreck):
            path.mkdir()
            for name, data in wreck.items():
                (path / name).write_bytes(data)

        held = []
        kill_at_every_step(
            tmp_path / "edits",
            put,
            third.save_pretrained,
            lambda path, steps, held=held: held.append(assert_one_of(path, first, second, third)),
        )
        assert held == sorted(held)
        assert held[-1] == 2
        assert names(tmp_path / "edits") == PLAIN
        survivors.append(held[0])
    assert survivors == sorted(survivors)
    assert set(survivors) == {0, 1}


def test_the_same_tensors_with_other_entries(tmp_path):
    old, new = _state(1), _state(1)
    new.entries.reverse()
    new.base = make_edits(1, gated=False, **{**SMALL, "layers": (5,)}).base
    kill_at_every_step(
        tmp_path / "edits",
        lambda path: old.save_pretrained(path),
        lambda path: new.save_pretrained(path),
        lambda path, steps: assert_one_of(path, old, new),
    )
    assert names(tmp_path / "edits") == PLAIN


@pytest.mark.parametrize("after", ["one file", "sharded"])
def test_a_failing_step_leaves_one_state_and_no_debris(tmp_path, after):
    old, new = _state(1), _state(2)
    path, failed = tmp_path / "edits", 0
    for n in range(1, 1000):
        shutil.rmtree(path, ignore_errors=True)
        old.save_pretrained(path)
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, at=n, error=OSError(28, "No space left on device"))
            try:
                new.save_pretrained(path, max_file_bytes=_limit(after))
            except OSError:
                failed += 1
        if assert_one_of(path, old, new) == 0:
            assert names(path) == PLAIN
        if steps.count < n:
            break
    assert failed == n - 1 >= 8


def test_a_failing_save_spares_the_files_of_a_document_that_it_cannot_read(tmp_path):
    _state(1).save_pretrained(tmp_path)
    config = tmp_path / "edit_config.json"
    text = config.read_text()
    config.write_text(text[:-3])  # a slip of somebody's editor
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
        Steps(patch, at=5, error=OSError(28, "No space left on device"))
        _state(2).save_pretrained(tmp_path)
    config.write_text(text)
    assert_one_of(tmp_path, _state(1))


def test_everything_is_on_disk_before_a_name_relies_on_it(tmp_path, monkeypatch):
    _state(1).save_pretrained(tmp_path)
    synced, events = {}, []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            events.append("directory")

    def note_rename(source, target):
        assert synced[os.stat(source).st_ino] == os.stat(source).st_size, source
        replace(source, target)
        events.append("document" if Path(target).name == "edit_config.json" else "tensors")

    def note_open(path, mode):
        file = builtins.open(path, mode)  # noqa: SIM115  the caller closes it
        synced.pop(os.fstat(file.fileno()).st_ino, None)  # numbers of removed files come back
        return file

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    monkeypatch.setattr(edits_io, "open", note_open, raising=False)
    _state(2).save_pretrained(tmp_path, max_file_bytes=TWO_FILES)
    shards = len(names(tmp_path)) - 1
    assert shards > 1
    staged = ["tensors"] * shards
    assert events == [*staged, "directory", "document", "directory", *staged]


def _save_in_turn(path, states, go):
    go.set()
    while True:
        for state in states:
            state.save_pretrained(path)


def _fork():
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork: starting a Python per kill would take minutes")
    return multiprocessing.get_context("fork")


def test_a_real_kill(tmp_path):
    context, chance = _fork(), random.Random(0)
    states = [make_edits(2, d=64, layers=(2, 3), neurons=100 + n, seed=n) for n in range(3)]
    states[0].save_pretrained(tmp_path)
    held = set()
    for _ in range(15):
        go = context.Event()
        turn = chance.randrange(3)
        process = context.Process(target=_save_in_turn, args=(tmp_path, states[turn:] + states[:turn], go))
        process.start()
        go.wait()
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        held.add(assert_one_of(tmp_path, *states))
    states[1].save_pretrained(tmp_path)
    assert names(tmp_path) == PLAIN
    assert len(held) > 1


@pytest.mark.parametrize("when", ["found", "opened"])
def test_a_file_that_is_moved_once_it_was(tmp_path, when):
    old, new, read = _state(1), _state(2), []

    def check(path, steps):
        if not list(path.glob("edits.*.safetensors")) or assert_one_of(path, old, new) == 0:
            return
        stat, opened = Path.stat, edits_io._opened

        def settle():
            patch.undo()
            edits_io._settle(path)

        def stat_and_settle(self, **kwargs):
            result = stat(self, **kwargs)
            if self.suffix == ".safetensors":
                settle()
            return result

        @contextmanager
        def opened_and_settle(file):
            with opened(file) as handle:
                settle()
                yield handle

        with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as at_once:
            at_once.delattr(edits_io, "_locked")  # which a second look would need
            if when == "found":
                patch.setattr(Path, "stat", stat_and_settle)
            else:
                patch.setattr(edits_io, "_opened", opened_and_settle)
            read.append(assert_one_of(path, old, new))
        assert names(path) == PLAIN

    kill_at_every_step(tmp_path / "edits", old.save_pretrained, new.save_pretrained, check)
    assert set(read) == {1}


def test_reading_while_others_write(tmp_path):
    context = _fork()
    states = [make_edits(2, d=64, seed=n, **{k: v for k, v in SMALL.items() if k != "d"}) for n in range(3)]
    states[0].save_pretrained(tmp_path)
    processes = [
        context.Process(target=_save_in_turn, args=(tmp_path, states[n:] + states[:n], context.Event()))
        for n in range(2)
    ]
    for process in processes:
        process.start()
    try:
        held = [assert_one_of(tmp_path, *states) for _ in range(60)]
    finally:
        for process in processes:
            assert process.is_alive()
            process.kill()
            process.join()
    assert len(set(held)) > 1


# Damage


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


def json_of(data: bytes):
    """A tensor file's header, or its bytes where they are no header."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        return length, json.loads(data[8 : 8 + length])
    except ValueError:
        return data


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


def test_places_without_edits(tmp_path):
    with pytest.raises(EditsFileError, match=r"nowhere holds no edits: edit_config\.json cannot be read"):
        Edits.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for act in (
        lambda: Edits.from_pretrained(tmp_path / "file"),
        lambda: make_edits(1).save_pretrained(tmp_path / "file"),
    ):
        with pytest.raises(EditsFileError, match="file"):
            act()
    assert (tmp_path / "file").read_text() == "x"


# The hub


class FakeHub:
    """huggingface_hub's three calls that edits use, over a folder."""

    def __init__(self, monkeypatch, folder):
        import huggingface_hub

        self.folder, self.calls = folder, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", self)

    def __call__(self, token=None):
        self.calls.append(("api", token))
        return self

    def snapshot_download(self, repo_id, *, revision, token, allow_patterns):
        self.calls.append(("download", repo_id, revision, token, allow_patterns))
        if not (self.folder / repo_id).exists():
            raise FileNotFoundError(f"404: {repo_id}")
        return str(self.folder / repo_id)

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, delete_patterns):
        self.calls.append(("upload", repo_id, revision, commit_message, delete_patterns))
        shutil.copytree(folder_path, self.folder / repo_id)
        return type("Commit", (), {"commit_url": "address"})


def test_hub_round_trip(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, tmp_path)
    edits, patterns = make_edits(2), ["edit_config.json", "edits*.safetensors"]
    assert edits.push_to_hub("someone/edits", private=True, token="t", message="Two edits") == "address"
    assert hub.calls == [
        ("api", "t"),
        ("create", "someone/edits", True, True),
        ("upload", "someone/edits", None, "Two edits", patterns),
    ]
    assert names(tmp_path / "someone/edits") == PLAIN
    assert same(Edits.from_pretrained("someone/edits", revision="v2"), edits)
    assert hub.calls[-1] == ("download", "someone/edits", "v2", None, patterns)
    edits.push_to_hub("someone/others", revision="v3")
    assert hub.calls[-1] == ("upload", "someone/others", "v3", "Upload edits", patterns)


def test_hub_is_asked_only_where_no_local_path_is_meant(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    make_edits(1).save_pretrained("someone/edits")
    assert len(Edits.from_pretrained("someone/edits")) == 1
    with pytest.raises(EditsError, match=r"a revision \('v2'\) belongs to a hub repository"):
        Edits.from_pretrained("someone/edits", revision="v2")
    for path in (tmp_path / "no/edits", "./no/edits", "no/such/edits", "edits", "../no/edits", "no/"):
        with pytest.raises(EditsFileError, match="holds no edits"):
            Edits.from_pretrained(path)
    assert hub.calls == []
    with pytest.raises(EditsFileError, match="no/edits is no directory, and getting it from the hub failed: 404"):
        Edits.from_pretrained("no/edits")


@pytest.mark.parametrize("failed", [FileNotFoundError, ValueError, RuntimeError])
def test_a_hub_that_takes_nothing_is_told(tmp_path, monkeypatch, failed):
    FakeHub(monkeypatch, tmp_path)

    def refuse(self, repo_id, **options):
        raise failed("no connection")

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    with pytest.raises(EditsError, match="could not be put into someone/edits on the hub: no connection"):
        make_edits(1).push_to_hub("someone/edits")


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(EditsError, match="to put edits into someone/edits on the hub, install huggingface_hub"):
        make_edits(1).push_to_hub("someone/edits")
    with pytest.raises(EditsFileError, match="someone/edits is no directory; to look for it on the hub, install"):
        Edits.from_pretrained("someone/edits")

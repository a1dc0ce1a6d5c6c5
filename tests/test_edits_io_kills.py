"""No moment of a save at which a kill loses edits.

A step is a call that changes the file system, or could block; a kill before the n-th is tried for every n.
"""

import builtins
import multiprocessing
import os
import random
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.factories import make_edits
from tests.test_edits import same
from tests.test_edits_io import PLAIN, names
from unike_kernels import edits_io
from unike_kernels.edits import Edits, EditsFileError


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

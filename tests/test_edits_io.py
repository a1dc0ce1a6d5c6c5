"""Edits on disk and on the hub: exact round trips, files that say who may read them, and places without edits."""

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
from tests.test_edits import assert_own_storage, edits_of_any_kind, same
from unike_kernels.edits import Edits, EditsError, EditsFileError

PLAIN = ["edit_config.json", "edits.safetensors"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def json_of(data: bytes):
    """A tensor file's header, or its bytes where they are no header."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        return length, json.loads(data[8 : 8 + length])
    except ValueError:
        return data


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

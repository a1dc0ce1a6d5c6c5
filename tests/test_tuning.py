"""Launch choices: the first row that fits, a file's rows before those of the package, and files that are wrong."""

import json

import pytest
import torch

from unike_kernels.triton_kernels import tuning

CPU = torch.device("cpu")
ROW = {"kernel": "k", "arch": 0, "at_most": {"tokens": 16}, "choice": {"BN": 32}}


@pytest.fixture
def table(monkeypatch):
    rows = [tuning.Row("k", 90, {}, {"BN": 1}), tuning.Row("k", 0, {"tokens": 64}, {"BN": 2})]
    monkeypatch.setattr(tuning, "ROWS", [*rows, tuning.Row("k", 0, {}, {"BN": 4})])


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes what UNIKE_TUNING then names."""

    def write(content):
        path = tmp_path / "tuned.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("UNIKE_TUNING", str(path))
        tuning._measured.cache_clear()
        return path

    yield write
    tuning._measured.cache_clear()


@pytest.mark.usefixtures("table")
def test_the_first_row_that_fits_wins(monkeypatch):
    monkeypatch.delenv("UNIKE_TUNING", raising=False)
    assert tuning.choose("k", CPU, tokens=64) == {"BN": 2}
    assert tuning.choose("k", CPU, tokens=65) == {"BN": 4}
    with tuning.pretend(90):
        assert tuning.choose("k", CPU, tokens=1) == {"BN": 1}
    with pytest.raises(LookupError, match="other"):
        tuning.choose("other", CPU)


def test_what_has_no_room_gets_fewer_stages_then_narrower_ones():
    choice, meta = {"BLOCK_N": 128, "BLOCK_D": 128, "num_stages": 4}, torch.device("meta")
    for arch, rows, expected in (
        (90, 144, (128, 4)),
        (80, 144, (128, 4)),
        (89, 144, (128, 3)),  # two buffers of 36 KiB of 99
        (120, 144, (128, 2)),  # not known: as little as any has
        (90, 528, (64, 2)),
        (89, 1040, (32, 2)),
    ):
        with tuning.pretend(arch):
            found = tuning.fitting(choice, rows, 2, meta)
        assert (found["BLOCK_D"], found["num_stages"]) == expected and found["BLOCK_N"] == 128
    assert tuning.fitting(choice, 10**6, 2, torch.device("cpu")) == choice  # the interpreter has room for all


@pytest.mark.usefixtures("table")
def test_a_file_is_asked_first(tuned):
    tuned([ROW])
    assert tuning.choose("k", CPU, tokens=16) == {"BN": 32}
    assert tuning.choose("k", CPU, tokens=17) == {"BN": 2}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (["k", 0, {}, {}], "kernel, arch, at_most, choice"),
        ({key: value for key, value in ROW.items() if key != "arch"}, "kernel, arch, at_most, choice"),
        (ROW | {"more": 1}, "nothing else"),
        (ROW | {"kernel": 3}, "kernel must be a name"),
        (ROW | {"arch": "90"}, "arch must be an integer"),
        (ROW | {"arch": True}, "arch must be an integer"),
        (ROW | {"at_most": {"tokens": "16"}}, "at_most must be"),
        (ROW | {"at_most": None}, "at_most must be"),
        (ROW | {"choice": {"BN": 1.5}}, "choice must be"),
        (ROW | {"choice": {"BN": 0}}, "choice must be"),
        (ROW | {"choice": [1]}, "choice must be"),
    ],
)
@pytest.mark.usefixtures("table")
def test_a_wrong_entry_is_named_with_its_file(tuned, entry, says):
    path = tuned([ROW, entry])
    with pytest.raises(ValueError, match=says) as error:
        tuning.choose("k", CPU, tokens=1)
    assert str(path) in str(error.value)
    assert "row 1" in str(error.value)


@pytest.mark.usefixtures("table")
def test_a_file_that_is_no_list_of_rows_is_refused(tuned):
    for content in ("{", "{}", "3"):
        path = tuned(content)
        with pytest.raises(ValueError, match="UNIKE_TUNING") as error:
            tuning.choose("k", CPU, tokens=1)
        assert str(path) in str(error.value)
    path.unlink()
    tuning._measured.cache_clear()
    with pytest.raises(ValueError, match="cannot be read"):
        tuning.choose("k", CPU, tokens=1)


@pytest.mark.usefixtures("table")
def test_a_size_that_the_kernel_does_not_have_is_named(tuned):
    tuned([ROW | {"at_most": {"token": 16}}])
    with pytest.raises(ValueError, match="asks for token, but k has tokens"):
        tuning.choose("k", CPU, tokens=1)

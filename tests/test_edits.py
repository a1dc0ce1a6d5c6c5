"""Edits in memory: select, remove, merge, to, validate, and what they print."""

import dataclasses
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import make_base, make_edits
from unike_kernels.config import ShiftConfig, UnikeConfig
from unike_kernels.edits import Edits, EditsError, UnknownEditError

SHARED = ("shared.", "calibration.")


@st.composite
def edits_of_any_kind(draw: st.DrawFn, min_edits: int = 0) -> Edits:
    """Edits over all sizes that may be 0, one or several layers, gated or not, in every dtype."""
    layers = tuple(sorted(draw(st.sets(st.integers(0, 12), min_size=1, max_size=3))))
    n_edits = draw(st.integers(min_edits, 4))
    rows = st.lists(st.integers(0, 3), min_size=len(layers), max_size=len(layers))
    edits = make_edits(
        n_edits,
        draw(st.sampled_from([2, 6])),
        layers,
        draw(st.booleans()),
        draw(st.integers(0, 3)),
        n_cases=draw(st.none() | st.integers(0, 3)),
        encoder_maps=draw(st.integers(0, 2)),
        neurons=draw(st.lists(rows, min_size=n_edits, max_size=n_edits)),
        ids=draw(st.lists(st.text(min_size=1, max_size=4), min_size=n_edits, max_size=n_edits, unique=True)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 5)),
    )
    changes = st.fixed_dictionaries(
        {
            "target": st.text(max_size=5),
            "image": st.none() | st.text(max_size=3),
            "loss": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "success": st.booleans(),
            "steps": st.integers(0, 10**6),
        }
    )
    edits.entries = [replace(entry, **draw(changes)) for entry in edits.entries]
    return edits


def same(a: Edits, b: Edits) -> bool:
    """Whether all of it is equal: entries, config, base and every tensor with its dtype."""
    ours, theirs = a.named_tensors(), b.named_tensors()
    return (
        (a.entries, a.config, a.base, list(ours)) == (b.entries, b.config, b.base, list(theirs))
        and (a.calibration and a.calibration.layer) == (b.calibration and b.calibration.layer)
        and all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    )


def groups_of(edits: Edits, name: str) -> dict[str, torch.Tensor]:
    """Every tensor row that belongs to one edit alone, sliced here by hand."""
    e, out = edits.ids.index(name), {}
    for layer, own in edits.layers.items():
        start, stop = int(own.group_ptr[e]), int(own.group_ptr[e + 1])
        for field in ("keys", "key_bias", "values", "up", "up_bias"):
            if getattr(own, field) is not None:
                out[f"{layer}.{field}"] = getattr(own, field)[start:stop]
        out |= {f"{layer}.{field}": getattr(own, field)[e] for field in ("zeta", "h_sem", "h_pos")}
    return out


def assert_holds(result: Edits, source: Edits, ids: list[str]) -> None:
    """result is exactly these edits of source, valid, with the same shared tensors."""
    result.validate()
    assert result.ids == ids
    for name in ids:
        assert result.entries[result.ids.index(name)] == source.entries[source.ids.index(name)]
        ours, theirs = groups_of(result, name), groups_of(source, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = result.named_tensors(), source.named_tensors()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key.startswith(SHARED))


def assert_own_storage(result: Edits, *sources: Edits) -> None:
    """No storage is shared with a source, and none is larger than the tensor that it holds."""
    theirs = {t.untyped_storage().data_ptr() for source in sources for t in source.named_tensors().values()} - {0}
    for name, tensor in result.named_tensors().items():
        assert tensor.untyped_storage().data_ptr() not in theirs, name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


# Select, remove, merge


@given(edits_of_any_kind(), st.data())
def test_select_any_ids_in_any_order(edits, data):
    ids = data.draw(st.lists(st.sampled_from(edits.ids), unique=True) if len(edits) else st.just([]))
    chosen = edits.select(ids)
    assert_holds(chosen, edits, ids)
    assert_own_storage(chosen, edits)


@given(edits_of_any_kind(min_edits=1), st.data())
def test_remove_leaves_the_others_as_they_were(edits, data):
    gone = data.draw(st.sets(st.sampled_from(edits.ids)))
    kept = edits.remove(gone)
    assert_holds(kept, edits, [name for name in edits.ids if name not in gone])
    assert_own_storage(kept, edits)


@given(edits_of_any_kind(min_edits=1), st.data())
def test_parts_merge_back_into_the_whole(edits, data):
    edits.entries = [replace(entry, prompt=f"{e}") for e, entry in enumerate(edits.entries)]
    order = data.draw(st.permutations(edits.ids))
    cut = data.draw(st.integers(0, len(order)))
    merged = Edits.merge([edits.select(order[:cut]), edits.select(order[cut:])])
    assert_holds(merged, edits, order)
    assert_own_storage(merged, edits)
    assert same(merged.select(edits.ids), edits)


def test_ids_can_be_one_or_many():
    edits = make_edits(3)
    assert edits.select("edit-0-1").ids == edits.select(["edit-0-1"]).ids == ["edit-0-1"]
    assert edits.remove("edit-0-1").ids == edits.remove(iter(["edit-0-1"])).ids == ["edit-0-0", "edit-0-2"]
    assert len(edits) == 3


@pytest.mark.parametrize("method", ["select", "remove"])
def test_unknown_id_is_named_with_what_exists(method):
    with pytest.raises(UnknownEditError) as caught:
        getattr(make_edits(30), method)(["edit-0-1", "nobody"])
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("no edit has the id 'nobody'; there are 30: 'edit-0-0', 'edit-0-1', ")
    assert str(caught.value).endswith("and 10 more")


def test_an_id_can_be_selected_once():
    with pytest.raises(EditsError, match="more often: 'edit-0-1'"):
        make_edits(3).select(["edit-0-1", "edit-0-0", "edit-0-1"])


def test_changing_one_leaves_the_other():
    edits = make_edits(3, gated=True)
    before = make_edits(3, gated=True)
    results = [edits.select(edits.ids), edits.remove("edit-0-0"), Edits.merge([edits]), edits.to(dtype=torch.float32)]
    for result in results:
        for tensor in result.named_tensors().values():
            tensor.zero_()
        result.entries.clear()
    assert same(edits, before)


def test_results_carry_no_graph():
    edits = make_edits(2)
    edits.layers[2].keys.requires_grad_()
    edits.shared[2].h_sem.requires_grad_()
    for result in (edits.select(edits.ids), edits.remove("edit-0-0"), Edits.merge([edits]), edits.to()):
        assert not any(tensor.requires_grad for tensor in result.named_tensors().values())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_no_file_holds_are_refused(dtype):
    edits = make_edits(2)
    told = f"one of torch.float64, torch.float32, torch.bfloat16, torch.float16, but got {dtype}"
    with pytest.raises(EditsError, match=told):
        edits.to(dtype=dtype)
    edits.layers[2].keys = edits.layers[2].keys.to(dtype)
    with pytest.raises(EditsError, match=rf"layers.2.keys has dtype {dtype}, but must have one of torch.float64"):
        edits.validate()


def test_merge_of_other_edits_stores_the_shared_parts_once():
    a, b, c = make_edits(2, seed=1), make_edits(1, seed=2), make_edits(0, seed=3)
    merged = Edits.merge([a, b, c])
    assert merged.ids == [*a.ids, *b.ids]
    own = sum(t.nbytes for e in (a, b) for key, t in e.named_tensors().items() if key.startswith("layers."))
    ptr = sum(8 for _ in a.layers)  # two group_ptr of E + 1 became one
    common = sum(t.nbytes for key, t in a.named_tensors().items() if key.startswith(SHARED))
    assert merged.nbytes == own - ptr + common


def _changed(**changes):
    return lambda edits: replace(edits, **changes)


def _shifted(name):
    def change(edits):
        tensor = edits.named_tensors()[name]
        tensor[(0,) * tensor.dim()] += 0.5
        return edits

    return change


DIFFERENT = {
    "size": (lambda _: make_edits(1, d=4, seed=2), ["base hidden_size: 8 and 4", "base ffn_size: 32 and 16"]),
    "probe": (_changed(base=replace(make_base(), probe=(0.125, 1.0, 0.25))), ["base probe: (0.125, -0.5, 0.25) and"]),
    "config": (
        _changed(config=UnikeConfig(layers=(2, 3), shift=ShiftConfig(k=7, clamp=False))),
        ["config.shift.k: 40 and 7", "config.shift.clamp: True and False"],
    ),
    "layers": (lambda _: make_edits(1, layers=(2, 4), seed=2), ["layers: [2, 3] and [2, 4]"]),
    "memory values": (_shifted("shared.3.h_pos"), ["shared.3.h_pos: values up to 0.5 apart"]),
    "memory size": (lambda _: make_edits(1, n_items=6, seed=2), ["shared.2.h_sem: shapes [5, 8] and [6, 8]"]),
    "encoder": (_shifted("shared.2.encoder.1.bias"), ["shared.2.encoder.1.bias: values up to 0.5 apart"]),
    "no encoder": (
        lambda _: make_edits(1, encoder_maps=0, seed=2),
        ["shared.2.encoder.0.weight: only the first has it"],
    ),
    "calibration": (_shifted("calibration.cases"), ["calibration.cases: values up to 0.5 apart"]),
    "no calibration": (_changed(calibration=None), ["calibration.center: only the first has it"]),
    "dtype": (lambda edits: edits.to(dtype=torch.float64), ["layers.2.keys: torch.float32 on cpu and torch.float64"]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_merge_refuses_what_differs_and_names_it(name):
    change, messages = DIFFERENT[name]
    a, b = make_edits(2, seed=1), make_edits(1, seed=2)
    assert Edits.merge([a, b]).ids == [*a.ids, *b.ids]
    with pytest.raises(EditsError) as caught:
        Edits.merge([a, a.select([]), change(b)])
    assert str(caught.value).startswith("edits 0 and 2 cannot be merged; they differ in ")
    for message in messages:
        assert message in str(caught.value)


def test_the_name_of_the_base_keeps_nobody_from_merging():
    b = make_edits(1, seed=2)
    b = replace(b, base=replace(b.base, name_or_path="another/path"))
    assert Edits.merge([make_edits(1), b]).base.name_or_path == "tiny"


def test_merge_refuses_equal_ids_and_nothing():
    with pytest.raises(EditsError, match="the same id: 'edit-0-0', 'edit-0-1'"):
        Edits.merge([make_edits(2), make_edits(2)])
    with pytest.raises(EditsError, match="nothing to merge"):
        Edits.merge([])


def test_the_newer_of_two_edits_with_one_request_replaces_the_older():
    a, b = make_edits(2, seed=1), make_edits(2, seed=2)
    request = {"prompt": a.entries[0].prompt, "image": a.entries[0].image}
    b.entries[1] = replace(b.entries[1], **request)
    with pytest.warns(UserWarning, match="edit 'edit-2-1' replaces 'edit-1-0': the same image and prompt") as caught:
        merged = Edits.merge([a, b])
    assert len(caught) == 1
    assert_holds(merged.select(["edit-1-1"]), a, ["edit-1-1"])
    assert_holds(merged.remove("edit-1-1"), b, b.ids)

    b.entries[1] = replace(b.entries[1], image="another picture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Edits.merge([a, b])) == 4


# To, nbytes, repr


def test_to_changes_floats_only():
    edits = make_edits(2, gated=True)
    half = edits.to(dtype=torch.bfloat16)
    half.validate()
    for name, tensor in half.named_tensors().items():
        assert tensor.dtype == (torch.int64 if name.endswith("group_ptr") else torch.bfloat16)
    assert same(edits.to("cpu"), edits)
    with pytest.raises(EditsError, match=r"torch\.int32"):
        edits.to(dtype=torch.int32)


def test_nbytes_counts_every_tensor():
    edits = make_edits(1, d=4, layers=(0,), n_items=2, n_cases=3, encoder_maps=1, neurons=2)
    own = 2 * 4 + 2 + 2 * 4 + 3 * 4  # keys, biases, values; zeta, h_sem, h_pos
    shared = 2 * 2 * 4 + 4 * 4 + 4 + 4 + 3 * 4  # memory, encoder, center, cases
    assert edits.nbytes == 4 * (own + shared) + 8 * 2


def test_repr_is_a_short_table():
    edits = make_edits(12, neurons=[[e, 1] for e in range(12)])
    edits.entries[1] = replace(edits.entries[1], prompt="two\nlines \x1b[2J and " + "very " * 20 + "long", loss=None)
    lines = repr(edits).splitlines()
    assert lines[0] == f"Edits: 12 of tiny, layers [2, 3], 5 memory items, {edits.nbytes / 1e6:.3g} MB"
    assert lines[1].split() == ["id", "prompt", "->", "target", "neurons", "loss", "success"]
    assert lines[2].split()[-3:] == ["0+1", "0", "yes"]
    assert "two lines ?[2J and very very very ver... -> thing 1" in lines[3]
    assert lines[3].split()[-3:] == ["1+1", "-", "NO"]
    assert lines[-1] == "... and 2 more"
    assert len(lines) == 2 + 10 + 1
    assert len(edits.summary().splitlines()) == 2 + 12
    assert max(map(len, lines)) <= 120


# Validate


def _tensor(layer_part, name, change):
    def apply(edits):
        room = getattr(edits, layer_part)
        part = room[3] if isinstance(room, dict) else room
        setattr(part, name, change(getattr(part, name)))

    return apply


def _entry(**changes):
    def apply(edits):
        edits.entries[1] = replace(edits.entries[1], **changes)

    return apply


def _poke(part, name, value):
    def change(tensor):
        tensor[1] = value
        return tensor

    return _tensor(part, name, change)


def _base(**changes):
    def apply(edits):
        edits.base = replace(edits.base, **changes)

    return apply


BROKEN = {
    "keys too short": (_tensor("layers", "keys", lambda t: t[1:]), "layers.3.keys has shape [5, 8], but must have [6"),
    "values too narrow": (_tensor("layers", "values", lambda t: t[:, 1:]), "[6, 7], but must have [6, 8]"),
    "zeta per neuron": (_tensor("layers", "zeta", lambda t: t.repeat(2, 1)), "[6, 8], but must have [3, 8]"),
    "bias of two dimensions": (_tensor("layers", "key_bias", lambda t: t[:, None]), "[6, 1], but must have [6]"),
    "other hidden size": (_base(hidden_size=4), "layers.2.keys has shape [6, 8], but must have [6, 4]"),
    "up without a gated FFN": (_tensor("layers", "up", lambda t: torch.zeros(6, 8)), "layers.3.up"),
    "gated without up": (_base(gated=True), "'layers.2.up', 'layers.2.up_bias', 'layers.3.up', 'layers.3.up_bias'"),
    "memory of another size": (_tensor("shared", "h_sem", lambda t: t[1:]), "shared.3.h_sem has shape [4, 8], but"),
    "encoder at one layer": (_tensor("shared", "encoder", lambda t: ()), "shared.3.encoder.0.weight"),
    "encoder of another size": (
        _tensor("shared", "encoder", lambda maps: tuple((w[1:], b) for w, b in maps)),
        "shared.3.encoder.0.weight has shape [7, 8], but must have [8, 8]",
    ),
    "center": (
        _tensor("calibration", "center", lambda t: t[1:]),
        "calibration.center has shape [7], but must have [8]",
    ),
    "cases": (_tensor("calibration", "cases", lambda t: t[:, 1:]), "calibration.cases has shape [4, 7], but must"),
    "calibrated elsewhere": (_tensor("calibration", "layer", lambda layer: 3), "first edited layer, 2, but names 3"),
    "pointer falls": (_poke("layers", "group_ptr", 5), "group_ptr is [0, 5, 4, 6], but the entries' sizes give [0, 2"),
    "pointer of floats": (
        _tensor("layers", "group_ptr", lambda t: t.float()),
        "torch.float32, but must have torch.int",
    ),
    "keys of integers": (
        _tensor("layers", "keys", lambda t: t.long()),
        "torch.int64, but must have one of torch.float64, torch.float32",
    ),
    "mixed dtypes": (
        _tensor("layers", "values", lambda t: t.double()),
        "layers.3.values is torch.float64 on cpu, but layers.2.keys is torch.float32 on cpu",
    ),
    "nan in a neuron": (
        _poke("layers", "keys", float("nan")),
        "layers.3.keys holds values that are not finite, of edit 'edit-0-0'",
    ),
    "inf in a vector": (_poke("layers", "zeta", float("inf")), "not finite, of edit 'edit-0-1'"),
    "nan in the memory": (_poke("shared", "h_pos", float("nan")), "shared.3.h_pos holds values that are not finite"),
    "group of another size": (_entry(neurons={2: 2, 3: 3}), "layers.3.keys has shape [6, 8], but must have [7, 8]"),
    "groups sized otherwise": (
        lambda edits: setattr(
            edits, "entries", [replace(e, neurons={2: n, 3: 2}) for e, n in zip(edits.entries, [1, 3, 2], strict=True)]
        ),
        "layers.2.group_ptr is [0, 2, 4, 6], but the entries' sizes give [0, 1, 4, 6]",
    ),
    "group at another layer": (_entry(neurons={2: 2}), "has groups at layers [2], but the edited layers are [2, 3]"),
    "negative size": (
        _entry(neurons={2: 2, 3: -1}),
        "edit 'edit-0-1': neurons must map layers to sizes, but has 3: -1",
    ),
    "loss": (_entry(loss=float("nan")), "edit 'edit-0-1': loss must be finite or None, but is nan"),
    "empty id": (_entry(id=""), "must be a text that is not empty"),
    "id twice": (_entry(id="edit-0-2"), "two edits have the id 'edit-0-2'"),
    "layer beyond the base": (_base(num_layers=3), "layer 3 does not exist: the base has 3 layers"),
    "impossible base": (_base(head_dim=0), "head_dim must be at least 1, but is 0"),
    "shared elsewhere": (lambda edits: edits.shared.pop(3), "layers has [2, 3], but shared has [2]"),
    "no layers": (lambda edits: (edits.layers.clear(), edits.shared.clear()), "at least one decoder layer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validate_names_both_values(name, tmp_path):
    change, message = BROKEN[name]
    edits = make_edits(3)
    edits.validate()
    change(edits)
    for refuse in (edits.validate, lambda: edits.save_pretrained(tmp_path / "x"), lambda: Edits.merge([edits])):
        with pytest.raises(EditsError) as caught:
            refuse()
        assert message in str(caught.value)
    assert not (tmp_path / "x").exists()


@given(edits_of_any_kind())
@settings(max_examples=40)
def test_whatever_the_factory_makes_is_valid(edits):
    edits.validate()
    assert edits.ids == [entry.id for entry in edits.entries]
    assert repr(edits)


# The fingerprint


def test_mismatches_name_architecture_only():
    base = make_base()
    assert base.mismatches(replace(base, name_or_path=None, probe=())) == []
    assert base.mismatches(replace(base, heads=1, act="gelu")) == ["act: 'relu' and 'gelu'", "heads: 2 and 1"]
    assert base.same_probe(replace(base, name_or_path="else"))
    assert not base.same_probe(replace(base, probe=base.probe[1:]))
    for field in dataclasses.fields(base):
        if field.name not in ("name_or_path", "probe"):
            assert len(base.mismatches(replace(base, **{field.name: "other"}))) == 1

"""A swap writes what differs, and leaves what patching anew would, bit for bit."""

import copy
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unike_kernels as uk
from tests.models_tiny import ALWAYS, ROUTED, edits_for, make_model
from tests.sites_expected import shift_of
from unike_kernels import planning, unchanged
from unike_kernels.projections import Projections
from unike_kernels.unchanged import Seen, Written

ROOM = {"max_groups": 12, "max_neurons": 40, "max_items": 30}


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    """Chunks that end inside of the tables of these tests."""
    monkeypatch.setattr(planning, "AT_ONCE", 4)
    monkeypatch.setattr(unchanged, "CHUNK", 3)


def patched(model, edits):
    """What patching with these edits anew puts on the model."""
    model = copy.deepcopy(model)
    uk.unpatch(model)
    return written(uk.patch(model, edits, **ROOM))


def written(handle):
    """All that a swap writes: the encoders, which a change of dtype has rounded, are built into the patch."""
    parts = [m for layer in handle.record.layers for m in (layer.neurons, layer.shift.memory, layer.router)]
    return [tensor.clone() for part in parts if part is not None for tensor in part.buffers()]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


class Projected:
    """Counts the items that are projected."""

    def __init__(self, monkeypatch):
        self.rows, item = 0, Projections.item

        def counted(projections, attention, h_pos):
            self.rows += len(h_pos)
            return item(projections, attention, h_pos)

        monkeypatch.setattr(Projections, "item", counted)

    def by(self, act):
        self.rows = 0
        act()
        return self.rows


@pytest.mark.parametrize(
    ("name", "config"),
    [("opt", ROUTED), ("llama", ALWAYS), ("llama", shift_of(ALWAYS, attention="raw"))],
    ids=["opt-routed", "llama-always", "llama-raw"],
)
def test_any_chain_of_swaps_leaves_what_patching_anew_does(name, config):
    model = make_model(name)
    pool = edits_for(model, config, n_edits=8)
    others = [edits_for(model, config, n_edits=5, seed=seed, shared_seed=0) for seed in (5, 6)]

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.sampled_from([pool, *others]).flatmap(chosen), min_size=1, max_size=4))
    def check(chain):
        mine = copy.deepcopy(model)
        handle = uk.patch(mine, pool, **ROOM)
        for edits in chain:
            handle.swap(edits)
            assert same(written(handle), patched(model, edits))

    check()


def chosen(edits):
    return st.lists(st.sampled_from(edits.ids), unique=True, max_size=8).map(edits.select)


def test_added_edits_alone_are_written(monkeypatch):
    model = make_model("llama")
    edits, projected = edits_for(model, n_edits=8), Projected(monkeypatch)
    handle = uk.patch(model, edits.select(edits.ids[:6]), **ROOM)
    layers = len(handle.record.layers)
    # six items of the memory, then the edits' own: 12 rows are three whole chunks, and 12 and 13 are new
    assert projected.by(lambda: handle.swap(edits)) == 2 * layers
    assert projected.by(lambda: handle.swap(edits)) == 2 * layers  # the same again: what is in no whole chunk
    assert projected.by(lambda: handle.swap(edits.select(edits.ids[:6]))) == 0
    stays = handle.record.layers[0].neurons.keys
    stays.data[:13] = 7  # which torch does not count: twelve rows are of the edits that are there
    handle.swap(edits)
    assert bool((stays[:12] == 7).all()) and not bool((stays[12] == 7).any())
    stays.data[:12] = handle.edits.layers[handle.record.layers[0].index].keys[:12]
    assert projected.by(handle.refresh) == 14 * layers
    assert same(written(handle), patched(model, handle.edits))


CHANGED = {
    "source, in place": lambda model, handle: [own.values.mul_(2) for own in handle.edits.layers.values()],
    "items, in place": lambda model, handle: [own.h_pos.mul_(2) for own in handle.edits.shared.values()],
    "neurons that were written over": lambda model, handle: [t.values.zero_() for t in neurons_of(handle)],
    "items that were written over": lambda model, handle: [s.memory.keys.zero_() for s in shifts_of(handle)],
    "projections": lambda model, handle: [double(weights) for weights in projections_of(model)],
    "dtype, and back": lambda model, handle: model.bfloat16().float(),
}


def neurons_of(handle):
    return [layer.neurons for layer in handle.record.layers]


def shifts_of(handle):
    return [layer.shift for layer in handle.record.layers]


def projections_of(model):
    return [p for name, p in model.named_parameters() if "k_proj" in name]


@torch.no_grad()
def double(weights):
    weights.mul_(2)


@pytest.mark.parametrize("what", CHANGED)
def test_what_changed_since_is_written_again(what):
    model = make_model("llama")
    edits = edits_for(model, n_edits=8)
    handle = uk.patch(model, edits, **ROOM)
    CHANGED[what](model, handle)
    handle.swap(edits)
    assert same(written(handle), patched(model, edits))


@pytest.mark.parametrize(
    "made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_knows_nothing_of_what_its_storage_was_written_from(made):
    model = make_model("llama")
    uk.patch(model, edits_for(model, n_edits=8), **ROOM)
    for edits in edits_of(model):  # changed once before the copy, and once after: the same number of changes
        edits.values.mul_(2)
    uk.PatchHandle.of(model).swap(uk.PatchHandle.of(model).edits)
    twin = made(model)
    handle = uk.PatchHandle.of(twin)
    for edits in edits_of(twin):
        edits.values.mul_(2)
    handle.swap(handle.edits)
    assert same(written(handle), patched(model, handle.edits))


def edits_of(model):
    return list(uk.PatchHandle.of(model).edits.layers.values())


def test_edits_of_inference_mode_are_written_every_time():
    model = make_model("llama")
    edits = edits_for(model, n_edits=8)
    with torch.inference_mode():
        edits = edits.to(torch.device("cpu"))
        handle = uk.patch(model, edits, **ROOM)
        for own in edits.layers.values():
            own.values.mul_(2)
        handle.swap(edits)
    assert same(written(handle), patched(model, edits))


@pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
def test_what_a_move_replaced_is_free(config):
    """On a GPU it is gigabytes."""
    model = make_model("llama")
    edits = edits_for(model, config)
    with uk.patch(model, edits, **ROOM) as handle:
        layer = handle.record.layers[0]
        parts = [layer.neurons, layer.shift.memory]
        old = [weakref.ref(t) for part in parts for t in part.buffers() if t.is_floating_point()]
        assert len(old) > 5 and all(ref() is not None for ref in old)
        model.to(torch.bfloat16)
        assert all(ref() is None for ref in old)
        handle.swap(edits)


def test_seen_tensors_are_the_same_until_one_changes():
    a, b = torch.zeros(3), torch.ones(3)
    seen = Seen()
    assert not seen.same([a, b])
    seen.note([a, b])
    assert seen.same([a, b]) and seen.same(t for t in (a, b))
    assert not seen.same([a]) and not seen.same([b, a]) and not seen.same([a, b.clone()])
    assert not copy.deepcopy(seen).same([a, b])
    a[0] = 1
    assert not seen.same([a, b])
    with torch.inference_mode():
        c = torch.zeros(3)
    seen.note([c])
    assert not seen.same([c])


def test_rows_alike():
    storage, rows, own = torch.zeros(9), torch.arange(14.0).view(7, 2), torch.zeros(2, 3)
    written = Written()
    assert written.alike([storage], [[rows], [own]]) == [0, 0] and written.in_a_row([storage], [[rows], [own]]) == 0
    written.note([storage], [[rows], [own]])
    more, other = torch.cat([rows, rows]), rows.clone()
    other[4, 1] = -1
    for first, second, alike, in_a_row in (
        (rows, own, [7, 2], 9),
        (rows.clone(), torch.cat([own, own]), [7, 2], 9),
        (more, own, [7, 2], 7),  # the second table's rows lie elsewhere
        (rows[:5], own, [5, 2], 5),
        (other, own, [3, 2], 3),  # to a chunk of three
        (rows, own + 1, [7, 0], 7),
        (rows.double(), own, [0, 2], 0),
        (rows[:, :1], own, [0, 2], 0),
        (rows[:0], own, [0, 2], 0),
    ):
        assert written.alike([storage], [[first], [second]]) == alike
        assert written.in_a_row([storage], [[first], [second]]) == in_a_row
    assert written.alike([storage], [[rows, other], [own]]) == [7, 2]  # pairwise, as far as the tables go
    assert not copy.deepcopy(written)._tables  # a pickle holds no edits twice
    storage[0] = 1
    assert written.alike([storage], [[rows], [own]]) == [0, 0]
    written.note([storage], [[rows], [own]])
    rows[6] = 0
    assert written.alike([storage], [[rows], [own]]) == [0, 0]

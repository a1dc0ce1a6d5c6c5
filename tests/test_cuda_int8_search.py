"""The int8 search on a GPU finds exactly what scoring every key finds; where there is none, on the emulator."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kernel_tools import DEVICE, launches, on_cuda, poisoned
from search_inputs import KINDS, make_keys

import unike_kernels as uk
from tests.models_tiny import ALWAYS, edits_for, inputs_for, make_model
from unike_kernels import indexing, native, reference
from unike_kernels.cuda_kernels import int8_search
from unike_kernels.cuda_kernels.int8_search import CudaInt8Index
from unike_kernels.indexing import KeptIndex, pays_in_cuda
from unike_kernels.memory import ExternalMemory
from unike_kernels.triton_kernels import launching as allocating

EMULATED = DEVICE.type == "cpu"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    on_cuda(monkeypatch)


def search(index, q, k, ranges=None):
    with poisoned(), launches() as started:
        found = index.search(q, k, ranges)
    if len(q) and k:
        names = ["prepare", "scan", "bound", "rerank"] if len(index.keys) else ["prepare"]
        assert started == {**{f"int8_search_{name}": 1 for name in names}, "cosine_topk_select": 1}
    return found


def allocated(monkeypatch):
    """All that launchers allocate from now on, kept alive."""
    new, kept = allocating.new, []
    monkeypatch.setattr(allocating, "new", lambda *args: kept.append(new(*args)) or kept[-1])
    return kept


def all_scored(keys):
    """The oracle: an index that knows nothing of its keys."""
    index = CudaInt8Index(keys)
    index.residual.fill_(float("inf"))
    return index


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    kind=st.sampled_from(KINDS),
    n=st.integers(0, 700),
    d=st.sampled_from([1, 5, 63, 64, 100, 160, 224, 1100]),
    k=st.integers(0, 40),
    t=st.sampled_from([0, 1, 2, 4, 5, 8, 9, 16]),
    dtype=st.sampled_from(native.INDEXED),
    query=st.sampled_from(["random", "a key", "zero", "nan", "inf"]),
    limited=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_finds_what_scoring_every_key_finds(kind, n, d, k, t, dtype, query, limited, seed):
    if EMULATED:
        import emulator

        emulator.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    keys = make_keys(kind, n, d, dtype, generator)
    q = torch.randn(t, d, generator=generator)
    if query == "a key" and n:
        q = keys[torch.randint(0, n, (t,), generator=generator)].float()
    elif query not in ("random", "a key"):
        q[:1] = 0.0 if query == "zero" else float(query)
    keys, q = keys.to(DEVICE), q.to(DEVICE)
    ranges = None
    if limited:
        ranges = torch.randint(-3, n + 4, (t, 2), generator=generator).sort(dim=1).values.to(DEVICE)
    index = CudaInt8Index(keys)
    scores, indices = search(index, q, k, ranges)
    oracle = all_scored(keys)
    all_scores, all_indices = search(oracle, q, k, ranges)
    assert torch.equal(scores, all_scores) and torch.equal(indices, all_indices)
    if t and k:
        assert (index.reranked <= oracle.reranked).all() and (index.reranked >= (indices >= 0).sum(dim=1)).all()

    # And the oracle is the reference in float64, but for the rounding of a sum of d products of fp32.
    norm = torch.linalg.vector_norm(keys.float(), dim=1).double()
    expected, _ = reference.cosine_topk(q.double(), keys.double(), k, key_norm=norm, ranges=ranges)
    torch.testing.assert_close(all_scores.double(), expected, rtol=0, atol=(d + 8) * 2**-24)
    unit = reference._unit(q.double())
    for row in range(t if k else 0):
        found = all_indices[row][all_indices[row] >= 0]
        assert len(found.unique()) == len(found)
        cosine = reference._over_norm(keys[found].double() @ unit[row], norm[found])
        torch.testing.assert_close(cosine, all_scores[row, : len(found)].double(), rtol=0, atol=(d + 8) * 2**-24)


@pytest.mark.parametrize("kind", ["spread", "outliers"])
@pytest.mark.parametrize("d", [256, 320, 448])  # powers of two, and what needs two windows, as 2560 and 3584 do
def test_few_keys_are_scored_where_keys_are_spread(kind, d):
    generator = torch.Generator().manual_seed(1)
    keys = make_keys(kind, 4000, d, torch.bfloat16, generator).to(DEVICE)
    index = CudaInt8Index(keys)
    search(index, torch.randn(8, d, generator=generator).to(DEVICE), 20)
    assert (index.reranked >= 20).all() and index.reranked.float().mean() < 400
    assert index.bytes < 0.6 * keys.numel() * 2


@pytest.mark.parametrize("queries", [1, 6])
def test_near_identical_keys_are_all_scored_and_the_codes_are_left_out(queries):
    keys = make_keys("near-identical", 900, 128, torch.float32, torch.Generator().manual_seed(2)).to(DEVICE)
    index, oracle = CudaInt8Index(keys), CudaInt8Index(keys)
    oracle.residual.fill_(float("inf"))
    scale, tried = index.scale.clone(), []
    expected = search(oracle, keys[:queries], 5)
    for _ in range(9):
        left = int(index.habit[2]) >> 32
        index.scale.copy_(scale if left == 0 else torch.full_like(scale, float("nan")))  # read only where codes are
        found = search(index, keys[:queries], 5)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert (index.reranked > 300).all() and (left == 0 or (index.reranked == 900).all())
        tried.append(left == 0 and int(index.habit[0]) == 900 * queries)
    # The habit is looked at when the next search begins: so the first one to leave the codes out is seen as a try here.
    assert tried == [True, False, False, True, False, False, False, False, True]
    index.encode()
    assert not index.habit.any()
    keys.copy_(make_keys("spread", 900, 128, torch.float32, torch.Generator().manual_seed(3)))
    index.encode()
    for _ in range(3):
        search(index, keys[:queries], 5)
        assert (index.reranked < 300).all() and int(index.habit[2]) == 0


class TestOfAMemory:
    @pytest.fixture
    def memory(self, monkeypatch):
        monkeypatch.setattr(KeptIndex, "WAIT", 2)
        monkeypatch.setattr(indexing, "pays_in_cuda", lambda queries, n, d: queries <= 16 and n >= 500)
        sem = torch.randn(550, 64, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        memory = ExternalMemory(sem, sem, sem, 450, capacity=600, backend="cuda")
        memory.q = torch.randn(2, 64, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        return memory

    @staticmethod
    def check(memory, selected=None, times=3):
        for _ in range(times):
            found = memory.search(memory.q, 7, selected)
            memory.choose("reference")
            expected = memory.search(memory.q, 7, selected)
            memory.choose("cuda")
            assert torch.equal(found[1], expected[1])
            torch.testing.assert_close(found[0], expected[0])

    @staticmethod
    def other(memory, n):
        rows = torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(DEVICE)
        memory.load(rows, rows, rows, n - 50)

    def test_it_follows_every_change(self, memory):
        """In place, so that what was captured searches the new items; other storage gets a copy of its own."""
        assert memory.kept.index is None
        memory.search(memory.q, 7)
        assert memory.kept.index is None
        self.check(memory)
        index = memory.kept.index
        places = [t.data_ptr() for t in (index.codes, index.scale, index.residual, index.center)]
        for change in (
            lambda: self.other(memory, 580),
            lambda: self.other(memory, 510),
            lambda: memory.sem.__setitem__(int(memory.search(memory.q[:1], 1)[1]), float("nan")),
            lambda: memory.sem_norm.mul_(torch.linspace(1, 2, 600, device=DEVICE)),
        ):
            change()
            self.check(memory)
            self.check(memory, torch.tensor([[3, -1], [-1, -1]], device=DEVICE))
            assert memory.kept.index is index
            assert places == [t.data_ptr() for t in (index.codes, index.scale, index.residual, index.center)]
        memory.to(torch.bfloat16)
        memory.q = memory.q.bfloat16()
        memory.search(memory.q, 7)
        assert memory.kept.index is None
        self.check(memory, times=2)
        assert memory.kept.index is not None and memory.kept.index is not index

    def test_a_captured_search_follows_a_swap(self, memory, monkeypatch):
        """Replayed with the addresses of before; torch's copy of the ranges, which a graph repeats, is made here."""
        self.check(memory)
        module, calls = native.cuda(), []
        run = module.int8_search
        monkeypatch.setattr(module, "int8_search", lambda *args: calls.append(args) or run(*args))
        kept = allocated(monkeypatch)  # as a graph keeps its memory
        memory.kept.index.habit[2] = 5 << 32  # in a while without codes
        monkeypatch.setattr(indexing, "captured", lambda device: True)
        scores, indices = memory.search(memory.q, 7)
        monkeypatch.setattr(indexing, "captured", lambda device: False)
        for n in (580, 510):
            self.other(memory, n)
            scores.fill_(0), indices.fill_(0)
            ranges = memory.spans[1].expand(2, 2).contiguous()
            run(*calls[0][:2], ranges.data_ptr(), *calls[0][3:])
            expected = reference.cosine_topk(memory.q, memory.sem[:n], 7)
            assert torch.equal(indices, expected[1])
            torch.testing.assert_close(scores, expected[0])
        assert kept

    def test_other_streams_read_a_whole_copy(self, memory, monkeypatch):
        """It is waited for before anybody can find it, and a change waits for those who read it."""
        seen, encode = [], CudaInt8Index._encode

        def record(name):
            monkeypatch.setattr(
                int8_search, name, lambda device: seen.append((name, memory.kept.index, memory.kept._of))
            )

        monkeypatch.setattr(CudaInt8Index, "_encode", lambda *args: seen.append("encode") or encode(*args))
        record("wait_for_device"), record("wait_for_stream")
        before = memory.kept._of
        self.check(memory, times=2)
        index, of = memory.kept.index, memory.kept._of
        assert seen[-2:] == ["encode", ("wait_for_stream", None, of)] and before != of
        seen.clear()
        self.other(memory, 580)
        assert seen == [("wait_for_device", index, of), "encode", ("wait_for_stream", index, of)]
        assert memory.kept._of != of

    def test_made_in_inference_mode_changed_outside(self, memory):
        with torch.inference_mode():
            self.check(memory)
        index = memory.kept.index
        self.other(memory, 580)
        self.check(memory)
        with torch.inference_mode():
            self.other(memory, 510)
            self.check(memory)
        assert index is memory.kept.index is not None

    def test_none_is_made_or_changed_while_captured(self, memory, monkeypatch):
        monkeypatch.setattr(indexing, "captured", lambda device: True)
        self.check(memory)
        assert memory.kept.index is None
        monkeypatch.setattr(indexing, "captured", lambda device: False)
        self.check(memory)
        index = memory.kept.index
        monkeypatch.setattr(indexing, "captured", lambda device: True)
        memory.sem[int(memory.search(memory.q[:1], 1)[1])] = float("nan")
        codes = index.codes.clone()
        self.check(memory)
        assert torch.equal(index.codes, codes)

    def test_where_it_does_not_pay_or_was_not_asked_for(self, memory):
        memory.choose("reference")
        for _ in range(3):
            memory.search(memory.q, 7)
        memory.choose("cuda")
        for _ in range(3):
            memory.search(memory.q.repeat(9, 1), 7)
            assert memory.kept.of(memory.q, memory.sem, memory.sem_norm, 129, "cuda") is None
            assert memory.kept.of(memory.q.double(), memory.sem, memory.sem_norm, 7, "cuda") is None
            assert memory.kept.of(memory.q, memory.sem, memory.sem_norm, 7, "triton") is None
            with torch.inference_mode():
                rows = memory.sem.clone()
            assert memory.kept.of(memory.q, rows, memory.sem_norm, 7, "cuda") is None
        assert memory.kept.index is None
        assert pays_in_cuda(1, 100_000, 4096) and not pays_in_cuda(1, 10_000, 4096)
        assert not pays_in_cuda(9, 100_000, 4096) and not pays_in_cuda(0, 100_000, 4096)

    def test_in_a_patched_model(self, monkeypatch):
        """Made at the second pass, and it follows swap; status tells its size and what the last search scored."""
        monkeypatch.setattr(KeptIndex, "WAIT", 2)
        monkeypatch.setattr(indexing, "pays_in_cuda", lambda queries, n, d: n >= 300)
        model = make_model("llama", layers=2).to(DEVICE)
        inputs = {name: t.to(DEVICE) for name, t in inputs_for(model, (5, 3)).items()}
        edits, others = (edits_for(model, ALWAYS, layers=(1,), n_items=n, seed=n) for n in (330, 300))
        for layer, shared in others.shared.items():
            shared.encoder = edits.shared[layer].encoder  # a swap keeps it
        handle = uk.patch(model, edits, backend="cuda", max_items=340)
        before = next(s for s in uk.status(model) if s.kind == "shift")
        assert before.scored is None and "scored" not in str(uk.status(model))
        for which in (edits, others):
            if which is others:
                handle.swap(others)
            with torch.no_grad():
                for _ in range(2):
                    logits = model(**inputs).logits
                twin = copy.deepcopy(model)
                uk.unpatch(twin)
                with uk.patch(twin, which, backend="reference"):
                    expected = twin(**inputs).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            found = next(s for s in uk.status(model) if s.kind == "shift")
            assert edits.config.shift.k <= found.scored <= 340 and found.bytes > before.bytes + 340 * 64
            assert "scored" in str(uk.status(model)).splitlines()[0]

    @pytest.mark.skipif(not EMULATED, reason="asks for little shared memory")
    def test_where_it_has_no_room(self, memory):
        import emulator

        emulator.device(shared_bytes=60 * 1024)
        for _ in range(3):
            memory.kept.of(memory.q, memory.sem, memory.sem_norm, 7, "cuda")
        assert memory.kept.index is None
        with pytest.raises(ValueError, match="a key has 64 elements, and codes of them have no room"):
            CudaInt8Index(memory.sem)


def test_among_equal_scores_the_lowest_index_wins():
    keys = torch.randn(5, 96)[torch.arange(500) % 5] * 2.0 ** (torch.arange(500)[:, None] % 3)
    scores, indices = search(CudaInt8Index(keys.to(DEVICE)), keys[2:3].to(DEVICE), 6)
    assert indices.tolist() == [[2, 7, 12, 17, 22, 27]] and scores.unique().numel() == 1


def test_another_search_meanwhile_leaves_what_is_written_in_place(monkeypatch):
    """As another thread's does."""
    index = CudaInt8Index(torch.randn(600, 64, device=DEVICE))
    q, launch = torch.randn(4, 64, device=DEVICE), int8_search.launch
    index.search(q, 5)
    expected = index.reranked.clone()

    def interrupted(*args):
        monkeypatch.setattr(int8_search, "launch", launch)
        index.search(q[:1], 9)
        launch(*args)

    monkeypatch.setattr(int8_search, "launch", interrupted)
    index.search(q, 5)
    assert torch.equal(index.reranked, expected)


def test_strided_keys_given_norms_and_what_is_refused():
    table = torch.randn(600, 90).to(DEVICE)
    keys = table[::2, 10:74]
    ones = torch.ones(300, device=DEVICE)
    scores, indices = search(CudaInt8Index(keys, ones), keys[:2], 4)
    expected = reference.cosine_topk(keys[:2], keys, 4, key_norm=ones)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, expected[0])
    index = CudaInt8Index(keys)
    ranges = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
    for q, span in ((keys[:2, :5], None), (keys[:2].double(), None), (keys[:17], None), (keys[:2], ranges)):
        with pytest.raises(ValueError, match="must be"):
            index.search(q, 3, span)
    with pytest.raises(ValueError, match="k must be 0 to 128, but is 129"):
        index.search(keys[:1], 129)
    for wrong in (keys.double(), keys[0], keys.to("meta")):
        with pytest.raises(ValueError, match="keys must be"):
            CudaInt8Index(wrong)
    with pytest.raises(ValueError, match=r"key_norm must be \[300\]"):
        CudaInt8Index(keys, torch.ones(3, device=DEVICE))

"""ExternalMemory: which items are found, in which order, and what its storage does when it changes."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from unike_kernels import reference
from unike_kernels.memory import ExternalMemory


def make_memory(n=6, own=3, d=5, capacity=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sem = torch.randn(n + own, d, generator=generator, dtype=torch.float64).to(dtype)
    rows = torch.randn(2, n + own, 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    return ExternalMemory(sem, rows[0], rows[1], n, capacity), sem


@hypothesis.given(
    n=st.integers(0, 7),
    own=st.integers(0, 4),
    k=st.integers(1, 9),
    spare=st.integers(0, 3),
    top=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_search_is_the_reference_over_the_items_in_question(n, own, k, spare, top, seed):
    memory, sem = make_memory(n, own, capacity=n + own + spare, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    q = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    scores, indices = memory.search(q, k)
    expected = reference.cosine_topk(q, sem, k)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, expected[0])

    selected = torch.full((4, top), -1)
    for row in selected:
        for slot in range(int(torch.randint(0, top + 1, (), generator=generator))):
            free = [e for e in range(own) if e not in row.tolist()]
            if free:
                row[slot] = free[int(torch.randint(0, len(free), (), generator=generator))]
    scores, indices = memory.search(q, k, selected)
    for t in range(4):
        rows = [*range(n), *(n + e for e in sorted(e for e in selected[t].tolist() if e >= 0))]
        wanted, at = reference.cosine_topk(q[t : t + 1], sem[rows], k)
        assert indices[t].tolist() == [rows[i] if i >= 0 else -1 for i in at[0].tolist()]
        torch.testing.assert_close(scores[t], wanted[0])


def test_among_equal_scores_the_lowest_index_wins():
    sem = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])  # 1, 2 and 3 point the same way
    memory = ExternalMemory(sem, sem, sem, 2)
    q = torch.tensor([[1.0, 0.0]])
    assert memory.search(q, 4)[1].tolist() == [[1, 2, 3, 0]]
    assert memory.search(q, 4, torch.tensor([[1, 0]]))[1].tolist()[0][0] == 1  # the memory before an edit's own item
    assert memory.search(q, 1, torch.tensor([[0, -1]]))[1].tolist() == [[1]]


def test_an_edit_that_is_named_twice_is_found_once():
    memory, sem = make_memory(3, 3)
    twice = memory.search(sem[4:6], 6, torch.tensor([[1, 1, -1, 0, 1], [2, -1, -1, 2, -1]]))
    once = memory.search(sem[4:6], 6, torch.tensor([[1, 0], [2, -1]]))
    assert all(torch.equal(a, b) for a, b in zip(twice, once, strict=True))


def test_what_is_not_finite_or_zero():
    memory, sem = make_memory(2, 2)
    nan = torch.full((1, 5), float("nan"), dtype=torch.float64)
    selected = torch.tensor([[0]])
    for query in (nan, nan.nan_to_num(float("inf"))):
        for found in (memory.search(query, 3), memory.search(query, 3, selected)):
            assert (found[1] == -1).all() and (found[0] == -torch.inf).all()
    scores, indices = memory.search(torch.zeros(1, 5, dtype=torch.float64), 3, selected)
    assert indices.tolist() == [[0, 1, 2]] and not scores.any()
    memory.sem[2] = float("nan")
    scores, indices = memory.search(sem[:1], 4, selected)
    assert sorted(indices[0].tolist()) == [-1, -1, 0, 1] and indices[0, 0] == 0


def test_an_edit_that_has_no_own_item_here():
    memory, sem = make_memory(3, 0)
    assert (memory.search(sem[:1], 5, torch.tensor([[0]]))[1][0] >= 3).sum() == 0
    empty, _ = make_memory(0, 0)
    scores, indices = empty.search(sem[:1], 2, torch.tensor([[0]]))
    assert indices.tolist() == [[-1, -1]] and scores.tolist() == [[-torch.inf, -torch.inf]]


def test_load_replaces_everything_in_place():
    memory, _ = make_memory(6, 3, capacity=12)
    other, sem = make_memory(2, 1, seed=9)
    pointers = [t.data_ptr() for t in memory.buffers()]
    memory.load(other.sem, other.keys, other.values, 2)
    assert pointers == [t.data_ptr() for t in memory.buffers()]
    assert memory.counts.tolist() == [2, 3]
    assert not memory.sem[3:].any() and not memory.keys[3:].any() and not memory.sem_norm[3:].any()
    q = torch.randn(3, 5, dtype=torch.float64)
    (scores, indices), (expected, wanted) = memory.search(q, 4), other.search(q, 4)
    assert torch.equal(indices, wanted)
    torch.testing.assert_close(scores, expected)  # products of other widths may round otherwise
    with pytest.raises(ValueError, match=r"room for 12 items \(max_items at patch time\), but got 13"):
        big, _ = make_memory(13, 0)
        memory.load(big.sem, big.keys, big.values, 13)
    assert torch.equal(memory.sem[:3], sem)


def test_storage_too_small_from_the_start():
    with pytest.raises(ValueError, match=r"room for 4 items \(max_items at patch time\), but got 9"):
        make_memory(capacity=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_norms_are_those_of_the_rows_as_stored(dtype):
    memory, _ = make_memory(dtype=torch.float32, capacity=11)
    memory.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert memory.sem.dtype == dtype and memory.sem_norm.dtype == wide and memory.counts.dtype == torch.int64
    torch.testing.assert_close(memory.sem_norm, memory.sem.to(wide).norm(dim=1))
    scores, _ = memory.search(memory.sem[:3], 1)  # a row is its own nearest item, at cosine 1
    torch.testing.assert_close(scores[:, 0], torch.ones(3, dtype=wide))
    assert memory.state_dict() == {} and "capacity=11, d=5" in repr(memory)


def test_meta_and_back():
    memory, _ = make_memory()
    assert memory.to("meta").sem_norm.device.type == "meta"

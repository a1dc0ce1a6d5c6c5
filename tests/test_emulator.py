"""The emulator that runs CUDA kernels without a GPU: right kernels are right in every order, wrong ones are found."""

import ctypes

import emulator
import pytest
import torch

SEEDS = range(8)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(emulator.build([emulator.HERE / "selftest.cu"], "selftest")))
    found.last_error.restype = ctypes.c_char_p
    return found


def call(library, name, *args, seed=0):
    library.emulator_seed(ctypes.c_uint64(seed))
    plain = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
    return getattr(library, f"run_{name}")(*plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fragments_make_a_matrix_product(library, dtype):
    """ldmatrix, cp.async and mma as the PTX ISA lays them out: another product would come out of any other layout."""
    a, b = torch.randn(16, 96).to(dtype), torch.randn(8, 96).to(dtype)
    for seed in SEEDS:
        out = torch.full((16, 8), float("nan"))
        assert call(library, "product", a, b, out, 96, 16 if dtype == torch.float16 else 0, 0, seed=seed) == 0
        torch.testing.assert_close(out, a.float() @ b.float().T, rtol=0, atol=1e-4)


def test_copies_that_nobody_waited_for_are_not_there(library):
    a, b = torch.ones(16, 32).bfloat16(), torch.ones(8, 32).bfloat16()
    seen = []
    for seed in SEEDS:
        out = torch.zeros(16, 8)
        assert call(library, "product", a, b, out, 32, 0, 1, seed=seed) == 0
        seen.append(bool(out.isfinite().all()))
    assert not all(seen)


@pytest.mark.parametrize("forget", [0, 1, 2, 3])
def test_the_copy_engine_and_what_is_forgotten_beside_it(library, forget):
    values, seen = torch.randn(8, 32), []
    for seed in range(32):
        out = torch.full((8, 32), float("nan"))
        done = call(library, "brought", values, out, 4, forget, seed=seed) == 0  # some mistakes are named
        seen.append(done and torch.equal(out, values))
    assert all(seen) if forget == 0 else not all(seen)


def test_int8_product(library):
    a = torch.randint(-127, 128, (16, 32), dtype=torch.int8)
    b = torch.randint(-127, 128, (8, 32), dtype=torch.int8)
    out = torch.zeros(16, 8, dtype=torch.int32)
    assert call(library, "product_int8", a, b, out) == 0
    assert torch.equal(out, a.int() @ b.int().T)


def test_the_last_block_sees_what_all_wrote_and_a_missing_barrier_shows(library):
    values, parts = torch.randint(0, 100, (6 * 96,), dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    wrong = 0
    for seed in SEEDS:
        for forget in (0, 1):
            arrived, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            assert call(library, "sum", values, parts, arrived, out, 6, 96, forget, seed=seed) == 0
            right = int(out) == int(values.sum())
            assert right or forget
            wrong += not right
    assert wrong > len(SEEDS) // 2


def test_lanes_of_one_warp_need_a_barrier_too(library):
    """Lane 0 may be ahead of the others of its warp: told too soon that all is there, the last block misses some."""
    values = torch.randint(1, 100, (6 * 32,), dtype=torch.int32)
    wrong = 0
    for seed in range(32):
        for forget in (0, 1):
            parts = torch.zeros(6 * 32, dtype=torch.int32)
            arrived, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            assert call(library, "sum_of_lanes", values, parts, arrived, out, 6, forget, seed=seed) == 0
            right = int(out) == int(values.sum())
            assert right or forget
            wrong += not right
    assert wrong > 3


def test_clusters_read_each_others_shared_memory(library):
    wrong = 0
    for seed in SEEDS:
        for forget in (0, 1):
            out = torch.zeros(8, 4, dtype=torch.int32)
            done = call(library, "exchange", out, 8, 4, forget, seed=seed) == 0
            assert done or (forget and "may not have started" in library.last_error().decode())
            expected = [[10 * r + b // 4 * 4 + r for r in range(4)] for b in range(8)]
            assert (done and out.tolist() == expected) or forget
            wrong += not done
    assert wrong


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (0, "wrote outside of its 64 bytes of shared memory"),
        (1, "waits at __syncthreads"),
        (2, "waits at __syncwarp"),
        (3, "an address is not 16-byte aligned"),
        (4, "while other lanes of its mask are at"),
        (5, "expect_bytes: nobody started the barrier"),
        (6, "wait_for_bytes: nobody sends them"),
        (7, "bulk_copy: addresses and bytes must be multiples of 16"),
    ],
)
def test_mistakes_are_named(library, which, said):
    assert call(library, "wrong", which) != 0
    assert said in library.last_error().decode()
    assert call(library, "wrong", 99) == 0  # and the next launch starts afresh

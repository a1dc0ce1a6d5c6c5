"""cosine_topk in CUDA C++: the tests of the Triton kernels and more, on the emulator where there is no GPU."""

import ctypes

import emulator
import pytest
import torch
from kernel_tools import DEVICE, DTYPES, launches, on_cuda, poisoned, shifted
from topk_bodies import CosineTopk, integers, rand

from unike_kernels import backends, cuda_kernels, native, ops
from unike_kernels.cuda_kernels import zeros as of_zeros
from unike_kernels.cuda_kernels.cosine_topk import KERNEL, MOST_QUERIES, ZEROS
from unike_kernels.triton_kernels import launching as allocating
from unike_kernels.triton_kernels import tuning

EMULATED = DEVICE.type == "cpu"
SEEDS = range(3)
ALONE = tuning.Row(KERNEL, 0, {"queries": 16}, {"launches": 1})


def zeros():
    """What the launches of this stream share, as a tensor; None before the first."""
    if not EMULATED:
        return None  # not torch's memory
    addresses = list(ZEROS._of_stream.values())
    return [torch.frombuffer((ctypes.c_char * ZEROS.most).from_address(at), dtype=torch.uint8) for at in addresses]


def assert_zeros():
    assert not any(bytes_of_stream.any() for bytes_of_stream in zeros() or [])


def seed(value):
    if EMULATED:
        emulator.seed(value)


class TestCuda(CosineTopk):
    backend = "cuda"

    @pytest.fixture(autouse=True)
    def here(self, monkeypatch):
        on_cuda(monkeypatch)
        tuning.ROWS.insert(0, ALONE)  # for memories as small as a test's too; in place, as imports add to it
        yield
        tuning.ROWS.remove(ALONE)

    def kernels(self, queries, n):
        if queries > MOST_QUERIES:
            return super().kernels(queries, n)
        alone = n > 0 and tuning.choose(KERNEL, DEVICE, n=n, queries=queries)["launches"] == 1
        return (*([KERNEL] if n else []), *([] if alone else ["cosine_topk_select"]))

    def found(self, q, keys, k, **options):
        """And what was zero before is zero again."""
        results = super().found(q, keys, k, **options)
        assert_zeros()
        return results

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64])
    def test_every_kernel(self, tokens, dtype):
        """Each has its rows of a unit and its columns of a slab; several slabs, several units for each block."""
        q, keys = rand(tokens, 600, dtype=dtype), rand(330, 600, dtype=dtype)
        self.check(q, keys, 7, key_norm=keys.float().norm(dim=1))
        self.check(q[:, :37], keys[:, :37], 7)  # rows start at multiples of 16 bytes, but end between them

    @pytest.mark.parametrize("k", [1, 40, 128])
    @pytest.mark.parametrize("rising", [True, False])
    def test_lists_are_pruned(self, k, rising):
        """Keys that get better and better, and worse and worse: every one, and hardly one, is kept for a while."""
        q, noise = rand(1, 32), rand(4000, 32)
        by = torch.linspace(0, 4, 4000, device=DEVICE)[:, None]
        self.check(q, (q * (by if rising else by.flip(0)) + noise).bfloat16().float(), k)

    @pytest.mark.parametrize("launched", [1, 2])
    def test_more_candidates_than_are_ranked_at_a_time(self, launched):
        """The best rows all in one slot: nothing is told of the k-th best, and every list is full."""
        if EMULATED:
            emulator.device(multiprocessors=12)
        q, keys = rand(2, 16), rand(5000, 16)
        keys[3::256] = q[0] + 0.1 * keys[3::256]
        with tuning.trying(lambda row: {"launches": launched}):
            self.check(q, keys, 128)
            self.check(q, q[:1].expand(5000, 16), 128)

    @pytest.mark.parametrize("tokens", [1, 3, 16, 64])
    def test_one_launch_is_two(self, tokens):
        q, keys = rand(tokens, 32, dtype=torch.float16), integers(300 if tokens > 16 else 700, 32, dtype=torch.float16)
        with tuning.trying(lambda row: {"launches": 2}):
            expected = self.found(q, keys, 40)
        for value in range(8):
            seed(value)
            with tuning.trying(lambda row: {"launches": 1}):
                assert all(torch.equal(a, b) for a, b in zip(expected, self.found(q, keys, 40), strict=True))

    @pytest.mark.parametrize("tokens", [1, 8, 9, 16])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_copy_engine_brings_the_same_keys(self, tokens, dtype):
        """Several slabs and several units for each block, the last of them cut short, and rows that nobody sees."""
        q, keys = rand(tokens, 1024, dtype=dtype), rand(330, 1024, dtype=dtype)
        ranges = torch.tensor([[7, 250], [100, 101], [300, 330]], device=DEVICE).repeat(6, 1)[:tokens].contiguous()
        for options in ({}, {"key_norm": keys.float().norm(dim=1)}, {"ranges": ranges}):
            expected = self.found(q, keys, 9, **options)
            for value in SEEDS:
                seed(value)
                with tuning.trying(lambda row: {"launches": 1, "copies": 2}):
                    found = self.found(q, keys, 9, **options)
                assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
                if EMULATED:  # each row in two slabs, and fewer where some are not seen
                    brought = emulator.bulk_copies()
                    assert brought == 660 if "ranges" not in options else 0 < brought <= 660

    @pytest.mark.parametrize(
        ("tokens", "d", "dtype"), [(2, 600, torch.float16), (17, 512, torch.float16), (2, 512, torch.float32)]
    )
    def test_where_the_copy_engine_cannot_every_thread_copies(self, tokens, d, dtype):
        with tuning.trying(lambda row: {"launches": 1, "copies": 2}):
            self.check(rand(tokens, d, dtype=dtype), rand(90, d, dtype=dtype), 5)
            self.check(rand(2, 512, dtype=dtype), rand(90, 513, dtype=dtype)[:, 1:], 5)  # rows start anywhere
        if EMULATED:
            assert emulator.bulk_copies() == 0

    @pytest.mark.skipif(not EMULATED, reason="reads the workspace, and asks for a number of multiprocessors")
    def test_almost_no_score_is_kept(self, monkeypatch):
        """Each of 12 blocks sees 500 rows: alone, it would keep 224 of them before it knew of any bound."""
        emulator.device(multiprocessors=12)
        new, made = allocating.new, []
        monkeypatch.setattr(allocating, "new", lambda *args: made.append(new(*args)) or made[-1])
        q, keys = rand(1, 32), rand(6000, 32)
        for launched, most in ((1, 300), (2, 500)):  # 192 are the first units', which have nothing to be held against
            for value in range(6):
                seed(value)
                made.clear()
                with tuning.trying(lambda row, launched=launched: {"launches": launched}):
                    ops.cosine_topk(q, keys, 10, backend="cuda")
                counts = made[-1][12 * 8 * 257 :].view(torch.int32)
                assert len(counts) == 12 and 10 <= counts.sum() <= most

    @pytest.mark.skipif(not EMULATED, reason="writes to memory that is not torch's")
    @pytest.mark.parametrize("planted", ["counter behind", "counter ahead", "bound", "slots"])
    def test_what_a_launch_left_behind_would_show(self, planted):
        """The zeros matter: with anything else in them this file's checks fail."""
        q, keys = rand(1, 16), rand(300, 16)
        expected = self.found(q, keys, 5)
        (shared,) = zeros()
        words = shared.view(torch.int64)  # a counter in the first 128 bytes, a bound, then slots
        noticed = 0
        for value in range(6):
            seed(value)
            if planted.startswith("counter"):
                words[0] = 1 if planted == "counter ahead" else 2**32 - 1
            else:
                words[16 if planted == "bound" else slice(17, 17 + 32)] = 2**62 + 2**61 + 2**60 - 1 - 2**63  # above all
            with poisoned():
                scores, indices = ops.cosine_topk(q, keys, 5, backend="cuda")
            noticed += not torch.equal(indices, expected[1]) or bool(shared.any())
            shared.zero_()
        assert noticed >= (3 if planted == "counter ahead" else 6)  # the last block is not always late
        assert torch.equal(self.found(q, keys, 5)[1], expected[1])

    def test_zeros_of_streams_captures_and_failures(self, monkeypatch):
        """A captured launch has its own for good; those of a launch that failed are not used again."""
        used, module = [], native.cuda()
        launch = module.cosine_topk
        monkeypatch.setattr(module, "cosine_topk", lambda *args: used.append(args[14]) or launch(*args))
        q, keys = rand(1, 16), rand(300, 16)
        first = self.found(q, keys, 5)
        self.found(q, keys, 5)
        monkeypatch.setattr(of_zeros, "captured", lambda device: True)
        for _ in range(2):
            assert torch.equal(self.found(q, keys, 5)[1], first[1])
        monkeypatch.setattr(of_zeros, "captured", lambda device: False)
        self.found(q, keys, 5)
        assert used[0] == used[1] == used[4] and len(set(used)) == 3
        size = module.cosine_topk_zeros(1, 5)
        assert abs(used[2] - used[3]) >= size and abs(used[0] - used[2]) >= ZEROS.most

        def fail(*args):
            raise RuntimeError("launching cosine_topk: failed")

        monkeypatch.setattr(module, "cosine_topk", fail)
        with pytest.raises(RuntimeError, match="failed"):
            self.found(q, keys, 5)
        monkeypatch.setattr(module, "cosine_topk", lambda *args: used.append(args[14]) or launch(*args))
        assert torch.equal(self.found(q, keys, 5)[1], first[1])
        assert used[-1] not in used[:-1]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_many_tenants(self, dtype):
        """Every query its own rows: units that nobody sees are skipped."""
        starts = torch.tensor([0, 20, 900, 17, 400, 1990, 640, 1500, 1501], device=DEVICE)
        ranges = torch.stack([starts, starts + torch.arange(9, device=DEVICE) * 12], dim=1)
        self.check(rand(9, 40, dtype=dtype), rand(2000, 40, dtype=dtype), 10, ranges=ranges)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_neither_order_nor_size_of_the_grid_changes_a_bit(self, dtype):
        q, keys = rand(3, 80, dtype=dtype), integers(900, 80, dtype=dtype)  # many ties
        expected = self.found(q, keys, 30)
        for value in range(6):
            seed(value)
            if EMULATED:
                emulator.device(multiprocessors=1 + 7 * (value % 3))
            assert all(torch.equal(a, b) for a, b in zip(expected, self.found(q, keys, 30), strict=True))

    def test_equal_rows_score_equally_wherever_they_are(self):
        for dtype in DTYPES:
            row = rand(1, 200, dtype=dtype)
            scores, indices = self.found(rand(2, 200, dtype=dtype), row.expand(300, 200), 128)
            assert torch.equal(indices, torch.arange(128, device=DEVICE).expand(2, 128))
            assert (scores == scores[:, :1]).all()

    @pytest.mark.parametrize(("tokens", "d"), [(1, 7000), (12, 4096), (40, 300)])
    def test_little_shared_memory(self, tokens, d):
        """99 KiB, as consumer GPUs have: queries that do not fit come along with the keys."""
        if EMULATED:
            emulator.device(shared_bytes=99 * 1024)
        self.check(rand(tokens, d, dtype=torch.bfloat16), rand(70, d, dtype=torch.bfloat16), 5)

    def test_norms_in_other_dtypes_and_queries_out_of_line(self):
        q, keys = rand(4, 48, dtype=torch.bfloat16), rand(90, 48, dtype=torch.bfloat16)
        norm = keys.float().norm(dim=1)
        expected = self.found(q, keys, 5, key_norm=norm)
        again = self.found(shifted(q), keys, 5, key_norm=torch.stack([norm, norm], dim=1)[:, 0])
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))

    def test_what_the_backend_means(self):
        assert [(b.name, b.reason) for b in backends.available() if b.name == "cuda"] == [("cuda", None)]
        assert backends.resolve("cuda", DEVICE, torch.float16) == "cuda"
        assert backends.resolve("auto", DEVICE, torch.float16) != "cuda"
        with pytest.raises(ValueError, match="backend 'cuda' cannot run here: it takes float16, bfloat16, float32"):
            backends.resolve("cuda", DEVICE, torch.float64)
        with pytest.raises(ValueError, match="k is 129, and it finds at most 128"):
            ops.cosine_topk(rand(1, 8), rand(140, 8), 129, backend="cuda")

    @pytest.mark.parametrize(("tokens", "dtype"), [(8, torch.bfloat16), (9, torch.bfloat16), (1, torch.float32)])
    def test_auto_takes_it_where_it_was_measured_faster(self, tokens, dtype):
        q, keys = rand(tokens, 64, dtype=dtype), rand(90, 64, dtype=dtype)
        mine = cuda_kernels.faster("cosine_topk", (q, keys, 5, None, None))
        assert mine == (tokens <= 8 and dtype != torch.float32)
        assert not cuda_kernels.faster("cosine_topk", (q, keys, 129, None, None))
        if not EMULATED:
            with launches() as counted:
                ops.cosine_topk(q, keys, 5)
            assert (counted[KERNEL] > 0) == mine

    def test_the_module_refuses_what_it_cannot_do(self):
        module = native.cuda()
        sizes = {"q_dtype": "float16", "key_dtype": "float16", "t": 1, "n": 10, "d": 8, "k": 3}
        needed = module.cosine_topk_workspace(**sizes)
        good = {"q": 16, "q_stride": 8, "keys": 16, "key_stride": 8, "key_norm": 0, "ranges": 0, **sizes}
        good |= {
            "workspace": 16,
            "bytes": needed,
            "zeros": 16,
            "alone": True,
            "bulk": False,
            "scores": 16,
            "indices": 16,
            "stream": 0,
        }
        most = 2**31 - 2**20
        shape = (torch.empty(1, 8, device="meta"), torch.empty(most + 1, 8, device="meta"), 3, None, None)
        assert f"it takes at most {most}" in cuda_kernels.refusal("cosine_topk", shape)
        for change, said in (
            ({"t": 65}, "t must be 0 to 64, but is 65"),
            ({"k": 129}, "k must be 0 to 128, but is 129"),
            ({"n": most + 1}, f"n must be 0 to {most}, but is {most + 1}"),
            ({"d": 0}, "d must be 1 to 1048576, but is 0"),
            ({"key_dtype": "float64"}, "but got float64"),
            ({"key_dtype": "bfloat16"}, "q is float16, keys are bfloat16"),
            ({"key_stride": -8}, "key_stride must be 0 to .*, but is -8"),
            ({"bytes": needed - 1}, f"bytes of workspace must be {needed} to .*, but is {needed - 1}"),
            ({"scores": 0}, "one is null"),
            ({"zeros": 0}, "one is null"),
        ):
            with pytest.raises(ValueError, match=said):
                module.cosine_topk(**{**good, **change})


def test_without_the_module_or_a_gpu_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(native, "cuda", lambda: None)
    monkeypatch.setattr(native, "_load", lambda name: (None, "it was not built"))
    with pytest.raises(ValueError, match="backend 'cuda' cannot run here: it was not built"):
        ops.cosine_topk(rand(1, 8), rand(9, 8), 3, backend="cuda")

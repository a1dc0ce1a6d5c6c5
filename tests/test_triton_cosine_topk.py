"""cosine_topk in Triton: the reference's items and scores, ties, padding and ranges included."""

import pytest
import torch
from kernel_tools import DEVICE, launches
from topk_bodies import CosineTopk, rand

from unike_kernels import ops, reference
from unike_kernels.triton_kernels import tuning


class TestTriton(CosineTopk):
    backend = "triton"

    def test_more_queries_than_programs(self):
        """Past the table's programs every tile walks all rows by itself."""
        most = tuning.choose("cosine_topk", DEVICE, T=1, bytes=4)
        tiles = most["programs"] + 1
        q, keys = rand(tiles * most["BLOCK_T"] if DEVICE.type == "cpu" else 200, 16), rand(80, 16)
        self.check(q, keys, 2)

    def test_more_than_the_kernel_keeps(self):
        q, keys = rand(1, 8), rand(140, 8)
        with pytest.raises(ValueError, match="k is 129, and it finds at most 128"):
            ops.cosine_topk(q, keys, 129, backend="triton")
        scores, _ = ops.cosine_topk(q, keys, 129)  # "auto" takes the reference
        torch.testing.assert_close(scores, reference.cosine_topk(q, keys, 129)[0])

    def test_queries_in_chunks(self, monkeypatch):
        q, keys = rand(37, 16), rand(90, 16)
        ranges = torch.tensor([[i, 90 - i] for i in range(37)], device=DEVICE)
        whole = self.found(q, keys, 3, ranges=ranges)
        monkeypatch.setattr("unike_kernels.triton_kernels.cosine_topk.CHUNK", 16)
        with launches() as counted:
            parts = ops.cosine_topk(q, keys, 3, ranges=ranges, backend="triton")
        assert counted["cosine_topk_scan"] == counted["cosine_topk_merge"] == 3
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))

    def test_two_full_tiles_of_queries(self):
        self.check(rand(128, 16), rand(40, 16), 2)

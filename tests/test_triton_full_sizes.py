"""The largest sizes that the operators promise, on narrow rows, so that the interpreter gets through them."""

import pytest
import torch
from kernel_tools import DEVICE, launches
from operator_cases import check, ints, rand

from unike_kernels import ops, reference

F16 = torch.float16


@pytest.mark.parametrize("form", ["always", "route"])
def test_neurons_of_8192_tokens(form):
    tokens, n, d = 8192, 64, 16
    arguments = {"x": rand(tokens, d, dtype=F16), "keys": rand(n, d, dtype=F16), "key_bias": rand(n, dtype=F16)}
    arguments |= {"values": rand(n, d, dtype=F16, fan=n), "group_ptr": ints([0, 5, 5, 20, 64]), "act": "gelu"}
    if form == "route":
        arguments["route"] = torch.rand(tokens, 4).to(DEVICE, F16)
    check("extra_neurons", arguments)


@pytest.mark.parametrize("form", ["always", "selected"])
def test_20_000_active_neurons_beside_200_000(form):
    active, resident, d = 20_000, 200_000 if form == "selected" else 0, 16
    n = active + resident
    arguments = {"x": rand(3, d, dtype=F16), "keys": rand(n, d, dtype=F16), "key_bias": rand(n, dtype=F16)}
    arguments |= {"values": rand(n, d, dtype=F16, fan=active), "act": "relu"}
    if form == "selected":
        arguments |= {"group_ptr": ints([0, resident, n]), "selected": ints([[1], [1], [-1]])}
    check("extra_neurons", arguments)


@pytest.mark.parametrize("form", ["given", "alpha at the case token"])
def test_shift_of_a_prompt_of_8192_tokens(form):
    tokens, d, cases = 8192, 32, 6
    owner = torch.arange(tokens) * (cases + 1) // tokens - 1  # the first tokens are of no case
    arguments = {"h_input": rand(tokens, d), "q": rand(tokens, 2, 8), "item_keys": rand(50, 1, 8)}
    arguments |= {"item_values": rand(50, 1, 8), "token_to_case": ints(owner), "out_proj": (rand(d, 16, fan=16), None)}
    arguments["indices"] = ints(torch.stack([torch.randperm(50)[:5] for _ in range(cases)]))
    if form == "given":
        arguments["alpha"] = torch.rand(cases, device=DEVICE)
    else:
        last = [int((owner == case).nonzero()[-1]) for case in range(cases)]
        arguments |= {"case_tokens": ints(last), "folded": (rand(d, 16, fan=16), None), "clamp": False}
    with launches() as counted:
        check("knowledge_shift", arguments)
    assert counted == {"knowledge_shift_project": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("gap", [16, 224])
def test_search_among_10_million_rows(gap):
    """Rows beyond 2^31 elements too; in the interpreter five minutes, in which it gives the same."""
    n, d, k = 10_000_000, 16, 40
    keys = torch.empty(n * gap, dtype=F16, device=DEVICE).as_strided((n, d), (gap, 1))
    keys.normal_()
    norm, q = keys.float().norm(dim=1), rand(3, d, dtype=F16)
    q[2] = keys[n - 1]
    for ranges in (None, ints([[0, n], [n - 70_000, n - 1], [5, n]])):
        scores, indices = ops.cosine_topk(q, keys, k, key_norm=norm, ranges=ranges, backend="triton")
        expected, right = reference.cosine_topk(q, keys, k, key_norm=norm, ranges=ranges)
        torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6)
        assert (indices == right).float().mean() > 0.9  # the others change places within rounding
        assert indices[2, 0] == n - 1

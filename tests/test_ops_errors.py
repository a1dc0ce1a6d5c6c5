"""What the operators refuse, by name and with both values."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from unike_kernels import ops, reference

X, K, B, V = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6), torch.randn(6, 8)
PTR, CASES_OF = torch.tensor([0, 2, 6]), torch.tensor([0, 1, 1])
H, Q, IK, IV, IDX = (
    torch.randn(3, 8),
    torch.randn(3, 4, 2),
    torch.randn(5, 2, 2),
    torch.randn(5, 2, 2),
    torch.zeros(3, 2, dtype=torch.long),
)
W_K, W_V = torch.randn(9, 8), torch.randn(8, 9)


def en(x=X, keys=K, key_bias=B, values=V, act="relu", **options):
    return ops.extra_neurons(x, keys, key_bias, values, act=act, **options)


def af(w_k=W_K, w_v=W_V, **options):
    return ops.augmented_ffn(X, w_k, None, w_v, None, K, B, V, act="silu", **options)


def ks(h=H, q=Q, keys=IK, values=IV, indices=IDX, **options):
    return ops.knowledge_shift(h, q, keys, values, indices, **options)


ERRORS = {
    "x has 7 features, keys have 8": lambda: en(x=X[:, :7]),
    "x must be [..., d], keys [n, d], but got [3, 8], [6]": lambda: en(keys=B),
    "values must be [6, *] (keys [6, 8]), but got [5, 8]": lambda: en(values=V[:5]),
    "key_bias must be [6] (keys [6, 8]), but got [5]": lambda: en(key_bias=B[:5]),
    "up must be [6, 8] (keys [6, 8]), but got [5, 8]": lambda: en(up=K[:5]),
    "up_bias must be [6] (keys [6, 8]), but got [5]": lambda: en(up=K, up_bias=B[:5]),
    "up_bias is [6], but up is None": lambda: en(up_bias=B),
    "group_ptr must be [G + 1], but got [0]": lambda: en(group_ptr=PTR[:0]),
    "zeta must be [2, 8] (group_ptr [3], values [6, 8]), but got [3, 8]": lambda: en(group_ptr=PTR, zeta=K[:3]),
    "zeta must be [8] (group_ptr None, values [6, 8]), but got [6]": lambda: en(zeta=B),
    "token_to_case must be [3] (x [3, 8]), but got [2]": lambda: en(token_to_case=CASES_OF[:2]),
    "route must be [3, 2] (x [3, 8], token_to_case None, group_ptr [3]), but got [2, 2]": lambda: en(
        group_ptr=PTR, route=torch.ones(2, 2)
    ),
    "selected must be [2, *] (x [3, 8], token_to_case [3], route [2, 2]), but got [3, 1]": lambda: en(
        group_ptr=PTR, route=torch.ones(2, 2), token_to_case=CASES_OF, selected=IDX[:, :1]
    ),
    "act must be one of relu, gelu, gelu_tanh, silu, identity, but got 'swish'": lambda: en(act="swish"),
    "y must be [3, 8] (x [3, 8], values [6, 8]), but got [6, 8]": lambda: ops.extra_neurons_(K, X, K, B, V, act="relu"),
    "w_v must be [8, 9] (w_k [9, 8], values [6, 8]), but got [9, 8]": lambda: af(w_v=W_K),
    "w_k must be [*, 8] (x [3, 8]), but got [8, 9]": lambda: af(w_k=W_V),
    "both be gated or neither: w_up is [9, 8], up is None": lambda: af(w_up=W_K),
    "q has 7 features, keys have 8": lambda: ops.cosine_topk(X[:, :7], K, 2),
    "k must be 0 or more, but got -1": lambda: ops.cosine_topk(X, K, -1),
    "key_norm must be [6] (keys [6, 8]), but got [8]": lambda: ops.cosine_topk(X, K, 2, key_norm=H[0]),
    "ranges must be [3, 2] (q [3, 8]), but got [2, 2]": lambda: ops.cosine_topk(X, K, 2, ranges=IDX[:2]),
    "h_input must be [T, d], but got [3, 4, 2]": lambda: ks(h=Q),
    "q must be [3, *, *] (h_input [3, 8]), but got [2, 4, 2]": lambda: ks(q=Q[:2]),
    "item_keys must be [*, *, 2] (q [3, 4, 2]), but got [3, 8]": lambda: ks(keys=H),
    "item_values must be [5, 2, *] (item_keys [5, 2, 2]), but got [4, 2, 2]": lambda: ks(values=IV[:4]),
    "q has 4 heads, which is no multiple of the 3 heads of item_keys": lambda: ks(
        keys=torch.randn(5, 3, 2), values=torch.randn(5, 3, 2)
    ),
    "indices must be [3, *] (h_input [3, 8], token_to_case None), but got [2, 2]": lambda: ks(indices=IDX[:2]),
    "case_tokens is [3], but token_to_case is None": lambda: ks(case_tokens=CASES_OF),
    "case_tokens must be [2] (indices [2, 2]), but got [3]": lambda: ks(
        indices=IDX[:2], token_to_case=CASES_OF, case_tokens=CASES_OF
    ),
    "alpha must be [3] or, with token_to_case, [2], but got [4]": lambda: ks(
        indices=IDX[:2], token_to_case=CASES_OF, alpha=torch.ones(4)
    ),
    "alpha must be [3] or, with token_to_case, [3], but got []": lambda: ks(alpha=torch.tensor(0.5)),
    "the heads make 4 features, h_input has 8, and out_proj is None": lambda: ks(q=Q[:, :2]),
    "out_proj weight must be [8, 4]": lambda: ks(q=Q[:, :2], out_proj=(W_V, None)),
    "out_proj bias must be [8] (h_input [3, 8]), but got [6]": lambda: ks(out_proj=(torch.eye(8), B)),
    "encoder[0] weight must be [*, 8] (h_input [3, 8]), but got [8, 9]": lambda: ks(encoder=[(W_V, None)]),
    "encoder[1] weight must be [*, 9] (weight [9, 8]), but got [9, 8]": lambda: ks(encoder=[(W_K, None)] * 2),
    "the encoder returns 9 features, h_input has 8": lambda: ks(encoder=[(W_K, None)]),
    "orientation must be 'knowledge' or 'input', but got 'alpha'": lambda: ks(orientation="alpha"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_shapes_are_named(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert message in str(caught.value)


TYPE_ERRORS = {
    "keys must be a tensor of float, but got torch.int64": lambda: en(keys=K.long()),
    "group_ptr must be a tensor of int64, but got torch.int32": lambda: en(group_ptr=PTR.int()),
    "x must be a tensor of float, but got list": lambda: en(x=[1.0]),
    "x must be a tensor of float, but got NoneType": lambda: en(x=None),
    "values must be a tensor of float, but got NoneType": lambda: en(values=None),
    "w_v must be a tensor of float, but got NoneType": lambda: af(w_v=None),
    "k must be an int, but got float": lambda: ops.cosine_topk(X, K, 2.0),
    "indices must be a tensor of int64, but got torch.float32": lambda: ks(indices=H),
    "indices must be a tensor of int64, but got NoneType": lambda: ks(indices=None),
    "encoder[0] weight must be a tensor of float, but got NoneType": lambda: ks(encoder=[(None, B)]),
    "encoder[0] bias must be a tensor of float, but got torch.int64": lambda: ks(encoder=[(K, PTR)]),
}


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_bad_types_are_named(message):
    with pytest.raises(TypeError) as caught:
        TYPE_ERRORS[message]()
    assert message in str(caught.value)


def test_another_device_is_named():
    with pytest.raises(ValueError, match="x is on cpu, keys is on meta"):
        en(keys=K.to("meta"))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cosine_topk", (X, W_V, 2, None, None, "auto"), "q has 8 features, keys have 9"),
        ("extra_neurons", (X, W_V, B, V, *[None] * 7, "relu", 0.0, "auto"), "x has 8 features, keys have 9"),
        ("extra_neurons_", (B, X, K, B, V, *[None] * 7, "relu", 0.0, "auto"), r"y must be \[3, 8\]"),
        ("augmented_ffn", (X, W_V, None, W_V, *[None] * 3, K, B, V, *[None] * 3, "relu", 0.0, "auto"), "w_k must be"),
        (
            "knowledge_shift",
            (
                H,
                Q,
                H,
                IV,
                IDX,
                *[None] * 5,
                [],
                "identity",
                "knowledge",
                True,
                None,
                None,
                True,
                None,
                None,
                None,
                "auto",
            ),
            "item_keys must be",
        ),
    ],
)
def test_the_operators_check_shapes_without_the_functions(name, args, message):
    """The fake kernels state the same contract, for graphs that call the operators themselves."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.unike, name)(*fakes)


@pytest.mark.parametrize("name", ops.__all__)
def test_every_operator_has_its_specification(name):
    assert callable(getattr(reference, name))

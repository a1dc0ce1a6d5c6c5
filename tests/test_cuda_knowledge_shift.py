"""The CUDA kernel of `knowledge_shift` against the reference in float64; without a GPU, on the emulator."""

from contextlib import contextmanager

import emulator
import pytest
import shift_bodies as bodies
import torch
from kernel_tools import DEVICE, DTYPES, launches, on_cuda, poisoned, shifted, strided
from shift_bodies import SHAPES, case_tokens, ids, inputs, layer, on_cases

import unike_kernels as uk
from tests.models_tiny import ALWAYS, edits_for, inputs_for, make_model
from unike_kernels import native
from unike_kernels.cuda_kernels import refusal
from unike_kernels.cuda_kernels.knowledge_shift import KERNEL, choose
from unike_kernels.triton_kernels import tuning
from unike_kernels.triton_kernels.knowledge_shift_arguments import arguments

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EMULATED = DEVICE.type == "cpu"
check = bodies.checker("cuda", lambda path: {KERNEL: 1})


@pytest.fixture(autouse=True)
def here(monkeypatch):
    on_cuda(monkeypatch)


def split(blocks, rows):
    """Inside, a cluster has `blocks` blocks and takes `rows` query heads, whatever the table says."""
    return tuning.trying(lambda row: {"SPLIT": blocks, "ROWS": rows} if row.kernel == KERNEL else row.choice)


@contextmanager
def emulated(seed, shared_bytes=227 * 1024):
    """Inside, the emulator draws another order, or has less shared memory; a GPU is what it is."""
    if EMULATED:
        emulator.seed(seed)
        emulator.device(shared_bytes=shared_bytes)
    yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_given_alpha(shape, dtype):
    bodies.given_alpha(check, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16])
def test_items_of_a_case(tokens, dtype):
    bodies.items_of_a_case(check, tokens, dtype)


@pytest.mark.parametrize(("tokens", "dtype"), [*((3, dtype) for dtype in DTYPES), (1, F16), (16, BF16)], ids=str)
def test_raw(tokens, dtype):
    bodies.raw(check, tokens, dtype, every_option=tokens == 3)


@pytest.mark.parametrize("k", [0, 1, 16, 17, 40, 128])
def test_any_number_of_items(k):
    bodies.any_number_of_items(check, k)


@pytest.mark.parametrize("dtypes", [(F32, BF16, F16), (F16, F32, BF16), (BF16, F16, F32)], ids=str)
def test_mixed_dtypes_and_views(dtypes):
    h, q, keys, values = inputs(3)
    parts = [h.to(dtypes[0]), q.to(dtypes[1]), keys.to(dtypes[2]), values.to(dtypes[2])]
    for view in (lambda t: t, shifted, strided):
        bodies.views(check, parts, view)


@pytest.mark.parametrize("orientation", ["knowledge", "input"])
@pytest.mark.parametrize("form", ["heads", "raw"])
def test_rows_that_are_not_retrieved_do_not_leak(form, orientation):
    bodies.rows_that_are_not_retrieved_do_not_leak("cuda", 6, orientation, form == "raw", None)


def test_alpha_0_keeps_the_input_whatever_is_known():
    bodies.alpha_0_keeps_the_input_whatever_is_known("cuda")


def test_no_tokens_and_zero_vectors():
    bodies.no_tokens_and_zero_vectors(check)


# Every way to share the work: clusters of 1 to 8 blocks, all of a group's query heads or some of them.
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "rows"), [("multi-head", 1), ("7 heads on 1", 1), ("7 heads on 1", 4), ("odd sizes", 2)]
)
def test_any_cluster(blocks, shape, rows):
    for dtype in (BF16, F32):
        parts = inputs(2, **SHAPES[shape], dtype=dtype)
        with split(blocks, rows):
            check(parts, ids(2, 5), alpha=torch.tensor([0.3, 0.7], device=DEVICE))


@pytest.mark.parametrize(("hd", "hv"), [(64, 64), (80, 80), (128, 128), (128, 72)])
def test_head_sizes_of_real_models(hd, hv):
    parts = inputs(2, heads=14, kv_heads=2, hd=hd, hv=hv, items=50, dtype=BF16)
    for blocks, rows in ((1, 1), (1, 4), (2, 4)):
        with split(blocks, rows):
            check(parts, ids(2, 40, items=50), alpha=0.4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "blocks"), [(1030, 8), (1536, 8), (1000, 1), (264, 4)])
def test_wide_raw_heads(d, blocks, dtype):
    """More columns than a warp takes at once, last slices that are shorter, items in several pieces."""
    # sixteen alphas, each a cosine: of three, plain torch once had all right to the last bit
    parts = inputs(16, heads=1, kv_heads=1, hd=d, hv=d, items=50, dtype=dtype)
    with split(blocks, 1):
        check(parts, ids(16, 40, items=50), clamp=False)
        options = on_cases(16, k=40, items=50)
        check(parts, case_tokens=case_tokens(options["token_to_case"], 3), orientation="input", **options)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("hv", [600, 220])
def test_little_shared_memory_takes_more_pieces(hv, blocks):
    """As much as an L4 has, and next to none: the ring of pieces goes round many times."""
    parts = inputs(2, heads=1, kv_heads=1, hd=600, hv=hv, items=130)
    indices = ids(2, 128, items=130)
    with split(blocks, 1):
        first = check(parts, indices, clamp=False)
        assert not torch.equal(first[0], parts[0])
        for seed in range(12):
            with emulated(seed, shared_bytes=(99 if seed == 0 else 40) * 1024), poisoned():
                found = uk.ops.knowledge_shift(*parts, indices, clamp=False, backend="cuda")
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.parametrize("form", ["heads", "raw", "case"])
def test_the_same_bits_in_every_order_and_run(form):
    if form == "heads":
        parts = inputs(4, heads=14, kv_heads=2, hd=24, hv=40, items=20, dtype=BF16)
        options = {**on_cases(4, k=12, items=20), "alpha": torch.tensor([0.2, 0.9, 0.4], device=DEVICE)}
    else:
        parts = inputs(4, heads=1, kv_heads=1, hd=300, hv=300, items=20)
        options = on_cases(4, k=12, items=20, clamp=False)
        if form == "case":
            options["case_tokens"] = case_tokens(options["token_to_case"], 3)
    first = None
    for seed in range(12):
        for _ in range(3 if seed == 0 else 1):
            with split(4, 2), emulated(seed), poisoned():
                found = uk.ops.knowledge_shift(*parts, backend="cuda", **options)
            first = found if first is None else first
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_offsets_beyond_32_bits():
    """Rows 2**30 elements apart. On a CPU the memory between them is never touched."""
    gap = 2**30 + 8
    buffer = torch.empty(2 * gap + 64, dtype=F16, device=DEVICE)
    h, q, *rows = inputs(1, items=3, dtype=F16)
    tables = [buffer.as_strided((3, 2, 16), (gap, 16, 1), offset) for offset in (0, 32)]
    for table, values in zip(tables, rows, strict=True):
        table.copy_(values)
    check([h, q, *tables], torch.tensor([[2, 1]], device=DEVICE), alpha=0.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 17}, "there are 17 tokens, and it takes at most 16"),
        ({"items": 129}, "there are 129 items per token, and it takes at most 128"),
        ({"out_proj": True}, "there is an output projection, and it projects nothing"),
        ({"alpha": None}, "alpha is to be computed from 4 heads, and it compares one head"),
        ({"alpha": None, "encoder": True}, "alpha is to be computed from an encoder, and it compares one head"),
        ({"values": F16}, "keys are torch.float32, values torch.float16, and it takes both in one dtype"),
    ],
)
def test_triton_takes_what_it_refuses(change, reason):
    tokens, items = change.get("tokens", 2), change.get("items", 5)
    *parts, values = inputs(tokens, items=max(items, 9))
    parts += [values.to(change.get("values", F32))]
    indices, alpha = ids(tokens, items, max(items, 9)), change.get("alpha", torch.full((tokens,), 0.5, device=DEVICE))
    projection, encoder = (layer(64, 64) if name in change else () for name in ("out_proj", "encoder"))
    given = (*parts, indices, alpha, None, None, *(projection or (None, None)), list(encoder))
    assert refusal("knowledge_shift", given) == reason
    options = {"out_proj": projection} if projection else {}
    options |= {"encoder": [encoder]} if encoder else {}
    with launches() as counted:
        uk.ops.knowledge_shift(*parts, indices, alpha=alpha, backend="cuda", **options)
    name = "knowledge_shift_project" if projection else "knowledge_shift_attend"  # the one launch attends too
    assert KERNEL not in counted and counted[name] == 1


def test_more_cases_than_a_grid_has_room_for():
    parts, at = inputs(1, heads=1, kv_heads=1, hd=8, hv=8), torch.zeros(1, dtype=torch.long, device=DEVICE)
    for cases, alpha, reason in (
        (65_519, None, None),
        (65_520, None, "there are 65520 cases whose alpha is to be computed, and it takes at most 65519"),
        (65_520, torch.ones(1, device=DEVICE), None),
    ):
        given = (*parts, ids(cases, 2), alpha, at, at.expand(cases), None, None, [])
        assert refusal("knowledge_shift", (*given, *[None] * 9)) == reason


def test_a_head_too_wide_for_a_device_without_clusters_is_refused_by_its_name():
    parts = inputs(1, heads=1, kv_heads=1, hd=1032, hv=1032)
    given = (*parts, ids(1, 5), None, None, None, None, None, [])
    with tuning.pretend(80):
        reason = "a head has 1032 columns, and it takes at most 1024 on compute capability 8.0"
        assert refusal("knowledge_shift", given) == reason
    assert refusal("knowledge_shift", given) is None


@pytest.mark.parametrize("built", [90, 80])
def test_a_module_built_without_clusters_gets_none_whatever_the_device_can(built, monkeypatch):
    """PTX of less than sm_90, on a device that has clusters."""
    monkeypatch.setattr(native, "built_for", lambda device: built)
    rest = (ids(1, 5), *[None] * 5, [], "identity", "knowledge", True, None, None, True, None, None, None)
    narrow, wide = ((*inputs(1, heads=1, kv_heads=1, hd=hd, hv=hd), *rest) for hd in (1024, 1032))
    with tuning.pretend(90):
        assert choose(arguments(*narrow))[0] == (8 if built == 90 else 1)
        reason = "a head has 1032 columns, and it takes at most 1024 on compute capability 8.0"
        assert refusal("knowledge_shift", wide) == (None if built == 90 else reason)


def test_the_module_refuses_what_it_cannot_do():
    place, sizes = (16, 8, 8, "float32"), (1, 1, 5, 1, 1, 8, 8)
    places, rest = [place] * 4, (16, 0, 0, 16, "float32", False, 16, 16, *sizes, 1.0, 0.0, False, True, False)
    for change, said in (
        ({"blocks": 3}, "launching knowledge_shift"),
        ({"rows": 3}, "launching knowledge_shift"),
        ({"places": [(16, 8, 8, "float64"), *places[1:]]}, "but got float64"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=said):
            native.cuda().knowledge_shift(
                *change.get("places", places), *rest, change.get("blocks", 1), change.get("rows", 1), 0
            )


def test_an_encoder_that_a_given_alpha_leaves_out_is_no_reason_to_refuse():
    check(inputs(2), ids(2, 5), alpha=0.3, encoder=[layer(64, 64)])


def test_a_clamped_alpha_keeps_the_input_bit_for_bit():
    """Knowledge that points away: alpha is 0, and neither an infinity in it nor a negative zero is touched."""
    h, q, keys, values = inputs(2, heads=1, kv_heads=1, hd=40, hv=40)
    values.copy_(-h[:1]).add_(0.01 * torch.randn_like(values))
    h[1] = h[0]
    h[0, 0] = -0.0
    values[:, 0], values[:, 1] = 1.0, 1e30
    h[:, 1] = -1.0
    indices = torch.tensor([[1, 2], [3, -1]], device=DEVICE)
    out, used = check([h, q, keys, values], indices)
    assert used.eq(0).all() and torch.equal(out, h) and out[0, 0].signbit()
    out, used = check([h, q, keys, values], indices, rescale=False, orientation="input")
    assert used.eq(0).all() and not torch.equal(out, h)


def test_scores_that_overflow_leave_the_weight_to_what_is_missing():
    h, q, keys, values = inputs(1, heads=2, kv_heads=2)
    q.fill_(1e30)
    keys.fill_(-1e30)
    indices = torch.tensor([[1, -1, 2]], device=DEVICE)
    out, _ = uk.ops.knowledge_shift(h, q, keys, values, indices, alpha=0.5, backend="cuda")
    expected, _ = uk.reference.knowledge_shift(h, q, keys, values, indices, alpha=0.5)
    assert out.isfinite().all() and torch.equal(out, expected)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_patched_model_decodes_with_it(name):
    """Once a case's alpha is decided, every step and layer is one start; the answer is that of the reference."""
    model = make_model(name, layers=2).to(DEVICE)
    inputs = {key: value.to(DEVICE) for key, value in inputs_for(model, (5, 3, 4)).items()}
    edits = edits_for(model, ALWAYS, prompts={k: v[:2] for k, v in inputs.items()}, layers=(0, 1))
    said = {}
    for backend in ("reference", "cuda"):
        with uk.patch(model, edits, backend=backend), torch.no_grad(), launches() as counted:
            said[backend] = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    assert torch.equal(said["cuda"].sequences, said["reference"].sequences)
    for ours, theirs in zip(said["cuda"].logits, said["reference"].logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counted[KERNEL] >= 3 * 2  # three steps behind the first, two layers

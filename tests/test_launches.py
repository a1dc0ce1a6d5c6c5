"""Launches that a patch adds to each edited layer in decode: kernels of ours, and whatever torch starts around them."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

import unike_kernels as uk
from bench.gpu_check.launches import FORMS
from bench.gpu_check.launches import added as added_on_a_gpu
from bench.latency.shapes import SHAPES
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model
from tests.test_decode import Counting, decode_step
from unike_kernels import backends
from unike_kernels.cases import as_if_capturing
from unike_kernels.triton_kernels import launching

SCAN = "cosine_topk_scan"
SEARCH = {SCAN: 1, "cosine_topk_merge": 1}
ALWAYS_ON, SELECTED = {"hidden": 1, "weighted_rows": 1}, {"selected_rows": 1}
ATTEND, LINEAR, MIX = "knowledge_shift_attend", "knowledge_shift_linear", "knowledge_shift_mix"
PROJECT = "knowledge_shift_project"


def started(model, inputs, monkeypatch):
    """What one decode step starts: every kernel by name, and every operator of torch that is no view.

    Kernels are counted and not run, since no launch depends on a value: what they would have written is zeros.
    """
    counting, implementation = Counting(), backends.implementation

    def looking_into(*args):
        kernel = implementation(*args)
        assert kernel is not None, f"{args[0]} ran the reference"

        def call(*operands):
            with counting:  # torch looks no deeper than our operator by itself
                return kernel(*operands)

        return call

    def counted(kernel, grid, *args, **constants):
        counting.seen[kernel.__name__] += 0 not in grid

    def zeros(shape, dtype, device):
        with torch._C._DisableTorchDispatch():
            return torch.zeros(shape, dtype=dtype, device=device)

    with monkeypatch.context() as patched, as_if_capturing(), torch.no_grad():
        patched.setattr(launching, "launch", counted)
        patched.setattr(launching, "new", zeros)
        step = decode_step(model, inputs)
        counting.seen.clear()
        patched.setattr(backends, "implementation", looking_into)
        with counting:
            step()
    # promote_types asks for a dtype and starts nothing.
    return Counter({k: n for k, n in counting.seen.items() if k != "promote_types" and not k.startswith("unike::")})


def added(config, monkeypatch, name="opt"):
    """Launches that a layer adds: all four edited against two of them, so that what is once per pass cancels."""
    found = []
    for edited in (4, 2):
        model = make_model(name)
        inputs = inputs_for(model, (6, 6, 6))
        edits = edits_for(model, config, prompts={k: v[:2] for k, v in inputs.items()})
        uk.patch(model, edits, backend="triton", layers=sorted(edits.layers)[:edited])
        found.append(started(model, inputs, monkeypatch))
    more = Counter(found[0])
    more.subtract(found[1])
    return {name: count / 2 for name, count in more.items() if count}


@pytest.mark.parametrize("attention", ["projected", "raw"])
@pytest.mark.parametrize("alpha", [None, 0.3], ids=["adaptive", "fixed"])
def test_retrieval_per_case_adds_three_at_most(alpha, attention, monkeypatch):
    for config, neurons in ((ALWAYS, ALWAYS_ON), (ROUTED, SELECTED)):
        config = replace(config, shift=replace(config.shift, alpha=alpha, attention=attention))
        found = added(config, monkeypatch)
        assert found == {**neurons, ATTEND: 1} and sum(found.values()) <= 3


@pytest.mark.parametrize("positions", ["all", "from_case_token"])
@pytest.mark.parametrize("attention", ["projected", "raw"])
def test_retrieval_per_token_with_a_fixed_alpha_adds_four(attention, positions, monkeypatch):
    """The search's scan, and attention, which merges what that found and mixes."""
    for config, neurons in ((ALWAYS, ALWAYS_ON), (ROUTED, SELECTED)):
        shift = replace(config.shift, per="token", alpha=0.3, attention=attention, positions=positions)
        found = added(replace(config, shift=shift), monkeypatch)
        assert found == {**neurons, SCAN: 1, ATTEND: 1} and sum(found.values()) <= 4


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_retrieval_per_token_with_an_alpha_of_each_adds_four(name, monkeypatch):
    """`raw` takes it from rows of the encoder; `projected` from weights that are folded, in the launch that attends."""
    for config, neurons in ((ALWAYS, ALWAYS_ON), (ROUTED, SELECTED)):
        for attention, kernel in (("projected", PROJECT), ("raw", ATTEND)):
            shift = replace(config.shift, per="token", attention=attention)
            found = added(replace(config, shift=shift), monkeypatch, name)
            assert found == {**neurons, SCAN: 1, kernel: 1} and sum(found.values()) <= 4


def test_an_encoder_with_an_activation_costs_its_linear_maps(monkeypatch):
    """The output projection and the encoder's two maps on h_know of every token, and the mix."""
    for attention, maps in (("projected", 3), ("raw", 2)):
        shift = replace(ALWAYS.shift, per="token", attention=attention)
        config = replace(ALWAYS, shift=shift, encoders=replace(ALWAYS.encoders, activation="gelu"))
        found = added(config, monkeypatch, "llama")
        assert found == {**ALWAYS_ON, **SEARCH, ATTEND: 1, LINEAR: maps, MIX: 1}


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_starts_no_more(form):
    """Counted by the profiler: copies, fills and what a launcher allocates included."""
    shape = replace(SHAPES["llama-100m"], layers=4)
    assert added_on_a_gpu(shape, form) <= FORMS[form][2]


def test_the_gpu_check_allows_what_is_counted_here(monkeypatch):
    for routed, changes, most in FORMS.values():
        base = ROUTED if routed else ALWAYS
        assert sum(added(replace(base, shift=replace(base.shift, **changes)), monkeypatch).values()) <= most


def test_a_grid_that_no_gpu_takes_is_refused_by_its_size():
    def hidden_grads():
        pass

    started = []
    with launching.recording(lambda kernel, grid, args, constants: started.append(grid)):
        launching.launch(hidden_grads, (70_000, 65_535), torch.zeros(1))
        for grid in ((2, 65_536), (2, 3, 65_536)):
            before = launching.LAUNCHES.copy()
            with pytest.raises(ValueError, match="hidden_grads needs 2 x .*65536 programs, and a GPU takes 65535"):
                launching.launch(hidden_grads, grid, torch.zeros(1))
            assert before == launching.LAUNCHES
        launching.launch(hidden_grads, (0, 65_536), torch.zeros(1))
    assert started == [(70_000, 65_535)]

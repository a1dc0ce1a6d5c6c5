"""What a training step leaves out: the same steps and losses, finished edits gone, nothing done that no loss sees."""

from dataclasses import replace

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import make_editor, make_processor, make_requests
from tests.models_tiny import ALWAYS, edits_for, inputs_for, make_model
from unike_kernels.editing import train as train_module
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.editing.sparing import batch_axes, narrowed
from unike_kernels.editing.train import GroupTrainer
from unike_kernels.models import find_decoder, get_module

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
QUIET = {"progress": False}


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("name", ["opt", "llava"])
def test_finished_edits_leave_the_batch(name, seen, monkeypatch):
    """Their rows are picked from the states there are; where it does not show how, the layers below run again."""
    editor, requests = make_editor(name), make_requests(name, 6)
    alone = [editor.edit([r], **QUIET).entries[0] for r in requests]
    passes, sizes = [], []
    run, forward = GroupTrainer._pass, GroupTrainer._forward

    def traced(self, samples, rows):
        passes.append(len(rows))
        return run(self, samples, rows)

    def sized(self, work):
        sizes.append(len(work.rows))
        return forward(self, work)

    monkeypatch.setattr(GroupTrainer, "_pass", traced)
    monkeypatch.setattr(GroupTrainer, "_forward", sized)
    if not seen:
        monkeypatch.setattr(train_module, "batch_axes", lambda of_all, of_two: None)
    edits = editor.edit(requests, **QUIET)
    assert passes[:2] == [6, 2] and (len(passes) == 2) == seen
    steps = [e.steps for e in edits.entries]
    assert len(set(steps)) > 2 and steps == [e.steps for e in alone]
    if seen:
        assert sizes == [sum(n >= step for n in steps) for step in range(max(steps) + 1)]
    for one, other in zip(alone, edits.entries, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_what_grows_with_the_batch_is_seen_not_guessed():
    def states(b, *more):
        return (
            torch.zeros(b, 5, 4),
            {3: ((torch.zeros(3, b, 5), None), {"mask": torch.zeros(1, 1, 5, 5), "n": 2})},
            *more,
        )

    axes = batch_axes(states(5), states(2))
    assert axes == [0, 1, None, None, None]  # of 5 edits with 5 tokens each, the rows
    hidden, calls = narrowed(states(5), axes, torch.tensor([0, 3]))
    assert hidden.shape == (2, 5, 4) and calls[3][0][0].shape == (3, 2, 5) and calls[3][1]["mask"].shape == (1, 1, 5, 5)
    assert batch_axes(states(5, torch.zeros(25)), states(2, torch.zeros(10))) is None  # flattened
    assert batch_axes(states(5, torch.zeros(5, 7)), states(2, torch.zeros(2, 6))) is None
    assert batch_axes(states(5, object()), states(2, object())) is None
    assert batch_axes(states(5, 3), states(2, 4)) is None
    assert batch_axes(states(5, None), states(2)) is None


SHIFTS = {
    "per case": {},
    "raw": {"attention": "raw"},
    "per token": {"per": "token"},
    "from the case token": {"positions": "from_case_token"},
    "a fixed alpha": {"alpha": 0.5},
}


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_spared_step_is_a_whole_one(name, shift, independent):
    """Where target tokens are predicted: the first edited layer replayed, the last at those tokens alone."""
    model = make_model(name, dtype=torch.float64)
    model.requires_grad_(False)
    collator, decoder = Collator(model, make_processor(name)), find_decoder(model)
    samples = [Sample(r["prompt"], r["target"], r["image"]) for r in make_requests(name, 3)]
    config = replace(ALWAYS, shift=replace(ALWAYS.shift, **SHIFTS[shift]))
    edits = edits_for(model, config, prompts=inputs_for(model, [5, 4, 3]))
    attention = get_module(model, decoder.layers[min(edits.layers)].attention)
    with uk.patch(model, edits) as handle:
        zeros = dict.fromkeys(edits.layers, torch.zeros(16))
        trainer = GroupTrainer(collator, decoder, handle, config.neurons, zeros, zeros, independent=independent)
        work = trainer._pass(samples, torch.arange(3))
        assert work.attended is not None
        seen: list[int] = []
        hook = attention.register_forward_hook(lambda *_: seen.append(1))
        other = trainer._pass(samples, torch.arange(3))
        assert other.attended is None and len(seen) == 1  # hooks of others are to hear of every step
        whole = trainer._tail(other, whole=True)
        assert len(seen) == 2
        hook.remove()
        before = {m: dict(vars(m)) for m in model.modules()}
        spared = trainer._tail(work)
        assert all(vars(m).keys() == kept.keys() for m, kept in before.items())
        assert all(vars(m).get("forward") is kept.get("forward") for m, kept in before.items())
    at = torch.nn.functional.pad(work.batch.target_mask[:, 1:], (0, 1))
    torch.testing.assert_close(spared[at], whole[at], **CLOSE)
    assert not torch.allclose(spared[~at], whole[~at])

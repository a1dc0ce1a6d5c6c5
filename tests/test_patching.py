"""patch, unpatch, status and the handle: what changes on a model, and that all of it can be taken back."""

import copy
import pickle

import pytest
import torch

import unike_kernels as uk
from tests.models_tiny import ALWAYS, MODELS, ROUTED, edits_for, inputs_for, make_model


@pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
@pytest.mark.parametrize("name", MODELS)
def test_edits_act_and_leave_no_trace(name, config):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    keys, base = list(model.state_dict()), model(**inputs).logits
    handle = uk.patch(model, edits_for(model, config, prompts=inputs))
    edited = model(**inputs).logits
    assert (edited - base).abs().amax(dim=(1, 2)).min() > 1e-2
    with handle.disabled():
        assert torch.equal(model(**inputs).logits, base)
    assert torch.equal(model(**inputs).logits, edited)
    with pytest.warns(UserWarning, match="save_pretrained"):
        assert list(model.state_dict()) == keys
    uk.unpatch(model)
    assert torch.equal(model(**inputs).logits, base)
    assert not uk.status(model)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copy_is_independent(copier):
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    base = model(**inputs).logits
    uk.patch(model, edits_for(model))
    edited = model(**inputs).logits
    twin = copier(model)
    assert torch.equal(twin(**inputs).logits, edited)
    uk.unpatch(twin)
    assert torch.equal(twin(**inputs).logits, base)
    assert torch.equal(model(**inputs).logits, edited)

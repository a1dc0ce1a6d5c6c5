"""Patched models that are copied, saved, loaded and moved."""

import copy
import io
import pickle

import pytest
import torch

import unike_kernels as uk
from tests.models_tiny import ROUTED, edits_for, inputs_for, make_model, text_inputs
from tests.test_patching import snapshot


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["llama", "blip2"])
def test_copy_is_independent(name, copier):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    base = model(**inputs).logits
    handle = uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
    handle.set_cases(case_positions=torch.tensor([1, 2]))
    with handle.disabled():  # nothing could switch the copy on again, so it is on
        twin = copier(model)
    handle.set_cases()
    edited = model(**inputs).logits
    own = uk.patching.PatchHandle.of(twin)
    assert torch.equal(twin(**inputs).logits, edited)
    own.swap(edits_for(make_model(name), ROUTED, prompts=inputs, seed=3))
    assert not torch.equal(twin(**inputs).logits, edited)
    assert torch.equal(model(**inputs).logits, edited)
    uk.unpatch(twin)
    assert torch.equal(twin(**inputs).logits, base) and snapshot(twin).keys() == snapshot(make_model(name)).keys()
    assert torch.equal(model(**inputs).logits, edited)
    with pytest.raises(ValueError, match="no patch named 'default' on this model; there are: none"):
        uk.patching.PatchHandle.of(twin)


def test_copy_after_a_pass_that_stopped_half_way():
    model = make_model("opt")
    inputs = inputs_for(model, [5, 3])
    handle = uk.patch(model, edits_for(model))
    expected = model(**inputs).logits

    def fail(module, args):
        raise KeyboardInterrupt

    hook = model.model.decoder.layers[3].fc2.register_forward_pre_hook(fail)  # between the FFN's two modules
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    hook.remove()
    twin = copy.deepcopy(model)  # a tensor of that pass could not be copied
    assert torch.equal(twin(**inputs).logits, expected) and torch.equal(model(**inputs).logits, expected)
    handle.remove()


def test_copy_made_while_a_prompt_goes_on_does_not_go_on():
    model = make_model("llama")
    with uk.patch(model, edits_for(model)).continuing("new"):
        twin = copy.deepcopy(model)
    cache = twin(**text_inputs([4])).past_key_values
    with pytest.raises(ValueError, match="whose case was already decided"):
        twin(**text_inputs([2]), past_key_values=cache)


def test_copy_of_a_part_takes_its_patch_along():
    model = make_model("blip2")
    inputs = text_inputs([5, 3])
    base = model.language_model(**inputs).logits
    uk.patch(model, edits_for(model))
    part = copy.deepcopy(model.language_model)
    assert torch.equal(part(**inputs).logits, model.language_model(**inputs).logits)
    assert len(uk.status(part)) == 8
    uk.unpatch(part)
    assert torch.equal(part(**inputs).logits, base)
    assert not torch.equal(model.language_model(**inputs).logits, base)


def test_torch_save_of_a_patched_model():
    model = make_model("opt")
    inputs = inputs_for(model, [5, 3])
    uk.patch(model, edits_for(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "blip2"])
def test_save_pretrained_writes_the_base_and_says_so_once(name, tmp_path):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    base = model(**inputs).logits
    model.save_pretrained(tmp_path / "clean")
    handle = uk.patch(model, edits_for(model))
    with pytest.warns(UserWarning, match="edits.save_pretrained") as caught:
        model.save_pretrained(tmp_path / "patched")
        model.save_pretrained(tmp_path / "again")
    assert len([w for w in caught if "carries edits" in str(w.message)]) == 1
    files = {p.name: p.read_bytes() for p in (tmp_path / "clean").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "patched").iterdir()}
    reloaded = type(model).from_pretrained(tmp_path / "patched")
    assert torch.equal(reloaded(**inputs).logits, base)
    handle.edits.save_pretrained(tmp_path / "edits")
    uk.patch(reloaded, uk.Edits.from_pretrained(tmp_path / "edits"))
    assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)


def test_base_checkpoint_loads_into_a_patched_model():
    model, other = make_model("opt"), make_model("opt", seed=1)
    inputs = inputs_for(model, [5, 3])
    checkpoint = other.state_dict()
    handle = uk.patch(model, edits_for(model))
    model.load_state_dict(checkpoint, strict=True)
    with handle.disabled():
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    handle.refresh()  # the memory's keys and values are the new weights' now
    with pytest.warns(UserWarning, match="other weights"):
        uk.patch(other, handle.edits)
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_changing_the_dtype_after_a_patch(name, dtype):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3, 4])
    edits = edits_for(model, ROUTED, prompts={k: v[:2] for k, v in inputs.items()})
    handle = uk.patch(model, edits)
    model.to(dtype)
    other = make_model(name, dtype=dtype)
    uk.patch(other, edits)
    logits, expected = model(**inputs).logits, other(**inputs).logits
    assert logits.dtype == dtype and {s.dtype for s in uk.status(model) if s.kind != "router"} == {str(dtype)[6:]}
    tolerance = 1e-5 if dtype == torch.float64 else 20 * torch.finfo(dtype).eps
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    for layer in handle.record.layers:
        stored = layer.shift.memory
        torch.testing.assert_close(
            stored.sem_norm, torch.linalg.vector_norm(stored.sem.to(stored.sem_norm.dtype), dim=1)
        )
        assert stored.sem_norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

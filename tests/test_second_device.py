"""A model that is not on the CPU: edits are made, saved, patched and measured where it lies; on a GPU too, if any."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only

import unike_kernels as uk
from tests.editing_tiny import TARGETS, ask, make_processor, make_requests, make_triplets, routed
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model
from tests.second_device import DEVICE, There, second_device
from unike_kernels.editing.editor import Editor
from unike_kernels.edits import Edits


@pytest.fixture(params=["second", pytest.param("cuda", marks=pytest.mark.gpu)])
def there(request):
    torch.set_num_threads(1)
    if request.param == "cuda":
        yield torch.device("cuda:0")
        return
    with second_device() as device:
        yield device


@pytest.mark.parametrize("there", ["second"], indirect=True)
def test_it_refuses_what_a_device_refuses(there):
    near, far = torch.randn(3, 4), torch.randn(3, 4).to(there)
    for call in (lambda: near + far, lambda: far @ near.T, lambda: near[torch.tensor([0]).to(there)]):
        with pytest.raises(RuntimeError, match="on lazy:0 and on the CPU"):
            call()
    with pytest.raises(TypeError, match="copy it to the CPU first"):
        far.numpy()
    with pytest.raises(RuntimeError, match="on lazy:0 and on the CPU"):
        torch.nn.Linear(4, 2).to(there)(near)


@pytest.mark.parametrize("there", ["second"], indirect=True)
def test_it_computes_what_the_cpu_computes(there):
    here = torch.nn.Linear(4, 2)
    far = torch.nn.Linear(4, 2, device=there)
    far.load_state_dict(here.state_dict())
    x = torch.randn(3, 4)
    (here(x) ** 2).sum().backward()
    (far(x.to(there)) ** 2).sum().backward()
    assert far.weight.grad.device == there
    torch.testing.assert_close(far.weight.grad.cpu(), here.weight.grad)
    far(x.to(there)).detach()[[0, 2]].mul_(torch.tensor(2.0))  # numbers, and lists that index, may come from anywhere
    assert torch.tensor([1, 2], device=there).tolist() == [1, 2] and isinstance(x.to(there)[0], There)


def moved(inputs, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["blip2", "llava", "llama"])
def test_edits_are_those_of_the_cpu_and_act_alike(name, there, tmp_path):
    requests, found, said = make_requests(name, 3), [], []
    inputs = inputs_for(make_model(name), [5, 7])
    for device in (torch.device("cpu"), there):
        model = make_model(name).to(device)
        editor = Editor(model, make_processor(name), routed(steps=5))
        editor.build_memory(make_triplets(name), progress=False)
        editor.fit(progress=False)
        editor.calibrate(make_triplets(name, 4, start=300), progress=False)
        edits = editor.edit(requests, progress=False)
        found.append(edits.named_tensors())
        edits.save_pretrained(tmp_path / device.type)
        loaded = Edits.from_pretrained(tmp_path / device.type)
        asked = moved(inputs, device)
        with torch.no_grad():
            base = model(**asked).logits
            with uk.patch(model, loaded, routing="always") as handle:
                logits = model(**asked).logits
                answers = model.generate(**asked, max_new_tokens=3, do_sample=False)
                told = str(handle.explain(**asked)[0])
                handle.swap(loaded.remove("e1"))
                fewer = model(**asked).logits
            with uk.patch(model, loaded, routing="routed"):
                model(**asked)
            assert torch.equal(model(**asked).logits, base) and not torch.equal(logits, base)
        assert logits.device == device
        said.append([base.cpu(), logits.cpu(), fewer.cpu(), answers.cpu(), told])
    assert found[0].keys() == found[1].keys() and all(t.device.type == "cpu" for t in found[1].values())
    for key, tensor in found[0].items():
        if there.type == "cuda" and not key.startswith(("shared.", "calibration.")):
            continue  # Adam follows the sign of a gradient near zero, and another order of sums turns it
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    torch.testing.assert_close(said[1][0], said[0][0], rtol=1e-3, atol=1e-3)
    if there == DEVICE:
        for here, far in zip(said[0][1:3], said[1][1:3], strict=True):
            torch.testing.assert_close(far, here, rtol=1e-3, atol=1e-3)
        assert torch.equal(said[0][3], said[1][3]) and said[0][4] == said[1][4]


def test_what_was_learned_is_saved_and_used_there(there, tmp_path):
    first, second = (Editor(make_model("blip2").to(there), make_processor("blip2"), routed(steps=5)) for _ in range(2))
    first.build_memory(make_triplets("blip2"), progress=False)
    first.fit(progress=False)
    first.save(tmp_path / "editor.safetensors")
    second.load(tmp_path / "editor.safetensors")
    edits = second.edit(make_requests("blip2", 1), progress=False)
    probes = [{"kind": "rel", **ask("blip2", "what is this ? answer :", 0), "target": TARGETS[-1]}]
    assert len(second.check(edits, probes).rows) == 1


def test_protocols_run_there(there):
    from tests.test_protocols import make_records
    from unike_kernels.evaluation import protocols
    from unike_kernels.evaluation.examiner import Examiner
    from unike_kernels.evaluation.unike import Unike

    editor = Editor(make_model("blip2").to(there), make_processor("blip2"), routed(steps=3))
    method = Unike(editor, routing="routed")
    method.fit(make_records(6, start=40))
    plan = protocols.plan("sequential", [make_records(4)], k=2, seed=0)
    results = list(protocols.run(plan, method, Examiner(editor.collator, batch_size=4)))
    assert [r.sequence for r in results] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["FT", "LoRA", "T-Patcher", "GRACE", "MEND", "KE", "SERAC, image-aware"])
def test_baselines_edit_there(name, there):
    pytest.importorskip("sklearn")
    from bench.quality.baselines import METHODS
    from tests.test_baselines import SMALL, requests, target_loss, training

    cls = METHODS[name]
    few = {key: min(value, 4) for key, value in SMALL[name].items() if "steps" in key}
    method = cls(make_model("blip2").to(there), make_processor("blip2"))
    method.config = dataclasses.replace(method.config, **SMALL[name] | few)
    method.fit(training("blip2", 8))
    (request,) = requests("blip2", 1)
    before = target_loss(method, request, None)
    with method.apply([request]) as edited:
        assert torch.isfinite(torch.tensor(target_loss(method, request, edited)))
    assert target_loss(method, request, None) == before


def split(model, device, first):
    """The layers from `first` on, the norm and the head are put on the device; what enters each follows it."""

    def follow(module, args, kwargs):
        move = partial(tree_map_only, torch.Tensor, lambda x: x.to(device))
        return move(args), move(kwargs)

    for module in (*model.model.layers[first:], model.model.norm, model.lm_head):
        module.to(device)
        module.register_forward_pre_hook(follow, with_kwargs=True)
    return model


@pytest.mark.parametrize("mode", ["always", "routed"])
def test_a_model_may_lie_on_two_devices(mode, there):
    """As with a device map: the router decides on the first edited layer's device, the last one lies elsewhere."""
    asked = inputs_for(make_model("llama"), [5, 7])
    edits = edits_for(make_model("llama"), ROUTED if mode == "routed" else ALWAYS, prompts=asked)
    said = []
    for model in (make_model("llama"), split(make_model("llama"), there, max(edits.layers))):
        with torch.no_grad():
            base = model(**asked).logits
        with torch.no_grad(), uk.patch(model, edits) as handle:
            logits = model(**asked).logits
            assert not torch.equal(logits, base)
            answers = model.generate(**asked, max_new_tokens=3, do_sample=False)
            said.append((logits.cpu(), answers.cpu(), str(handle.explain(**asked)[0])))
            assert logits.device == model.lm_head.weight.device
    torch.testing.assert_close(said[1][0], said[0][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(said[1][1], said[0][1]) and said[1][2] == said[0][2]


@pytest.mark.parametrize("mode", ["always", "routed"])
def test_edits_may_lie_where_the_model_does(mode, there):
    """All but the sizes of their groups, which stay where they were counted."""
    asked = inputs_for(make_model("llama"), [5, 7])
    edits = edits_for(make_model("llama"), ROUTED if mode == "routed" else ALWAYS, prompts=asked)
    said = []
    for model in (make_model("llama"), make_model("llama").to(there)):
        inputs = {name: value.to(model.device) for name, value in asked.items()}
        with uk.patch(model, edits), torch.no_grad():
            said.append(model(**inputs).logits.cpu())
        for part in (*edits.layers.values(), *edits.shared.values(), edits.calibration):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if field.name != "group_ptr":
                    setattr(part, field.name, tree_map_only(torch.Tensor, lambda t: t.to(there), value))
    # Native code, the reference and a GPU sum in another order each: they are up to 3.5e-5 apart.
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)

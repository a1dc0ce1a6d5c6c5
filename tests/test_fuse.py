"""mode="fuse": the same answers as mode="attach", one operator for an FFN, and nothing that is silently wrong."""

import copy
import pickle

import pytest
import torch
from kernel_tools import INTERPRETED, launches
from tolerance import assert_close_to_reference
from torch import nn

import unike_kernels as uk
from tests.models_tiny import MODELS, ROUTED, edits_for, inputs_for, make_model, skip_where_models_do_not_compile
from tests.test_patching import snapshot
from unike_kernels import ops
from unike_kernels.fused import refuse_unless_plain
from unike_kernels.models import find_decoder

every_model = pytest.mark.parametrize("name", MODELS)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of the operator had."""
    seen, operator = [], ops.augmented_ffn
    monkeypatch.setattr(ops, "augmented_ffn", lambda x, *a, **k: seen.append(x[..., 0].numel()) or operator(x, *a, **k))
    return seen


@every_model
def test_fuse_equals_attach(name, calls):
    model, wide = make_model(name), make_model(name, dtype=torch.float64)
    inputs = inputs_for(model, [5, 3])
    edits = edits_for(model)
    base = logits(model, inputs)
    with uk.patch(model, edits):
        attached = logits(model, inputs)
        assert not calls
    with uk.patch(wide, edits.to(dtype=torch.float64)):
        exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        truth = logits(wide, exact)
    with uk.patch(model, edits, mode="fuse") as handle:
        found = logits(model, inputs)
        assert len(calls) == 4  # one for every edited layer
        assert_close_to_reference(found, truth, attached, 2)
        assert not torch.equal(found, base)
        with handle.disabled():
            assert torch.equal(logits(model, inputs), base)
        assert len(calls) == 4
    assert torch.equal(logits(model, inputs), base)


@every_model
def test_routed_edits_are_those_of_attach(name, calls):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    edits = edits_for(model, ROUTED, prompts=inputs)
    with uk.patch(model, edits):
        expected = logits(model, inputs)
    with uk.patch(model, edits, mode="fuse"):
        assert torch.equal(logits(model, inputs), expected)
    assert not calls


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_generation_gives_the_same_tokens(name, calls):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    with uk.patch(model, edits_for(model)):
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with uk.patch(model, edits_for(model), mode="fuse"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)
    assert len(calls) >= 4 and min(calls) == 2  # decoding: one row for each of two sequences


@pytest.mark.skipif(not INTERPRETED, reason="a CPU model; the interpreter only")
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_with_the_kernels(name):
    model = make_model(name)
    inputs = inputs_for(model, [3])
    with uk.patch(model, edits_for(model), mode="fuse", backend="reference"):
        expected = logits(model, inputs)
    with uk.patch(model, edits_for(model), mode="fuse", backend="triton"), launches() as counted:
        found = logits(model, inputs)
    assert sum(n for kernel, n in counted.items() if kernel.startswith("augmented_ffn")) == 8  # two for each layer
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_many_rows_and_gradients_are_left_to_attach(name, calls):
    model = make_model(name)
    edits = edits_for(model)
    many = inputs_for(model, [40, 30])
    few = inputs_for(model, [4])
    with uk.patch(model, edits):
        expected = logits(model, many)
        loss = model(**few).logits.square().sum()
        loss.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with uk.patch(model, edits, mode="fuse"):
        assert torch.equal(logits(model, many), expected)
        model(**few).logits.square().sum().backward()
        assert not calls
        for key, gradient in gradients.items():
            assert torch.equal(model.get_parameter(key).grad, gradient), key
        logits(model, few)  # and it fuses again
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_swap_copies_and_pickles(name):
    model = make_model(name)
    inputs = inputs_for(model, [4])
    first, second = edits_for(model), edits_for(model, seed=5)
    with uk.patch(model, second, mode="fuse"):
        expected = logits(model, inputs)
    handle = uk.patch(model, first, mode="fuse", max_neurons=20)
    before = logits(model, inputs)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.swap(second)
    torch.testing.assert_close(logits(model, inputs), expected)
    for other in (twin, loaded):
        torch.testing.assert_close(logits(other, inputs), before)
        uk.PatchHandle.of(other).remove()
        assert all("forward" not in vars(module) for module in other.modules())
    assert len(uk.status(model)) and {s.mode for s in uk.status(model)} == {"fuse"}
    handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_base_keeps_its_keys_and_its_tensors():
    model = make_model("llama")
    keys, pointers = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    with uk.patch(model, edits_for(model), mode="fuse"), pytest.warns(UserWarning, match="carries edits"):
        assert list(model.state_dict()) == keys
        assert [p.data_ptr() for p in model.parameters()] == pointers


class Other(nn.Linear):
    """Looks like an nn.Linear, and need not compute what one does."""


def another_class(model, mlp):
    old = getattr(*mlp("up_proj", "fc1"))
    new = Other(old.in_features, old.out_features, bias=old.bias is not None)
    setattr(*mlp("up_proj", "fc1"), new)


def a_hook(model, mlp):
    getattr(*mlp("down_proj", "fc2")).register_forward_hook(lambda *a: None)


def another_forward(model, mlp):
    module = getattr(*mlp("down_proj", "fc2"))
    vars(module)["forward"] = lambda x: nn.Linear.forward(module, x) * 2


def offloaded(model, mlp):
    getattr(*mlp("down_proj", "fc1"))._hf_hook = object()


REFUSED = {
    another_class: "is a Other, not an nn.Linear",
    a_hook: "has forward hooks",
    another_forward: "already has a forward of its own",
    offloaded: "is offloaded or dispatched by accelerate",
}


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("spoil", REFUSED)
def test_what_is_not_plain_is_refused_by_name(name, spoil):
    model = make_model(name)
    edits = edits_for(model)
    layer = model.model.layers[2] if name == "llama" else model.model.decoder.layers[2]

    def mlp(gated, plain):
        return (layer.mlp, gated) if name == "llama" else (layer, plain)

    spoil(model, mlp)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"mode='fuse' cannot take layer 2: layers\.2\..* {REFUSED[spoil]}"):
        uk.patch(model, edits, mode="fuse")
    assert snapshot(model) == before
    uk.patch(model, edits)  # attach takes it


def test_a_default_device_does_not_matter():
    model = make_model("llama")
    with torch.device("meta"):
        refuse_unless_plain(model, find_decoder(model).layers[2], 2)


def test_another_formula_is_refused():
    model = make_model("llama")
    mlp = model.model.layers[3].mlp

    class Scaled(type(mlp)):
        def forward(self, x):
            return 1.5 * super().forward(x)

    mlp.__class__ = Scaled
    with pytest.raises(ValueError, match=r"layer 3: layers\.3\.mlp computes something else than down\(silu"):
        uk.patch(model, edits_for(model), mode="fuse")


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("modes", [("attach", "fuse"), ("fuse", "attach")])
def test_two_patches(name, modes):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    one, two = edits_for(model), edits_for(model, seed=5)
    base = logits(model, inputs)
    with uk.patch(model, one, name="one"), uk.patch(model, two, name="two"):
        expected = logits(model, inputs)
    with uk.patch(model, one, name="one", mode=modes[0]), uk.patch(model, two, name="two", mode=modes[1]):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, inputs), base)
    with uk.patch(model, one, name="one", mode="fuse"), pytest.raises(ValueError, match="another fused patch"):
        uk.patch(model, two, name="two", mode="fuse")


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_what_changes_later_is_noticed(name, calls):
    """A hook or another module put in after the patch: the base modules run again, with all that is on them."""
    model = make_model(name)
    inputs = inputs_for(model, [4])
    edits = edits_for(model)
    layer = model.model.layers[2] if name == "llama" else model.model.decoder.layers[2]
    linear = layer.mlp.down_proj if name == "llama" else layer.fc2

    def double(module, args, output):
        return 2 * output

    hook = linear.register_forward_hook(double)
    with uk.patch(model, edits):
        expected = logits(model, inputs)
    hook.remove()
    with uk.patch(model, edits, mode="fuse"):
        with_fuse = logits(model, inputs)
        assert len(calls) == 4
        hook = linear.register_forward_hook(double)
        if name == "llama":  # the order of the hooks on fc2 itself differs: neurons first, then doubled
            torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
        else:
            assert not torch.equal(logits(model, inputs), with_fuse)
        assert len(calls) == 4 + 3
        hook.remove()
        torch.testing.assert_close(logits(model, inputs), with_fuse)


def part(model, gated, plain):
    """A module of an edited layer's FFN."""
    return (
        getattr(model.model.layers[2].mlp, gated)
        if hasattr(model.model, "layers")
        else getattr(model.model.decoder.layers[2], plain)
    )


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_hooks_on_the_activation_are_refused_and_noticed(name, calls):
    model = make_model(name)
    inputs, edits = inputs_for(model, [4]), edits_for(model)

    def watch():
        return part(model, "act_fn", "activation_fn").register_forward_hook(lambda module, args, output: 2 * output)

    hook = watch()
    with pytest.raises(ValueError, match=r"layer 2: layers\.2\..*act.* has forward hooks"):
        uk.patch(model, edits, mode="fuse")
    with uk.patch(model, edits):
        expected = logits(model, inputs)
    hook.remove()
    with uk.patch(model, edits, mode="fuse"):
        hook = watch()
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    hook.remove()
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_forward_replaced_later_and_autocast_take_the_modules(name, calls):
    model, found = make_model(name), {}
    inputs, edits = inputs_for(model, [4]), edits_for(model)
    linear = part(model, "up_proj", "fc2")
    for mode in ("attach", "fuse"):
        with uk.patch(model, edits, mode=mode), torch.autocast("cpu", torch.bfloat16):
            found[mode] = logits(model, inputs)
    assert torch.equal(found["fuse"], found["attach"]) and not calls
    for mode in ("attach", "fuse"):
        with uk.patch(model, edits, mode=mode):
            vars(linear)["forward"] = lambda x: 2 * nn.Linear.forward(linear, x)
            found[mode] = logits(model, inputs)
        vars(linear).pop("forward", None)
    torch.testing.assert_close(found["fuse"], found["attach"], rtol=1e-4, atol=1e-5)
    assert len(calls) == 3


def test_an_activation_in_place_does_not_write_to_the_input(calls):
    model = make_model("opt")
    inputs, edits = inputs_for(model, [4]), edits_for(model)
    for layer in model.model.decoder.layers:
        layer.activation_fn = nn.ReLU(inplace=True)
    with uk.patch(model, edits):
        expected = logits(model, inputs)
    with uk.patch(model, edits, mode="fuse"):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


def test_another_formula_is_refused_in_bfloat16():
    model = make_model("llama", dtype=torch.bfloat16)
    mlp = model.model.layers[3].mlp

    class Scaled(type(mlp)):
        def forward(self, x):
            return 1.1 * super().forward(x)

    uk.patch(model, edits_for(model), mode="fuse").remove()
    mlp.__class__ = Scaled
    with pytest.raises(ValueError, match=r"layers\.3\.mlp computes something else"):
        uk.patch(model, edits_for(model), mode="fuse")


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_nothing_is_left_below_a_forward_that_was_put_around(name):
    """As accelerate does it: the forward that was there stays as `_old_forward`, and comes back with its hook's end."""
    model = make_model(name)
    inputs = inputs_for(model, [4])
    base, handle = logits(model, inputs), uk.patch(model, edits_for(model), mode="fuse")
    module = model.model.layers[2].mlp if name == "llama" else part(model, "", "fc2")
    module._old_forward = module.forward
    module.forward = lambda *args: module._old_forward(*args)
    assert not torch.equal(logits(model, inputs), base)
    handle.remove()
    assert torch.equal(logits(model, inputs), base)
    module.forward = module._old_forward
    assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_compiles_in_one_graph(name):
    skip_where_models_do_not_compile()
    torch._dynamo.reset()
    model = make_model(name, layers=2)
    inputs = inputs_for(model, [5, 3])
    uk.patch(model, edits_for(model, layers=(1,)), mode="fuse")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, logits(model, inputs))

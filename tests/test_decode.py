"""The decode step of a patched model: what it adds to the base's, that it reads no value, and that a graph follows."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import StaticCache

import unike_kernels as uk
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model, row_of
from unike_kernels.cases import as_if_capturing

CONFIGS = {
    "always": ALWAYS,
    "routed": ROUTED,
    "fixed": replace(ROUTED, shift=replace(ROUTED.shift, alpha=0.3)),
    "causal": replace(ROUTED, shift=replace(ROUTED.shift, positions="from_case_token")),
}
LAYERS = 4  # edited
READS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
# Views, and what hands out memory without a kernel.
FREE = ("view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "slice", "select", "detach", "alias")
FREE += (
    "transpose",
    "t",
    "permute",
    "unbind",
    "split",
    "as_strided",
    "unflatten",
    "empty",
    "lift_fresh",
    "_reshape_alias",
)


def name_of(func):
    return (
        func.overloadpacket.__name__
        if func.namespace == "aten"
        else f"{func.namespace}::{func.overloadpacket.__name__}"
    )


class Counting(TorchDispatchMode):
    """Counts what would be a kernel; an operator of ours is one, whatever it consists of."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = name_of(func)
        if name not in FREE:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """What a CUDA graph does: keeps every operator with the very tensors it saw, and runs them again without Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert name_of(func) not in READS, f"{func} cannot be captured"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)

                # Into the same memory. Views are the same memory already; so is what an operator wrote in place.
                def put(old, new):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

                olds, news = [], []
                tree_map_only(torch.Tensor, olds.append, out)
                tree_map_only(torch.Tensor, news.append, again)
                for old, new in zip(olds, news, strict=True):
                    put(old, new)


def patched(name, config, *, dtype=torch.float64, rows=(6, 6, 6), **options):
    model = make_model(name, dtype=dtype)
    inputs = inputs_for(model, rows)
    prompts = {k: v[:2] for k, v in inputs.items()}
    return model, inputs, uk.patch(model, edits_for(model, config, prompts=prompts), **options)


def decode_step(model, inputs):
    """Runs a prompt, and returns a call of its next decode step."""
    cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(inputs["input_ids"]), 1).long()], dim=1)
    token = torch.full((len(mask), 1), 7)
    return lambda: model(input_ids=token, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_two_operators_for_each_edited_layer(name, config):
    """One for the neurons, one for the shift, and nothing beside them: no projection runs twice."""
    model, inputs, handle = patched(name, CONFIGS[config])
    with torch.no_grad():
        counts = []
        for off in (False, True):
            step = decode_step(model, inputs) if not off else None
            with handle.disabled() if off else as_if_capturing():
                step = decode_step(model, inputs) if off else step
                with Counting() as counting:
                    step()
                counts.append(counting.seen)
    more = counts[0] - counts[1]
    assert more.pop("unike::extra_neurons_") == LAYERS
    assert more.pop("unike::knowledge_shift") == LAYERS
    assert not counts[1] - counts[0]  # nothing of the base is left out
    assert sum(more.values()) <= 6, more  # once per pass, whose cases they find: none belongs to a layer


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["opt", "llama", "qwen3", "olmo2"])
def test_mixing_before_the_projection_equals_mixing_behind_it(name, config, monkeypatch):
    model, inputs, _ = patched(name, CONFIGS[config])
    with torch.no_grad():
        before = decode_step(model, inputs)()
        monkeypatch.setattr("unike_kernels.modules.KnowledgeShift.mix", lambda self, *args: None)
        behind = decode_step(model, inputs)()
    torch.testing.assert_close(before, behind, rtol=1e-5, atol=1e-6)  # LLaMA's norms compute in float32


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_decoding_reads_no_value(name, config):
    model, inputs, handle = patched(name, CONFIGS[config])
    with torch.no_grad():
        expected = decode_step(model, inputs)()
        with handle.disabled():
            step = decode_step(model, inputs)
            with Counting() as base:
                step()
        step = decode_step(model, inputs)
        with as_if_capturing(), Counting() as ours:
            logits = step()
        assert torch.equal(logits, expected)
    for read in READS:  # transformers itself looks whether its mask hides anything
        assert ours.seen[read] == base.seen[read], read


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_what_others_keep_of_an_ffn_is_not_written_to(name):
    model, inputs, _ = patched(name, ALWAYS)
    layers = model.model.decoder.layers if name == "opt" else model.model.layers
    last, kept = layers[2].fc2 if name == "opt" else layers[2].mlp.down_proj, []
    with torch.no_grad():
        step = decode_step(model, inputs)
        last.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())), prepend=True)
        step()
    assert len(kept) == 1 and torch.equal(*kept[0])


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_what_hooks_on_all_modules_keep_is_not_written_to(name):
    model, inputs, _ = patched(name, ALWAYS)
    last, kept = next(m for n, m in model.named_modules() if n.endswith(("layers.2.fc2", "layers.2.mlp.down_proj"))), []

    def keep(module, args, out):
        if module is last:
            kept.append((out, out.clone()))

    with torch.no_grad():
        step = decode_step(model, inputs)
        hook = torch.nn.modules.module.register_module_forward_hook(keep)
        try:
            step()
        finally:
            hook.remove()
    assert len(kept) == 1 and torch.equal(*kept[0])


class Stepping:
    """Static decoding as a server does it: one cache, one token buffer, one captured step."""

    def __init__(self, model):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=24)
        self.token = torch.zeros(1, 1, dtype=torch.long)

    def prefill(self, inputs):
        self.cache.reset()
        return self.model(**inputs, past_key_values=self.cache).logits[:, -1]

    def step(self):
        return self.model(input_ids=self.token, past_key_values=self.cache).logits[:, -1]


def eager(model, inputs, tokens):
    """Logits of a prompt's decode steps on a cache of its own."""
    run = Stepping(model)
    run.prefill(inputs)
    out = []
    for token in tokens:
        run.token.fill_(token)
        out.append(run.step().clone())
    return out


@pytest.mark.parametrize("config", CONFIGS)
def test_recorded_step_follows_swaps_and_new_cases(config):
    model, inputs, handle = patched("llama", CONFIGS[config])
    first, rows = handle.edits, [row_of(inputs, i) for i in range(3)]
    second = edits_for(model, CONFIGS[config], prompts={k: v[:2] for k, v in inputs.items()}, seed=5)
    tokens = (9, 8, 7)
    with torch.no_grad():
        run = Stepping(model)
        run.prefill(rows[0])
        with as_if_capturing(), Recorder() as recorder:
            logits = run.step()
        seen = []
        for edits in (first, second, first):
            handle.swap(edits)
            for row in rows:
                expected = eager(model, row, tokens)
                run.prefill(row)
                for token, wanted in zip(tokens, expected, strict=True):
                    run.token.fill_(token)
                    recorder.replay()
                    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
                seen.append(logits.clone())
    # Edits and cases do say different things, or all of the above would hold of any graph.
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[3])
    assert torch.equal(seen[0], seen[6])


class NamedStepping(Stepping):
    """The same, with its cases named by hand: the step's index tensors stay where they are."""

    def __init__(self, model, handle, device="cpu"):
        super().__init__(model)
        self.handle, self.token = handle, self.token.to(device)
        self.owner, self.decided = torch.zeros(1, device=device).long(), torch.full((1,), -1, device=device)

    def prefill(self, inputs):
        length = inputs["input_ids"].numel()
        owner = self.owner.expand(length).contiguous()
        self.handle.set_cases(owner, torch.full_like(self.owner, length - 1))
        super().prefill(inputs)
        self.handle.set_cases(self.owner, self.decided)


def follow_named_cases(run, replay, logits, rows, tokens=(9, 8, 7)):
    """Replays of a step that was captured with named cases, against steps that run; -1 names what a prefill decided."""
    for row in rows:
        run.prefill(row)
        wanted = []
        for token in tokens:
            run.token.fill_(token)
            wanted.append(run.step().clone())
        run.prefill(row)
        for token, expected in zip(tokens, wanted, strict=True):
            run.token.fill_(token)
            replay()
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        run.handle.set_cases(run.owner, run.decided)  # after a replay, too, the case is one that was decided


@pytest.mark.parametrize("config", CONFIGS)
def test_recorded_step_of_named_cases(config):
    model, inputs, handle = patched("llama", CONFIGS[config])
    rows = [row_of(inputs, i) for i in range(3)]
    with torch.no_grad():
        run = NamedStepping(model, handle)
        run.prefill(rows[0])
        with as_if_capturing(), Recorder() as recorder:
            logits = run.step()
        follow_named_cases(run, recorder.replay, logits, rows)


def captured(step):
    """A CUDA graph of the step, which has run twice before on a stream of its own, and the logits that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return graph, logits


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_cuda_graph_of_named_cases(config):
    model, inputs, handle = patched("llama", CONFIGS[config], dtype=torch.float32)
    model.cuda()
    rows = [{k: v.cuda() for k, v in row_of(inputs, i).items()} for i in range(3)]
    with torch.no_grad():
        run = NamedStepping(model, handle, "cuda")
        run.prefill(rows[0])
        graph, logits = captured(run.step)
        follow_named_cases(run, graph.replay, logits, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_cuda_graph_follows_swaps_and_new_cases(config):
    model, inputs, handle = patched("llama", CONFIGS[config], dtype=torch.float32)
    second = edits_for(model, CONFIGS[config], prompts={k: v[:2] for k, v in inputs.items()}, seed=5)
    first = handle.edits
    model.cuda()
    rows = [{k: v.cuda() for k, v in row_of(inputs, i).items()} for i in range(3)]

    def fresh():
        run = Stepping(model)
        run.token = run.token.cuda()
        return run

    with torch.no_grad():
        run = fresh()
        run.prefill(rows[0])
        graph, logits = captured(run.step)
        for edits in (first, second, first):
            handle.swap(edits)
            for row in rows:
                other = fresh()
                other.prefill(row)
                run.prefill(row)
                for token in (9, 8, 7):
                    other.token.fill_(token)
                    run.token.fill_(token)
                    wanted = other.step()
                    graph.replay()
                    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "from_case_token"])
@pytest.mark.parametrize("alpha", [None, 0.3], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("attention", ["projected", "raw"])
def test_decoding_tokens_retrieve_by_themselves(attention, alpha, positions, monkeypatch):
    """In few launches as with masks over what was found; a row that decodes padding is left alone."""
    shift = replace(ALWAYS.shift, per="token", attention=attention, alpha=alpha, positions=positions)
    model, inputs, handle = patched("llama", replace(ALWAYS, shift=shift))
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1], [1], [0]])], dim=1)
    token = torch.full((3, 1), 7)

    def step():
        cache = model(**inputs, use_cache=True).past_key_values
        return model(input_ids=token, attention_mask=mask, past_key_values=cache).logits

    with torch.no_grad():
        found = step()
        monkeypatch.setattr("unike_kernels.modules.FEW_TOKENS", 0)
        torch.testing.assert_close(found, step(), rtol=1e-9, atol=1e-9)
        with handle.disabled():
            assert (found - step())[:2].abs().amax(dim=(1, 2)).min() > 1e-3


def test_recorded_step_with_retrieval_per_token_follows_swaps():
    shift = replace(ALWAYS.shift, per="token", alpha=0.3)
    model, inputs, handle = patched("llama", replace(ALWAYS, shift=shift))
    second = edits_for(model, handle.record.config, prompts={k: v[:2] for k, v in inputs.items()}, seed=5)
    with torch.no_grad():
        run = Stepping(model)
        run.prefill(row_of(inputs, 0))
        with as_if_capturing(), Recorder() as recorder:
            logits = run.step()
        for edits in (handle.edits, second):
            handle.swap(edits)
            expected = eager(model, row_of(inputs, 1), (9, 8))
            run.prefill(row_of(inputs, 1))
            for token, wanted in zip((9, 8), expected, strict=True):
                run.token.fill_(token)
                recorder.replay()
                torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)


def test_named_cases_that_were_overwritten_are_looked_at_again():
    shift = replace(ALWAYS.shift, per="token", alpha=0.3)
    model, inputs, handle = patched("llama", replace(ALWAYS, shift=shift))
    row = row_of(inputs, 0)
    tokens = row["input_ids"].shape[1]
    owner, at = torch.zeros(tokens, dtype=torch.long), torch.tensor([tokens - 1])
    with torch.no_grad():
        handle.set_cases(owner, at)
        model(**row, use_cache=False)
        handle.set_cases(owner, torch.tensor([-1]))  # goes on
        acting = model(**row, use_cache=False).logits
        owner.fill_(-1)
        idle = model(**row, use_cache=False).logits
        handle.set_cases(owner.clone(), torch.tensor([-1]))
        torch.testing.assert_close(model(**row, use_cache=False).logits, idle, rtol=1e-9, atol=1e-9)
    assert (idle - acting).abs().max() > 1e-3

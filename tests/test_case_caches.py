"""What was decided at case tokens goes on in KV caches: from pass to pass, row to row, copied, reset and refused."""

import contextlib
import copy
import pickle
import warnings
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import ModelOutput

import unike_kernels as uk
from tests.case_passes import (
    CLOSE,
    CONFIGS,
    GREEDY,
    assert_same_decisions,
    decisions,
    patched,
    rows_of_decisions,
    steps,
)
from tests.models_tiny import ALWAYS, ROUTED, row_of, text_inputs
from unike_kernels import memory, routing
from unike_kernels.caches import CACHE_NAMES, decisions_on
from unike_kernels.cases import as_if_capturing


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.mark.parametrize("name", ["opt", "llama", "llava"])
def test_decided_once_per_case(name, config, monkeypatch):
    model, inputs, handle = patched(name, config)
    calls = []
    for module, what in ((memory, "search"), (routing, "route")):
        real = module.ops.cosine_topk

        class Counting:
            def __init__(self, real, what):
                self.real, self.what = real, what

            def cosine_topk(self, q, *args, **kwargs):
                calls.append((self.what, len(q)))
                return self.real(q, *args, **kwargs)

        monkeypatch.setattr(module, "ops", Counting(real, what))
    model.generate(**inputs, **GREEDY)
    routed = [("route", 3)] * 2 if config.routing.mode == "routed" else []  # among the edits, among the training cases
    assert sorted(calls) == sorted(routed + [("search", 3)] * 4)  # 4 edited layers, 3 cases, 6 tokens decoded


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_sequences_that_take_turns_equal_separate_runs(name, config):
    model, inputs, _ = patched(name, config)
    a, b = row_of(inputs, 0), row_of(inputs, 1)
    alone = [list(steps(model, a)), list(steps(model, b))]
    turns = list(zip(steps(model, a), steps(model, b), strict=True))  # prefill A, prefill B, decode A, decode B, ...
    for i, (step_a, step_b) in enumerate(turns):
        assert torch.equal(step_a, alone[0][i]) and torch.equal(step_b, alone[1][i])
    assert not torch.equal(alone[0][1], alone[1][1])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copied_cache_goes_on(copier, config):
    model, inputs, _ = patched("llama", config)
    with torch.no_grad():
        cache, expected = DynamicCache(), list(steps(model, inputs))
        run = steps(model, inputs, cache)
        first = next(run)
        twin = copier(cache)
        model(**text_inputs([5, 5]))  # another case in between
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1).long()], dim=1)
        out = model(input_ids=first.argmax(-1)[:, None], attention_mask=mask, past_key_values=twin)
        assert torch.equal(out.logits[:, -1], expected[1])
        assert torch.equal(next(run), expected[1])  # the original goes on as well


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_static_cache_is_reused_for_another_sequence(name, config):
    model, inputs, _ = patched(name, config, rows=(7, 7, 7))
    rows = [row_of(inputs, i) for i in range(3)]
    with torch.no_grad():
        expected = [list(steps(model, row)) for row in rows]
        cache = StaticCache(config=model.config, max_cache_len=16)
        for row, steps_alone in zip(rows, expected, strict=True):
            cache.reset()
            for ours, theirs in zip(steps(model, row, cache), steps_alone, strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("named", [False, True])
def test_storage_that_inference_mode_made_is_decided_into_without_it(named):
    """What a captured graph reads: of a static cache that is reset, and of named cases."""
    model, inputs, handle = patched("llama", ROUTED, rows=(7, 7))
    tracker = handle.record.runtime.tracker
    cache = None if named else StaticCache(config=model.config, max_cache_len=16)
    if cache is not None:
        cache.early_initialization(batch_size=1, num_heads=2, head_dim=4, dtype=torch.float64, device="cpu")
    alphas = []
    for mode, row in ((torch.inference_mode, 0), (torch.no_grad, 1)):
        with mode():
            if cache is None:
                handle.set_cases(case_ptr=torch.tensor([0, 7]))
            else:
                cache.reset()
            model(**row_of(inputs, row), past_key_values=cache)
            alphas.append(tracker.current.state.layers[3].alpha)
    assert alphas[0] is alphas[1]


@pytest.mark.parametrize("name", ["opt", "llama", "blip2"])
def test_static_cache_in_generate(name, config):
    model, inputs, _ = patched(name, config)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


ROWS = {
    "reorder_cache": torch.tensor([2, 0, 1]),
    "batch_select_indices": torch.tensor([2, 0]),
    "batch_repeat_interleave": 2,
    "a mask": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("copier", [lambda c: c, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("how", ROWS)
def test_decisions_follow_the_rows_of_a_cache(how, copier, config):
    model, inputs, _ = patched("llama", config, rows=(7, 7, 7))
    rows = torch.arange(3).repeat_interleave(2) if isinstance(ROWS[how], int) else torch.arange(3)[ROWS[how]]
    method = "batch_select_indices" if how == "a mask" else how
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(**inputs, past_key_values=cache)
        expected = model(input_ids=torch.full((3, 1), 5), past_key_values=copy.deepcopy(cache)).logits
        twin = copier(cache)
        getattr(twin, method)(ROWS[how])
        ours = model(input_ids=torch.full((len(rows), 1), 5), past_key_values=twin).logits
        torch.testing.assert_close(ours, expected[rows], **CLOSE)
        if twin is not cache:
            assert torch.equal(model(input_ids=torch.full((3, 1), 5), past_key_values=cache).logits, expected)
    gone = weakref.ref(cache)
    del cache, twin
    assert gone() is None  # nothing about it makes it wait for the collection of garbage


def test_decisions_follow_the_rows_of_a_static_cache(config):
    model, inputs, handle = patched("llama", config, rows=(7, 7, 7))
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(**inputs, past_key_values=cache)
        token = {"input_ids": torch.full((3, 1), 5), "past_key_values": cache}
        before, alpha = model(**token).logits, decisions_on(cache, handle.record.name).layers[3].alpha
        cache.reset()
        model(**inputs, past_key_values=cache)
        cache.reorder_cache(ROWS["reorder_cache"])
        torch.testing.assert_close(model(**token).logits, before[ROWS["reorder_cache"]], **CLOSE)
        assert decisions_on(cache, handle.record.name).layers[3].alpha is alpha  # a captured graph reads there


def test_beams_of_one_case_go_on_with_the_same_decision():
    model, inputs, handle = patched("llama", ROUTED, rows=(7, 7))
    cache = model(**{k: t.repeat_interleave(2, dim=0) for k, t in inputs.items()}).past_key_values
    state = decisions_on(cache, handle.record.name)
    cache.reorder_cache(torch.tensor([1, 1, 3, 2]))
    assert decisions_on(cache, handle.record.name) is state
    cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
    assert decisions_on(cache, handle.record.name) is not state


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_a_mask_over_all_columns_of_a_cache_equals_one_that_grows(kind, side, config):
    """transformers reads column i as position i, so what is still to come stands behind this pass's columns."""
    model, inputs, _ = patched("llama", config, side=side)
    ids, given = inputs["input_ids"], inputs["attention_mask"]
    rows, length = given.shape

    def logits(width, asked):
        options = {"max_cache_len": 16} if kind is StaticCache else {}
        cache, mask = kind(config=model.config, **options), given
        for step in range(3):
            wide = torch.nn.functional.pad(mask, (0, max(0, width - mask.shape[1])))
            tokens = ids if step == 0 else torch.full((rows, 1), 4 + step)
            with contextlib.nullcontext() if asked or step == 0 else as_if_capturing():
                yield model(input_ids=tokens, attention_mask=wide, past_key_values=cache).logits
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)

    with torch.no_grad():
        expected = list(logits(0, True))
        for asked in (True, False):
            for ours, theirs in zip(logits(16, asked), expected, strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)


def test_outputs_are_not_asked_for_an_older_name_of_their_cache(monkeypatch):
    def refuse(self):
        raise RuntimeError("this name warns")

    model, inputs, _ = patched("llama", ROUTED)
    if hasattr(ModelOutput, CACHE_NAMES[1]):  # transformers 5.24 and newer give such outputs both names
        monkeypatch.setattr(ModelOutput, CACHE_NAMES[1], property(refuse))
    for use_cache in (True, False):
        model(**row_of(inputs, 0), use_cache=use_cache)


def test_cache_prefilled_without_the_patch_is_refused():
    model, inputs, handle = patched("llama", ROUTED)
    one = row_of(inputs, 0)
    token = {"input_ids": torch.tensor([[5]])}
    with handle.disabled():
        cache = model(**one, use_cache=True).past_key_values
        model(**token, past_key_values=cache)
    with pytest.raises(ValueError, match="ran without this patch"):
        model(**token, past_key_values=cache)
    handle.remove()
    cache = model(**one, use_cache=True).past_key_values
    handle = uk.patch(model, handle.edits)
    with pytest.raises(ValueError, match="ran without this patch"):
        model(**token, past_key_values=cache)
    assert cache.get_seq_length() == 7  # refused before anything was added
    with handle.disabled():
        model(**token, past_key_values=cache)


def test_reset_cache_that_was_prefilled_without_the_patch_keeps_no_older_decision():
    model, inputs, handle = patched("llama", ROUTED)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(**row_of(inputs, 0), past_key_values=cache)
        cache.reset()
        with handle.disabled():
            model(**row_of(inputs, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="ran without this patch"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_reset_cache_whose_prefill_failed_keeps_no_older_decision():
    model, inputs, _ = patched("llama", ROUTED)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(**row_of(inputs, 0), past_key_values=cache)
        cache.reset()

        def fail(module, args):
            raise KeyboardInterrupt

        hook = model.model.layers[3].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**row_of(inputs, 1), past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="ran without this patch"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


class PagedCache:
    """What transformers' continuous batching brings: a cache of many requests, without get_seq_length."""

    def update(self, keys, values, layer, **rest):
        return keys, values


def test_a_cache_that_does_not_say_its_length_is_refused():
    model, inputs, handle = patched("llama", ROUTED)
    one = {"input_ids": row_of(inputs, 0)["input_ids"], "position_ids": torch.arange(7)[None], "use_cache": False}
    one["attention_mask"] = torch.zeros(1, 1, 7, 7)
    with pytest.raises(ValueError, match=r"PagedCache does not say how many tokens .* use model.generate"):
        model(**one, past_key_values=PagedCache())
    with handle.disabled():
        model(**one, past_key_values=PagedCache())


def test_switching_off_for_some_tokens_keeps_the_case():
    model, inputs, handle = patched("llama", ROUTED)
    cache = model(**row_of(inputs, 0), use_cache=True).past_key_values
    found = decisions(handle)
    with handle.disabled():
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    model(input_ids=torch.tensor([[6]]), past_key_values=cache)
    assert_same_decisions(decisions(handle), found)


def test_several_tokens_on_a_used_cache_are_refused_or_told_apart(config):
    model, inputs, handle = patched("llama", config, rows=(7, 7, 7))
    tracker = handle.record.runtime.tracker
    whole = row_of(inputs, 0)
    head, tail = whole["input_ids"][:, :4], whole["input_ids"][:, 4:]
    with torch.no_grad():
        cache = model(input_ids=head, use_cache=True).past_key_values
        of_head = decisions(handle)
        with pytest.raises(ValueError, match="a pass of 3 tokens on a KV cache whose case was already decided"):
            model(input_ids=tail, past_key_values=cache)
        assert cache.get_seq_length() == 4  # refused before anything was added
        with handle.continuing("keep"):
            model(input_ids=tail, past_key_values=copy.deepcopy(cache))
        assert_same_decisions(decisions(handle), of_head)
        with handle.continuing("new"):
            model(input_ids=tail, past_key_values=cache)
            assert tracker.current.case_tokens.tolist() == [2]
            of_tail = decisions(handle)
            model(input_ids=tail[:, :1], past_key_values=cache)
        assert_same_decisions(decisions(handle), of_tail)  # one token decodes: its case is kept
    with pytest.raises(ValueError, match="how must be one of 'refuse', 'keep', 'new'"), handle.continuing("on"):
        pass


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_prompt_that_ended_in_an_earlier_chunk_keeps_its_decision(name):
    model, inputs, handle = patched(name, ROUTED, rows=(7, 4, 4), side="right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    selected = []
    with torch.no_grad(), handle.continuing("new"):
        for ends in ((7,), (4, 7)):
            cache, start = DynamicCache(config=model.config), 0
            for end in ends:
                model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
                start = end
            selected.append(decisions(handle))
        tracker = handle.record.runtime.tracker
        assert tracker.current.case_tokens.tolist() == [2, -1, -1]
        assert_same_decisions(*(rows_of_decisions(found, [1, 2]) for found in selected))
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="choose edits for all of them"), handle.choosing([None] * 3):
            model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache)


def test_shared_prefix_of_the_base_is_exact_where_edits_are_causal():
    model, inputs, handle = patched("llama", CONFIGS["causal"])
    whole = row_of(inputs, 0)
    with torch.no_grad():
        expected = model(**whole)
        decided = decisions(handle)
        with handle.disabled():
            shared = model(input_ids=whole["input_ids"][:, :4], use_cache=True).past_key_values
        with handle.continuing("new"):
            out = model(input_ids=whole["input_ids"][:, 4:], past_key_values=shared)
    assert_same_decisions(decisions(handle), decided)
    torch.testing.assert_close(out.logits, expected.logits[:, 4:], **CLOSE)


def test_speculative_decoding(config):
    model, inputs, handle = patched("llama", config)
    prompt = {"input_ids": torch.tensor([[9, 8, 7, 9, 8, 7, 9, 8]])}
    expected = model.generate(**prompt, **GREEDY)
    # An end that never comes: transformers before 5.24 may fail where there is none.
    lookup = {**GREEDY, "eos_token_id": -1, "prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}
    with handle.continuing("keep"), pytest.warns(UserWarning, match="prompts' ends with handle.set_cases"):
        model.generate(**prompt, **lookup)
    handle.set_cases(case_positions=torch.tensor([7]))  # the first pass already holds guesses behind the prompt
    handle.record.runtime.tracker.growth.warned = False
    with handle.continuing("keep"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(**prompt, **lookup), expected)


def test_chunked_prefill_in_generate_is_refused():
    model, inputs, _ = patched("llama", ALWAYS)
    with pytest.raises(ValueError, match="the rest of a prompt"):
        model.generate(**row_of(inputs, 0), **GREEDY, prefill_chunk_size=3)


def test_another_batch_size_on_a_cache_is_an_error_naming_both():
    model, inputs, _ = patched("llama", ALWAYS)
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="prefilled with 3 cases, but this pass has 2 rows"):
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


def test_generation_without_a_cache_warns_and_is_right_with_named_positions(config):
    model, inputs, handle = patched("llama", config)
    expected = model.generate(**inputs, **GREEDY)
    with pytest.warns(UserWarning, match="every pass is a new case"):
        model.generate(**inputs, **GREEDY, use_cache=False)
    handle.set_cases(case_positions=torch.tensor([6, 6, 6]))  # left-padded: all prompts end there
    handle.record.runtime.tracker.growth.warned = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), expected)
        with pytest.raises(ValueError, match=r"named for 3 rows, but this pass has 6; .*repeat_interleave\(beams\)"):
            model.generate(**inputs, **GREEDY, use_cache=False, num_beams=2)
        handle.set_cases(case_positions=torch.tensor([6] * 6))
        beams = model.generate(**inputs, **GREEDY, use_cache=False, num_beams=2)
    handle.set_cases()
    assert torch.equal(beams, model.generate(**inputs, **GREEDY, num_beams=2))


def test_a_loop_that_gives_no_cache_warns_and_prompts_of_rising_length_do_not():
    model, inputs, handle = patched("llama", ROUTED)
    ids = row_of(inputs, 0)["input_ids"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (4, 5, 6, 7):
            model(text_inputs([length], seed=length)["input_ids"])
    with torch.no_grad(), pytest.warns(UserWarning, match="every pass is a new case"):
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert copy.deepcopy(handle.record.runtime.tracker).growth.ids is None


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3"])
def test_a_cache_that_is_given_and_not_given_back_keeps_the_decision(name):
    model, inputs, _ = patched(name, ROUTED)
    one, token = row_of(inputs, 0), {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 8).long()}
    logits = []
    with torch.no_grad():
        for use_cache in (True, False):
            cache = DynamicCache(config=model.config)
            model(**one, past_key_values=cache, use_cache=use_cache)
            logits.append(model(**token, past_key_values=cache).logits)
    assert torch.equal(*logits)

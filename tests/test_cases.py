"""Case tokens, and what was decided at them: in padded, packed, cached, teacher-forced and beam-searched passes."""

import contextlib
import copy
import pickle
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

import unike_kernels as uk
from tests.models_tiny import ALWAYS, MULTIMODAL, ROUTED, TEXT, edits_for, inputs_for, make_model, row_of, text_inputs
from unike_kernels import memory, routing
from unike_kernels.cases import (
    Cases,
    CaseState,
    Version,
    as_if_capturing,
    attended,
    case_tokens_from_labels,
    cases_from_ptr,
    last_attended,
    padded_cases,
)

CONFIGS = {
    "always": ALWAYS,
    "routed": ROUTED,
    "causal": replace(ROUTED, shift=replace(ROUTED.shift, positions="from_case_token")),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # LLaMA's norms and rotations compute in float32 whatever the model's dtype


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def patched(name, config, rows=(7, 4, 6), *, edited=2, dtype=torch.float64, side="left", **options):
    """A patched model and a batch, its first `edited` rows questions of edits, so that routing tells rows apart."""
    model = make_model(name, dtype=dtype)
    inputs = inputs_for(model, rows, side=side)
    questions = {key: tensor[:edited] for key, tensor in inputs.items()}
    handle = uk.patch(model, edits_for(model, config, prompts=questions), **options)
    return model, inputs, handle


def decisions(handle):
    """{layer: (indices, alpha)} of the pass that just ran, and the edits selected."""
    state = handle.record.runtime.tracker.current.state
    return {i: (d.indices, d.alpha) for i, d in state.layers.items()}, state.selected


def assert_same_decisions(ours, theirs):
    (layers, selected), (other_layers, other_selected) = ours, theirs
    assert layers.keys() == other_layers.keys() and layers
    for i in layers:
        assert torch.equal(layers[i][0], other_layers[i][0])
        torch.testing.assert_close(layers[i][1], other_layers[i][1], **CLOSE)
    assert (selected is None) == (other_selected is None)
    assert selected is None or torch.equal(selected, other_selected)


def rows_of_decisions(found, rows):
    layers, selected = found
    return {i: (d[rows], a[rows]) for i, (d, a) in layers.items()}, None if selected is None else selected[rows]


# ------------------------------------------------------------------------------------------------ padded batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*TEXT, *MULTIMODAL])
def test_padded_row_decides_as_it_does_alone(name, config, side):
    model, inputs, handle = patched(name, config, side=side)
    logits, batch = model(**inputs).logits, decisions(handle)
    if config.routing.mode == "routed":  # or the test would compare nothing with nothing
        assert batch[1].flatten().tolist()[:2] == [0, 1]
        assert all((alpha[:2] != 0).all() for _, alpha in batch[0].values())
    for row in range(3):
        alone = row_of(inputs, row)
        expected = model(**alone).logits[0]
        assert_same_decisions(rows_of_decisions(batch, [row]), decisions(handle))
        torch.testing.assert_close(logits[row][inputs["attention_mask"][row] != 0], expected, **CLOSE)


@pytest.mark.parametrize("name", [*TEXT, *MULTIMODAL])
def test_padded_row_generates_as_it_does_alone(name, config):
    model, inputs, handle = patched(name, config)
    together = model.generate(**inputs, **GREEDY)[:, -6:]
    for row in range(3):
        alone = model.generate(**row_of(inputs, row), **GREEDY)[:, -6:]
        assert torch.equal(together[row], alone[0])
    with handle.disabled():
        assert not torch.equal(together, model.generate(**inputs, **GREEDY)[:, -6:])  # the edits do say something else


@pytest.mark.parametrize("name", ["opt", "llama", "blip2"])
def test_cached_decoding_goes_on_as_one_teacher_forced_pass(name, config):
    model, inputs, handle = patched(name, config)
    ids = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    new, steps = ids.sequences[:, -6:], torch.stack(ids.logits, dim=1)
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), new], dim=1)
    forced = model(**whole, labels=labels).logits[:, -7:-1]
    torch.testing.assert_close(forced, steps.to(forced), **CLOSE)  # generate() keeps logits in float32


@pytest.mark.parametrize("name", ["opt", "llama", "blip2"])
def test_beam_search(name, config):
    model, inputs, handle = patched(name, config)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**inputs, **beams)[:, -6:]
    assert decisions(handle)[0]
    for row in range(3):
        assert torch.equal(together[2 * row : 2 * row + 2], model.generate(**row_of(inputs, row), **beams)[:, -6:])
    with handle.disabled():
        assert not torch.equal(together, model.generate(**inputs, **beams)[:, -6:])


def test_text_alone_goes_to_the_language_model_of_a_blip2(config):
    model = make_model("blip2", dtype=torch.float64)
    inputs = text_inputs([7, 4])
    base = model.language_model(**inputs).logits
    edits = edits_for(model.language_model, config, prompts=inputs)
    handle = uk.patch(model, edits)
    edited = model.language_model(**inputs).logits
    assert (edited - base).abs().amax(dim=(1, 2)).min() > 1e-3
    for row in range(2):
        alone = model.language_model(**row_of(inputs, row)).logits[0]
        torch.testing.assert_close(edited[row][inputs["attention_mask"][row] != 0], alone, **CLOSE)
    uk.unpatch(model)
    handle = uk.patch(model.language_model, edits)  # patched where it is called: the same
    assert torch.equal(model.language_model(**inputs).logits, edited)
    handle.remove()
    assert torch.equal(model.language_model(**inputs).logits, base)


def test_patch_of_the_decoder_alone():
    model = make_model("llama")
    inputs = text_inputs([5, 5])
    base = model(**inputs).logits
    with uk.patch(model.model, edits_for(model)) as handle:
        assert not torch.equal(model(**inputs).logits, base)
        assert uk.status(model)[0].module.startswith("model.layers.1")
        assert uk.status(model.model)[0].module.startswith("layers.1")
        with pytest.raises(ValueError, match="already on this model"):
            uk.patch(model, edits_for(model))
        assert uk.patching.PatchHandle.of(model).record is handle.record
    assert torch.equal(model(**inputs).logits, base)


# ------------------------------------------------------------------------------------------------ teacher forcing


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["opt", "llama", "blip2", "llava"])
def test_target_changes_neither_items_nor_alpha(name, config, side):
    model, inputs, handle = patched(name, config, rows=(5, 5))
    model(**inputs)
    prompt = decisions(handle)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    pictures = {k: v for k, v in inputs.items() if k == "pixel_values"}
    seen = []
    for answers in ([[9, 10, 11], [12, 13]], [[20, 21, 22], [23, 24]]):
        rows = [row.tolist() + answer for row, answer in zip(ids, answers, strict=True)]
        forced = text_inputs(rows, side=side)
        labels = forced["input_ids"].clone()
        for row, mask in zip(labels, forced["attention_mask"], strict=True):
            start = int(mask.argmax())
            row[: start + length] = -100
            row[mask == 0] = -100
        loss = model(**forced, **pictures, labels=labels).loss
        assert loss.isfinite()
        seen.append(decisions(handle))
    assert_same_decisions(seen[0], seen[1])
    assert_same_decisions(seen[0], prompt)


def test_row_without_labels_takes_its_last_token(config):
    model, inputs, handle = patched("llama", config, rows=(6, 6))
    labels = torch.full_like(inputs["input_ids"], -100)
    model(**inputs)
    without = decisions(handle)
    model(**inputs, labels=labels)
    assert_same_decisions(decisions(handle), without)
    labels[0, 4:] = 7
    model(**inputs, labels=labels)
    tracker = handle.record.runtime.tracker
    assert tracker.current.case_tokens.tolist() == [3, 11]


@pytest.mark.parametrize("position", ["keyword", "positional"])
def test_labels_are_found_however_they_are_passed(position):
    model, inputs, handle = patched("opt", ALWAYS, rows=(6, 6))
    labels = inputs["input_ids"].masked_fill(torch.arange(6) < 4, -100)
    if position == "keyword":
        model(**inputs, labels=labels)
    else:
        model(inputs["input_ids"], inputs["attention_mask"], None, None, labels)
    assert handle.record.runtime.tracker.current.case_tokens.tolist() == [3, 9]


def test_label_at_position_0_is_an_error():
    model, inputs, handle = patched("llama", ALWAYS, rows=(6, 6))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[1, 0] = 5
    with pytest.raises(ValueError, match=r"labels of rows \[1\] start at position 0"):
        model(**inputs, labels=labels)
    with handle.disabled():
        model(**inputs, labels=labels)


def test_labels_behind_padding_are_an_error():
    """As a collator makes that pads to a multiple of some length, of prompts without any text of their own."""
    model, inputs, handle = patched("llama", ALWAYS, rows=(8, 5))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    with pytest.raises(ValueError, match=r"labels of rows \[1\] start at position 0 or behind padding"):
        model(**inputs, labels=labels)
    labels[1, 3] = -100  # its first token
    model(**inputs, labels=labels)
    assert handle.record.runtime.tracker.current.case_tokens.tolist() == [3, 11]


def test_labels_of_another_shape_are_an_error_naming_both():
    model, inputs, _ = patched("blip2", ALWAYS, rows=(6, 6))
    with pytest.raises(ValueError, match=r"labels are \(2, 6\), but the decoder sees \(2, 10\) tokens"):
        model(**inputs, labels=torch.full((2, 6), 5))


def test_labels_do_not_outlive_a_pass_that_failed():
    model, inputs, handle = patched("blip2", ALWAYS, rows=(6, 6))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 7:] = 5
    with pytest.raises(AttributeError):
        model(input_ids=inputs["input_ids"], pixel_values="no picture", labels=labels)  # fails before the decoder
    text = text_inputs([10, 10])  # as long as the labels: nothing would notice
    model.language_model(**text)
    assert handle.record.runtime.tracker.current.case_tokens.tolist() == [9, 19]


def test_named_positions_serve_answers_without_labels(config):
    model, inputs, handle = patched("llama", config, rows=(6, 6))
    model(**inputs)
    prompt = decisions(handle)
    longer = text_inputs([[*row.tolist(), 9, 8, 7] for row in inputs["input_ids"]])
    handle.set_cases(case_positions=torch.tensor([5, 5]))
    model(**longer)
    assert_same_decisions(decisions(handle), prompt)
    with pytest.raises(ValueError, match="case positions reach 5, but this pass has 4 tokens"):
        model(**text_inputs([4, 4]))
    with pytest.raises(ValueError, match="named for 2 rows, but this pass has 3"):
        model(**text_inputs([8, 8, 8]))
    handle.set_cases()
    model(**longer)
    assert handle.record.runtime.tracker.current.case_tokens.tolist() == [8, 17]


# ------------------------------------------------------------------------------------------- decisions and caches


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


def steps(model, inputs, cache=None, n=4):
    """Logits of a prefill and of n - 1 greedy steps with a KV cache, one generator step each."""
    cache = DynamicCache() if cache is None else cache
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for _ in range(n):
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **rest)
        yield out.logits[:, -1]
        ids, rest = out.logits[:, -1:].argmax(-1), {}
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


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
    kept = handle.record.runtime.tracker.kept
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(**inputs, past_key_values=cache)
        token = {"input_ids": torch.full((3, 1), 5), "past_key_values": cache}
        before, alpha = model(**token).logits, kept(cache).layers[3].alpha
        cache.reset()
        model(**inputs, past_key_values=cache)
        cache.reorder_cache(ROWS["reorder_cache"])
        torch.testing.assert_close(model(**token).logits, before[ROWS["reorder_cache"]], **CLOSE)
        assert kept(cache).layers[3].alpha is alpha  # a captured graph reads there


def test_beams_of_one_case_go_on_with_the_same_decision():
    model, inputs, handle = patched("llama", ROUTED, rows=(7, 7))
    cache = model(**{k: t.repeat_interleave(2, dim=0) for k, t in inputs.items()}).past_key_values
    state = handle.record.runtime.tracker.kept(cache)
    cache.reorder_cache(torch.tensor([1, 1, 3, 2]))
    assert handle.record.runtime.tracker.kept(cache) is state
    cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
    assert handle.record.runtime.tracker.kept(cache) is not state


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
    lookup = {**GREEDY, "prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}
    with handle.continuing("keep"), pytest.warns(UserWarning, match="prompts' ends with handle.set_cases"):
        model.generate(**prompt, **lookup)
    handle.set_cases(case_positions=torch.tensor([7]))  # the first pass already holds guesses behind the prompt
    handle.record.runtime.tracker._warned = False
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
    handle.record.runtime.tracker._warned = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), expected)
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
    assert copy.deepcopy(handle.record.runtime.tracker)._growth[0] is None


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


# ------------------------------------------------------------------------------------------------- packed batches


class Packed:
    """An engine in small: tokens of all requests in one row without padding, one KV cache, a block-diagonal mask."""

    def __init__(self, model, handle, slots):
        self.model, self.handle, self.slots = model, handle, slots
        self.cache = DynamicCache()
        self.owner, self.position = torch.zeros(0).long(), torch.zeros(0).long()

    def step(self, work):
        """work: {slot: (token ids, whether its prompt ends here)}; returns the logits of each slot's tokens."""
        owner = torch.cat([torch.full((len(ids),), slot) for slot, (ids, _) in work.items()])
        start = {slot: int((self.owner == slot).sum()) for slot in work}
        position = torch.cat([torch.arange(start[slot], start[slot] + len(ids)) for slot, (ids, _) in work.items()])
        self.owner, self.position = torch.cat([self.owner, owner]), torch.cat([self.position, position])
        sees = (owner[:, None] == self.owner) & (self.position <= position[:, None])
        mask = torch.zeros(sees.shape, dtype=self.model.dtype).masked_fill(~sees, torch.finfo(self.model.dtype).min)
        case_tokens = torch.full((self.slots,), -1)
        for slot, (_, prompt) in work.items():
            if prompt:
                case_tokens[slot] = int((owner == slot).nonzero().max())
        self.handle.set_cases(owner, case_tokens)
        ids = torch.tensor([i for ids, _ in work.values() for i in ids])[None]
        out = self.model(
            input_ids=ids, attention_mask=mask[None, None], position_ids=position[None], past_key_values=self.cache
        )
        return {slot: out.logits[0, owner == slot] for slot in work}


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3"])
def test_packed_rows_with_mixed_steps_equal_separate_runs(name, config):
    model, inputs, handle = patched(name, config)
    prompts = [row_of(inputs, i)["input_ids"][0].tolist() for i in range(3)]
    with torch.no_grad():
        alone = []
        for prompt in prompts:
            out = model(input_ids=torch.tensor([prompt]), use_cache=True)
            logits = [out.logits[0]]
            for token in (11, 12, 13):
                out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
                logits.append(out.logits[0])
            alone.append(logits)
        engine = Packed(model, handle, slots=2)
        seen = [[], [], []]

        def step(requests, slots, tokens):
            work = {s: (t, len(t) > 1) for s, t in zip(slots, tokens, strict=True)}
            for request, logits in zip(requests, engine.step(work).values(), strict=True):
                seen[request].append(logits)

        step([0], [0], [prompts[0]])  # prefill A
        step([0, 1], [0, 1], [[11], prompts[1]])  # A decodes while B is prefilled
        step([1, 0], [1, 0], [[11], [12]])  # both decode, in another order
        step([0], [0], [[13]])  # B waits
        engine.owner[engine.owner == 0] = 9  # A is done; its slot goes to C
        step([2, 1], [0, 1], [prompts[2], [12]])  # C is prefilled in it while B goes on
        step([2, 1], [0, 1], [[11], [13]])
        step([2], [0], [[12]])
    for request in range(3):
        assert len(seen[request]) >= 3
        for ours, theirs in zip(seen[request], alone[request], strict=False):
            torch.testing.assert_close(ours, theirs, **CLOSE)


NOTHING = {
    "no shift": (replace(ROUTED, shift=replace(ROUTED.shift, enabled=False)), {}),
    "always on, no shift": (replace(ALWAYS, shift=replace(ALWAYS.shift, enabled=False)), {}),
    "k of 0": (replace(ROUTED, shift=replace(ROUTED.shift, k=0)), {}),
    "no items": (replace(ROUTED, shift=replace(ROUTED.shift, own_item=False)), {"n_items": 0}),
}


@pytest.mark.parametrize("what", NOTHING)
def test_named_cases_decode_where_nothing_is_retrieved(what):
    config, options = NOTHING[what]
    model = make_model("llama", dtype=torch.float64)
    inputs = inputs_for(model, (7,))
    handle = uk.patch(model, edits_for(model, config, prompts=inputs, **options))
    token = {"input_ids": torch.tensor([[5]])}
    with torch.no_grad():
        expected = model(**token, past_key_values=model(**inputs).past_key_values).logits
        handle.set_cases(case_ptr=torch.tensor([0, 7]))
        cache = model(**inputs).past_key_values
        handle.set_cases(torch.tensor([0]), torch.tensor([-1]))
        assert torch.equal(model(**token, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_packed_prefill_in_csr_form(name, config):
    model, inputs, handle = patched(name, config)
    prompts = [row_of(inputs, i)["input_ids"][0] for i in range(3)]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=prompt[None]).logits[0] for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        owner = torch.arange(3).repeat_interleave(lengths)
        position = torch.cat([torch.arange(n) for n in lengths])
        mask = torch.zeros(len(owner), len(owner), dtype=torch.float64)
        mask[(owner[:, None] != owner) | (position > position[:, None])] = torch.finfo(torch.float64).min
        packed = {
            "input_ids": torch.cat(prompts)[None],
            "attention_mask": mask[None, None],
            "position_ids": position[None],
        }
        with pytest.raises(ValueError, match=r"position_ids start again inside rows \[0\]"):
            model(**packed)
        handle.set_cases(case_ptr=torch.tensor([0, *lengths.cumsum(0).tolist()]))
        for _ in range(2):  # named until named again
            torch.testing.assert_close(model(**packed).logits[0], expected, **CLOSE)
        with pytest.raises(ValueError, match=r"named the cases of 17 tokens, but this pass has 1 x 7 = 7"):
            model(input_ids=prompts[0][None])
        handle.set_cases()
        model(input_ids=prompts[0][None])


def test_named_cases_are_decided_anew_in_every_pass():
    model, inputs, handle = patched("llama", ROUTED)
    ids = row_of(inputs, 0)["input_ids"]
    plain = model(input_ids=ids).logits
    handle.set_cases(case_ptr=torch.tensor([0, 7]))
    with handle.choosing([handle.edits.ids[1]]):
        chosen = model(input_ids=ids).logits
    again = model(input_ids=ids).logits  # routed again: what was chosen for an earlier pass is forgotten
    assert handle.record.runtime.tracker.current.state.selected.tolist() == [[0]]
    torch.testing.assert_close(again, plain, **CLOSE)
    assert not torch.equal(chosen, again)
    handle.swap(handle.edits)
    model(input_ids=ids)  # decided under the new storage, so it may go on
    handle.set_cases(torch.tensor([0]), torch.tensor([-1]))
    model(input_ids=torch.tensor([[5]]))
    assert handle.record.runtime.tracker.current.decided


def test_sites_take_tokens_without_a_batch_dimension():
    model, inputs, handle = patched("llama", ROUTED, rows=(6, 6))
    layer, kept = model.model.layers[1], []
    hook = layer.mlp.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    model(**inputs)
    hook.remove()
    x, expected = kept[0]
    flat = layer.mlp(x.reshape(-1, x.shape[-1]))  # as an engine calls it; the tracker still knows the pass
    torch.testing.assert_close(flat.reshape(expected.shape), expected)


NAMED_WRONGLY = {
    "one of two": (([0, 0], None), {}, "takes both"),
    "case too large": (([0, 1], [1]), {}, r"token_to_case must be in \[-1, 1\) for 1 case tokens, but spans \[0, 1\]"),
    "row too large": (([0, 0], [2]), {}, r"case_tokens must be in \[-1, 2\) for 2 tokens, but spans \[2, 2\]"),
    "of another case": (([0, 1], [1, 0]), {}, r"case tokens \[1, 0\] of cases \[0, 1\] belong to cases \[1, 0\]"),
    "never decided": (([0, 1], [0, -1]), {}, r"cases \[1\] have no case token in this pass and were never decided"),
    "two ways": (([0], [0]), {"case_ptr": [0, 1]}, "in one way at a time, but got token_to_case and case_ptr"),
    "ptr falls": ((), {"case_ptr": [0, 3, 2]}, r"never fall, but got \[0, 3, 2\]"),
    "ptr starts late": ((), {"case_ptr": [1, 3]}, r"start at 0 and never fall, but got \[1, 3\]"),
    "negative position": ((), {"case_positions": [-1]}, r"0 or more, but got \[-1\]"),
}


@pytest.mark.parametrize("what", NAMED_WRONGLY)
def test_cases_named_wrongly(what):
    args, kwargs, message = NAMED_WRONGLY[what]
    _, _, handle = patched("llama", ALWAYS)
    handle.set_cases(torch.tensor([0]), torch.tensor([0]))
    tracker = handle.record.runtime.tracker
    before = tracker.explicit, tracker.positions
    with pytest.raises(ValueError, match=message):
        handle.set_cases(
            *(a and torch.tensor(a) for a in args), **{name: torch.tensor(value) for name, value in kwargs.items()}
        )
    assert before == (tracker.explicit, tracker.positions)


def test_flattened_inputs_need_named_cases():
    model, _, handle = patched("llama", ALWAYS)
    tracker = handle.record.runtime.tracker
    with pytest.raises(ValueError, match=r"tokens of shape \(6,\), not \[batch, length\]"):
        tracker.begin((), {"input_ids": torch.arange(6)})
    handle.set_cases(case_ptr=torch.tensor([0, 4, 6]))
    tracker.begin((), {"input_ids": torch.arange(6)})
    assert tracker.current.case_tokens.tolist() == [3, 5]
    tracker.begin((), {"inputs_embeds": torch.zeros(6, 16)})
    assert tracker.current.case_tokens.tolist() == [3, 5]


# ------------------------------------------------------------------------------------------------- chosen by hand


@pytest.mark.parametrize("base", [ALWAYS, ROUTED], ids=["always", "routed"])
@pytest.mark.parametrize("name", ["opt", "llama", "blip2"])
def test_edits_chosen_per_request(name, base):
    model = make_model(name, dtype=torch.float64)
    inputs = inputs_for(model, (7, 4, 6, 5))
    plain, plain_tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY, num_beams=2)
    edits = edits_for(model, base, prompts=inputs)
    ids = edits.ids
    with uk.patch(model, edits) as handle:
        with handle.choosing([ids[2], None, [ids[0], ids[3]], None]):
            chosen = model(**inputs).logits
            reports = handle.explain(**inputs)
            tokens = model.generate(**inputs, **GREEDY, num_beams=2)
        assert torch.equal(chosen[[1, 3]], plain[[1, 3]])
        assert torch.equal(tokens[[1, 3]], plain_tokens[[1, 3]])
        assert [[i for i, _ in r.edits] for r in reports] == [[ids[2]], [], [ids[0], ids[3]], []]
        after = model(**inputs).logits
        assert not torch.equal(after, chosen)
    for row, own in ((0, [ids[2]]), (2, [ids[0], ids[3]])):  # as if these were the only edits, always on
        with uk.patch(model, edits.select(own), routing="always"):
            torch.testing.assert_close(model(**row_of(inputs, row)).logits[0, -1], chosen[row, -1], **CLOSE)
            assert torch.equal(model.generate(**row_of(inputs, row), **GREEDY, num_beams=2)[0, -6:], tokens[row, -6:])


def test_choosing_names_what_is_wrong():
    model, inputs, handle = patched("llama", ALWAYS)
    message = "no edits other on this model; there are: edit-0-0, edit-0-1"
    with pytest.raises(ValueError, match=message), handle.choosing(["other"]):
        pass
    with handle.choosing([None, None]), pytest.raises(ValueError, match="chosen for 2 cases, but this pass has 3"):
        model(**inputs)
    model(**inputs)


def test_chosen_slots_stay_chosen():
    model, inputs, handle = patched("llama", ALWAYS)
    ids = handle.edits.ids
    prompts = [row_of(inputs, i)["input_ids"][0].tolist() for i in range(2)]
    engine = Packed(model, handle, slots=2)
    with handle.choosing([ids[0], None]):
        engine.step({0: (prompts[0], True)})
        engine.step({0: ([9], False), 1: (prompts[1], True)})
    assert handle.record.runtime.tracker.current.state.selected.tolist() == [[0], [-1]]
    engine.step({0: ([9], False), 1: ([9], False)})  # all of them go on: no need to choose again
    with pytest.raises(ValueError, match="choose edits for all of them from their start"):
        engine.step({0: ([9], False), 1: (prompts[1], True)})


# --------------------------------------------------------------------------------------------------- small parts


def test_cases_from_ptr():
    token_to_case, case_tokens = cases_from_ptr(torch.tensor([0, 2, 2, 5]))
    assert token_to_case.tolist() == [0, 0, 2, 2, 2]
    assert case_tokens.tolist() == [1, -1, 4]


def test_masks_of_every_form_say_the_same():
    flat = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    sees = flat.bool()[:, None, None, :] & torch.ones(4, 4).tril().bool()
    additive = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    static = torch.cat([sees, torch.zeros(2, 1, 4, 3).bool()], dim=-1)  # columns of an empty static cache
    device = torch.device("cpu")
    for mask in (flat, sees, additive, static, {"sliding_attention": sees[:, :, :, :2], "full_attention": sees}):
        assert attended(mask, 4).tolist() == flat.bool().tolist()
        assert last_attended(mask, 2, 4, device).tolist() == [3, 2]
    assert last_attended(None, 2, 4, device).tolist() == [3, 3]
    past = torch.cat([torch.ones(2, 1, 4, 5).bool(), static], dim=-1)
    long = torch.cat([torch.ones(2, 5), flat, torch.zeros(2, 3)], dim=1)
    for mask in (past, long, long[:, :9], long[:, 2:9]):  # the last: without columns for what was dropped
        assert last_attended(mask, 2, 4, device, past=5).tolist() == [3, 2]
    for mask, before in ((flat, 0), (long, 5)):
        assert padded_cases(mask, 2, 4, device, before).tolist() == [-1, -1, 0, 0, 1, 1, 1, -1]
    assert padded_cases(long, 2, 4, device, -1).tolist() == [0] * 4 + [1] * 4  # where it lies is not known
    assert padded_cases(None, 2, 2, device).tolist() == [0, 0, 1, 1]


def test_case_tokens_from_labels():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 5, -100, 6], [-100] * 4])
    assert case_tokens_from_labels(labels, torch.tensor([9, 9, 9])).tolist() == [1, 0, 9]


def test_rows_before_the_case_token():
    cases = Cases(torch.tensor([0, 0, 1, 1, -1, 2]), torch.tensor([1, 3, -1]), CaseState(Version(), 3))
    assert cases.rows("all").tolist() == [0, 0, 1, 1, -1, 2]
    assert cases.rows("from_case_token").tolist() == [-1, 0, -1, 1, -1, 2]
    empty = Cases(torch.tensor([-1, -1]), torch.tensor([]).long(), CaseState(Version(), 0))
    assert empty.rows("from_case_token").tolist() == [-1, -1]


def test_versions_are_compared_by_value():
    version = Version()
    assert copy.deepcopy(version) == version == pickle.loads(pickle.dumps(version))
    assert version != Version() and version != 1

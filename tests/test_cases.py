"""Case tokens, and what is decided at them: in padded, packed, teacher-forced and beam-searched passes."""

import contextlib
import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import unike_kernels as uk
from tests.case_passes import CLOSE, CONFIGS, GREEDY, assert_same_decisions, decisions, patched, rows_of_decisions
from tests.models_tiny import ALWAYS, MULTIMODAL, ROUTED, TEXT, edits_for, inputs_for, make_model, row_of, text_inputs
from unike_kernels.cases import (
    Cases,
    CaseState,
    Version,
    attended,
    case_tokens_from_labels,
    cases_from_ptr,
    last_attended,
    padded_cases,
)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


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


# ------------------------------------------------------------------------------------------------- packed batches


class Packed:
    """An engine in small: tokens of all requests in one row without padding, one KV cache, a block-diagonal mask."""

    def __init__(self, model, handle, slots):
        self.model, self.handle, self.slots = model, handle, slots
        self.cache = DynamicCache()
        self.owner, self.position = torch.zeros(0).long(), torch.zeros(0).long()
        self.free = set()

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
        case_tokens[list(self.free)] = -2
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


@pytest.mark.parametrize("chosen", [False, True])
def test_slots_grow_shrink_and_are_freed(chosen):
    model, inputs, handle = patched("llama", ROUTED)
    prompts = [row_of(inputs, i)["input_ids"][0].tolist() for i in range(3)]
    ids = [handle.edits.ids[0], None, handle.edits.ids[1]]

    def choosing(requests):
        return handle.choosing([ids[r] for r in requests]) if chosen else contextlib.nullcontext()

    with torch.no_grad():
        alone = []
        for r, prompt in enumerate(prompts):
            with choosing([r]):
                cache = model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
            alone.append(model(input_ids=torch.tensor([[11]]), past_key_values=cache).logits[0])
        engine = Packed(model, handle, slots=2)
        with choosing([0, 1]):
            engine.step({0: (prompts[0], True), 1: (prompts[1], True)})
        engine.slots = 3
        with pytest.raises(ValueError, match=r"cases \[2\] have no case token in this pass and were never decided"):
            handle.set_cases(torch.tensor([2]), torch.tensor([-1, -1, -1]))
        with choosing([0, 1, 2]):
            said = engine.step({0: ([11], False), 2: (prompts[2], True)})
        torch.testing.assert_close(said[0], alone[0], **CLOSE)
        said = engine.step({1: ([11], False), 2: ([11], False)})
        torch.testing.assert_close(torch.cat([said[1], said[2]]), torch.cat(alone[1:]), **CLOSE)
        engine.free, engine.slots = {0}, 2
        engine.step({1: ([12], False)})
        engine.free = set()
        for slots in ((0,), (0, 1)):  # of one request that is over, and of one whose slot is not there any more
            with pytest.raises(ValueError, match=r"cases \[0\] have no case token .* one that was freed"):
                handle.set_cases(torch.tensor(slots), torch.tensor([-1, -1]))
        engine.slots = 3
        engine.step({1: ([13], False)})
        with pytest.raises(ValueError, match=r"cases \[2\] have no case token"):
            engine.step({2: ([12], False)})
    handle.swap(handle.edits)
    with pytest.raises(ValueError, match=r"cases \[1\] .* were decided before the edits changed: prefill them again"):
        handle.set_cases(torch.tensor([1]), torch.tensor([-1, -1, -1]))


def test_case_tokens_that_are_overwritten_are_followed():
    """As an engine does whose index tensors stay where they are, for a captured graph."""
    model, inputs, handle = patched("llama", ROUTED, rows=(6, 6))
    packed, own = inputs["input_ids"].reshape(1, -1), torch.tensor([5, 11])
    position = torch.arange(6).repeat(2)[None]
    handle.set_cases(torch.tensor([0] * 6 + [1] * 6), own)
    model(input_ids=packed, position_ids=position)
    own.copy_(torch.tensor([3, 11]))
    model(input_ids=packed, position_ids=position)
    assert handle.record.runtime.tracker.current.case_tokens.tolist() == [3, 11]


def test_the_last_chunk_of_a_packed_prompt_decides():
    model, inputs, handle = patched("llama", CONFIGS["causal"])
    prompt = row_of(inputs, 0)["input_ids"][0].tolist()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        decided = decisions(handle)
        engine = Packed(model, handle, slots=1)
        engine.step({0: (prompt[:3], True)})
        said = engine.step({0: (prompt[3:], True)})[0][-1]
    torch.testing.assert_close(said, expected, **CLOSE)
    assert_same_decisions(decisions(handle), decided)


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


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("fill", [None, 0, 1, 9])
def test_padding_is_no_restart_of_positions(name, fill, config):
    """Padding on either side and within a row, at whatever position the caller puts it."""
    model, inputs, _ = patched(name, config)
    rows = [row_of(inputs, i)["input_ids"][0] for i in range(3)]
    with torch.no_grad():
        expected = [model(input_ids=row[None]).logits[0, -1] for row in rows]
        for at in ("left", "right", "within"):
            ids, mask = torch.zeros(3, 10, dtype=torch.long), torch.zeros(3, 10, dtype=torch.long)
            for i, row in enumerate(rows):
                n = len(row)
                where = {"left": range(10 - n, 10), "right": range(n), "within": [0, *range(11 - n, 10)]}[at]
                ids[i, list(where)], mask[i, list(where)] = row, 1
            position = mask.cumsum(1) - 1
            position = position.clamp(min=0) if fill is None else position.masked_fill(mask == 0, fill)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
            last = (mask * torch.arange(10)).amax(1)
            torch.testing.assert_close(logits[torch.arange(3), last], torch.stack(expected), **CLOSE)


def test_a_packed_row_is_refused_under_every_mask():
    model, inputs, _ = patched("llama", ROUTED)
    ids, position = torch.arange(3, 9)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    hidden = torch.tensor([[0, 1, 1, 0, 1, 1]])  # the first token of both sequences
    for mask in (None, torch.ones(1, 6, dtype=torch.long), hidden):
        with pytest.raises(ValueError, match=r"position_ids start again inside rows \[0\]"):
            model(input_ids=ids, attention_mask=mask, position_ids=position)


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
    "row too large": (([0, 0], [2]), {}, r"case_tokens must be in \[-2, 2\) for 2 tokens, but spans \[2, 2\]"),
    "of another case": (([0, 1], [1, 0]), {}, r"case tokens \[1, 0\] of cases \[0, 1\] belong to cases \[1, 0\]"),
    "never decided": (([0, 1], [0, -1]), {}, r"cases \[1\] have no case token in this pass and were never decided"),
    "two ways": (([0], [0]), {"case_ptr": [0, 1]}, "in one way at a time, but got token_to_case and case_ptr"),
    "ptr falls": ((), {"case_ptr": [0, 3, 2]}, r"never fall, but got \[0, 3, 2\]"),
    "ptr starts late": ((), {"case_ptr": [1, 3]}, r"start at 0 and never fall, but got \[1, 3\]"),
    "negative position": ((), {"case_positions": [-1]}, r"0 or more, but got \[-1\]"),
    "floats": (([0.0], [0]), {}, r"token_to_case must be a tensor of integers, but is a tensor of torch.float32"),
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
        with handle.choosing([ids[2], None, [ids[0], ids[3]], None], repeat=2):
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
    message = "no edit has the id 'other'; there are 2: 'edit-0-0', 'edit-0-1'"
    with pytest.raises(ValueError, match=message), handle.choosing(["other"]):
        pass
    for wrong in ([], "edit-0-0", None, [3, None, None]):
        message = re.escape(f"for the base, but got {wrong!r}")
        with pytest.raises(ValueError, match=message), handle.choosing(wrong):
            pass
    with pytest.raises(ValueError, match="repeat must be 1 or more, but is 0"), handle.choosing([None], repeat=0):
        pass
    for ids, repeat in ((["edit-0-0"], 1), ([None, "edit-0-0"], 1), ([None], 2)):  # 3 rows: no one else's edits
        message = rf"chosen for {len(ids) * repeat} rows, but this pass has 3; of beams.*choosing\(ids, repeat=...\)"
        with handle.choosing(ids, repeat=repeat), pytest.raises(ValueError, match=message):
            model(**inputs)
    model(**inputs)
    handle.remove()
    for use in (lambda: handle.choosing([None]).__enter__(), handle.set_cases, lambda: handle.explain(**inputs)):
        with pytest.raises(ValueError, match="patch 'default' is no longer on the model"):
            use()
    assert repr(handle) == "<patch 'default' of 2 edits, no longer on LlamaForCausalLM>"


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

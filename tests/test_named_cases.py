"""Cases that are named by hand: packed passes, their slots, and edits chosen for each."""

import contextlib
import re
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import unike_kernels as uk
from tests.case_passes import CLOSE, CONFIGS, GREEDY, assert_same_decisions, decisions, patched
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model, row_of
from unike_kernels.cases import as_if_capturing

EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


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


@EVERY_CONFIG
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


def test_a_captured_step_computes_nothing_that_the_next_naming_reads():
    """A capture runs no kernel: what it wrote would be read before it is there, and what it read would be freed."""
    model, inputs, handle = patched("llama", ROUTED, rows=(6, 6))
    packed, position = inputs["input_ids"].reshape(1, -1), torch.arange(6).repeat(2)[None]
    tracker = handle.record.runtime.tracker
    with torch.no_grad():
        handle.set_cases(torch.tensor([0] * 6 + [1] * 6), torch.tensor([5, 11]))
        cache = model(input_ids=packed, position_ids=position, use_cache=True).past_key_values
        handle.set_cases(torch.tensor([0, 1]), torch.tensor([-1, -1]))
        named = tracker.explicit
        decided = named.state.known, [d.alpha for d in named.state.layers.values()]
        with as_if_capturing():
            model(input_ids=torch.tensor([[7, 8]]), position_ids=torch.tensor([[6, 6]]), past_key_values=cache)
    assert named.state.known is named.known and torch.equal(decided[0], named.known)
    assert all(d.alpha is a for d, a in zip(named.state.layers.values(), decided[1], strict=True))
    handle.set_cases(torch.tensor([0, 1]), torch.tensor([-1, -1]))  # both are known still


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


@EVERY_CONFIG
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
    "never decided": (([0, 1], [0, -1]), {}, r"cases \[1\] have no case token in this pass and were never decided"),
    "case tokens twice": ((None, [0]), {"case_ptr": [0, 1]}, "so case_tokens must be left out"),
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
    with pytest.raises(ValueError, match="token_to_case is on meta, but case_tokens are on cpu"):
        handle.set_cases(torch.tensor([0], device="meta"), torch.tensor([0]))


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
    for repeat in (0, 1.5):
        with (
            pytest.raises(ValueError, match=f"repeat must be a whole number from 1, but is {repeat}"),
            handle.choosing([None], repeat=repeat),
        ):
            pass
    with pytest.raises(ValueError, match="repeat must be"), handle.choosing([None], repeat="2"):
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

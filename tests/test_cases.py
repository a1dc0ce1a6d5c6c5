"""Case tokens, and what is decided at them: in padded, packed, teacher-forced and beam-searched passes."""

import copy
import pickle

import pytest
import torch

import unike_kernels as uk
from tests.case_passes import CLOSE, CONFIGS, GREEDY, assert_same_decisions, decisions, patched, rows_of_decisions
from tests.models_tiny import ALWAYS, MULTIMODAL, TEXT, edits_for, make_model, row_of, text_inputs
from unike_kernels.cases import (
    Cases,
    CaseState,
    Version,
    attended,
    case_tokens_from_labels,
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


# --------------------------------------------------------------------------------------------------- small parts


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

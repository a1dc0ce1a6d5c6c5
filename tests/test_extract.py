"""States of triplets: the right rows, the triplets that count, and runs that stop and go on."""

import pytest
import torch

from tests.editing_tiny import TARGETS, ask, make_processor, make_triplets
from tests.models_tiny import case_taps, make_model
from unike_kernels.editing import extract
from unike_kernels.editing.extract import Extraction, answers_match, tap_rows
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.models import find_decoder


def extraction(name="blip2", model=None, layers=(1, 3), **options):
    model = model or make_model(name)
    collator = Collator(model, make_processor(name))
    return Extraction(collator, find_decoder(model), layers, **{"progress": False, "batch_size": 4, **options})


def count_forwards(model):
    """The number of vision passes so far, in a list of one."""
    calls = [0]

    def add(*_):
        calls[0] += 1

    model.vision_model.register_forward_hook(add)
    return calls


@pytest.mark.parametrize("name", ["opt", "blip2", "llava"])
def test_states_are_those_of_each_triplet_alone(name):
    """One triplet at a time, unpadded, read by other hooks: right rows whatever the batch."""
    run = extraction(name)
    triplets = make_triplets(name, 6)
    triplets.insert(3, {**ask(name, "which thing ?", None), "target": "moon"})
    states = run.run(triplets)
    assert states.kept == list(range(7)) and len(states.predictions) == 7
    taps: dict[str, list[dict]] = {"h_sem": [], "h_pos": [], "h_neg": []}
    for triplet, prediction in zip(triplets, states.predictions, strict=True):
        image = triplet["image"]
        for kind, answer in (("h_sem", None), ("h_pos", triplet["target"]), ("h_neg", prediction)):
            batch = run.collator.batch([Sample(triplet["prompt"], answer, image)], [0], eos=False)
            taps[kind].append(case_taps(batch.model, batch.inputs, (1, 3)))
        assert run.collator.generate([Sample(triplet["prompt"], None, image)]) == [prediction]
    for i in (1, 3):
        for kind, found in taps.items():
            torch.testing.assert_close(getattr(states.layers[i], kind), torch.cat([t[i] for t in found]))
    torch.testing.assert_close(states.cases, states.layers[1].h_sem)


@pytest.mark.parametrize("name", ["opt", "llama"])
@torch.no_grad()
def test_attention_output_and_ffn_input_are_read_where_they_are(name):
    """h_att is the attention's output before the residual; the FFN's input comes after its norm."""
    run = extraction(name, layers=(2,))
    triplets = make_triplets(name, 3)
    states = run.run(triplets)
    model = run.collator.model
    decoder = model.model.decoder if name == "opt" else model.model
    for n, triplet in enumerate(triplets):
        batch = run.collator.batch([Sample(triplet["prompt"])], [0])
        out = decoder(**batch.inputs, output_hidden_states=True, use_cache=False)
        layer, entering = decoder.layers[2], out.hidden_states[2]
        middle = entering[0, -1] + states.layers[2].h_att[n]  # the residual after the attention
        if name == "opt":
            x = layer.final_layer_norm(middle)
            leaving = middle + layer.fc2(layer.activation_fn(layer.fc1(x)))
        else:
            x = layer.post_attention_layernorm(middle)
            leaving = middle + layer.mlp(x)
        torch.testing.assert_close(leaving, out.hidden_states[3][0, -1])
        (case,) = tap_rows(model, run.decoder, (2,), batch, [batch.case_rows()])
        torch.testing.assert_close(case["ffn"][2][0], x)
        triplet["ffn"] = x
    torch.testing.assert_close(states.ffn_mean[2], torch.stack([t["ffn"] for t in triplets]).mean(dim=0))


def test_what_the_model_knows_is_left_out_of_the_memory():
    run = extraction()
    triplets = make_triplets("blip2", 6)
    whole = run.run(triplets)
    triplets[1]["target"] = f" {whole.predictions[1]} "
    triplets[4]["prediction"] = triplets[4]["target"]
    triplets[5]["prediction"] = "of the moon"
    states = run.run(triplets)
    assert states.kept == [0, 2, 3, 5] and states.predictions[4:] == [triplets[4]["target"], "of the moon"]
    for i in (1, 3):
        assert torch.equal(states.layers[i].h_sem, whole.layers[i].h_sem[[0, 2, 3, 5]])
        torch.testing.assert_close(states.layers[i].h_neg[:3], whole.layers[i].h_neg[[0, 2, 3]])
        assert (states.layers[i].h_neg[3] - whole.layers[i].h_neg[5]).abs().max() > 1e-3
    assert states.cases.shape == (6, 16)  # right or wrong, all calibrate routing


def test_empty_predictions_are_no_wrong_answers(monkeypatch):
    run = extraction()
    monkeypatch.setattr(Collator, "generate", lambda self, samples, *a, **k: ["", "moon", ""][: len(samples)])
    states = run.run([{**t, "target": "fish"} for t in make_triplets("blip2", 3)])
    assert states.kept == [1] and states.predictions == ["", "moon", ""]
    assert states.layers[1].h_neg.shape == (1, 16)
    nothing = run.run([{**t, "target": "moon"} for t in make_triplets("blip2", 3)])
    assert nothing.kept == [] and nothing.layers[1].h_pos.shape == (0, 16)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [("Red  dog.", "red dog", True), ("red dog", "red dogs", False), ("", ".", True), ("a.b", "ab", False)],
)
def test_answers_match(a, b, same):
    assert answers_match(a, b) is same


def test_answers_are_as_long_as_the_longest_target(monkeypatch):
    run, asked = extraction("opt"), []

    def generate(self, samples, *a, max_new_tokens, **k):
        asked.append(max_new_tokens)
        return ["w0"] * len(samples)

    monkeypatch.setattr(Collator, "generate", generate)
    run.run([{"prompt": "what ?", "target": "moon " * 40}])
    run.run([{"prompt": "what ?", "target": "moon"}])
    assert asked == [40, extract.ANSWER_TOKENS]


# Runs that stop and go on


class Stopped(BaseException):
    """As a kill: nothing on the way catches it."""


def same_states(a, b):
    tensors = [(a.cases, b.cases)]
    for i in a.layers:
        tensors += [(getattr(a.layers[i], k), getattr(b.layers[i], k)) for k in ("h_sem", "h_pos", "h_neg", "h_att")]
        tensors.append((a.ffn_mean[i], b.ffn_mean[i]))
    return a.kept == b.kept and a.predictions == b.predictions and all(torch.equal(x, y) for x, y in tensors)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    model, triplets = make_model("blip2"), make_triplets("blip2", 10)
    whole = extraction(model=model).run(triplets)
    calls = count_forwards(model)
    extraction(model=model).run(triplets)
    per_chunk, chunks = calls[0] // 3, []

    real = extract._write

    def write(path, chunk):
        if len(chunks) == 2:
            raise Stopped
        chunks.append(path)
        real(path, chunk)

    monkeypatch.setattr(extract, "_write", write)
    with pytest.raises(Stopped):
        extraction(model=model, cache=tmp_path).run(triplets)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    calls[0] = 0
    assert same_states(extraction(model=model, cache=tmp_path).run(triplets), whole)
    assert calls[0] == per_chunk  # the third chunk alone
    calls[0] = 0
    assert same_states(extraction(model=model, cache=tmp_path).run(triplets), whole)
    assert calls[0] == 0


def test_a_stop_while_writing_leaves_no_chunk(tmp_path, monkeypatch):
    model, triplets = make_model("blip2"), make_triplets("blip2", 4)

    def save(states, path, metadata):
        path.write_bytes(b"half")
        raise Stopped

    monkeypatch.setattr(extract, "save_file", save)
    with pytest.raises(Stopped):
        extraction(model=model, cache=tmp_path).run(triplets)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.safetensors"))
    extraction(model=model, cache=tmp_path).run(triplets)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "rows"])
def test_a_damaged_chunk_is_computed_again(damage, tmp_path):
    model, triplets = make_model("blip2"), make_triplets("blip2", 4)
    whole = extraction(model=model, cache=tmp_path).run(triplets)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    if damage == "rows":
        other = tmp_path / "other"
        extraction(model=model, cache=other).run(triplets[:3])
        (short,) = other.glob("*.safetensors")
        path.write_bytes(short.read_bytes())
    else:
        path.write_bytes({"cut": good[:-100], "empty": b"", "other": b"x" * 300}[damage])
    calls = count_forwards(model)
    assert same_states(extraction(model=model, cache=tmp_path).run(triplets), whole)
    assert calls[0] > 0 and path.read_bytes() == good


def test_the_cache_belongs_to_what_it_was_made_from(tmp_path):
    """Another model, layer, answer or picture is another chunk; the same thing again is not."""
    triplets = make_triplets("blip2", 2)

    def chunks(model=None, triplets=triplets, **options):
        extraction(model=model or make_model("blip2"), cache=tmp_path, **options).run(triplets)
        return len(list(tmp_path.glob("*.safetensors")))

    assert chunks() == 1
    assert chunks() == 1
    model = make_model("blip2")
    with torch.no_grad():
        model.language_model.model.decoder.layers[4].fc2.weight.mul_(1.001)  # the deepest weight of the edited part
    assert chunks(model) == 2
    assert chunks(make_model("blip2", dtype=torch.bfloat16)) == 3
    assert chunks(layers=(1, 2)) == 4
    for n, change in enumerate(
        ({"target": TARGETS[2]}, {"prediction": "moon"}, {"prompt": "what ?"}, ask("blip2", "?", 9))
    ):
        kept = {"prompt": triplets[1]["prompt"]} if "image" in change else {}
        assert chunks(triplets=[triplets[0], {**triplets[1], **change, **kept}]) == 5 + n
    assert chunks(triplets=triplets[::-1]) == 9
    assert chunks() == 9


def test_progress_goes_to_stderr_and_can_be_left_out(capsys):
    for progress in (True, False):
        extraction("opt", progress=progress).run(make_triplets("opt", 3))
        out, err = capsys.readouterr()
        assert out == "" and ("3/3" in err) is progress and bool(err) is progress

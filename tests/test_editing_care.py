"""What an editor must not do: use up iterators, reseed GPUs, follow defaults of others, run out of places half-way."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
import transformers

import unike_kernels as uk
from tests.editing_tiny import (
    QUESTIONS,
    answers,
    make_editor,
    make_processor,
    make_requests,
    make_tokenizer,
    make_triplets,
    picture,
    routed,
    samples_of,
)
from tests.models_tiny import _llama_config, make_model
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.evaluation.prompts import prompt_style
from unike_kernels.evaluation.unike import Unike


def test_an_iterator_is_refused_and_not_used_up() -> None:
    editor = make_editor("opt")
    requests = iter(make_requests("opt"))
    with pytest.raises(ValueError, match="requests must be a list of dicts, but are a list_iterator"):
        editor.edit(requests, progress=False)
    assert len(list(requests)) == 4
    cases = ({"prompt": q} for q in QUESTIONS)
    with pytest.raises(ValueError, match="calibration cases must be a list of dicts, but are a generator"):
        editor.calibrate(cases, progress=False)
    with pytest.raises(ValueError, match="triplets must be a list of dicts, but are a generator"):
        editor.build_memory((t for t in make_triplets("opt")), progress=False)
    with pytest.raises(ValueError, match="probes must be a list of dicts, but are a map"):
        editor.check(editor.edit(make_requests("opt", 1), progress=False), map(dict, []))


def test_no_gpu_is_reseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = uk.Editor(make_model("blip2"), make_processor("blip2"), routed())
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    triplets = [t | {"question": f"q{i % 3}"} for i, t in enumerate(make_triplets("blip2"))]
    editor.build_memory(triplets, progress=False)
    editor.fit(progress=False)
    edits = editor.edit(make_requests("blip2", 1), progress=False)
    assert edits.calibration is not None and edits.calibration.wording is not None  # so the draw was made
    assert torch.equal(torch.get_rng_state(), before) and not seeded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_decides_nothing(dtype: torch.dtype) -> None:
    config = replace(routed(), encoders=replace(routed().encoders, w_zeta="trained", w_zeta_edits=4))
    plain = make_editor("opt", config)
    wanted = plain.edit(make_requests("opt", 2), progress=False).named_tensors()
    model = make_model("opt")
    torch.set_default_dtype(dtype)
    try:
        other = uk.Editor(model, make_processor("opt"), config)
        other.build_memory(make_triplets("opt"), progress=False)
        other.fit(progress=False)
        other.calibrate([{"prompt": QUESTIONS[0]}], progress=False)
        found = other.edit(make_requests("opt", 2), progress=False).named_tensors()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in wanted.items():
        if not name.startswith("calibration"):
            assert torch.equal(found[name], tensor), name


def test_inference_mode_is_refused_before_anything_is_done() -> None:
    editor = make_editor("opt")
    with torch.inference_mode():
        for what in (
            lambda: editor.build_memory(make_triplets("opt"), progress=False),
            lambda: editor.fit(progress=False),
            lambda: editor.edit(make_requests("opt", 1), progress=False),
        ):
            with pytest.raises(RuntimeError, match="inside torch.inference_mode"):
                what()
    with torch.no_grad():
        assert len(editor.edit(make_requests("opt", 1), progress=False)) == 1


@pytest.mark.parametrize(
    "shipped",
    [{"num_beams": 4}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}, {"return_dict_in_generate": True}],
)
def test_answers_are_greedy_whatever_the_model_ships(shipped: dict[str, Any]) -> None:
    editor = make_editor("opt")
    plain = answers(editor, make_triplets("opt"))
    for name, value in shipped.items():
        setattr(editor.model.generation_config, name, value)
    assert answers(editor, make_triplets("opt")) == plain
    if "num_beams" in shipped:
        assert answers(editor, make_triplets("opt"), num_beams=4) != plain  # what is asked for is done


def test_a_template_that_brings_the_start_token_gets_no_second_one() -> None:
    processor = make_processor("llava")
    processor.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
        " {{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    )
    collator, style = Collator(make_model("llava"), processor), prompt_style("auto", "vqa", processor)
    prompts = [(style.ask("what is this ?"), picture(1)), (style.ask_text("what is this ?"), None)]
    for prompt, image in prompts:
        assert prompt.startswith("<s>")
        batch = collator.batch([Sample(prompt, "cat", image)], [0])
        ids = batch.inputs["input_ids"][0].tolist()
        assert ids.count(1) == 1 and ids[0] == 1
        assert collator.prompt_length(Sample(prompt, None, image)) == int(batch.case_position[0]) + 1
    assert collator.text_length(prompts[1][0]) == collator.prompt_length(Sample(prompts[1][0]))
    plain = collator.batch([Sample("what is this ?", "cat")], [0]).inputs["input_ids"][0].tolist()
    assert plain[0] == 1 and plain.count(1) == 1


def test_an_answer_of_the_models_own_has_room_to_be_read_again() -> None:
    model = make_model("opt")
    model.generation_config.eos_token_id = None  # it answers for as long as it may
    places, room = model.config.max_position_embeddings, 24
    words = itertools.cycle(["red", "blue", "green"])
    triplets = make_triplets("opt")
    for tokens, taken in ((places - room, True), (places - room + 1, False)):
        triplets[0]["prompt"] = " ".join(itertools.islice(words, tokens - 1))  # and a start token
        editor = uk.Editor(model, make_processor("opt"), routed())
        if taken:
            editor.build_memory(triplets, progress=False)
        else:
            with pytest.raises(ValueError, match=f"triplet 0 is {tokens} tokens long and may be answered with {room}"):
                editor.build_memory(triplets, progress=False)


def test_pictures_of_different_shapes_share_a_batch_where_the_model_takes_that() -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    grid = [[8, 16], [16, 8], [16, 16], [8, 24]]
    size = {"height": 8, "width": 8}
    pictures = LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=grid, do_center_crop=False)
    processor = transformers.LlavaNextProcessor(
        pictures,
        make_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=_llama_config(5),
        image_token_index=3,
        image_grid_pinpoints=grid,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    triplets = make_triplets("llava", 4)
    for i, t in enumerate(triplets):
        t["image"] = Image.new("RGB", (16, 16) if i % 2 else (8, 16), (i * 20, 0, 0))
    together, alone = (
        uk.Editor(model, processor, routed()).build_memory(triplets, batch_size=n, progress=False) for n in (4, 1)
    )
    torch.testing.assert_close(together.cases, alone.cases, rtol=1e-4, atol=1e-4)
    other = Collator(make_model("llava"), make_processor("llava"))  # whose pictures have one shape
    assert other.batch(samples_of(make_triplets("llava", 2)), [0, 1]).inputs["pixel_values"].dim() == 4


def test_a_trained_map_of_other_neuron_settings_is_not_loaded(tmp_path: Any) -> None:
    config = replace(routed(), encoders=replace(routed().encoders, w_zeta="trained", w_zeta_edits=4))
    make_editor("opt", config).save(tmp_path / "editor.safetensors")
    for part in ({"neurons": replace(config.neurons, per_layer=3)}, {"shift": replace(config.shift, k=7)}):
        other = uk.Editor(make_model("opt"), make_processor("opt"), replace(config, **part))
        with pytest.raises(ValueError, match=f"saved by another editor .* {next(iter(part))}: "):
            other.load(tmp_path / "editor.safetensors")
        assert other.states is None
    ridge = routed()
    make_editor("opt", ridge).save(tmp_path / "ridge.safetensors")
    other = uk.Editor(
        make_model("opt"), make_processor("opt"), replace(ridge, neurons=replace(ridge.neurons, per_layer=3))
    )
    other.load(tmp_path / "ridge.safetensors")  # a solved map does not depend on neurons
    assert other.states is not None


def test_one_step_edits_share_one_memory_until_they_are_put_on() -> None:
    editor = make_editor("opt")
    method = Unike(editor, routing="routed")
    made = method._many(samples_of(make_requests("opt", 4)))
    assert len({id(edits) for edits, _ in made}) == 1 and [name for _, name in made] == ["0", "1", "2", "3"]
    for n, edit in enumerate(method.one_step(samples_of(make_requests("opt", 3)))):
        with edit as edited:
            assert edited.handle.edits.ids == [str(n)]

"""MMEdit's and VLKEB's files, on a few records of each in tests/data."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.test_inputs import trained_tokenizer
from unike_kernels.editing.inputs import Collator, image_digest
from unike_kernels.evaluation import datasets
from unike_kernels.evaluation.metrics import token_accuracy
from unike_kernels.evaluation.pictures import MissingPicturesError, resolve
from unike_kernels.evaluation.prompts import STYLES, PromptStyle, prompt_style

DATA = Path(__file__).parent / "data"
FILES = sorted((DATA / "mmedit").glob("*.json"))


def drawn(root, names):
    """Small pictures of these names under `root`."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i % 256, 7)).save(path)
    return root


# Reading


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_key_of_every_record_is_read(path):
    rows, found = json.loads(path.read_text()), datasets.read(path)
    assert len(found.entries) == len(rows) >= 4
    assert found.task == ("caption" if "caption" in path.stem else "vqa")
    for i, (row, entry) in enumerate(zip(rows, found.entries, strict=True)):
        assert entry.id == f"{path.stem}:{i}"
        assert entry.prediction == row["pred"].strip()
        assert {key: row[key].strip() for key in datasets.STRINGS} == {
            key: getattr(entry, name) for key, name in datasets.STRINGS.items()
        }


def test_what_is_odd_is_reported_by_record():
    found = datasets.read(DATA / "mmedit/vqa_eval.json").findings
    assert found.unchanged == ["vqa_eval:4"]  # "London" and "london"
    assert found.same_rephrase == ["vqa_eval:3", "vqa_eval:5", "vqa_eval:6"]
    assert found.quoted == ["vqa_eval:2"]
    assert found.duplicates == ["vqa_eval:6"] and not found.contradictions and not found.stripped
    assert "     1  pred is alt, apart from case (nothing to edit): vqa_eval:4" in str(found)
    captions = datasets.read(DATA / "mmedit/caption_eval_edit.json")
    assert captions.findings.stripped == ["caption_eval_edit:1", "caption_eval_edit:3"]
    assert captions.entries[1].target == "A boy throwing out a pitch in a ball game."
    assert "caption_eval_edit.json: 4 records of caption" in str(captions)


def test_contradicting_records_are_told_from_repeated_ones(tmp_path):
    row = json.loads(FILES[0].read_text())[0]
    (tmp_path / "a.json").write_text(json.dumps([row, row | {"alt": "another thing"}, row]))
    found = datasets.read(tmp_path / "a.json").findings
    assert (found.contradictions, found.duplicates) == (["a:1"], ["a:2"])


def test_what_recurs_between_train_and_eval_is_counted():
    train, evaluation = (datasets.read(DATA / f"mmedit/vqa_{name}.json") for name in ("train", "eval"))
    found = datasets.overlap(train, evaluation)
    pictures = {e.image for e in train.entries}
    assert found.counts["picture"] == sum(e.image in pictures for e in evaluation.entries) >= 2
    assert found.counts["picture and prompt"] == found.counts["T-Loc question"] == 0
    assert found.counts["M-Loc picture and question"] >= 1
    assert "of 7 evaluation records, in training: picture" in str(found)


def test_vlkeb_portability():
    (one,) = datasets.read(DATA / "vlkeb/eval_edit_onehop.json").entries
    assert one.portability == (
        datasets.Hop(
            "1-hop",
            "In which city does the building in the picture stand?",
            "Paris",
            ("Where does the Eiffel Tower stand?", "Paris"),
        ),
    )
    many = datasets.read(DATA / "vlkeb/eval_multihop.json").entries
    assert [h.part for h in many[0].portability] == ["1-hop", "2-hop"] and many[1].portability == ()
    assert many[0].prediction == "Leaning_Tower_of_Pisa"


# Errors


def changed(**keys):
    return lambda row: row | keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not JSON: brackets are nested too deep"),
        ("[" + "1" * 5000 + "]", "not JSON: Exceeds the limit .* for integer string conversion"),
        ("[{", "not JSON: Expecting property name enclosed in double quotes in line 1, column 3"),
        ("{}", r"must hold a JSON list of records, but holds dict \{\}"),
        ("[]", r"must hold a JSON list of records, but holds list \[\]"),
        ("[3]", "record 0: must be an object, but is int 3"),
        (lambda row: {k: v for k, v in row.items() if k != "m_loc_q"}, "record 1: key 'm_loc_q' is missing"),
        (changed(alt=7), "record 1: key 'alt' must be a string, but is int 7"),
        (changed(alt="a \ud800"), r"record 1: key 'alt' holds half a character: str 'a \\ud800'"),
        (changed(port_new=[{"port_q": "\udfff"}]), "record 1: key 'port_new', item 0: 'port_q' holds half a character"),
        (changed(alt=" \n"), "record 1: key 'alt' is empty"),
        (changed(pred=None), "record 1: key 'pred' must be a string, but is NoneType None"),
        (changed(port_new={}), "record 1: key 'port_new' must be a list, but is dict"),
        (changed(port_new=[1]), "record 1: key 'port_new', item 0 must be an object, but is int 1"),
        (changed(port_new=[{"port_q": "who?"}]), "record 1: key 'port_new', item 0: 'port_a' must be a string"),
        (changed(port_new=[{"port_type": "1-hop"}]), "record 1: key 'port_new', item 0: 'Q&A' must be an object"),
        (
            changed(port_new=[{"port_type": "1-hop", "Q&A": {"Question": "who?", "Answer": ""}}]),
            "record 1: key 'port_new', item 0: 'Answer' must be a string that is not empty",
        ),
    ],
)
def test_a_malformed_file_is_refused_by_file_record_and_key(tmp_path, text, message):
    path = tmp_path / "bad.json"
    if callable(text):
        good = json.loads(FILES[0].read_text())
        text = json.dumps([good[0], text(good[1])])
    path.write_text(text)
    with pytest.raises(datasets.DatasetError, match=rf"bad\.json(: | is ){message}"):
        datasets.read(path)


def test_a_file_may_begin_with_a_mark(tmp_path):
    (tmp_path / "a.json").write_text(FILES[0].read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert len(datasets.read(tmp_path / "a.json").entries) == len(datasets.read(FILES[0]).entries)


def test_a_file_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'[{"src": "\xff"}]')
    with pytest.raises(datasets.DatasetError, match=r"not UTF-8 text \(byte 10\)"):
        datasets.read(tmp_path / "bad.json")


# Pictures


def test_missing_pictures_are_counted_and_named_once(tmp_path):
    found = datasets.read(DATA / "mmedit/vqa_eval.json")
    names = found.pictures()
    assert len(names) == len(set(names)) == 20  # 7 each, but two records share their picture
    drawn(tmp_path, names[:-2])
    with pytest.raises(MissingPicturesError, match=f"2 of 20 pictures are missing under {tmp_path}") as error:
        found.records(STYLES["raw"], tmp_path)
    assert error.value.missing == sorted(names[-2:])
    assert all(Path(name).name in str(error.value) for name in names[-2:])


def test_a_wrong_root_is_told_from_a_gap(tmp_path):
    found = datasets.read(DATA / "mmedit/caption_eval_edit.json")
    with pytest.raises(MissingPicturesError, match="is not a folder"):
        found.records(STYLES["raw"], tmp_path / "nowhere")
    with pytest.raises(MissingPicturesError, match="the folder that holds val2014, val2014_image_rephrase"):
        found.records(STYLES["raw"], tmp_path)
    many = [f"m.{i}/google_{j}.jpg" for i in range(9) for j in range(7)]
    text = str(MissingPicturesError(tmp_path, many, 100))
    assert "63 of 100" in text and "and 2 more" in text and "and 28 in 4 other folders" in text


def test_pictures_beside_their_file_are_missing_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingPicturesError) as error:
        resolve(["nofile.png"], ".")
    assert str(error.value) == f"1 of 1 pictures are missing under {tmp_path}:\n  nofile.png"


def test_pictures_of_other_kinds_may_be_missing(tmp_path):
    """COCO alone is enough for everything but M-Gen."""
    found = datasets.read(DATA / "mmedit/caption_eval_edit.json")
    drawn(tmp_path, [n for n in found.pictures() if "rephrase" not in n])
    records = found.records(STYLES["caption"], tmp_path, kinds=("t_gen", "m_loc"))
    assert [[p.kind for p in r.probes] for r in records] == 4 * [["rel", "t_gen", "m_loc"]]
    with pytest.raises(MissingPicturesError, match="4 of 12"):
        found.records(STYLES["caption"], tmp_path)


# Records


def test_records_ask_what_the_benchmark_asks(tmp_path):
    found = datasets.read(DATA / "mmedit/vqa_eval.json")
    root = drawn(tmp_path, found.pictures())
    record = found.records(prompt_style("auto", found.task), root)[0]
    row = json.loads((DATA / "mmedit/vqa_eval.json").read_text())[0]
    asked = [(p.kind, p.sample.prompt, p.sample.target, p.sample.image) for p in record.probes]
    short = "Question: {} Short answer:"
    assert asked == [
        ("rel", short.format(row["src"]), "2", root / row["image"]),
        ("t_gen", short.format(row["rephrase"]), "2", root / row["image"]),
        ("m_gen", short.format(row["src"]), "2", root / row["image_rephrase"]),
        ("t_loc", row["loc"], row["loc_ans"], None),
        ("m_loc", short.format(row["m_loc_q"]), row["m_loc_a"], root / row["m_loc"]),
    ]
    assert record.request == record.probes[0].sample
    assert (record.id, record.task, record.cluster) == ("vqa_eval:0", "vqa", row["image"])


def test_portability_is_asked_about_the_edits_picture(tmp_path):
    found = datasets.read(DATA / "vlkeb/eval_multihop.json")
    root = drawn(tmp_path, found.pictures())
    first, second = found.records(STYLES["raw"], root)
    ports = first.of("port")
    assert [p.part for p in ports] == ["1-hop", "2-hop"] and not second.of("port")
    assert ports[1].sample.target == "Seine" and ports[1].sample.image == first.request.image


# Prompt styles


@pytest.mark.parametrize(
    ("name", "task", "asked"),
    [
        ("raw", "vqa", ("q?", "q?", "q?")),
        ("short-answer", "vqa", ("Question: q? Short answer:", "Question: q? Short answer:", "q?")),
        ("auto", "vqa", ("Question: q? Short answer:", "Question: q? Short answer:", "q?")),
        ("caption", "caption", ("q?", "Question: q? Short answer:", "q?")),
        ("auto", "caption", ("q?", "Question: q? Short answer:", "q?")),
        ("answer", "vqa", ("Question: q? Answer:", "Question: q? Answer:", "q?")),
        ("answer-is", "vqa", ("q? The answer is:", "q? The answer is:", "q? The answer is:")),
        ("Q {} A", "vqa", ("Q q? A", "Q q? A", "q?")),
    ],
)
def test_prompt_styles(name, task, asked):
    style = prompt_style(name, task)
    assert (style.ask("q?"), style.ask_picture("q?"), style.ask_text("q?")) == asked


class Chatting:
    """A processor with a chat template."""

    chat_template = "any"

    def apply_chat_template(self, said, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        parts = ["<image>\n" if part["type"] == "image" else part["text"] for part in said[0]["content"]]
        return f"USER: {''.join(parts)} ASSISTANT:"


def test_a_chat_template_is_asked_with_and_without_a_picture():
    for name in ("chat", "auto"):
        style = prompt_style(name, "vqa", Chatting())
        assert style.ask("{q}") == style.ask_picture("{q}") == "USER: <image>\n{q} ASSISTANT:"
        assert style.ask_text("{q}") == "USER: {q} ASSISTANT:"


def test_a_processor_that_puts_the_pictures_tokens_itself_is_not_asked_in_chat():
    blip2 = Chatting()
    blip2.num_query_tokens = 32
    assert prompt_style("auto", "vqa", blip2) == STYLES["short-answer"]


def test_unknown_styles_are_refused():
    with pytest.raises(ValueError, match="the prompt style is 'short', not one of auto, chat, raw, short-answer"):
        prompt_style("short", "vqa")
    with pytest.raises(ValueError, match="object has no chat template"):
        prompt_style("chat", "vqa", object())
    with pytest.raises(ValueError, match=r"needs \{\} once"):
        PromptStyle("mine", "{} {}")


# Targets as tokens


@pytest.mark.parametrize(("kind", "space"), [("bytes", " "), ("sentencepiece", "")], ids=["OPT", "LLaMA"])
def test_targets_are_the_tokens_that_follow_the_prompt(kind, space):
    """OPT's word begins with its space, so the label does too; LLaMA's mark stands for it, so the label has none."""
    tokenizer = trained_tokenizer(kind)
    collator = Collator(nn.Linear(1, 1), tokenizer)
    for entry in datasets.read(DATA / "mmedit/vqa_eval.json").entries:
        prompt = STYLES["short-answer"].ask(entry.prompt)
        label = tokenizer(space + entry.target, add_special_tokens=False)["input_ids"]
        assert collator.target_ids(prompt, entry.target) == label
        whole = tokenizer(f"{prompt} {entry.target}", add_special_tokens=False)["input_ids"]
        assert whole[-len(label) :] == label
    if space:
        assert tokenizer("2", add_special_tokens=False)["input_ids"] != tokenizer(" 2", add_special_tokens=False)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_single_unknown_token_of_public_code_and_what_it_does_to_accuracy(kind):
    """A list given to the tokenizer looks a whole answer up as one token; here an answer is its own tokens."""
    tokenizer = trained_tokenizer(kind)
    collator = Collator(nn.Linear(1, 1), tokenizer)
    entries = [e for f in FILES for e in datasets.read(f).entries]
    ours, theirs = [], []
    for e in entries:
        right = torch.tensor(collator.target_ids(STYLES["raw"].ask(e.prompt), e.target))
        listed = torch.tensor(tokenizer.convert_tokens_to_ids([e.target]))  # what `encode([answer])` came to
        assert tokenizer.unk_token_id not in right and (
            kind == "sentencepiece" or tokenizer.decode(right)[1:] == e.target
        )
        assert len(listed) == 1
        said = right  # of a model that answers perfectly
        ours.append(token_accuracy(said, right))
        theirs.append(token_accuracy(said[-1:], listed))
    unknown = sum(tokenizer.convert_tokens_to_ids([e.target]) == [tokenizer.unk_token_id] for e in entries)
    assert unknown > len(entries) / 2
    assert set(ours) == {1.0} and sum(theirs) <= len(entries) - unknown


def test_a_pictures_file_serves_as_the_picture(tmp_path):
    from tests.editing_tiny import make_processor
    from tests.models_tiny import make_model
    from unike_kernels.editing.inputs import Sample

    path = drawn(tmp_path, ["a/b.png"]) / "a/b.png"
    collator = Collator(make_model("blip2"), make_processor("blip2"))
    with Image.open(path) as picture:
        pixels = picture.convert("RGB")
    named, shown = (
        collator.batch([Sample("what is this ?", "fish", image)], [0]).inputs["pixel_values"]
        for image in (path, pixels)
    )
    assert torch.equal(named, shown) and image_digest(path) == image_digest(str(path))

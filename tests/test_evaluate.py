"""`unike-kernels evaluate` as a user runs it: a random BLIP-2 of transformers' classes on disk, and drawn pictures."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Blip2Config, Blip2ForConditionalGeneration
from typer.testing import CliRunner

from bench.quality.emoji import model as emoji
from tests.second_device import second_device
from tests.test_datasets import DATA, drawn
from unike_kernels.cli import app
from unike_kernels.config import EncoderConfig, NeuronConfig, UnikeConfig
from unike_kernels.editing.loading import load
from unike_kernels.evaluation import datasets, evaluate, runs
from unike_kernels.evaluation.evaluate import Job, across, run
from unike_kernels.evaluation.records import Probe, Record, without_seen
from unike_kernels.evaluation.summary import Summary
from unike_kernels.evaluation.unike import SAVED_EVERY, Unike

runner = CliRunner()
MMEDIT, VLKEB = DATA / "mmedit", DATA / "vlkeb"
FAST = UnikeConfig(
    layers=(4, 5), encoders=EncoderConfig(steps=10), neurons=NeuronConfig(steps=12, lr_values=0.1, lr_keys=0.02)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, every picture that the sample files name, and a quick config."""
    root = tmp_path_factory.mktemp("evaluate")
    files = [datasets.read(p) for p in (*MMEDIT.glob("*.json"), *VLKEB.glob("*.json"))]
    texts = [
        t for d in files for e in d.entries for t in (e.prompt, f" {e.target}", e.loc, f" {e.loc_target}", e.m_loc)
    ]
    processor = emoji.make_processor(emoji.train_tokenizer(texts))
    told = emoji.make_config().to_dict()
    told["text_config"] |= {"max_position_embeddings": 256, "init_std": 0.2}
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(Blip2Config.from_dict(told))
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    drawn(root / "pictures", dict.fromkeys(n for d in files for n in d.pictures()))
    (root / "fast.json").write_text(json.dumps(FAST.to_json()))
    return root


def command(place, out, *more, data=("vqa_eval.json",), train=("vqa_train.json",)):
    """The command's arguments on MMEdit's sample files."""
    arguments = ["evaluate", "--model", str(place / "model"), "--images", str(place / "pictures"), "--out", str(out)]
    arguments += [a for name in data for a in ("--data", str(MMEDIT / name))]
    arguments += [a for name in train for a in ("--train-data", str(MMEDIT / name))]
    return [*arguments, "--config", str(place / "fast.json"), *more]


def rows(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_whole_protocol_by_its_command(place, tmp_path):
    result = runner.invoke(app, command(place, tmp_path / "run"))
    assert result.exit_code == 0, result.output
    found = rows(tmp_path / "run/seed0")
    assert sorted(r["id"] for r in found) == [f"vqa_eval:{i}" for i in range(7)]
    assert all([p["kind"] for p in r["probes"]] == ["rel", "t_gen", "m_gen", "t_loc", "m_loc"] for r in found)
    assert all(p["exact"] is not None and 0 <= p["before"] <= 1 for r in found for p in r["probes"])
    first = next(r for r in found if r["id"] == "vqa_eval:0")
    assert first["probes"][0]["prompt"] == "Question: How many tennis balls are in the picture? Short answer:"
    text = (tmp_path / "run/seed0/summary.txt").read_text()
    assert text.rstrip() in result.output
    assert {line.split()[0] for line in text.splitlines()} >= {"before", "after", "95", "exact", "locality"}
    rel = sum(r["probes"][0]["after"] for r in found) / 7
    assert f"{100 * rel:.1f}" in text.split("after")[1].split()[0]
    assert "2 records and" not in result.output and "locality questions" in result.output  # of MMEdit's own overlap
    assert "vqa_eval.json: 7 records of vqa" in result.output
    again = runner.invoke(app, command(place, tmp_path / "run"))
    assert again.exit_code == 0 and rows(tmp_path / "run/seed0") == found and text.rstrip() in again.output


def test_the_model_may_lie_on_another_device(place, tmp_path):
    with second_device() as there:
        arguments = ["--device", str(there), "--protocol", "sequential", "-k", "2"]
        result = runner.invoke(app, command(place, tmp_path / "run", *arguments))
    assert result.exit_code == 0, result.output
    found = rows(tmp_path / "run/seed0")  # 6 of the 7 records, in 3 sequences
    assert len({r["id"] for r in found}) == 6 and {r["sequence"] for r in found} == {0, 1, 2}


@pytest.mark.parametrize("file", ["vqa_eval.json", "vqa_train.json"])
@pytest.mark.parametrize("wrong", ["damaged", "long"])
def test_what_the_model_cannot_take_is_told_before_anything_is_learned(place, tmp_path, monkeypatch, file, wrong):
    monkeypatch.setattr(Unike, "fit", None)
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    asked = json.loads((MMEDIT / file).read_text())
    if wrong == "damaged":
        path = tmp_path / "pictures" / asked[3]["m_loc"]
        path.write_bytes(path.read_bytes()[:60])
        asked[3]["m_loc_q"] = "What is this new thing?"  # no other file asks it
    else:
        asked[3]["loc"] = "what is this " * 300
    (tmp_path / file).write_text(json.dumps(asked))
    option = "--data" if file == "vqa_eval.json" else "--train-data"
    arguments = command(place, tmp_path / "run", "--images", str(tmp_path / "pictures"))
    arguments[arguments.index(option) + 1] = str(tmp_path / file)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1, result.output
    name = f"the {'m_loc' if wrong == 'damaged' else 't_loc'} question of record '{Path(file).stem}:3'"
    assert f"{name}{':' if wrong == 'damaged' else ' is '}" in result.output


def test_a_stopped_command_goes_on_and_ends_as_if_it_had_not_been(place, tmp_path, monkeypatch):
    arguments = ["--protocol", "sequential", "-k", "3", "--routed", "--no-generate"]
    whole = runner.invoke(app, command(place, tmp_path / "whole", *arguments))
    assert whole.exit_code == 0, whole.output
    append = runs.Run.append

    def stopping(left):
        def stopped(self, result):
            append(self, result)
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        return stopped

    for n in (1, 2, 99):
        monkeypatch.setattr(runs.Run, "append", stopping([n]))
        result = runner.invoke(app, command(place, tmp_path / "run", *arguments))
        if n < 99:  # what is written stays
            assert result.exit_code != 0 and len(rows(tmp_path / "run/seed0")) == {1: 2, 2: 5}[n]
        if n == 1:
            with open(tmp_path / "run/seed0/samples.jsonl", "ab") as file:
                file.write(b'{"id": "vqa_ev')
    assert result.exit_code == 0, result.output
    found, wanted = rows(tmp_path / "run/seed0"), rows(tmp_path / "whole/seed0")
    assert len(wanted) == 6 and Counter(r["id"] for r in found) == Counter(r["id"] for r in wanted)
    assert sorted(found, key=lambda r: r["id"]) == sorted(wanted, key=lambda r: r["id"])
    for name in ("seed0/summary.txt", "run.json", "seed0/run.json"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert "1 records are left out, too few for another sequence of 3" in result.output
    assert "edits made since" in result.output and "own edit acts" in result.output
    assert "memory and encoders as saved in" in result.output


def test_a_run_stopped_while_it_learns_learns_again(place, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.Editor, "calibrate", stop)
    result = runner.invoke(app, command(place, tmp_path / "run", "--limit", "1"))
    assert result.exit_code != 0 and not (tmp_path / "run/memory/editor.safetensors").exists()
    monkeypatch.undo()
    result = runner.invoke(app, command(place, tmp_path / "run", "--limit", "1"))
    assert result.exit_code == 0, result.output


def test_another_runs_folder_is_refused_before_the_model_is_loaded(place, tmp_path, monkeypatch):
    assert runner.invoke(app, command(place, tmp_path / "run", "--limit", "1")).exit_code == 0
    found = rows(tmp_path / "run/seed0")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load", lambda *a, **k: pytest.fail("loaded"))
        result = runner.invoke(app, command(place, tmp_path / "run", "--limit", "2", "--routed", "--prompts", "raw"))
    assert result.exit_code == 1
    assert "holds another run (there, here): limit: 1 and 2" in result.output
    assert 'method.routing: "always" and "routed"' in result.output and 'prompts: "auto" and "raw"' in result.output
    result = runner.invoke(app, command(place, tmp_path / "run", "--limit", "1", "--dtype", "bfloat16"))
    assert result.exit_code == 1 and 'dtype: "float32" and "bfloat16"' in result.output
    other = tmp_path / "other"
    shutil.copytree(place / "model", other / "model")
    model = Blip2ForConditionalGeneration.from_pretrained(other / "model")
    with torch.no_grad():
        model.language_model.model.decoder.layers[5].fc1.weight.mul_(1.5)
    model.save_pretrained(other / "model")
    arguments = command(place, tmp_path / "run", "--limit", "1")
    arguments[arguments.index("--model") + 1] = str(other / "model")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "model.weights:" in result.output and "model.name:" in result.output
    assert rows(tmp_path / "run/seed0") == found
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("x")
    result = runner.invoke(app, command(place, tmp_path / "thesis"))
    assert result.exit_code == 1 and "is not empty and holds no run" in result.output


@pytest.mark.parametrize("option", ["--batch-size", "--memory", "--limit", "-k"])
def test_counts_are_at_least_one(place, tmp_path, option):
    result = runner.invoke(app, command(place, tmp_path / "run", option, "0"))
    assert result.exit_code == 2 and option in result.output
    assert not (tmp_path / "run").exists()


def test_another_processor_is_another_run(place, tmp_path):
    shutil.copytree(place, tmp_path / "other", ignore=shutil.ignore_patterns("pictures"))
    (tmp_path / "other/pictures").symlink_to(place / "pictures")
    arguments = command(tmp_path / "other", tmp_path / "run", "--limit", "1", "--no-generate")
    assert runner.invoke(app, arguments).exit_code == 0
    path = tmp_path / "other/model/processor_config.json"
    told = json.loads(path.read_text())
    told["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(told))
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "processor: " in result.output


def test_a_routed_run_learns_from_rephrasings(place, tmp_path):
    result = runner.invoke(app, command(place, tmp_path / "run", "--routed", "--limit", "1", "--no-generate"))
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "run/memory/editor.safetensors", "pt") as file:
        questions = json.loads(file.metadata()["editor"])["questions"]
    asked = Counter(q for q in questions if q is not None)
    assert asked and set(asked.values()) == {3}  # its prompt, its rephrasing, and another picture


def test_two_files_of_one_name_are_two(place, tmp_path):
    names = []
    for n, source in enumerate(("vqa_train.json", "caption_train_edit.json")):
        (tmp_path / str(n)).mkdir()
        shutil.copy(MMEDIT / source, tmp_path / str(n) / "train.json")
        names.append(tmp_path / str(n) / "train.json")
    arguments = command(place, tmp_path / "run", "--routed", "--limit", "1", "--no-generate", train=names)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "run/memory/editor.safetensors", "pt") as file:
        told = json.loads(file.metadata()["editor"])
    questions = {q for q in told["questions"] if q is not None}
    assert {q.partition(":")[0] for q in questions} == {"train.0", "train.1"}
    names[0].write_text(json.dumps(json.loads(names[0].read_text())[:3]))
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "train_data: " in result.output


def test_a_folder_whose_first_file_could_not_be_written_is_free(place, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "fsync", full)
        result = runner.invoke(app, command(place, tmp_path / "run", "--limit", "1"))
    assert result.exit_code == 1 and "No space left" in result.output
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run/run.json.123.tmp").write_text("{")  # of a kill
    runs.claim(tmp_path / "run", {"seed": 0})
    assert json.loads((tmp_path / "run/run.json").read_text()) == {"seed": 0}


def test_cross_task_mixes_questions_and_captions_over_seeds(place, tmp_path):
    both = {"data": ("vqa_eval.json", "caption_eval_edit.json"), "train": ("vqa_train.json", "caption_train_edit.json")}
    arguments = ["--protocol", "cross-task", "-k", "2", "--limit", "4", "--seed", "0", "--seed", "1", "--no-generate"]
    result = runner.invoke(app, command(place, tmp_path / "run", *arguments, **both))
    assert result.exit_code == 0, result.output
    for seed in (0, 1):
        found = rows(tmp_path / f"run/seed{seed}")
        assert Counter((r["sequence"], r["task"]) for r in found) == {
            (g, t): 1 for g in (0, 1) for t in ("vqa", "caption")
        }
        assert all(p["exact"] is None for r in found for p in r["probes"])
        text = (tmp_path / f"run/seed{seed}/summary.txt").read_text()
        assert "\nvqa\n" in text and "\ncaption\n" in text
    assert "percent, 2 seeds" in result.output and "standard deviation" in result.output


def test_missing_pictures_are_one_error_with_all_names_in_a_file(place, tmp_path):
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    gone = [datasets.read(MMEDIT / "vqa_eval.json").entries[0].image_rephrase]
    gone.append(datasets.read(MMEDIT / "vqa_train.json").entries[6].m_loc_image)
    for name in gone:
        (tmp_path / "pictures" / name).unlink()
    arguments = command(place, tmp_path / "run")
    arguments[arguments.index("--images") + 1] = str(tmp_path / "pictures")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "2 of " in result.output and all(Path(n).name in result.output for n in gone)
    assert (tmp_path / "run-missing-pictures.txt").read_text().split() == sorted(gone)
    assert not (tmp_path / "run").exists()


def test_pictures_of_metrics_not_asked_for_may_be_missing(place, tmp_path):
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    shutil.rmtree(tmp_path / "pictures/val2014_image_rephrase")
    arguments = command(place, tmp_path / "run", "--metrics", "rel,t_gen,t_loc,m_loc", "--limit", "2", "--no-generate")
    arguments[arguments.index("--images") + 1] = str(tmp_path / "pictures")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {p["kind"] for r in rows(tmp_path / "run/seed0") for p in r["probes"]} == {"rel", "t_gen", "t_loc", "m_loc"}
    assert "M-Gen" not in (tmp_path / "run/seed0/summary.txt").read_text()


def test_portability_of_vlkeb_is_a_column(place, tmp_path):
    told = []
    job = Job(
        str(place / "model"),
        [VLKEB / "eval_multihop.json"],
        [MMEDIT / "vqa_train.json"],
        place / "pictures",
        tmp_path / "run",
        prompts="raw",
        config=FAST,
        progress=False,
    )
    (summary,) = run(job, told.append)
    assert summary.records == 2 and "port" in summary.after and "Port" in "\n".join(told)
    parts = [[p["part"] for p in r["probes"] if p["kind"] == "port"] for r in rows(tmp_path / "run/seed0")]
    assert sorted(parts) == [[], ["1-hop", "2-hop"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--protocol", "all"), "must be one of one-step, sequential, cross-task"),
        (("--protocol", "sequential", "-k", "9"), "needs at least 9 records, but there are 7"),
        (("--metrics", "rel,gen"), "metrics must be some of rel, t_gen"),
        (("--dtype", "int8"), "dtype must be one of auto, float32"),
        (("--prompts", "short"), "the prompt style is 'short'"),
        (("--device", "cuda:99"), "the device 'cuda:99' cannot be used"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(place, tmp_path, more, message):
    result = runner.invoke(app, command(place, tmp_path / "run", *more))
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "run").exists()


def test_a_malformed_file_is_named(place, tmp_path):
    (tmp_path / "bad.json").write_text('[{"src": "who?"}]')
    arguments = command(place, tmp_path / "run")
    arguments[arguments.index("--data") + 1] = str(tmp_path / "bad.json")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "bad.json: record 0: key 'alt' is missing" in result.output
    (tmp_path / "bad.json").unlink()
    assert runner.invoke(app, arguments).exit_code == 2  # typer's own: there is no such file
    arguments = command(place, tmp_path / "run")
    arguments[arguments.index("--model") + 1] = str(tmp_path / "nowhere")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "nowhere" in result.output and not (tmp_path / "run").exists()


def test_what_is_evaluated_is_not_learned_from(tmp_path):
    train, evaluation = (datasets.read(MMEDIT / f"vqa_{n}.json") for n in ("train", "eval"))
    root = drawn(tmp_path, dict.fromkeys([*train.pictures(), *evaluation.pictures()]))
    from unike_kernels.evaluation.prompts import STYLES

    known, asked = (d.records(STYLES["raw"], root) for d in (train, evaluation))
    left, records, probes = without_seen(known, asked)
    seen = {(str(p.sample.image), p.sample.prompt) for r in asked for p in r.probes if p.sample.image}
    assert (
        len(left) == 7
        and records == 0
        and probes
        == sum((str(p.sample.image), p.sample.prompt) in seen for r in known for p in r.probes if p.sample.image)
    )
    assert probes >= 1
    twin = Record("twin", asked[0].request, (Probe("rel", asked[0].request),))
    assert without_seen([*known, twin], asked)[1:] == (1, probes)


def test_a_models_class_device_and_type(place):
    model, processor = load(str(place / "model"), dtype="bfloat16", device="cpu")
    assert type(model) is Blip2ForConditionalGeneration and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert processor.num_query_tokens == emoji.QUERY_TOKENS
    model, _ = load(str(place / "model"), device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_large_group_goes_on_where_its_edits_were_stopped(tmp_path, monkeypatch):
    from tests.editing_tiny import make_editor
    from tests.test_protocols import sample
    from unike_kernels.evaluation import unike

    monkeypatch.setattr(unike, "SAVED_EVERY", 2)
    assert SAVED_EVERY > 2
    editor = make_editor("blip2")
    requests = [sample(i) for i in range(5)]
    with Unike(editor).apply(requests) as edited:
        whole = edited.handle.edits
    edit, calls = editor.edit, []

    def counted(requests, **options):
        calls.append(len(requests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return edit(requests, **options)

    monkeypatch.setattr(editor, "edit", counted)
    with pytest.raises(KeyboardInterrupt), Unike(editor, cache=tmp_path).apply(requests):
        pass
    with Unike(editor, cache=tmp_path).apply(requests) as edited:
        found = edited.handle.edits
    assert calls == [2, 2, 1, 1]  # the first four were not made again
    with pytest.raises(KeyboardInterrupt), Unike(editor, cache=tmp_path).apply(requests):
        raise KeyboardInterrupt  # while the edits are asked about
    with Unike(editor, cache=tmp_path).apply(requests) as edited:
        assert edited.handle.edits.ids == whole.ids
    assert calls == [2, 2, 1, 1, 2, 2, 1]  # none was made again
    assert found.ids == whole.ids and not list(tmp_path.iterdir())
    ours, theirs = found.named_tensors(), whole.named_tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


@pytest.mark.parametrize("other", ["weights", "memory"])
def test_edits_that_a_stop_left_are_of_no_other_editor(tmp_path, monkeypatch, other):
    from tests.editing_tiny import make_editor
    from tests.test_protocols import sample
    from unike_kernels.evaluation import unike

    monkeypatch.setattr(unike, "SAVED_EVERY", 2)
    editor, second = make_editor("blip2"), make_editor("blip2")
    requests = [sample(i) for i in range(3)]
    with pytest.raises(KeyboardInterrupt), Unike(editor, cache=tmp_path).apply(requests):
        raise KeyboardInterrupt
    if other == "weights":
        with torch.no_grad():
            for weights in second.model.parameters():
                weights.mul_(1.01)
    else:
        for states in second.states.layers.values():
            for rows in vars(states).values():
                rows += 0.01
    with Unike(second, cache=tmp_path).apply(requests) as edited:
        found = edited.handle.edits
    with Unike(second).apply(requests) as edited:
        theirs = edited.handle.edits.named_tensors()
    assert all(torch.equal(t, theirs[n]) for n, t in found.named_tensors().items())
    assert found.base == second.base


def test_a_model_with_a_chat_template_is_asked_in_it(place, tmp_path, monkeypatch):
    """LLaVA: another class, whose prompts hold the picture's token."""
    from transformers import AutoProcessor, LlavaProcessor

    from tests import editing_tiny, models_tiny

    monkeypatch.setattr(models_tiny, "VOCABULARY", emoji.VOCABULARY)
    tokenizer = AutoProcessor.from_pretrained(place / "model").tokenizer
    tokenizer.add_special_tokens({"bos_token": "</s>"})
    chat = "{% for m in messages %}USER: {% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}"
    chat += "{{ p.text }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
    like = editing_tiny.make_processor("llava")
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(like.image_processor, tokenizer, image_token="<image>", chat_template=chat, **options)
    processor.save_pretrained(tmp_path / "model")
    models_tiny.make_model("llava").save_pretrained(tmp_path / "model")
    fast = UnikeConfig(layers=(3, 4), encoders=FAST.encoders, neurons=FAST.neurons)
    job = Job(
        str(tmp_path / "model"),
        [MMEDIT / "vqa_eval.json"],
        [MMEDIT / "vqa_train.json"],
        place / "pictures",
        tmp_path / "run",
        limit=1,
        config=fast,
        progress=False,
    )
    run(job, lambda text: None)
    (row,) = rows(tmp_path / "run/seed0")
    prompts = {p["kind"]: p["prompt"] for p in row["probes"]}
    assert all(prompts[k].startswith("USER: <image>") for k in ("rel", "t_gen", "m_gen", "m_loc"))
    assert prompts["t_loc"].startswith("USER: nq question: ") and "<image>" not in prompts["t_loc"]
    assert json.loads((tmp_path / "run/run.json").read_text())["model"]["class"] == "LlavaForConditionalGeneration"


def test_seeds_are_averaged():
    from tests.test_protocols import five, result_of

    found = [Summary.of([result_of("a", 0, 0, five(rel, (1.0,), 1.0, 1.0, 1.0))]) for rel in (1.0, 0.5)]
    lines = across(found).splitlines()
    assert lines[1].split() == ["mean", "75.0", "100.0", "100.0", "100.0", "100.0", "95.0"]
    assert lines[2].split()[:3] == ["standard", "deviation", "35.4"]

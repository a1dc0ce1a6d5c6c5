"""The baselines on tiny random models of both decoder families: edits act, go without a trace, and come one by one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from bench.quality.baselines import METHODS
from bench.quality.baselines.base import Baseline, asking
from bench.quality.baselines.ike import Ike, WithIke
from bench.quality.baselines.serac import Serac
from tests.editing_tiny import QUESTIONS, TARGETS, ask, make_processor
from tests.models_tiny import make_model
from unike_kernels.editing.inputs import Sample
from unike_kernels.evaluation.methods import Edited
from unike_kernels.evaluation.records import Probe, Record
from unike_kernels.models import UnsupportedModelError

BASES = ("blip2", "llama")
PAIRS = [(base, name) for base in BASES for name in METHODS]
_NETWORKS = {"steps": 60, "batch": 4, "lr": 3e-3}
SMALL = {  # few steps, since nothing here asks how well anything learned
    "FT": {"steps": 10},
    "KE": _NETWORKS,
    "MEND": _NETWORKS,
    "SERAC": {**_NETWORKS, "answer_steps": 60, "width": 32, "heads": 2},
    "SERAC, image-aware": {**_NETWORKS, "answer_steps": 60, "width": 32, "heads": 2},
    "T-Patcher": {"steps": 20},
    "GRACE": {"lr": 0.3, "steps": 10},
    "LoRA": {"steps": 10},
}


def question(name: str, n: int, image: int, target: str) -> Sample:
    asked = ask(name, QUESTIONS[n % 3], image)
    return Sample(asked["prompt"], target, asked["image"])


def training(name: str, n: int = 16) -> list[Record]:
    """Edits with one probe of every kind."""
    out = []
    for i in range(n):
        target = TARGETS[i % len(TARGETS)]
        request = question(name, 0, 100 + i, target)
        probes = (
            Probe("rel", request),
            Probe("t_gen", question(name, 1, 100 + i, target)),
            Probe("m_gen", question(name, 0, 200 + i, target)),
            Probe("m_loc", question(name, 2, 300 + i, TARGETS[(i + 1) % len(TARGETS)]), "other_concept"),
            Probe("t_loc", Sample("the old house ? answer :", TARGETS[(i + 2) % len(TARGETS)]), "random"),
        )
        out.append(Record(f"r{i}", request, probes))
    return out


def requests(name: str, n: int = 3) -> list[Sample]:
    return [question(name, 0, i, TARGETS[-1 - i]) for i in range(n)]


@pytest.fixture(scope="module")
def fitted() -> Iterator[Any]:
    """(base, method's name) -> the fitted method, made once."""
    made: dict[tuple[str, str], Baseline] = {}

    def get(base: str, name: str) -> Baseline:
        torch.set_num_threads(1)
        if (base, name) not in made:
            cls = METHODS[name]
            config = dataclasses.replace(cls.trials()[0], **SMALL.get(name, {}))
            method = cls(make_model(base), make_processor(base), config)
            method.fit(training(base))
            made[base, name] = method
        return made[base, name]

    yield get


@torch.no_grad()
def answers(method: Baseline, samples: Sequence[Sample], edited: Edited | None = None) -> list[Tensor]:
    """Logits of every row up to its last real token."""
    told = [edited.prompt(s) for s in samples] if edited else list(samples)
    out: list[Tensor] = [torch.zeros(0)] * len(told)
    for batch in method.host.collator.batches(told, 8, eos=False):
        with edited.running(batch) if edited else asking(batch):
            logits = batch.model(**batch.inputs).logits
        for r, row in enumerate(batch.rows):
            out[row] = logits[r][batch.inputs["attention_mask"][r] != 0]
    return out


def target_loss(method: Baseline, sample: Sample, edited: Edited | None) -> float:
    told = edited.prompt(sample) if edited else sample
    batch = method.host.collator.batch([told], [0], eos=False)
    with edited.running(batch) if edited else asking(batch), torch.no_grad():
        logits = batch.model(**batch.inputs).logits
    wanted = torch.where(batch.target_mask, batch.inputs["input_ids"], -100)[:, 1:]
    return float(nn.functional.cross_entropy(logits[0, :-1].float(), wanted[0]))


@pytest.mark.parametrize(("base", "name"), PAIRS)
def test_an_edit_acts_and_leaves_no_trace(base, name, fitted):
    method = fitted(base, name)
    state = copy.deepcopy(method.host.model.state_dict())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in method.host.model.modules())
    (request,) = requests(base, 1)
    before, loss = answers(method, [request]), target_loss(method, request, None)
    with method.apply([request]) as edited:
        during = target_loss(method, request, edited)
    after = answers(method, [request])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in method.host.model.state_dict().items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in method.host.model.modules())
    if isinstance(method, Ike):  # a random model does not follow demonstrations: that it is asked otherwise is all
        assert during != loss
    else:
        assert during < loss


@pytest.mark.parametrize(("base", "name"), PAIRS)
def test_the_base_comes_back_after_an_error(base, name, fitted):
    method = fitted(base, name)
    before = answers(method, requests(base))
    with pytest.raises(KeyError), method.apply(requests(base, 1)):
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, answers(method, requests(base)), strict=True))


@pytest.mark.parametrize(("base", "name"), PAIRS)
def test_three_edits_on_one_model_are_deterministic(base, name, fitted):
    method = fitted(base, name)
    three = requests(base)
    found = []
    for _ in range(2):
        with method.apply(three) as edited:
            found.append(answers(method, three, edited))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    base_answers = answers(method, three)
    changed = [a.shape != b.shape or not torch.equal(a, b) for a, b in zip(found[0], base_answers, strict=True)]
    assert any(changed)


@pytest.mark.parametrize(("base", "name"), PAIRS)
def test_one_step_gives_what_apply_gives(base, name, fitted):
    method = fitted(base, name)
    three = requests(base)
    for request, one in zip(three, method.one_step(three), strict=True):
        with one as edited:
            many = answers(method, [request], edited)[0]
        with method.apply([request]) as edited:
            alone = answers(method, [request], edited)[0]
        torch.testing.assert_close(many, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_edited_is_refused(name, fitted):
    with pytest.raises(UnsupportedModelError, match="no decoder of a known family"):
        METHODS[name](nn.Sequential(nn.Linear(4, 4)), make_processor("llama"))
    method = fitted("llama", name)
    with (
        pytest.raises(ValueError, match="request 1 needs a prompt and a target"),
        method.apply([requests("llama", 1)[0], Sample("what is this ? answer :", " ")]),
    ):
        raise AssertionError("entered")


@pytest.mark.parametrize("name", ["KE", "MEND", "SERAC", "T-Patcher", "GRACE", "IKE"])
def test_what_was_not_fitted_says_so(name):
    method = METHODS[name](make_model("llama"), make_processor("llama"))
    with pytest.raises(ValueError, match="fit"), method.apply(requests("llama", 1)):
        raise AssertionError("entered")


@pytest.mark.parametrize("name", METHODS)
def test_as_many_trials_for_every_method(name):
    trials = METHODS[name].trials()
    assert len(trials) == 4 == len(set(trials))
    assert METHODS[name].source


@pytest.mark.parametrize("name", ["MEND", "SERAC"])
def test_training_resumes_and_is_cached(name, tmp_path, monkeypatch):
    from bench.quality.baselines import training as t

    cls = METHODS[name]
    config = dataclasses.replace(cls.trials()[0], **SMALL[name])

    def fit(folder=None):
        method = cls(make_model("llama"), make_processor("llama"), config)
        method.fit(training("llama"), cache=folder, progress=False)
        network = method.answers if isinstance(method, Serac) else method.network
        return {k: v.clone() for k, v in network.state_dict().items()}

    whole = fit()
    monkeypatch.setattr(t, "SAVE_EVERY", -1.0)
    step = t.tqdm.update

    seen = []

    def stop(self, n=1):
        step(self, n)
        seen.append(n)
        if len(seen) == 55:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(t.tqdm, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
    assert [f.suffix for f in tmp_path.iterdir()] == [".partial"]
    resumed = fit(tmp_path)
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}
    monkeypatch.setattr(t.torch.optim, "Adam", None)  # nothing trains any more
    cached = fit(tmp_path)
    assert all(torch.equal(v, cached[k]) for k, v in whole.items())


@pytest.mark.parametrize("name", ["SERAC, image-aware", "GRACE"])
def test_generation_is_edited_as_teacher_forcing_is(name, fitted):
    """The first generated token, and the next ones given it, are those of the teacher-forced pass."""
    method = fitted("blip2", name)
    request = requests("blip2", 1)[0]
    with method.apply([request]) as edited:
        asked = Sample(request.prompt, None, request.image)
        batch = method.host.collator.batch([asked, asked], [0, 1], side="left")
        with edited.running(batch):
            new = method.host.collator.generate_ids(batch, 3, min_new_tokens=3)
            assert edited.acting() == [[0], [0]]
        prompt = batch.inputs["input_ids"]
        full = method.host.collator.batch([asked], [0])
        ids = torch.cat([prompt[:1], new[:1]], dim=1)
        full.inputs = {**full.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with edited.running(full), torch.no_grad():
            logits = full.model(**full.inputs).logits[0, prompt.shape[1] - 1 : -1]
    logits[:, method.host.collator.eos] = -torch.inf
    assert logits.argmax(dim=-1).tolist() == new[0].tolist()


def test_the_training_split_shows_nothing_that_is_edited_or_compared():
    from bench.quality.baselines.training_split import benchmark_records, members, training_records
    from bench.quality.emoji import data, records
    from bench.quality.world import picture

    found = training_records(200)
    assert len({r.id for r in found}) == 200 and {r.task for r in found} == {"name", "rename", "other name", "caption"}
    shown = {id(p.sample.image) for r in found for p in r.probes}
    ids = {c.id for c in members()}
    for split in ("development", "reported"):
        for task in records.TASKS:
            assert not ids & {c.id for c in records.edited(split, task)}
        for record in benchmark_records(split, "name", 60):
            assert record.probes[0].kind == "rel" and record.request == record.probes[0].sample
            compared = {id(p.sample.image) for p in record.probes if p.sample.image is not None}
            assert not compared & shown
    allowed = {id(picture(c.image(artist))) for c in members() for artist in c.artists}
    assert shown <= allowed | {id(None)}
    names = {c.name for c in data.concepts()} - {c.name for c in members()}
    assert not names & {r.request.target for r in found}
    for record in found:
        kinds = {p.kind for p in record.probes}
        assert kinds == {"rel", "t_gen", "m_gen", "t_loc", "m_loc"}
        parts = {p.part for p in record.probes if p.kind == "m_loc"}
        assert parts == {"other_concept", "same_subgroup", "same_picture", "other_question"}


def test_what_is_learned_is_kept_under_all_that_it_depends_on():
    from bench.quality.baselines import mend
    from bench.quality.baselines import training as t

    model, records = make_model("llama"), training("llama", 4)
    told = {"steps": 3}
    first = t.key(model, records, told, [mend])
    assert first == t.key(make_model("llama"), training("llama", 4), told, [mend])
    others = [
        t.key(make_model("llama", seed=1), records, told, [mend]),
        t.key(model, records[:3], told, [mend]),
        t.key(model, records, {"steps": 4}, [mend]),
        t.key(model, records, told, [mend, t]),
    ]
    assert len({first, *others}) == 5
    assert t._meaning('"""a"""\nx = 1  # b\n') == t._meaning("x = 1\n") != t._meaning("x = 2\n")


def test_ike_asks_behind_the_nearest_fact_within_the_context(fitted):
    method = fitted("llama", "IKE")
    first, second = requests("llama", 2)
    other = dataclasses.replace(second, prompt="the big fish", target="moon")
    with method.apply([first, other]) as edited:
        asked = edited.prompt(Sample("the big fish", "red dog"))
    assert asked.prompt.endswith("New Fact: the big fish moon\nPrompt: the big fish") and asked.target == "red dog"
    ids = method.host.collator.tokenizer(asked.prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) + 3 <= method.host.model.config.max_position_embeddings
    assert "Prompt:" in asked.prompt[: -len("Prompt: the big fish")]  # at least one demonstration found room


def test_whether_a_base_follows_is_asked_without_the_facts_own_demonstration(monkeypatch):
    method, records, asked = METHODS["IKE"](make_model("llama"), make_processor("llama")), training("llama", 4), []
    monkeypatch.setattr(method, "accuracy", lambda samples: asked.append(samples) or 0.5)
    method.fit(records)
    behind, _ = asked
    for record, own, sample in zip(records, method.demonstrations, behind, strict=True):
        assert own not in sample.prompt and any(d in sample.prompt for d in method.demonstrations if d != own)
        assert own in method.asked(record.request, record.request).prompt


def test_of_two_edits_that_ask_the_same_the_later_one_counts(fitted):
    for name in ("GRACE", "SERAC", "SERAC, image-aware"):
        method = fitted("blip2", name)
        (request,) = requests("blip2", 1)
        with method.apply([dataclasses.replace(request, target="green cat"), request]) as edited:
            batch = method.host.collator.batch([request], [0], eos=False)
            with edited.running(batch), torch.no_grad():
                batch.model(**batch.inputs)
                assert edited.acting() == [[1]]


@pytest.mark.parametrize("base", BASES)
def test_an_edit_is_known_by_the_state_that_its_question_is_asked_with(base, fitted, monkeypatch):
    from bench.quality.baselines.serac import Replacing

    method, samples = fitted(base, "SERAC, image-aware"), requests(base)
    seen = []
    monkeypatch.setattr(Replacing, "_decide", lambda self, states, position: seen.append(states))
    with method.apply(samples) as edited:
        batch = method.host.collator.batch(samples, [0, 1, 2], eos=False)
        with edited.running(batch), torch.no_grad():
            batch.model(**batch.inputs)
    torch.testing.assert_close(seen[0], method.states(samples))


def test_the_table_says_na_for_ike_on_a_model_that_does_not_follow():
    from bench.quality.baselines.__main__ import table

    five = dict.fromkeys(("rel", "t_gen", "m_gen", "t_loc", "m_loc", "mean"), 50.0)
    local = {"t_loc": 99.0, "m_loc": 98.0}
    shown = {"after": five, "locality_b": local, "exact": {"rel": 10.0}, "seconds": 0.5, "training_rel": 91.25}
    lines = table({"IKE": {"in_context": 0.2, "without": 0.25}, "FT": shown}).splitlines()
    assert lines[2].startswith("| IKE (in-context accuracy 20.0, without 25.0) | n/a | n/a |")
    assert lines[3] == "| FT | 91.2 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 99.0 | 98.0 | 10.0 | 0.50 |"


def test_the_search_shows_what_each_setting_changes_and_its_means():
    from bench.quality.baselines.__main__ import searched, trial

    first, second, *rest = METHODS["MEND"].trials()
    means = {("name", first): 80.0, ("caption", first): 90.0, ("name", second): 81.0}
    of = {"of": {"edits": 25}}
    rows = {trial("MEND", task, config): {"after": {"mean": mean}} | of for (task, config), mean in means.items()}
    rows[trial("MEND", "caption", second)] = {"after": {"mean": 99.0}, "of": {"edits": 50}}  # of another search
    lines = searched({0: rows, 1: rows}, ["MEND"], 25).splitlines()
    assert lines[0] == "| method | changed | names, 0 | captions, 0 | names, 1 | captions, 1 | mean |"
    assert len(lines) == 4 + len(rest)
    assert lines[2] == "| MEND | chosen | 80.0 | 90.0 | 80.0 | 90.0 | 85.0 |"
    assert lines[3] == "| MEND | edit_weight 1.0 | 81.0 | - | 81.0 | - | - |"


@pytest.mark.parametrize("base", BASES)
def test_ike_stands_before_another_methods_edits(base, fitted):
    inner, ike = fitted(base, "FT"), fitted(base, "IKE")
    ike = Ike(inner.host.model, inner.host.collator.processor, ike.config)  # on the edited model itself
    ike.fit(training(base))
    method = WithIke(inner, ike, "FT + IKE")
    some = requests(base, 2)
    bare = answers(inner, some)
    together = list(method.one_step(some))
    assert len(together) == 2 and method.settings()["ike"] == ike.settings()
    with together[1] as edited:
        told = edited.prompt(some[1])
        assert told.prompt != some[1].prompt and str(some[1].target) in told.prompt and told.target == some[1].target
        prompted = answers(inner, [some[1]], edited)[0]
    with ike.apply([some[1]]) as only:
        assert told == only.prompt(some[1])
        assert not torch.equal(prompted, answers(inner, [some[1]], only)[0])  # the weights' edit acts, too
    with method.apply(some) as edited:
        assert str(some[0].target) in edited.prompt(some[0]).prompt
    assert all(torch.equal(a, b) for a, b in zip(bare, answers(inner, some), strict=True))


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])  # SmolLM2 pads with its end
@pytest.mark.parametrize("name", ["SERAC", "SERAC, image-aware"])
def test_serac_reads_the_question_alone(name, pad, monkeypatch):
    """As it learns it: not MiniGPT-4's template, which stands before the picture, and not what pads it."""
    from bench.quality.baselines import serac
    from bench.quality.smollm import model
    from bench.quality.world import picture
    from tests.smollm_tiny import make_net, make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    shown = [
        Sample(p, " crutch", picture("noto/1fa7c.png")) for p in ("What is this?", "Question: what is it? Answer:")
    ]
    told = Sample("Question: what is a crutch? Answer:", " wood")
    records = [Record(str(n), s, (Probe("rel", s), Probe("t_loc", told))) for n, s in enumerate(shown)]
    cls = METHODS[name]
    config = dataclasses.replace(cls.trials()[0], steps=1, answer_steps=1, batch=2, width=32, heads=2)
    method = cls(make_net(tokenizer), model.make_processor(tokenizer), config)
    method.fit(records)
    read, padded = [], serac.padded
    monkeypatch.setattr(serac, "padded", lambda rows, device: read.append(rows) or padded(rows, device))
    monkeypatch.setattr(serac.Scope, "logit", lambda self, a, b: torch.ones(len(a), b.shape[-2]))  # all in scope
    questions = [method.ids(s.prompt) for s in shown]
    edit = [*questions[1], *method.answer_ids(shown[1]), *method.end(), *method.ids("\n")]
    with method.apply(shown[1:]) as edited, torch.no_grad():
        batch = method.host.collator.batch(shown, [0, 1], eos=False)
        read.clear()
        with edited.running(batch):
            batch.model(**batch.inputs)
        asked, continued = read
        assert asked == questions
        target = method.host.collator.target_ids(shown[0].prompt, shown[0].target)
        assert continued[0][: len(edit + questions[0] + target)] == edit + questions[0] + target
        batch = method.host.collator.batch([Sample(s.prompt, None, s.image) for s in shown], [0, 1], side="left")
        read.clear()
        with edited.running(batch):
            method.host.collator.generate_ids(batch, 1)
        assert read == [questions, [edit + q for q in questions]]
    monkeypatch.setattr(method.host.collator.processor, "template", "<ImageHere>{} Say it:")
    with pytest.raises(ValueError, match="'What is this.' is read as .*, which does not end in its own tokens"):
        method.lead(shown[0])

"""Protocols on a tiny BLIP-2: who is on the model with whom, what is measured, and what a stop costs."""

import json
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import TARGETS, ask, make_editor, make_processor, make_triplets, routed
from tests.models_tiny import make_model
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.evaluation import metrics, protocols
from unike_kernels.evaluation.examiner import Examiner
from unike_kernels.evaluation.methods import Edited, Method
from unike_kernels.evaluation.records import KINDS, Probe, Record
from unike_kernels.evaluation.runs import OtherRunError, Run
from unike_kernels.evaluation.summary import Summary, retention
from unike_kernels.evaluation.unike import Unike


def sample(i, question="what is this ? answer :", target=None, image=True):
    asked = ask("blip2", question, i if image else None)
    return Sample(asked["prompt"], target or TARGETS[i % len(TARGETS)], asked["image"])


def make_records(n, task="vqa", start=0):
    """n edits about n pictures, one probe of each kind and a second rephrasing."""
    out = []
    for i in range(start, start + n):
        request = sample(i)
        probes = (
            Probe("rel", request),
            Probe("t_gen", sample(i, "which thing do you see ?")),
            Probe("t_gen", sample(i, "what is the thing ? answer :")),
            Probe("m_gen", Sample(request.prompt, request.target, sample(i + 50).image)),
            Probe("t_loc", sample(i, "what is a car ?", "red dog", image=False)),
            Probe("m_loc", sample(i + 100, target="big sun"), "other"),
        )
        out.append(Record(f"{task}{i}", request, probes, task, f"picture {i // 2}"))
    return out


@pytest.fixture(scope="module")
def editor():
    return make_editor("blip2")


def examiner_of(editor, batch_size=4):
    return Examiner(editor.collator, batch_size=batch_size)


class Fake(Method):
    """Notes what it is asked for; changes nothing, or fails."""

    name = "fake"

    def __init__(self, fail_at=None):
        self.sequences, self.fail_at = [], fail_at

    @contextmanager
    def apply(self, requests):
        if len(self.sequences) == self.fail_at:
            raise KeyboardInterrupt
        self.sequences.append(list(requests))
        yield Edited()


# Plans


def test_sequences_are_disjoint_in_the_seeds_order():
    records = make_records(7)
    plan = protocols.plan("sequential", [records], k=3, seed=4)
    assert [len(g) for g in plan.sequences] == [3, 3] and plan.left_out == 1
    assert len({r.id for r in plan.records}) == 6
    assert plan == protocols.plan("sequential", [records], k=3, seed=4)
    assert plan.records != protocols.plan("sequential", [records], k=3, seed=5).records
    one = protocols.plan("one-step", [records], seed=4)
    assert one.records[:6] == plan.records and one.left_out == 0  # the same order whatever K
    assert protocols.plan("sequential", [records], k=2, seed=4, limit=5).records == plan.records[:4]


def test_cross_task_sequences_have_the_same_share_of_each_task():
    questions, captions = make_records(12), make_records(9, "caption", 12)
    plan = protocols.plan("cross-task", [questions, captions], k=5)
    assert [Counter(r.task for r in g) for g in plan.sequences] == 4 * [{"vqa": 3, "caption": 2}]
    assert plan.left_out == 1
    orders = {tuple(r.task for r in g) for g in plan.sequences}
    assert len(orders) > 1  # mixed, not one task after the other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("two-step", [[1]]), "must be one of one-step, sequential, cross-task, but is 'two-step'"),
        (("one-step", [[1]], 2), "a one-step protocol cannot have K = 2"),
        (("sequential", [[1]], 0), "a sequential protocol cannot have K = 0"),
        (("cross-task", [[1]], 2), "cross-task takes several tasks, not 1"),
        (("sequential", [[1], [2]], 2), "sequential takes one task, not 2"),
        (("sequential", [[1, 2]], 3), "sequential with K = 3 needs at least 3 records, but there are 2"),
        (("cross-task", [[1, 2], [3]], 4), "needs at least 4 records, but there are 2 [+] 1"),
        (("one-step", [[1, 1]]), "record ids must be unique, but there are 1 repeated"),
    ],
)
def test_plans_that_make_no_sense_are_refused(arguments, message):
    name, tasks, *k = arguments
    tasks = [[r for i in task for r in make_records(1, start=i)] for task in tasks]
    with pytest.raises(ValueError, match=message):
        protocols.plan(name, tasks, k=k[0] if k else 1)


def test_a_limit_below_one_group_is_refused():
    with pytest.raises(ValueError, match=r"needs at least 4 records, but there are 6 \(limit 3\)"):
        protocols.plan("sequential", [make_records(6)], k=4, limit=3)


# Runs


@pytest.mark.parametrize("k", [1, 2])
def test_a_method_that_changes_nothing_leaves_everything(editor, k):
    records, method = make_records(4), Fake()
    plan = protocols.plan("sequential", [records], k=k)
    results = list(protocols.run(plan, method, examiner_of(editor)))
    assert method.sequences == [[r.request for r in sequence] for sequence in plan.sequences]
    assert [r.id for r in results] == [r.id for r in plan.records]
    assert [(r.sequence, r.age) for r in results] == [(i // k, k - 1 - i % k) for i in range(4)]
    summary = Summary.of(results)
    assert summary.after["rel"].mean == summary.before["rel"]
    assert summary.after["t_loc"].mean == summary.after["m_loc"].mean == 100.0
    assert summary.locality_b == {"t_loc": 100.0, "m_loc": 100.0}
    assert summary.exact["t_loc"] == summary.exact["m_loc"] == 100.0
    assert not summary.own and not summary.others


@pytest.mark.parametrize(("k", "shared"), [(1, [1] * 5), (5, [2, 2, 1])])
def test_before_and_after_are_asked_in_the_same_company(editor, k, shared, monkeypatch):
    """Rounding may hang on what shares a batch, and would be counted as lost locality."""
    monkeypatch.setattr(protocols, "AT_ONCE", 2)
    examiner, asked = examiner_of(editor), {"before": [], "after": []}
    for name, groups in asked.items():
        real = getattr(examiner, name)
        monkeypatch.setattr(
            examiner, name, lambda p, *rest, real=real, groups=groups: groups.append(p) or real(p, *rest)
        )
    records = make_records(5)
    list(protocols.run(protocols.plan("sequential", [records], k=k), Fake(), examiner))
    assert asked["before"] == asked["after"]
    assert [len(group) for group in asked["after"]] == [n * len(records[0].probes) for n in shared]


def by_hand(collator, probe):
    """(target token ids, what the model says there, best ids at all positions), from a whole forward alone."""
    batch = collator.batch([probe.sample], [0], eos=False)
    with torch.no_grad():
        logits = batch.model(**batch.inputs).logits[0]
    at = batch.target_mask[0].nonzero()[:, 0]
    top = logits.topk(1 if probe.sample.image is None else 10).indices
    return batch.inputs["input_ids"][0][at], logits[at - 1].argmax(-1), top


@pytest.mark.parametrize("routing", ["always", "routed"])
def test_every_figure_is_that_of_whole_forwards(editor, routing):
    """K = 2: both edits are on the model when either is tested, and the case token is the prompt's last."""
    records, collator = make_records(2), editor.collator
    method = Unike(editor, routing=routing)
    plan = protocols.plan("sequential", [records], k=2)
    results = {r.id: r for r in protocols.run(plan, method, examiner_of(editor))}
    ordered = [r.request for r in plan.records]
    before = {(r.id, i): by_hand(collator, p) for r in records for i, p in enumerate(r.probes)}
    with method.apply(ordered) as edited:
        for record in records:
            for i, (probe, asked) in enumerate(zip(record.probes, results[record.id].probes, strict=True)):
                wanted, said, top = before[record.id, i]
                batch = collator.batch([probe.sample], [0], eos=False)
                with edited.running(batch):
                    _, now, now_top = by_hand(collator, probe)
                outcome = asked.outcome
                assert outcome.before == metrics.token_accuracy(said, wanted)
                assert outcome.after == metrics.token_accuracy(now, wanted)
                assert outcome.locality_a == metrics.locality_a(said, now)
                assert outcome.locality_b == pytest.approx(metrics.locality_b(top, now_top), abs=0.02)
                answer = collator.generate([probe.sample], max_new_tokens=len(wanted) + 1)[0]
                assert outcome.answer in (answer, None) and (outcome.answer is None) == (i == 2)
                if outcome.answer is not None and probe.kind in ("rel", "t_gen", "m_gen"):
                    assert outcome.exact == (answer == probe.sample.target)
                if outcome.answer is not None and probe.kind in ("t_loc", "m_loc"):
                    assert outcome.exact == (answer == outcome.answer_before)
    assert all(r.probes[0].outcome.after == 1.0 for r in results.values() if r.age == 0 or routing == "routed")
    owns = {p.own for r in results.values() for p in r.probes if p.kind == "rel"}
    assert owns == ({None} if routing == "always" else {True})


def test_a_naming_of_the_case_that_took_the_answers_token_would_be_seen(editor):
    """Where the case token were the sequence's last, other targets would route otherwise."""
    request = sample(3)
    method = Unike(editor, routing="routed")
    with method.apply([request]) as edited:
        acted = []
        for target in ("red dog", "moon", "green bird house"):
            batch = editor.collator.batch([Sample(request.prompt, target, request.image)], [0], eos=False)
            with edited.running(batch), torch.no_grad():
                batch.model(**batch.inputs)
                acted.append(edited.acting())
    assert acted == [[[0]]] * 3


def test_a_model_that_does_not_carry_the_edits_is_not_asked(editor):
    """Another instance of the same model would answer as the base does, and nobody would know why."""
    other = make_editor("blip2")
    plan = protocols.plan("one-step", [make_records(1)])
    with pytest.raises(ValueError, match="the edits are on one .* that is no part of it is asked"):
        list(protocols.run(plan, Unike(editor), examiner_of(other)))


def test_one_step_edits_are_each_alone(editor):
    """Trained in one batch, put on one by one; each as if the others had never been asked for."""
    records = make_records(3)
    method = Unike(editor, routing="routed")
    together = list(protocols.run(protocols.plan("one-step", [records]), method, examiner_of(editor)))
    for record in records:
        alone = protocols.plan("one-step", [[record]])
        (result,) = protocols.run(alone, method, examiner_of(editor))
        (same,) = [r for r in together if r.id == record.id]
        assert [p.outcome.after for p in result.probes] == [p.outcome.after for p in same.probes]


def test_repeated_requests_are_each_their_own_one_step_edit(editor):
    first = make_records(1)[0]
    again = Record("again", Sample(first.request.prompt, "moon", first.request.image), first.probes)
    made = list(Unike(editor).one_step([first.request, again.request]))
    targets = []
    for edit in made:
        with edit as edited:
            targets += [e.target for e in edited.handle.edits.entries]
    assert targets == [first.request.target, "moon"]


def test_the_model_is_the_base_after_every_end(editor):
    model, records = editor.model, make_records(4)
    batch = editor.collator.batch([records[0].request], [0])
    with torch.no_grad():
        before = model(**batch.inputs).logits
    plan = protocols.plan("sequential", [records], k=2)
    running = protocols.run(plan, Unike(editor), examiner_of(editor))
    next(running)
    assert uk.status(model)  # a sequence of two is being handed on
    running.close()
    with torch.no_grad():
        assert not uk.status(model) and torch.equal(before, model(**batch.inputs).logits)


class Prompting(Edited):
    def prompt(self, sample):
        return Sample(f"red dog {sample.prompt}", sample.target, sample.image)


class Demonstrating(Fake):
    """Puts words before the prompt, as in-context editing does."""

    @contextmanager
    def apply(self, requests):
        yield Prompting()


def test_a_longer_prompt_is_compared_at_its_last_positions(editor):
    records, collator = make_records(1), editor.collator
    (result,) = protocols.run(protocols.plan("one-step", [records]), Demonstrating(), examiner_of(editor))
    for probe, asked in zip(records[0].probes, result.probes, strict=True):
        wanted, said, top = by_hand(collator, probe)
        longer = Probe(probe.kind, Prompting().prompt(probe.sample))
        _, now, now_top = by_hand(collator, longer)
        assert asked.outcome.after == metrics.token_accuracy(now, wanted)
        assert asked.outcome.locality_a == metrics.locality_a(said, now)
        assert asked.outcome.locality_b == pytest.approx(metrics.locality_b(top, now_top[-len(top) :]), abs=0.02)
        assert asked.prompt == probe.sample.prompt


def test_a_method_may_not_change_the_target(editor):
    class Cheating(Demonstrating):
        @contextmanager
        def apply(self, requests):
            edited = Edited()
            edited.prompt = lambda s: Sample(s.prompt, "moon", s.image)
            yield edited

    with pytest.raises(ValueError, match="the method changed the target 'red dog' into 'moon'"):
        list(protocols.run(protocols.plan("one-step", [make_records(1)]), Cheating(), examiner_of(editor)))


# Folders


@pytest.mark.parametrize("k", [1, 2])
def test_a_run_that_is_stopped_anywhere_goes_on(editor, k, tmp_path):
    plan = protocols.plan("sequential", [make_records(4)], k=k)
    whole = list(protocols.run(plan, Unike(editor), examiner_of(editor)))
    for stop in (1, 3):
        folder = tmp_path / str(stop)
        run = Run(folder, {"k": k})
        running = protocols.run(plan, Unike(editor), examiner_of(editor), done=run.done)
        for _ in range(stop):
            run.append(next(running))
        running.close()
        with open(folder / "samples.jsonl", "ab") as file:  # a stop in the middle of writing
            file.write(b'{"id": "vqa2", "task": "v')
        again = Run(folder, {"k": k})
        assert len(again.results) == stop
        for result in protocols.run(plan, Unike(editor), examiner_of(editor), done=again.done):
            again.append(result)
        assert again.results == whole == Run(folder, {"k": k}).results


def test_a_finished_run_edits_nothing(editor):
    plan, method = protocols.plan("sequential", [make_records(2)], k=2), Fake(fail_at=0)
    assert list(protocols.run(plan, method, examiner_of(editor), done={r.id for r in plan.records})) == []


def test_a_record_that_was_computed_twice_counts_once(editor, tmp_path):
    plan, run = protocols.plan("one-step", [make_records(1)]), Run(tmp_path / "a", {})
    (result,) = protocols.run(plan, Fake(), examiner_of(editor))
    run.append(result)
    run.append(result)
    assert Run(tmp_path / "a", {}).results == [result]


def test_another_runs_folder_is_refused_by_what_differs(tmp_path):
    Run(tmp_path / "a", {"k": 1, "seed": 0, "method": {"name": "UniKE", "steps": 50}})
    with pytest.raises(OtherRunError, match=r"holds another run \(there, here\): k: 1 and 2; method.steps: 50 and 25"):
        Run(tmp_path / "a", {"k": 2, "seed": 0, "method": {"name": "UniKE", "steps": 25}})
    with pytest.raises(OtherRunError, match="seed: 0 and null"):
        Run(tmp_path / "a", {"k": 1, "method": {"name": "UniKE", "steps": 50}})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty and holds no run"):
        Run(tmp_path / "b", {})
    (tmp_path / "a/samples.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="damaged in line 1"):
        Run(tmp_path / "a", {"k": 1, "seed": 0, "method": {"name": "UniKE", "steps": 50}})


# Summaries


def result_of(name, sequence, age, values, cluster=None, own=None):
    """A result by hand: kind -> (before, after, locality A, locality B, exact)."""
    from unike_kernels.evaluation.examiner import Outcome

    probes = tuple(
        protocols.Asked(kind, "", "q", "t", Outcome(*v, "x", "y", None), own, None if own is None else 0)
        for kind, vs in values.items()
        for v in vs
    )
    return protocols.Result(name, "vqa", cluster or name, sequence, age, probes)


def five(rel, t_gen, m_gen, t_loc, m_loc):
    local = [(0.5, 0.5, x, x / 2, True) for x in (t_loc, m_loc)]
    return {
        "rel": [(0.0, rel, 0.0, 0.0, rel == 1)],
        "t_gen": [(0.0, t, 0.0, 0.0, None) for t in t_gen],
        "m_gen": [(0.25, m_gen, 0.0, 0.0, False)],
        "t_loc": local[:1],
        "m_loc": local[1:],
    }


def test_a_summary_by_hand():
    results = [
        result_of("a", 0, 1, five(1.0, (1.0, 0.0), 0.5, 1.0, 0.5), own=True),
        result_of("b", 0, 0, five(0.5, (1.0,), 1.0, 1.0, 1.0), own=False),
    ]
    found = Summary.of(results)
    means = {k: i.mean for k, i in found.after.items()}
    assert means == {"rel": 75.0, "t_gen": 75.0, "m_gen": 75.0, "t_loc": 100.0, "m_loc": 75.0, "mean": 80.0}
    assert found.before == {"rel": 0.0, "t_gen": 0.0, "m_gen": 25.0, "t_loc": 100.0, "m_loc": 100.0}
    assert found.locality_b == {"t_loc": 50.0, "m_loc": 37.5}
    assert found.exact == {"rel": 50.0, "m_gen": 0.0, "t_loc": 100.0, "m_loc": 100.0}
    assert found.own["rel"] == 50.0 and found.others["rel"] == 0.0
    assert found.after["rel"].low == 50.0 and found.after["rel"].high == 100.0
    assert (found.after["mean"].low, found.after["mean"].high) == (70.0, 90.0)  # of a alone, of b alone
    text = str(found)
    assert "percent, 2 edits" in text and "50.0-100.0" in text and "own edit acts" in text


def test_one_cluster_has_no_interval():
    results = [result_of(n, 0, 0, five(1.0, (1.0,), 1.0, 1.0, 1.0), cluster="one") for n in "ab"]
    assert "interval" not in str(Summary.of(results))
    with pytest.raises(ValueError, match="no results"):
        Summary.of([])


def test_retention_goes_by_age():
    results = [
        result_of(f"{g} {a}", g, a, five(float(a < 5), (1.0,), 1.0, 1.0, 1.0)) for g in (0, 1) for a in range(10)
    ]
    found = retention(results, 10)
    assert [name for name, _ in found] == ["8 to 9", "6 to 7", "4 to 5", "2 to 3", "0 to 1"]
    assert [cells["rel"] for _, cells in found] == ["0.0", "0.0", "50.0", "100.0", "100.0"]
    assert "t_loc" not in found[0][1]
    assert [name for name, _ in retention(results[:2], 2)] == ["1", "0"]


def test_results_survive_json():
    result = result_of("a", 3, 2, five(1.0, (1.0, 0.0), 0.5, 1.0, 0.5), own=True)
    assert protocols.Result.from_json(json.loads(json.dumps(result.to_json()))) == result


# UniKE's own learning


def test_fit_takes_requests_as_triplets_and_locality_as_calibration():
    from unike_kernels.editing.editor import Editor

    editor = Editor(make_model("blip2"), make_processor("blip2"), routed())
    assert isinstance(editor.collator, Collator)
    triplets = make_triplets("blip2", 8)
    records = [
        Record(
            str(i),
            Sample(t["prompt"], t["target"], t["image"]),
            tuple(Probe(kind, sample(200 + i)) for kind in KINDS),
        )
        for i, t in enumerate(triplets)
    ]
    method = Unike(editor, routing="routed")
    method.fit(records)
    assert len(editor.states.predictions) == 8 and editor.fits
    assert len(editor.cases) == 8 + 2 * 8 + 2 * 8  # requests, locality, rephrasings and other pictures
    assert editor.questions == [*map(str, range(8)), *[None] * 16, *(str(i // 2) for i in range(16))]
    always = Unike(Editor(make_model("blip2"), make_processor("blip2"), routed()))
    always.fit(records)
    assert len(always.editor.cases) == 8 + 2 * 8
    assert method.settings()["config"] == editor.config.to_json()
    with pytest.raises(ValueError, match="routing must be 'always' or 'routed'"):
        Unike(editor, routing="sometimes")

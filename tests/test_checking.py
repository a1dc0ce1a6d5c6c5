"""`Editor.check`: the five metrics of probes that people bring."""

import pytest

from tests.editing_tiny import (
    answers,
    ask,
    make_requests,
    picture,
)

QUIET = {"progress": False}


def make_probes():
    (request,) = make_requests("blip2", 1)
    asked = {"prompt": request["prompt"], "target": request["target"], "image": request["image"]}
    return request, [
        {"kind": "rel", **asked},
        {"kind": "t_gen", **asked, "prompt": "which thing do you see ?"},
        {"kind": "m_gen", **asked, "image": picture(9)},
        {"kind": "t_loc", "prompt": "what is the moon ?", "target": "star"},
        {"kind": "m_loc", **ask("blip2", "which one is old ?", 8), "target": "house"},
    ]


def test_check_reports_the_five_metrics(editors):
    editor = editors("blip2")
    request, probes = make_probes()
    edits = editor.edit([request], **QUIET)
    report = editor.check(edits, probes)
    assert report.before == {"rel": 0.0, "t_gen": 0.0, "m_gen": 0.0, "t_loc": 100.0, "m_loc": 100.0}
    assert report.metrics["rel"] == report.exact["rel"] == 100.0
    assert report.metrics["mean"] == pytest.approx(sum(report.metrics[k] for k in report.before) / 5)
    assert report.locality_b.keys() == {"t_loc", "m_loc"}
    rel, *_, m_loc = report.rows
    assert rel.answer_after == request["target"] != rel.answer_before and rel.locality_b is None
    assert m_loc.answer_before == answers(editor, [probes[-1]])[0][: len(m_loc.answer_before)] and m_loc.before == 1.0
    assert editor.check(edits, probes) == report
    head, before, after, *_, counts = str(report).splitlines()
    assert head.split() == ["percent", "rel", "t_gen", "m_gen", "t_loc", "m_loc", "mean"]
    assert before.split() == ["before", "0.0", "0.0", "0.0", "100.0", "100.0"]
    assert after.split()[1] == "100.0" and counts.split() == ["probes", "1", "1", "1", "1", "1"]


def test_check_of_always_on_edits_and_of_some_kinds(editors):
    editor = editors("blip2")
    request, probes = make_probes()
    edits = editor.edit([request], **QUIET)
    report = editor.check(edits, [probes[0], probes[3], probes[4]], routing="always")
    assert report.metrics.keys() == {"rel", "t_loc", "m_loc"} and report.metrics["rel"] == 100.0
    assert min(report.metrics["t_loc"], report.metrics["m_loc"], *report.locality_b.values()) < 100.0
    assert str(report).splitlines()[1].split() == ["before", "0.0", "100.0", "100.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "reliability"}, "probe 4 needs a kind of rel, t_gen, m_gen, t_loc, m_loc, but has 'reliability'"),
        ({"target": ""}, "probe 4 needs a non-empty string 'target'"),
        ({"prompt": None}, "probe 4 needs a non-empty string 'prompt'"),
    ],
)
def test_bad_probes_are_named(change, message, editors):
    editor = editors("blip2")
    request, probes = make_probes()
    edits = editor.edit([request], **QUIET)
    with pytest.raises(ValueError, match=message):
        editor.check(edits, [*probes[:4], {**probes[4], **change}])

"""The paper's tables, figures and claims from small made-up results, and a table that is stopped in the middle."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import torch
from typer.testing import CliRunner

from bench.quality import cells, claims, figures, paper, paper_tables, protocol, report, run, tsne, world
from bench.quality.ablation import summary
from bench.quality.cells import Cell, Found, Scale, Store
from bench.quality.rows import ALPHAS, CONTROLS, FIGURES, ITEMS, ROWS, RowEditor
from bench.quality.world import PlacedProbe
from tests.editing_tiny import make_editor
from tests.test_protocols import make_records
from unike_kernels.evaluation.examiner import Examiner, Outcome
from unike_kernels.evaluation.methods import Edited, Method
from unike_kernels.evaluation.metrics import clustered_error
from unike_kernels.evaluation.protocols import Asked, Result
from unike_kernels.evaluation.records import KINDS
from unike_kernels.evaluation.scoring import Score

SMALL = Scale(bases=(0,), draws=(0, 1), edits=4, stacked=20, figure=4, large=(1000,))


def results(levels, n=4, acted=None, sequences=None):
    """n records of two concepts; record i's five metrics are levels[i % len(levels)] in shares of 1."""
    out = []
    for i in range(n):
        asked = []
        for kind, level in zip(KINDS, levels[i % len(levels)], strict=True):
            outcome = Outcome(0.1, level, level, 0.5, level == 1.0, "a", "b", None if acted is None else [])
            own, others = (None, None) if acted is None else acted
            asked.append(Asked(kind, "", "what ?", "cat", outcome, own, others))
        out.append(Result(f"r{i}", "name", f"concept {i // 2}", sequences[i] if sequences else i, 0, tuple(asked)))
    return out


@cache
def made_up(levels, acted):
    """A saved row; many cells share one."""
    return cells.saved(results(levels, acted=acted))


def fill_with(store, needed, levels):
    """Saves made-up rows: levels(method) of every cell."""
    environment = {"commit": "abc", "machine": "x"}
    for cell in needed:
        row = made_up(levels(cell.method), (True, 0) if "routed" in cell.method else None)
        if cell.method == "IKE":
            row = {"na": "the base model does not follow demonstrations"}
        store.add(cell.base, cell, row | {"settings": "s", "taken": environment})


def level_of(method):
    """Routed UniKE above all, and rows that rise with alpha and items."""
    top = {"UniKE, routed": 1.0, "UniKE": 0.9}.get(method, 0.6)
    points = [float(w) for w in method.replace(",", " ").split() if w.replace(".", "", 1).isdigit()]
    top += points[0] / 200 if points else 0.0
    return ((top,) * 5, (top - 0.2, *(top,) * 4))


# --- what is needed ---


def test_every_draw_is_whole_before_the_next_and_rows_are_measured_once():
    found = cells.needed([1, 2, 3], ["4a", "4b", "4c"], SMALL)
    assert len(found) == len(set(found)) and [c.draw for c in found] == sorted(c.draw for c in found)
    one = [c for c in found if c.protocol == "one-step" and c.draw == 1]
    assert {c.method for c in one} == set(cells.TABLE_1) and {c.task for c in one} == {"name", "caption"}
    assert {c.edits for c in found if c.k == 1000} == {1000} and {c.method for c in found if c.k == 1000} == {
        "UniKE",
        "UniKE, routed",
    }
    assert not [c for c in found if c.protocol != "one-step" and c.method == "IKE"]
    assert {c.method for c in found if c.k == 1} > {r.name for rows in FIGURES.values() for r in rows}
    assert cells.needed([], [], SMALL) == [] and cells.needed([], ["5a"], SMALL) == []


def test_settings_tell_stale_rows(monkeypatch):
    ours, theirs = (Cell(0, "one-step", 1, "name", 0, 4, m) for m in ("UniKE", "MEND"))
    before = [cells.settings(c, SMALL) for c in (ours, theirs)]
    assert before == [cells.settings(c, SMALL) for c in (ours, theirs)]
    assert [cells.settings(c, cells.QUICK) for c in (ours, theirs)] != before
    config = cells.default_config()
    monkeypatch.setattr(cells, "default_config", lambda: replace(config, neurons=replace(config.neurons, beta=0.5)))
    assert cells.settings(ours, SMALL) != before[0] and cells.settings(theirs, SMALL) == before[1]


# --- saving ---


def test_what_is_kept_of_a_row_by_hand():
    row = cells.saved(results([(1.0, 0.5, 0.5, 1.0, 0.0), (0.0, 0.5, 0.5, 1.0, 0.0)]))
    assert row["metrics"] == {"rel": 50.0, "t_gen": 50.0, "m_gen": 50.0, "t_loc": 100.0, "m_loc": 0.0, "mean": 50.0}
    assert row["values"]["rel"] == "1000 0 1000 0" and row["clusters"] == "concept_0 concept_0 concept_1 concept_1"
    assert row["errors"]["rel"] == 0.0  # each concept has one right and one wrong: their means agree
    assert row["before"]["rel"] == 10.0 and row["exact"]["rel"] == 50.0 and row["own"] == {}
    json.dumps(row)


def test_draws_are_pooled_and_the_largest_number_of_edits_counts(tmp_path):
    store = Store(tmp_path)
    assert store.found(0, "one-step", 1, "name", "FT") is None and store.bases() == []
    for draw, edits, level in ((0, 2, 0.0), (0, 4, 1.0), (1, 4, 0.5)):
        cell = Cell(0, "one-step", 1, "name", draw, edits, "FT")
        store.add(0, cell, cells.saved(results([(level,) * 5], edits)))
    found = store.found(0, "one-step", 1, "name", "FT")
    assert found.edits == 8 and found.draws == 2 and found.metrics["rel"] == 75.0
    assert found.values["mean"] == [100.0] * 4 + [50.0] * 4
    # both draws hold both concepts: within each the values differ, between them they do not
    assert found.errors["rel"] == 0.0 and store.bases() == [0]


def test_the_error_of_edits_that_were_on_the_model_together_counts_their_sequences(tmp_path):
    store = Store(tmp_path)
    cell = Cell(0, "sequential", 2, "name", 0, 4, "FT")
    levels = [(1.0,) * 5, (0.0,) * 5]  # each concept has one right and one wrong
    for sequences, error in (([0, 1, 0, 1], 50.0), ([0, 1, 1, 0], 0.0), ([0, 0, 0, 0], 0.0)):
        store.add(0, cell, cells.saved(results(levels, sequences=sequences)))
        found = store.found(0, "sequential", 2, "name", "FT")
        assert found.errors["rel"] == pytest.approx(
            error
        )  # the right ones in one sequence; one in each; a single sequence


def test_a_stopped_table_loses_one_row_at_most(tmp_path, monkeypatch):
    """A fake method on a tiny model, stopped within its second row; the first is kept, and half of the second."""
    monkeypatch.setattr(world, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(protocol, "tasks_of", lambda *a: [make_records(3)])
    editor, made, log = make_editor("blip2"), [], []

    class Fake(Method):
        """Stops when it is asked for the fifth edit."""

        def __init__(self, name):
            self.name = name

        @contextmanager
        def apply(self, requests):
            log.append((self.name, requests[0]))
            if len(log) == 5 and not made[1:]:
                raise KeyboardInterrupt
            yield Edited()

    class Bench(cells.Bench):
        def __init__(self, base, scale):
            self.base, self.scale, self.training, self.made = base, scale, 0, {}
            self.examiner = Examiner(editor.collator, batch_size=8)
            made.append(base)

        def _make(self, name):
            return Fake(name)

    needed = [Cell(0, "one-step", 1, "name", 0, 3, m) for m in ("FT", "LoRA", "UniKE")]
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(cells.fill(needed, store, SMALL, {"commit": "a"}, Bench))
    assert [r["cell"]["method"] for r in store.rows(0).values()] == ["FT"] and len(log) == 5
    done = [c.method for c, _ in cells.fill(needed, store, SMALL, {"commit": "b"}, Bench)]
    assert done == ["LoRA", "UniKE"]
    assert [name for name, _ in log[5:]] == ["LoRA"] * 2 + ["UniKE"] * 3  # the first of LoRA's was kept, too
    assert {r["taken"]["commit"] for r in store.rows(0).values()} == {"a", "b"}
    assert list(cells.fill(needed, store, SMALL, {}, Bench)) == [] and len(made) == 2
    assert len(list(cells.fill(needed, store, cells.QUICK, {}, Bench))) == 3  # other settings: measured anew


# --- claims ---


def found(level, labels=(), n=4, error=1.0):
    values = {k: [float(level)] * n for k in (*KINDS, "mean")}
    metrics = dict.fromkeys(values, float(level))
    return Found(n, metrics, dict.fromkeys(values, error), values=values if labels else {}, labels=labels)


def test_differences_by_hand():
    labels = (("d", "a"), ("d", "a"), ("d", "b"), ("d", "c"))
    a, b = found(90, labels), found(80, labels)
    a.values["rel"][:] = [100.0, 80.0, 90.0, 90.0]
    d = claims.difference(a, b, ("rel", "t_gen"))
    each = [(20 + 10) / 2, (0 + 10) / 2, 10.0, 10.0]
    assert d.value == 10.0 and d.error == clustered_error(each, ["a", "a", "b", "c"])
    other = found(80, (*labels[:3], ("d", "z")))  # other edits: the errors add up, 1 and 1
    assert claims.difference(a, other, ("rel",)) == claims.Difference(10.0, 2**0.5)
    assert claims.difference(a, None, ("rel",)) is None and claims.difference(Found(reason="n/a"), a, ("rel",)) is None
    assert str(claims.Difference(1.0, 0.25)) == "+1.0 ± 0.2" and str(claims.Difference(-1.0, math.nan)) == "-1.0"


@pytest.mark.parametrize(
    "value, error, least, verdict",
    [
        (3.0, 1.0, 0.0, "holds"),
        (2.0, 1.0, 0.0, "undecided"),
        (-2.5, 1.0, 0.0, "does not hold"),
        (0.0, 0.0, 0.0, "undecided"),
        (-5.0, 1.0, -8.0, "holds"),
        (-11.0, 1.0, -8.0, "does not hold"),
        (40.0, 1.0, 50.0, "does not hold"),
        (40.0, math.nan, 0.0, "undecided"),
    ],
)
def test_verdicts(value, error, least, verdict):
    assert claims.Claim("c", "d", claims.Difference(value, error), least=least).verdict == verdict
    assert claims.Claim("c", "d", None).verdict == "not measured"


def ablation():
    """A made-up saved ablation: level by row, errors of half a point."""
    level = {"base": 5.0, "intrinsic only": 70.0, "latent-IKE only": 4.0, "UniKE": 90.0, "UniKE, no zeta": 89.5}
    rows = {}
    for row in ("base", *(r.name for r in (*ROWS, *CONTROLS))):
        metrics = dict.fromkeys((*KINDS, "mean"), level.get(row, 80.0))
        locality = {"t_loc": 50.0, "m_loc": 50.0}
        rows[row] = {"metrics": metrics, "errors": dict.fromkeys(KINDS, 0.5), "locality_b": locality, "parts": {}}
    rows["UniKE, routed, 20 stacked"] = rows["UniKE, routed"]
    environment = {"commit": "abc"}
    return {"seed": 0, "edits": 300, "rows": rows, "fit": {}, "seconds": 1.0, "environment": environment} | {
        "removal_is_exact": True
    }


def test_claims_from_saved_results(tmp_path):
    report.save("ablation-seed0", ablation(), tmp_path)
    fill_with(Store(tmp_path), cells.needed([1, 2], ["4a", "4b", "4c"], SMALL), level_of)
    told = {(c.text, c.compared): c for c in claims.claims(tmp_path, 0)}

    def one(text, part):
        (c,) = (c for (t, compared), c in told.items() if t == text and part in compared)
        return c

    lacking = one("intrinsic editing alone lacks generality", "")
    assert lacking.ours == claims.Difference(20.0, 0.5**0.5) and lacking.verdict == "holds"
    assert lacking.theirs == pytest.approx((97.4 + 92.8 - 69.2 - 67.4) / 2)
    assert dict(lacking.controls)["UniKE, shuffled memory"].value == 10.0
    assert one("latent-IKE alone is reliable", "").verdict == "does not hold"
    assert one("a truthful zeta helps", "no zeta").verdict == "undecided"  # half a point, errors of 0.7
    assert one("a random zeta hurts", "").ours.value == 9.5
    assert one("a truthful zeta helps", "random zeta").ours.value == 10.0
    assert one(
        "adaptive alpha beats a fixed one", "best of 5 fixed (on other concepts: 1)"
    ).ours.value == pytest.approx(90 - 60.5)
    for kind in ("generality", "locality"):  # 40 items against one: 39 / 200 of 100 points
        assert one("more items help", kind).ours == claims.Difference(pytest.approx(19.5), 0.0)
    assert one("UniKE is above all baselines", "UniKE, routed").ours.value == pytest.approx(40.0)
    mild = one("sequential editing declines mildly", "UniKE, K = 20")
    assert mild.theirs == pytest.approx(83.76 - 95.14) and mild.verdict == "holds"
    text = claims.table(list(told.values()))
    assert "| latent-IKE alone is reliable |" in text and "does not hold" in text
    assert all(c.ours is None for c in claims.claims(tmp_path, 1))
    captions = {(c.text, c.compared): c for c in claims.claims(tmp_path, 0, "caption")}
    assert any(c.ours is not None for (text, _), c in captions.items() if text == "UniKE is above all baselines")
    assert captions["more items help", "generality, 40 items - 1"].ours is None  # a figure's, of names alone


def test_an_ablations_rows_are_compared_edit_by_edit():
    """Two concepts, three edits: the difference is one of a concept alone."""
    asked = [PlacedProbe(e, kind, "", None, f"c{e // 2}") for e in range(3) for kind in KINDS]

    def row(level_of_edit):
        scores = [Score(level_of_edit[p.edit], level_of_edit[p.edit], 1.0) for p in asked]
        return summary(asked, scores)

    result = {"edits": 3, "rows": {"a": row([1.0, 0.5, 0.5]), "b": row([0.5, 0.5, 0.5])}}
    assert result["rows"]["a"]["values"]["rel"] == "1000 500 500" and result["rows"]["a"]["clusters"] == "c0 c0 c1"
    a, b = (paper_tables.ablation_row(result, name) for name in ("a", "b"))
    d = claims.difference(a, b, ("rel", "m_loc"))
    assert d.value == pytest.approx(50 / 3) and d.error == clustered_error([50.0, 0.0, 0.0], ["c0", "c0", "c1"])


def test_an_error_is_that_of_sequences_where_it_is_larger():
    """Four edits of four concepts, two and two on the model together."""
    asked = [PlacedProbe(e, kind, "", None, f"c{e}") for kind in KINDS for e in range(4)]
    levels = [1.0, 1.0, 0.0, 0.0]
    row = summary(asked, [Score(levels[p.edit], levels[p.edit], 1.0) for p in asked], 2)
    other = summary(asked, [Score(0.0, 0.0, 1.0) for _ in asked], 2)
    by_sequence = clustered_error([100.0, 100.0, 0.0, 0.0], [0, 0, 1, 1])
    assert by_sequence > clustered_error([100.0, 100.0, 0.0, 0.0], [0, 1, 2, 3])
    assert row["sequences"] == "0 0 1 1" and set(row["errors"].values()) == {by_sequence}
    old = row | {"errors": dict.fromkeys(KINDS, 0.0)}  # saved when errors went by concept alone
    result = {"edits": 4, "rows": {"a": old, "b": other}}
    a, b = (paper_tables.ablation_row(result, name) for name in ("a", "b"))
    assert a.errors["rel"] == by_sequence and claims.difference(a, b, ("rel",)) == claims.Difference(50.0, by_sequence)


# --- tables, figures, report ---


def test_the_report_holds_every_table_and_figure(tmp_path):
    needed = cells.needed([1, 2, 3], ["4a", "4b", "4c"], SMALL)
    fill_with(Store(tmp_path), [c for c in needed if c.method != "KE"], level_of)
    report.save("ablation-seed0", ablation(), tmp_path)
    for name in ("4a", "4b", "4c"):
        path = figures.draw(name, tmp_path)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert figures.draw("5a", tmp_path) is None
    (tmp_path / "notes.md").write_text("## By hand\n")
    text = report.write_report(tmp_path).read_text()
    for part in ("Table 1: one-step", "Table 2: sequential", "Table 3: cross-task", "Table 4: the parts", "## By hand"):
        assert part in text
    assert "| 98.8 98.4 94.8 98.3 96.7 | 98.0 97.4 92.8 98.7 88.8 |" in text  # Table 1, UniKE
    assert paper.SEQUENTIAL["caption", 20]["MEND"] in text and paper.CROSS_TASK["FT"] in text
    assert "IKE: n/a, the base model does not follow demonstrations." in text and "Not measured: KE." in text
    assert "| IKE | n/a | n/a |" in text and "| KE | - | - |" in text
    assert (
        "met: routed UniKE's mean is above every other row's measured so far (98.0; next, UniKE: 88.0; difference +10.0"
        in text
    )
    cost = "routing costs under three points of generality (-10.0: T-Gen -10.0, M-Gen -10.0)"
    assert f"met: {cost}, and changes T-Loc +10.0, M-Loc +10.0" in text
    assert "| base | 10.0 | 10.0 | 10.0 | 100.0 | 100.0 | 46.0 |" in text
    assert "K = 1000" in text and "met: K = 1000 keeps 95 % of Rel (100.0)" in text
    assert "| 8 in 2 draws |" in text and "Taken with commit abc, machine x." in text
    assert "![Figure 4a](figure-4a.png)" in text and "figure-5a" not in text
    assert "quick run" not in text
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*half*"))


def test_what_routing_costs_by_hand():
    at = dict(zip(KINDS, (98.0, 96.5, 97.0, 96.0, 81.0), strict=True))
    always, routed = Found(metrics=at), Found(metrics=at | {"t_gen": 96.0, "m_gen": 90.5, "t_loc": 100.0})
    told = paper_tables.cost({"UniKE": always, "UniKE, routed": routed})
    assert told.startswith("- **missed**: ") and "(3.5: T-Gen 0.5, M-Gen 6.5), and changes T-Loc +4.0, M-Loc" in told
    assert paper_tables.cost({"UniKE": always, "UniKE, routed": None}) == ""


def test_the_best_row_is_named_by_hand():
    routed, other = (Found(metrics=dict.fromkeys((*KINDS, "mean"), m)) for m in (96.8, 97.2))
    told = paper_tables.best({"SERAC": other, "IKE": Found(reason="no"), "UniKE, routed": routed})
    missed = (
        "- **missed**: routed UniKE's mean is above every other row's (96.8; next, SERAC: 97.2; difference -0.4 ± 0.0)"
    )
    assert told == missed
    unsure = replace(other, errors=dict.fromkeys(KINDS, 1.0))
    told = paper_tables.best({"SERAC": unsure, "UniKE, routed": routed})
    assert told.endswith("difference -0.4 ± 1.0, level: within 2 standard errors)")
    fewer = Found(metrics=dict.fromkeys((*KINDS, "mean"), 97.5))  # on those edits that the other row is of
    told = paper_tables.best({"SERAC": other, "UniKE, routed": routed}, lambda rival: fewer)
    assert told.startswith("- met:") and "difference +0.3" in told


def test_a_quick_report_says_so(tmp_path):
    folder = tmp_path / "quick"
    fill_with(Store(folder), cells.needed([1], [], SMALL), level_of)
    text = report.write_report(folder).read_text()
    assert "**A quick run**" in text and "--table 1 --quick" in text


def test_an_empty_folder_has_a_report_without_tables(tmp_path):
    assert report.write_report(tmp_path).read_text() == "# Quality on the emoji world\n"


def test_figure_5a(tmp_path):
    editor = make_editor("blip2")
    result = tsne.run(editor, 0)
    for space in result["spaces"].values():
        assert 0.0 <= space["auc"] <= 1.0
        assert len(space["pos"].split()) == len(space["neg"].split()) == result["held_out"] > 0
    report.save("tsne-seed0", result, tmp_path)
    assert figures.draw("5a", tmp_path).stat().st_size > 10_000
    report.save("tsne-seed1", result | {"seed": 1}, tmp_path)
    assert figures.draw("5a", tmp_path).stat().st_size > 20_000


def test_figure_rows_change_what_they_name():
    base = cells.default_config()
    assert [r.config(base, None).shift.k for r in FIGURES["4a"]] == list(ITEMS)
    assert [r.config(base, None).shift.alpha for r in FIGURES["4b"]] == [*ALPHAS, None]
    assert [r.zeta for r in FIGURES["4c"]] == ["none", "random", "semantic", "truthful"]
    editor = make_editor("blip2")
    fresh = RowEditor(editor.model, editor.collator.processor, editor.config).prepare(FIGURES["4c"][2], editor)
    for layer, fit in editor.fits.items():
        semantic, truthful = fresh.fits[layer].zeta_prime, fit.zeta_prime
        torch.testing.assert_close(semantic.norm(), truthful.norm(), rtol=1e-4, atol=0)
        assert torch.nn.functional.cosine_similarity(semantic, truthful, dim=0) < 0.99


def test_the_command_fills_draws_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(cells, "fill", lambda needed, store, scale, environment: fill_made_up(needed, store))
    result = CliRunner().invoke(
        run.app, ["--table", "1", "--figure", "4c", "--seeds", "0", "--draws", "0", "--edits", "4"]
    )
    assert result.exit_code == 0, result.output
    assert "Not measured" not in result.output and "FT" in result.output
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "figure-4c.png", "protocols-seed0.json"}


def fill_made_up(needed, store):
    fill_with(store, needed, level_of)
    yield from ((c, SimpleNamespace(get=lambda name: "made up")) for c in needed)


def test_the_best_of_several_is_chosen_on_other_concepts_than_it_is_judged_on():
    labels = tuple(("name 0 4", f"c{i // 2}") for i in range(8))  # concepts c0 to c3, two edits each

    def row(*means):
        values = {kind: [float(m) for m in means for _ in range(2)] for kind in (*KINDS, "mean")}
        metrics = {kind: sum(v) / len(v) for kind, v in values.items()}
        return Found(8, metrics, values=values, labels=labels)

    # c0 and c2 are one half, c1 and c3 the other: "a" is best on the first half, "b" on the second
    found, names = claims.chosen_on_others({"a": row(90, 10, 90, 10), "b": row(20, 80, 20, 80)})
    assert names == "b, a" and found.metrics["mean"] == 15.0  # each judged where it was not chosen
    same, names = claims.chosen_on_others({"a": row(50, 50, 50, 50), "b": row(40, 40, 40, 40)})
    assert names == "a" and same.metrics["rel"] == 50.0

"""The baselines on the second model's layout with a tiny random language model, and the claims from made-up rows."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from bench.quality.baselines import METHODS
from bench.quality.baselines.ft import FineTuning
from bench.quality.baselines.t_patcher import TPatcher
from bench.quality.claims import of_rows
from bench.quality.smollm import baselines, facts, model, run, world
from bench.quality.smollm.page import read, where
from bench.quality.world import record
from tests.smollm_tiny import make_net, make_tokenizer
from unike_kernels.evaluation.methods import Method
from unike_kernels.evaluation.records import LOCAL

TEXT = baselines.KINDS_OF["text"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> baselines.Bench:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(model, "load", lambda trained: (make_net(tokenizer), model.make_processor(tokenizer)))
    return baselines.Bench("text", torch.bfloat16)


def test_training_facts_are_about_the_memorys_countries_alone() -> None:
    found = baselines.training("text", 80)
    assert len({r.id for r in found}) == len(found) == 80
    inside = {c.name for c in facts.splits()["memory"]}
    for r in found:
        assert r.cluster in inside and len(r.of("rel")) == 1 and len(r.of("t_gen")) == 2 and r.of("t_loc")
        for p in r.probes:
            assert any(name in p.sample.prompt for name in inside) and p.sample.image is None
            if p.kind in LOCAL and p.part != "own":
                assert r.cluster not in p.sample.prompt
    assert [r.request for r in baselines.training("text", 40)] == [r.request for r in found[:40]]
    assert {r.request for r in baselines.training("text", 40, seed=1)} != {r.request for r in found[:40]}


def test_rows_of_other_questions_get_no_company(tmp_path: Path) -> None:
    path, of = tmp_path / "rows.json", run.asked_of("text", 40, "bfloat16")
    assert of != run.asked_of("text", 39, "bfloat16") | {"edits": 40}
    path.write_text(json.dumps(of | {"rows": {}}))
    run.check_saved(path, of)
    path.write_text(json.dumps(of | {"questions": "others"}))
    with pytest.raises(typer.BadParameter, match=f"holds questions 'others', but '{of['questions']}' is asked for"):
        run.check_saved(path, of)
    saved = read(where("baselines-pictures"))
    run.check_saved(where("baselines-pictures"), run.asked_of("pictures", saved["edits"], saved["dtype"]))


def test_a_change_of_a_half_precision_model_is_learned_in_float32(bench: baselines.Bench) -> None:
    assert next(bench.net.llama_model.parameters()).dtype == torch.bfloat16
    asked = record(world.items("text", 1)[0])
    for name in ("FT", "LoRA"):
        method = METHODS[name](bench.net, bench.processor)
        assert {d.dtype for d in method.change([asked.request], {}).values()} == {torch.float32}
        row = bench.measured(method, [asked], generate=False)
        assert row["before"]["rel"] == 0.0 and row["metrics"]["rel"] > 50.0


def test_rows_are_in_the_edits_own_order_and_of_the_metrics_that_a_fact_has(bench: baselines.Bench) -> None:
    records = [record(item) for item in world.items("text", 4)][::-1]

    class Nothing(Method):
        name = "nothing"

        def apply(self, requests: Any) -> Any:
            applied.append([r.prompt for r in requests])
            return FineTuning(bench.net, bench.processor).carrying({})

    applied: list[list[str]] = []
    row = bench.measured(Nothing(), records, 2, generate=False)
    prompts = [r.request.prompt for r in records]
    assert applied == [prompts[:2], prompts[2:]]
    assert row["clusters"].split() == [r.cluster.replace(" ", "_") for r in records]
    assert row["metrics"]["t_loc"] == 100.0 and row["errors"]["t_loc"] == 0.0
    assert all(math.isnan(row["metrics"][kind]) and row["values"].get(kind, "") == "" for kind in ("m_gen", "m_loc"))
    assert math.isnan(row["metrics"]["mean"])


def test_finished_rows_are_not_measured_again(bench: baselines.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(item) for item in world.items("text", 2)]
    monkeypatch.setattr(baselines, "SEQUENTIAL", (2,))
    monkeypatch.setattr(baselines, "SEEN", 2)
    brief = dataclasses.replace(FineTuning.trials()[0], steps=3)
    rows: dict[str, Any] = {}
    kept: list[list[str]] = []
    baselines.run(bench, records, {"FT": brief}, rows, lambda: kept.append(sorted(rows)))
    assert kept == [["FT"], ["FT", "FT, K = 2"]]
    assert rows["FT"]["config"]["steps"] == 3 and 0.0 <= rows["FT"]["training_rel"] <= 100.0
    monkeypatch.setattr(bench, "measured", None)
    baselines.run(bench, records, {"FT": brief}, rows, lambda: pytest.fail("measured again"))


def test_a_memory_that_suits_all_settings_is_stored_once(
    bench: baselines.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "TRAINING", 8)
    loud, quiet = TPatcher.trials()[:2]
    first, second = bench.fitted("T-Patcher", loud), bench.fitted("T-Patcher", quiet)
    assert first.memory is second.memory and (first.config, second.config) == (loud, quiet)
    assert bench.fitted("GRACE", METHODS["GRACE"].trials()[0]) is not bench.fitted(
        "GRACE", METHODS["GRACE"].trials()[1]
    )


def test_the_settings_with_the_best_mean_over_both_tasks_are_chosen() -> None:
    trials = FineTuning.trials()
    assert baselines.chosen("FT", [{}, {}]) == trials[0]

    def search(*means: float) -> dict[str, Any]:
        return {"FT": {baselines.settings(t): {"rel": m, "t_loc": m} for t, m in zip(trials, means, strict=True)}}

    assert baselines.chosen("FT", [search(50, 60, 55, 0), {}]) == trials[1]
    assert baselines.chosen("FT", [search(50, 60, 55, 0), search(50, 10, 56, 0)]) == trials[2]
    assert baselines.chosen("LoRA", [search(50, 60, 55, 0)]) == METHODS["LoRA"].trials()[0]
    stopped = {"FT": dict(list(search(50, 60, 55, 0)["FT"].items())[:2])}
    with pytest.raises(ValueError, match="FT has 4 settings, but its search has 2"):
        baselines.chosen("FT", [search(50, 60, 55, 0), stopped])


def row(**metrics: float) -> dict[str, Any]:
    """Four edits of two concepts with these metrics, all alike."""
    nan = dict.fromkeys(("m_gen", "m_loc", "mean"), math.nan)
    values = {k: " ".join([str(round(10 * v))] * 4) for k, v in metrics.items()} | {"m_gen": "", "m_loc": ""}
    errors = dict.fromkeys((*metrics, "m_gen", "m_loc"), 0.0)
    return {"metrics": metrics | nan, "errors": errors, "values": values, "clusters": "a a b b"}


def test_claims_of_a_task_without_pictures() -> None:
    ablation = {
        "edits": 4,
        "rows": {
            "base": row(rel=10, t_gen=10, t_loc=100),
            "intrinsic only": row(rel=100, t_gen=50, t_loc=90),
            "intrinsic + latent-IKE": row(rel=100, t_gen=70, t_loc=73),
            "UniKE": row(rel=100, t_gen=90, t_loc=80),
            "UniKE, routed": row(rel=100, t_gen=90, t_loc=100),
            "latent-IKE only": row(rel=8, t_gen=8, t_loc=84),
            **{f"UniKE, alpha {a:g}": row(rel=100, t_gen=90, t_loc=60 + 20 * a) for a in (0.1, 0.25, 0.5, 0.75, 1.0)},
        },
        "sequential": {"UniKE, K = 10": row(rel=88, t_gen=50, t_loc=69)},
    }
    found = {"edits": 4, "rows": {"FT": row(rel=100, t_gen=100, t_loc=64), "IKE": {"na": "it does not follow"}}}
    found["rows"][baselines.INTRINSIC] = row(rel=100, t_gen=60, t_loc=30)
    told = {(c.text, c.compared): c for c in of_rows(baselines.rows_of("text", ablation, found))}
    lacking = told["intrinsic editing alone lacks generality", "generality, UniKE - intrinsic only"]
    assert lacking.ours is not None and lacking.ours.value == pytest.approx(40.0) and lacking.verdict == "holds"
    above = told["UniKE is above all baselines", "mean of three, UniKE, routed - best baseline of 1 (FT)"]
    assert above.ours is not None and above.ours.value == pytest.approx(290 / 3 - 88.0) and above.verdict == "holds"
    best = told["adaptive alpha beats a fixed one", "mean of three, UniKE - best of 5 fixed (on other concepts: 1)"]
    assert best.ours is not None and best.ours.value == pytest.approx(0.0)
    mild = told[
        "sequential editing declines mildly",
        "mean of three, UniKE, K = 10 - one step (mild: no worse than the paper's)",
    ]
    assert mild.ours is not None and mild.ours.value == pytest.approx(-21.0) and mild.verdict == "does not hold"
    text = baselines.table("text", ablation, found)
    assert "| intrinsic + IKE | - | 100.0 ± 0.0 | 60.0" in text and "| intrinsic + latent-IKE | - | 100.0" in text
    assert "| IKE | n/a |" in text and "| UniKE, K = 10 | - | 88.0 ± 0.0 |" in text and "M-Gen" not in text

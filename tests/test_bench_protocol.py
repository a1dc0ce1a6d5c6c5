"""Methods of the benchmark through the protocols: rows with their controls, and runs that go on."""

from dataclasses import replace

import pytest

from bench.quality import protocol, world
from bench.quality.rows import CONTROLS, RATE, ROWS, Row, default_config
from tests.editing_tiny import make_editor
from tests.test_protocols import make_records
from unike_kernels.config import UnikeConfig
from unike_kernels.evaluation import protocols
from unike_kernels.evaluation.examiner import Examiner


@pytest.fixture(scope="module")
def editor():
    return make_editor("blip2")


def test_every_row_and_baseline_can_be_asked_for(editor):
    known = protocol.names()
    assert {"UniKE", "UniKE, routed", "UniKE, random zeta", "FT", "SERAC, image-aware"} <= set(known)
    assert "UniKE, alpha fixed at its mean" not in known
    with pytest.raises(ValueError, match="must be one of intrinsic only, .*, but is 'ROME'"):
        protocol.method("ROME", editor, 0)
    with pytest.raises(ValueError, match="needs the mean alpha of another row"):
        protocol.RowMethod(next(r for r in CONTROLS if r.alpha == "mean"), editor)
    assert isinstance(protocol.method("UniKE, routed", editor, 0), protocol.RowMethod)


def test_a_rows_control_is_on_every_patch(editor):
    zero = protocol.RowMethod(Row("zero", memory="zero"), editor)
    request = make_records(1)[0].request
    for method, same in ((zero, True), (protocol.RowMethod(Row("UniKE"), editor), False)):
        with method.apply([request]) as edited:
            values = edited.handle.record.layers[0].shift.memory.values
            assert bool((values == values[0]).all()) is same
    assert zero.settings()["row"]["memory"] == "zero" and zero.settings()["memory"] > 0


def test_rows_train_at_the_rate_searched_for_them_and_routed_ones_at_the_librarys():
    for row in (*ROWS, *CONTROLS):
        found, library = row.config(default_config(), 0.3).neurons, row.config(UnikeConfig(), 0.3).neurons
        assert (found.lr_keys, found.lr_values) == ((1e-2, 1e-2) if row.routed else (RATE, RATE))
        assert library == replace(found, lr_keys=1e-2, lr_values=1e-2)


def test_a_measured_plan_goes_on_and_is_then_read(editor, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "CACHE", tmp_path)
    plan = protocols.plan("one-step", [make_records(3)])
    method, examiner = protocol.RowMethod(ROWS[0], editor), Examiner(editor.collator)
    one_step, asked = method.one_step, []

    def counted(requests):
        for edit in one_step(requests):
            asked.append(edit)
            if len(asked) == 2:
                raise KeyboardInterrupt
            yield edit

    monkeypatch.setattr(method, "one_step", counted)
    about = {"base": 0, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        protocol.measured(method, examiner, plan, about, progress=False)
    found = protocol.measured(method, examiner, plan, about, progress=False)
    assert [r.id for r in found] == [r.id for r in plan.records] and len(asked) == 4  # one, a stop, two
    assert protocol.measured(method, examiner, plan, about, progress=False) == found and len(asked) == 4
    assert found == list(protocols.run(plan, protocol.RowMethod(ROWS[0], editor), examiner))
    assert len(list((tmp_path / "runs").iterdir())) == 1
    protocol.measured(method, examiner, plan, about | {"base": 1}, progress=False)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_tasks():
    assert [len(t) for t in protocol.tasks_of("cross-task", "name", 5, 0)] == [5, 5]
    assert {r.task for t in protocol.tasks_of("cross-task", "name", 5, 0) for r in t} == {"name", "caption"}
    assert [r.task for t in protocol.tasks_of("one-step", "rename", 2, 0) for r in t] == ["rename", "rename"]

"""What a method inherits where it says nothing of its own."""

from contextlib import contextmanager

import pytest

from unike_kernels.editing.inputs import Sample
from unike_kernels.evaluation.methods import Edited, Method
from unike_kernels.evaluation.records import Probe, Record


class Noting(Method):
    """Notes what is on the model."""

    name = "noting"

    def __init__(self):
        self.on = []

    @contextmanager
    def apply(self, requests):
        self.on.append([r.prompt for r in requests])
        try:
            yield Edited()
        finally:
            self.on.append([])


def test_one_step_puts_every_request_on_alone():
    method = Noting()
    for edit in method.one_step([Sample("a", "1"), Sample("b", "2")]):
        with edit as edited:
            assert edited.acting() is None and edited.prompt(Sample("q")) == Sample("q")
            with edited.running(None):
                pass
    assert method.on == [["a"], [], ["b"], []]
    assert method.settings() == {} and method.fit([]) is None


def test_a_method_without_apply_is_refused():
    class Nothing(Method):
        name = "nothing"

    with pytest.raises(TypeError, match="apply"):
        Nothing()


def test_probes_of_a_kind():
    probes = (Probe("rel", Sample("a")), Probe("t_gen", Sample("b")), Probe("m_loc", Sample("c"), "same_picture"))
    record = Record("one", Sample("a"), probes)
    assert record.of("rel", "m_loc") == [probes[0], probes[2]]

"""One pass of a patched model runs at a time: what a second thread, a fork and an interrupted pass may do."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import unike_kernels as uk
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model
from unike_kernels import hooks


@pytest.mark.parametrize("torchs", [False, True], ids=["own hooks", "torch's hooks"])
def test_a_second_thread_is_refused_and_the_first_goes_on(torchs):
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    if torchs:
        model.model.register_forward_pre_hook(lambda *_: None)
    uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
    uk.patch(model, edits_for(model, ALWAYS), name="other")
    expected, told = model(**inputs).logits, []

    def meanwhile():
        try:
            model(**inputs)
        except RuntimeError as error:
            told.append(str(error))

    def within(*_):
        gone.remove()
        second = threading.Thread(target=meanwhile)
        second.start()
        second.join()

    for _ in range(2):
        gone = model.model.layers[-2].register_forward_pre_hook(within)
        assert torch.equal(model(**inputs).logits, expected)
        meanwhile()  # after it: nothing to refuse
    assert len(told) == 2 and all("another thread is within a pass of this model" in t for t in told)

    def failing(*_):
        raise error

    for error in (KeyError, KeyboardInterrupt):  # a pass that failed is over, though torch calls no hook after Ctrl-C
        gone = model.model.layers[-1].register_forward_pre_hook(failing)
        with pytest.raises(error):
            model(**inputs)
        gone.remove()
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(lambda: model(**inputs).logits).result(), expected)
    assert not set(hooks._running.values()) - {threading.get_ident()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_within_another_threads_pass_may_run():
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
    expected, inside, over = model(**inputs).logits, threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        over.wait()

    model.model.layers[-1].register_forward_pre_hook(wait)
    first = threading.Thread(target=lambda: model(**inputs))
    first.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        code = 2
        try:
            over.set()
            code = int(not torch.equal(model(**inputs).logits, expected))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    over.set()
    first.join()

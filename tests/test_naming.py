"""What may be named by hand, and what goes on from the slots named before: without a model."""

import pytest
import torch

from unike_kernels.cases import CaseState, LayerDecision, Version
from unike_kernels.naming import FREE, cases_from_ptr, named_cases

VERSION = Version()


def named(owners, tokens, before=None, version=VERSION):
    return named_cases(torch.tensor(owners).long(), torch.tensor(tokens).long(), before, version)


def decided(known=(True, True), version=VERSION):
    """What two cases decided: the first was routed to edit 5, the second to edit 6."""
    layer = LayerDecision(torch.tensor([[3], [4]]), torch.tensor([[0.3], [0.4]]), torch.tensor([0.1, 0.2]))
    selected, scores = torch.tensor([[5], [6]]), torch.tensor([[0.5], [0.6]])
    known = None if known is None else torch.tensor(known)
    return CaseState(version, 2, selected, scores, layers={1: layer}, known=known)


def test_cases_from_ptr():
    token_to_case, case_tokens = cases_from_ptr(torch.tensor([0, 2, 2, 5]))
    assert token_to_case.tolist() == [0, 0, 2, 2, 2]
    assert case_tokens.tolist() == [1, -1, 4]


def test_nothing_named_is_found_automatically():
    assert named_cases(None, None, decided(), VERSION) is None
    for half in ((torch.tensor([0]), None), (None, torch.tensor([0]))):
        with pytest.raises(ValueError, match="takes both"):
            named_cases(*half, None, VERSION)


@pytest.mark.parametrize("before", [None, decided()], ids=["first", "all of them anew"])
def test_cases_that_all_have_their_tokens_are_fresh(before):
    cases = named([0, 0, 1, -1], [1, 2], before)
    assert cases.fresh and not cases.decided
    assert cases.token_to_case.tolist() == [0, 0, 1, -1] and cases.case_tokens.tolist() == [1, 2]
    assert cases.state == CaseState(VERSION, 2)


def test_tensors_of_any_shape_and_integers_are_taken_and_an_engines_own_is_not_copied():
    own = torch.tensor([1, 2])
    cases = named_cases(torch.tensor([[0, 0, 1]], dtype=torch.int32), own, None, VERSION)
    assert cases.token_to_case.tolist() == [0, 0, 1]
    assert cases.case_tokens.data_ptr() == own.data_ptr()  # what is written there is followed


def test_slots_that_go_on_keep_their_decisions():
    before = decided()
    cases = named([1, 0], [-1, -1], before)
    assert cases.decided and not cases.fresh
    assert cases.state.selected is before.selected and cases.state.layers == before.layers
    assert cases.state.layers is not before.layers  # the new pass decides into its own
    some = named([1, 1, 0], [-1, 1], before)
    assert not some.decided and not some.fresh and some.state.known.tolist() == [True, True]


def test_a_freed_slot_is_forgotten():
    own, before = torch.tensor([FREE, -1]), decided()
    cases = named_cases(torch.tensor([1]), own, before, VERSION)
    assert cases.case_tokens.tolist() == [-1, -1] and own.tolist() == [FREE, -1]
    assert cases.state.known.tolist() == [False, True] and before.known.tolist() == [True, True]
    with pytest.raises(ValueError, match=r"cases \[0\] have no case token in this pass and were never decided"):
        named([0], [-1, -1], cases.state)
    assert named([0], [0, -1], cases.state).state.known.tolist() == [False, True]  # decided anew by this pass


def test_slots_grow_and_shrink():
    grown = named([2, 1], [-1, -1, 0], decided())
    assert grown.state.size == 3 and grown.state.known.tolist() == [True, True, False]
    assert grown.state.selected.tolist() == [[5], [6], [-1]]
    assert grown.state.layers[1].indices.tolist() == [[3], [4], [-1]]
    shrunk = named([0], [-1], decided())
    assert shrunk.state.size == 1 and shrunk.state.selected.tolist() == [[5]]
    with pytest.raises(ValueError, match=r"cases \[2\] have no case token in this pass and were never decided"):
        named([2], [-1, -1, -1], decided())


def test_decisions_of_other_edits_do_not_go_on():
    with pytest.raises(ValueError, match=r"cases \[1\] .* were decided before the edits changed: prefill them again"):
        named([1, 0], [1, -1], decided(version=Version()))
    assert named([1, 0], [1, 0], decided(version=Version())).state.version is VERSION
    assert named([1], [-1, -1], decided(version=VERSION.twin())).decided  # of a copied model


@pytest.mark.parametrize(
    "before", [None, decided(known=None), decided(known=(True, False))], ids=["first", "nothing ran", "the other was"]
)
def test_a_case_that_was_never_decided_needs_its_token(before):
    with pytest.raises(ValueError, match=r"cases \[1\] have no case token in this pass and were never decided: a new"):
        named([0, 1], [0, -1], before)


WRONG = {
    "case too large": ([0, 1], [1], r"token_to_case must be in \[-1, 1\) for 1 case tokens, but spans \[0, 1\]"),
    "case too small": ([-2, 0], [1], r"token_to_case must be in \[-1, 1\) for 1 case tokens, but spans \[-2, 0\]"),
    "row too large": ([0, 0], [2], r"case_tokens must be in \[-2, 2\) for 2 tokens, but spans \[2, 2\]"),
    "row too small": ([0, 0], [-3], r"case_tokens must be in \[-2, 2\) for 2 tokens, but spans \[-3, -3\]"),
    "of another case": ([0, 1], [1, 0], r"case tokens \[1, 0\] of cases \[0, 1\] belong to cases \[1, 0\]"),
    "of no case": ([0, -1], [1], r"case tokens \[1\] of cases \[0\] belong to cases \[-1\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_named_wrongly(what):
    owners, tokens, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        named(owners, tokens)


def test_no_tokens_and_no_cases():
    assert named([], []).state.size == 0
    assert named([-1, -1], []).token_to_case.tolist() == [-1, -1]

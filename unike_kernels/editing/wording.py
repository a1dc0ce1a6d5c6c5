"""What the wording of a question changes in a state: learned from training questions, asked in several wordings."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .asking import together

RIDGE = 0.3  # of the mean variance that wording makes; chosen on development facts; 0.1 and 1 did about as well
MOST = 64  # directions; more did no better there


@torch.no_grad()
def wording(states: Tensor, questions: Sequence[Hashable]) -> Tensor | None:
    """W [r, d] fp32, r at most MOST, such that x - W^T W x is x whitened against wording, up to a factor.

    states [M, d]: of M case tokens; questions: M times what is asked, None where nothing is known of it. With S [d, d]
    the covariance of states around the mean of their question, that is (S + ridge I)^(-1/2) x, ridge = RIDGE trace(S) /
    d (within-class covariance normalisation: Hatch, Kajarekar and Stolcke, Interspeech 2006). None where no question
    is asked twice.
    """
    if len(states) != len(questions):
        raise ValueError(f"{len(states)} states, but {len(questions)} questions")
    groups = [states[rows].double() for rows in together(questions) if len(rows) > 1]
    if not groups:
        return None
    around = torch.cat([group - group.mean(dim=0) for group in groups])  # [m, d]
    with torch.random.fork_rng(devices=[]):  # all singular vectors of 4,000 states of a 7B model would take a minute
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs', too
        _, spread, directions = torch.svd_lowrank(around.cpu(), q=min(*around.shape, MOST + 16), niter=4)
    variance = spread.square() / len(around)  # of each direction, falling
    ridge = RIDGE * around.square().sum().cpu() / (len(around) * states.shape[1])
    taken = 1 - (ridge / (variance + ridge)).sqrt()  # of a direction; 0 where wording changes nothing
    some = min(MOST, int((variance > 1e-12 * variance[:1]).sum()))
    return (taken.sqrt() * directions).T[:some].float().contiguous() if some else None

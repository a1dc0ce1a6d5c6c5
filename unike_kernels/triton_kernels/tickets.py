"""Programs of one launch that wait for each other: by tickets, drawn in the order in which they start.

Who waits has a later ticket than those it waits for, which run already: however few programs a device has room for, it
comes to an end. The counters are zeros before the launch and used up after it.
"""

import triton
import triton.language as tl

COUNTERS = 4  # int32: tickets drawn, programs that are done with the first step, with the second; one to spare


@triton.jit
def draw(counters):
    """This program's ticket."""
    return tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")


@triton.jit
def wait_for(counter, count):
    """Returns when `count` programs have added to the counter; what they wrote before can be read then."""
    ready = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while ready < count:
        ready = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@triton.jit
def say_done(counter):
    """Adds this program to the counter, once all its threads have written what they write."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")

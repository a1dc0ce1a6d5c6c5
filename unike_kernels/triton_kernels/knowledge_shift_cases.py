"""`knowledge_shift` of one head with an alpha of each case, in one launch: the case tokens' alphas, then all tokens."""

import triton
import triton.language as tl

from .knowledge_shift_kernels import attend_case, attend_tile, items_of
from .tickets import draw, say_done, wait_for


@triton.jit(do_not_specialize=["T", "C"])
def knowledge_shift_cases(
    q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices, token_to_case, h_input, h_t, case_tokens, out, used,
    encoded, e_n, counters, T, C, K, scaling, cap,
    HD: tl.constexpr, TILED: tl.constexpr, INPUT: tl.constexpr, CLAMP: tl.constexpr, RESCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out = h_input mixed with h_know by alpha = cos(Enc(h_know), h_input) at the token case_tokens [C] of each case.

    q to h_input, out and encoded as in `knowledge_shift_attend` with one head as wide as h, HD columns; case_tokens
    int64, -1: such a case is left alone; used float32 [C]; counters int32 [4], zeros before.
    Grid (C + tiles): the first C tickets take a case each, the others its tiles, as there, when all alphas are known.
    Bytes: as there, and K rows of keys and encoded (or values) once more for each case. Float32 throughout; rounds
    once, where out is stored.
    """
    ticket = draw(counters)
    head = tl.zeros([], tl.int32)  # the only one
    if ticket < C:
        case = ticket.to(tl.int64)
        at = tl.load(case_tokens + case)
        ids, there, live = items_of(indices, case, K, BLOCK_K)
        if live & (at >= 0):
            r = tl.arange(0, 16)
            attend_case(  # its alpha belongs to the case, not to row `at`
                case, ids, there, live, r == 0, at.to(tl.int32) + tl.zeros((16,), tl.int32), r, head, q, q_t, q_h, keys,
                k_n, k_h, values, v_n, v_h, h_input, h_t, used, None, used + (case - at), encoded, e_n, K, scaling,
                cap, 1, 1, HD, HD, True, True, False, INPUT, CLAMP, False, SOFTCAP, 16, BLOCK_K, BLOCK_D, BLOCK_V,
            )  # fmt: skip
        else:
            tl.store(used + case, 1.0 if INPUT else 0.0)
        say_done(counters + 1)
    else:
        wait_for(counters + 1, C)
        attend_tile(
            ticket - C, head, q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices, token_to_case, h_input, h_t, used,
            out, used, None, 0, None, 0, None, T, K, scaling, cap, 1, 1, HD, HD, True, TILED, True, False, True, INPUT,
            CLAMP, RESCALE, SOFTCAP, BLOCK_R, BLOCK_K, BLOCK_D, BLOCK_V, 16,
        )  # fmt: skip

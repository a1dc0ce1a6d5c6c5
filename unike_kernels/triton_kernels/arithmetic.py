"""Functions of float32 tiles that several kernels use; derivatives beside them."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh to a few ulp, small x included: 2 sigmoid(2 x) - 1 alone loses all digits of a small result."""
    z = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - z) / (1.0 + z)
    s = x * x  # the polynomial is that of Cephes' tanhf, for |x| < 0.625
    p = -5.70498872745e-3
    p = p * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * s * p, tl.where(x < 0, -large, large))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """act(x), x float32. A NaN stays a NaN."""
    if ACT == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACT == "identity")
        return x


@triton.jit
def activate_grad(x, ACT: tl.constexpr):
    """d act(x) / d x, x float32; torch's convention at 0: relu has 0."""
    if ACT == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        return s * (1.0 + x * (1.0 - s))
    else:
        tl.static_assert(ACT == "identity")
        return tl.full(x.shape, 1.0, tl.float32)

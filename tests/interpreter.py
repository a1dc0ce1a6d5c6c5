"""Repairs of Triton's CPU interpreter (3.2 to 3.9), for tests only.

Without them, loops over a run-time range die with numpy 2.4 and later, and whatever is computed in bfloat16 is silently
wrong: the interpreter keeps bfloat16 as a bit pattern and calculates with the pattern.
"""

from typing import Any

import numpy as np


def _widen(bits: Any) -> Any:
    """float32 of bfloat16 bit patterns."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(values: Any) -> Any:
    """Bit patterns of float32, rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(values), ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16), rounded)


def repair() -> None:
    """Repairs the interpreter of this process. Call it before the first kernel runs."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder, handle, bf16 = interpreter.InterpreterBuilder, interpreter.TensorHandle, tl.bfloat16

    if not hasattr(builder, "get_int1_ty"):  # Triton 3.2 cannot tell what ~ makes of a mask
        builder.get_int1_ty = lambda self: tl.int1
        all_ones = builder.get_all_ones_value
        builder.get_all_ones_value = lambda self, of: (
            handle(np.ones(1, dtype=bool), tl.int1) if of.scalar == tl.int1 else all_ones(self, of)
        )

    def narrow(tensor: Any) -> bool:
        return tensor.dtype.scalar == bf16

    def value(tensor: Any) -> Any:
        return _widen(tensor.data) if narrow(tensor) else tensor.data

    # int() of an array with one element and one dimension raises since numpy 2.4.
    patch_tensor = interpreter._patch_lang_tensor

    def patched_tensor(tensor: Any, *scope: Any) -> None:  # Triton before 3.4 has no scope, and leaves things patched
        patch_tensor(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched_tensor

    cast_impl = builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        a, b = source.dtype.scalar, target.scalar
        if a == b:
            return handle(source.data, b)
        if a == bf16:
            wide = _widen(source.data)
            return handle(wide if b == tl.float32 else wide.astype(interpreter._get_np_dtype(target)), b)
        if b == bf16:
            return handle(_narrow(source.data.astype(np.float32)), b)
        return cast_impl(self, source, target)

    builder.cast_impl = cast

    fp_to_fp = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        floats = {tl.bfloat16, tl.float16, tl.float32, tl.float64}
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if {source.dtype.scalar, target.scalar} <= floats and nearest:
            return cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    builder.create_fp_to_fp = create_fp_to_fp

    binary, unary, dot = builder.binary_op, builder.unary_op, builder.create_dot

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if narrow(left):
            return handle(_narrow(op(value(left), value(right))), bf16)
        return binary(self, left, right, op)

    def unary_op(self: Any, tensor: Any, op: Any) -> Any:
        return handle(_narrow(op(value(tensor))), bf16) if narrow(tensor) else unary(self, tensor, op)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        if narrow(a) or narrow(b):
            return handle(np.matmul(value(a), value(b), dtype=np.float32) + acc.data, acc.dtype.scalar)
        return dot(self, a, b, acc, *rest)

    builder.binary_op, builder.unary_op, builder.create_dot = binary_op, unary_op, create_dot

    compare = {"LT": np.less, "GT": np.greater, "LE": np.less_equal, "GE": np.greater_equal}
    compare |= {"EQ": np.equal, "NE": np.not_equal}
    for ordered in "OU":
        for short, op in compare.items():
            _compare(builder, handle, f"create_fcmp{ordered}{short}", op, narrow, value, tl.int1)
    for name in ("EQ", "NE", "SLT", "SGT", "SLE", "SGE", "ULT", "UGT", "ULE", "UGE"):
        _compare(builder, handle, f"create_icmp{name}", compare[name[-2:]], narrow, value, tl.int1)

    # The compare-and-swap of tl.sort and tl.topk: one element at a time in Python, hundreds of times slower.
    apply_impl = interpreter.ReduceOps.apply_impl

    def apply(self: Any, tensor: Any) -> Any:
        if self.combine_fn is not tl.standard._xor_combine:
            return apply_impl(self, tensor)
        one = tensor[0] if isinstance(tensor, tuple) else tensor
        data = np.bitwise_xor.reduce(one.handle.data, axis=self.axis, keepdims=self.keep_dims)
        result = self.to_tensor(data, one.dtype)
        return (result,) if isinstance(tensor, tuple) else result

    interpreter.ReduceOps.apply_impl = apply

    for name in ("sum", "min_max"):
        _refuse_bf16(interpreter.ReduceOps, name, bf16)


def _compare(builder: Any, handle: Any, name: str, op: Any, narrow: Any, value: Any, boolean: Any) -> None:
    before = getattr(builder, name)

    def compared(self: Any, left: Any, right: Any) -> Any:
        # Always booleans: the interpreter gives them the operands' dtype. A scalar one becomes floats when spread, and
        # 3.9 refuses integers as masks.
        told = op(value(left), value(right)) if narrow(left) else before(self, left, right).data
        return handle(told.astype(bool), boolean)

    setattr(builder, name, compared)


def _refuse_bf16(reductions: Any, name: str, bf16: Any) -> None:
    before = getattr(reductions, name)

    def refusing(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.handle.dtype.scalar == bf16:
            raise NotImplementedError("a reduction of bfloat16 in the interpreter: cast to float32 first")
        return before(self, tensor, *args, **kwargs)

    setattr(reductions, name, refusing)

"""Every operator of `unike` as torch sees it: schema, kernel, fake kernel and gradient.

One library with hand-written schemas: torch.library.custom_op costs two to four times as much per call. All arguments
are positional, tensors first, the backend last. The reference runs on every device; `backends` says when a launcher of
that operator's name takes its place. The gradient of an operator is itself an operator, so that compiled code can call
it; the reference's computes the forward again under autograd instead of keeping what lies between.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .. import backends, reference
from ._checks import check_shape
from .augmented_ffn import check_arguments as check_augmented_ffn
from .cosine_topk import check_arguments as check_cosine_topk
from .extra_neurons import check_arguments as check_extra_neurons
from .knowledge_shift import check_arguments as check_knowledge_shift
from .retrieve_and_shift import check_arguments as check_retrieve_and_shift
from .retrieve_and_shift import scores_dtype

LIB = torch.library.Library("unike", "DEF")
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality

_NEURONS = (
    "Tensor x, Tensor keys, Tensor? key_bias, Tensor values, Tensor? up, Tensor? up_bias, Tensor? zeta, "
    "Tensor? route, Tensor? group_ptr, Tensor? token_to_case, Tensor? selected, str act, float beta, str backend"
)
_FFN = (
    "Tensor x, Tensor w_k, Tensor? b_k, Tensor w_v, Tensor? b_v, Tensor? w_up, Tensor? b_up, Tensor keys, "
    "Tensor? key_bias, Tensor values, Tensor? up, Tensor? up_bias, Tensor? zeta, str act, float beta, str backend"
)
_SHIFT = (
    "Tensor h_input, Tensor q, Tensor item_keys, Tensor item_values, Tensor indices, Tensor? alpha, "
    "Tensor? token_to_case, Tensor? case_tokens, Tensor? out_weight, Tensor? out_bias, Tensor[] encoder, "
    "str encoder_act, str orientation, bool clamp, float? scaling, float? softcap, bool rescale, "
    "Tensor? encoder_rows, Tensor? folded_weight, Tensor? folded_bias, str backend"
)


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], after: int = 0) -> None:
    """An operator; `kernel` gets its arguments without the backend, which has `after` arguments behind it.

    One that writes in place writes its first argument.
    """

    def run(*args: Any) -> Any:
        at = len(args) - 1 - after
        backend, args = args[at], args[:at] + args[at + 1 :]
        tensors: list[Tensor] = []
        for arg in args:
            if isinstance(arg, Tensor):
                tensors.append(arg)
            elif type(arg) is list:
                tensors += [leaf for leaf in arg if isinstance(leaf, Tensor)]
        if forward_ad._current_level >= 0 and _tangents(tensors):
            raise RuntimeError(f"unike::{name} has no forward-mode derivative; unike_kernels.reference has all of them")
        chosen = backends.implementation(name, backend, tensors, args) or kernel
        device = tensors[0].device.type
        if not torch.is_autocast_enabled(device):
            return chosen(*args)
        with torch.autocast(device, enabled=False):  # it would round the products of what is accumulated in float32
            return chosen(*args)

    def run_in_place(*args: Any) -> None:
        run(*args)
        # Kernels write past torch, which has to know: gradients of what it saved would be of what stands there now.
        increment_version(args[0])

    LIB.define(f"{name}{schema}")
    LIB.impl(name, run_in_place if "(a!)" in schema else run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"unike::{name}", fake, lib=LIB)


def _tangents(tensors: Iterable[Tensor]) -> bool:
    """Whether a forward-mode derivative is wanted: torch drops tangents here, so it would be zero and nobody told.

    torch.func keeps its tangents where a kernel does not see them: within its jvp every operator counts.
    """
    if eager_transforms.JVP_NESTING > 0:
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _flat(args: Iterable[Any]) -> list[Any]:
    """The arguments with lists of tensors spread out."""
    return [leaf for arg in args for leaf in (arg if isinstance(arg, (list, tuple)) else [arg])]


def _like(leaves: Iterable[Any], args: Iterable[Any]) -> tuple[Any, ...]:
    """The inverse: leaves gathered as in args."""
    left = iter(leaves)
    return tuple([next(left) for _ in arg] if isinstance(arg, (list, tuple)) else next(left) for arg in args)


# ------------------------------------------------------------------------------------------------------- gradients


class _Once(torch.autograd.Function):
    """Gradients that refuse to be differentiated: without it, a second derivative would be zero and nobody told.

    They hang on all that they depend on, what was differentiated by and the gradients that came in: on a leaf of its
    own, `torch.autograd.grad` of other inputs would never come by here.
    """

    @staticmethod
    def forward(ctx: Any, message: str, found: Sequence[Tensor], *depends_on: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(grad.view_as(grad) for grad in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.message)


def _define_differentiable(
    name: str, arguments: str, returns: str, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """An operator, `<name>_backward`, and the link between them.

    `needs`: which leaves of the arguments want a gradient; the backend, the last argument, has no entry.
    """
    _define(name, f"({arguments}) -> {returns}", kernel, fake)

    def gradients(grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *args, needs = rest
        leaves = [
            leaf.detach().requires_grad_(need) if isinstance(leaf, Tensor) else leaf
            for leaf, need in zip(_flat(args), needs, strict=True)
        ]
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        # A dispatch mode (the flop counter, say) calls operators with autograd off, also if gradients are enabled.
        with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False):
            if not all(leaf.view_as(leaf).requires_grad for leaf in wanted):
                raise RuntimeError(f"unike::{name}_backward needs autograd, which is off here, as in inference mode")
            result = kernel(*_like(leaves, args))
            result = [result] if isinstance(result, Tensor) else result
            # No output depends on a wanted tensor where nothing was selected or retrieved.
            live = [(output, grad) for output, grad in zip(result, grads, strict=True) if output.requires_grad]
            if not live:
                return [leaf.new_zeros(leaf.shape) for leaf in wanted]
            outputs, of_outputs = zip(*live, strict=True)
            found = torch.autograd.grad(outputs, wanted, of_outputs, materialize_grads=True)
        return [grad.contiguous() for grad in found]

    def fake_gradients(grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *args, _, needs = rest
        return [leaf.new_empty(leaf.shape) for leaf, need in zip(_flat(args), needs, strict=True) if need]

    schema = f"(Tensor[] grads, {arguments}, bool[] needs) -> Tensor[]"
    _define(f"{name}_backward", schema, gradients, fake_gradients, after=1)
    operator = getattr(torch.ops.unike, f"{name}_backward").default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves = _flat(inputs)
        ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        ctx.args = _like((None if isinstance(leaf, Tensor) else leaf for leaf in leaves), inputs)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors, needs = iter(ctx.saved_tensors), _flat(ctx.needs_input_grad)[:-1]  # without the backend's
        leaves = [next(tensors) if known else leaf for known, leaf in zip(ctx.is_tensor, _flat(ctx.args), strict=True)]
        with torch.no_grad():
            found = operator(list(grads), *_like(leaves, ctx.args), needs)
        if torch.is_grad_enabled():  # create_graph=True
            message = f"unike::{name} is differentiable once; unike_kernels.reference has all derivatives"
            depends_on = [leaf for leaf, need in zip(leaves, (*needs, False), strict=True) if need]
            found = _Once.apply(message, found, *depends_on, *grads)
        left = iter(found)
        return _like((next(left) if need else None for need in (*needs, False)), ctx.args)

    torch.library.register_autograd(f"unike::{name}", backward, setup_context=setup_context, lib=LIB)


# ------------------------------------------------------------------------------------------------------- operators


def _neuron_options(*args: Any) -> dict[str, Any]:
    names = ("up", "up_bias", "zeta", "route", "group_ptr", "token_to_case", "selected", "act", "beta")
    return dict(zip(names, args, strict=True))


def _extra_neurons(x: Tensor, keys: Tensor, key_bias: Tensor | None, values: Tensor, *rest: Any) -> Tensor:
    return reference.extra_neurons(x, keys, key_bias, values, **_neuron_options(*rest))


def _extra_neurons_fake(x: Tensor, *rest: Any) -> Tensor:
    *tensors, _, _, _ = rest
    check_extra_neurons(torch._check, x, *tensors)
    return x.new_empty((*x.shape[:-1], tensors[2].shape[1]))


def _extra_neurons_in_place(
    y: Tensor, x: Tensor, keys: Tensor, key_bias: Tensor | None, values: Tensor, *rest: Any
) -> None:
    reference.extra_neurons_(y, x, keys, key_bias, values, **_neuron_options(*rest))


def _extra_neurons_in_place_fake(y: Tensor, x: Tensor, *rest: Any) -> None:
    check_shape(torch._check, "y", y, tuple(_extra_neurons_fake(x, *rest).shape), x=x)


_define_differentiable("extra_neurons", _NEURONS, "Tensor", _extra_neurons, _extra_neurons_fake)
_define("extra_neurons_", f"(Tensor(a!) y, {_NEURONS}) -> ()", _extra_neurons_in_place, _extra_neurons_in_place_fake)


def _augmented_ffn(*args: Any) -> Tensor:
    x, w_k, b_k, w_v, b_v, w_up, b_up, keys, key_bias, values, up, up_bias, zeta, act, beta = args
    options = {"act": act, "w_up": w_up, "b_up": b_up, "up": up, "up_bias": up_bias, "zeta": zeta, "beta": beta}
    return reference.augmented_ffn(x, w_k, b_k, w_v, b_v, keys, key_bias, values, **options).contiguous()


def _augmented_ffn_fake(x: Tensor, *rest: Any) -> Tensor:
    check_augmented_ffn(torch._check, x, *rest[:-3])
    return x.new_empty(x.shape)


_define_differentiable("augmented_ffn", _FFN, "Tensor", _augmented_ffn, _augmented_ffn_fake)


def _cosine_topk(
    q: Tensor, keys: Tensor, k: int, key_norm: Tensor | None, ranges: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reference.cosine_topk(q, keys, k, key_norm=key_norm, ranges=ranges)


def _cosine_topk_fake(
    q: Tensor, keys: Tensor, k: int, key_norm: Tensor | None, ranges: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    check_cosine_topk(torch._check, q, keys, k, key_norm, ranges)
    shape, dtype = (*q.shape[:-1], k), reference.compute_dtype(q, keys, key_norm)
    return q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=torch.int64)


_TOPK = "(Tensor q, Tensor keys, SymInt k, Tensor? key_norm, Tensor? ranges, str backend) -> (Tensor, Tensor)"
_define("cosine_topk", _TOPK, _cosine_topk, _cosine_topk_fake)


def _knowledge_shift(*args: Any) -> tuple[Tensor, Tensor]:
    h_input, q, item_keys, item_values, indices, alpha, token_to_case, case_tokens, weight, bias, encoder = args[:11]
    encoder_act, orientation, clamp, scaling, softcap, rescale, encoder_rows, folded_weight, folded_bias = args[11:]
    h, used = reference.knowledge_shift(
        h_input,
        q,
        item_keys,
        item_values,
        indices,
        alpha=alpha,
        encoder=list(zip(encoder[::2], encoder[1::2], strict=True)) or None,
        encoder_act=encoder_act,
        orientation=orientation,
        clamp=clamp,
        token_to_case=token_to_case,
        case_tokens=case_tokens,
        out_proj=None if weight is None else (weight, bias),
        scaling=scaling,
        softcap=softcap,
        rescale=rescale,
        encoder_rows=encoder_rows,
        folded=None if folded_weight is None else (folded_weight, folded_bias),
    )
    return h.contiguous(), used


def _knowledge_shift_fake(*args: Any) -> tuple[Tensor, Tensor]:
    check_knowledge_shift(torch._check, *args[:11], *args[17:20])
    h_input, q, item_keys, item_values, indices, alpha, token_to_case, case_tokens = args[:8]
    per_case = reference.alpha_is_per_case(alpha, indices, token_to_case, case_tokens)
    count = indices.shape[0] if per_case else h_input.shape[0]
    return h_input.new_empty(h_input.shape), h_input.new_empty(count, dtype=reference.compute_dtype(h_input, q))


_define_differentiable("knowledge_shift", _SHIFT, "(Tensor, Tensor)", _knowledge_shift, _knowledge_shift_fake)


_RETRIEVE = (
    "(Tensor h_input, Tensor q, Tensor item_keys, Tensor item_values, Tensor tap, Tensor sem, SymInt k, "
    "Tensor? sem_norm, Tensor spans, Tensor? token_to_case, Tensor? selected, Tensor? alpha, Tensor? out_weight, "
    "Tensor? out_bias, Tensor? encoder_rows, Tensor? folded_weight, Tensor? folded_bias, str orientation, bool clamp, "
    "float? scaling, float? softcap, bool rescale, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _retrieve_and_shift(*args: Any) -> tuple[Tensor, ...]:
    h_input, q, item_keys, item_values, tap, sem, k, sem_norm, spans, token_to_case, selected, alpha = args[:12]
    weight, bias, encoder_rows, folded_weight, folded_bias, orientation, clamp, scaling, softcap, rescale = args[12:]
    h, used, scores, indices = reference.retrieve_and_shift(
        h_input,
        q,
        item_keys,
        item_values,
        tap,
        sem,
        k,
        spans=spans,
        sem_norm=sem_norm,
        token_to_case=token_to_case,
        selected=selected,
        alpha=alpha,
        out_proj=None if weight is None else (weight, bias),
        encoder_rows=encoder_rows,
        folded=None if folded_weight is None else (folded_weight, folded_bias),
        orientation=orientation,
        clamp=clamp,
        scaling=scaling,
        softcap=softcap,
        rescale=rescale,
    )
    return h.contiguous(), used, scores, indices


def _retrieve_and_shift_fake(*args: Any) -> tuple[Tensor, ...]:
    check_retrieve_and_shift(torch._check, *args[:17])
    h_input, q, tap, sem, k = args[0], args[1], args[4], args[5], args[6]
    tokens, (of_alpha, of_scores) = h_input.shape[0], scores_dtype(h_input, q, tap, sem)
    scores = tap.new_empty((tokens, k), dtype=of_scores)
    found = tap.new_empty((tokens, k), dtype=torch.int64)
    return h_input.new_empty(h_input.shape), h_input.new_empty(tokens, dtype=of_alpha), scores, found


_define("retrieve_and_shift", _RETRIEVE, _retrieve_and_shift, _retrieve_and_shift_fake)

"""The forward hooks of one patch: they read the site's tensors, ask the edit's modules and add what those return.

Hooks are objects, not closures, so that a patched model pickles and deep-copies with its patch.
"""

import os
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .cases import Cases, all_missing, may_ask
from .forwards import HookedForward, own_product
from .labels import LabelsHook, another_thread, within
from .modules import KnowledgeShift
from .neurons import ExtraNeurons
from .projections import OwnHook, Projections
from .routing import Router
from .tracker import CaseTracker

_running: dict[int, int] = {}  # by a Runtime's id: the thread whose pass runs now
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)  # which has none of the threads that were in a pass
_ON_ALL = torch.nn.modules.module._global_forward_hooks  # of every module in the process


class Runtime:
    """What all hooks of one patch share: whether it is on, and the cases of the current pass."""

    def __init__(self, tracker: CaseTracker) -> None:
        self.enabled = True
        self.tracker = tracker
        self.sites: list[AttentionSite] = []  # of the edited layers
        self.forwards: list[HookedForward] = []  # that hold hooks of this patch
        self.hooked: list[tuple[str, nn.Module]] = []  # the sites' modules, by their names below the decoder
        self.native: Cases | None = None  # those of the decoding step that runs now, if native code may serve it
        self.again = False  # it goes on with what the step before found
        # of a backward pass: which one, and whether the patch was on and its cases before that
        self.before: tuple[int, bool, Cases | None] | None = None
        self.places: list[tuple[dict[str, Any], HookedForward]] | None = None  # where each of the forwards stands

    def cases(self, like: Tensor) -> Cases:
        """The current pass's cases on `like`'s device."""
        if self.tracker.current is None:
            raise RuntimeError(
                "an edited layer ran outside its decoder, so its cases are unknown; call the decoder, or name them "
                "with handle.set_cases and run the decoder once"
            )
        return self.tracker.current.to(like.device)

    def recompute(self, enabled: bool, cases: Cases | None) -> None:
        """Within a backward pass: the layers that run now are of a pass with these cases, while the patch was so.

        Until the backward pass ends; then everything is as it was before it.
        """
        task = torch._C._current_graph_task_id()
        if self.before is None or self.before[0] != task:
            self.after_backward()  # of one that failed: torch calls nothing then
            self.before = task, self.enabled, self.tracker.current
            # torch has no public way to be called when a backward pass ends; FSDP takes this one, too
            torch.autograd.Variable._execution_engine.queue_callback(self.after_backward)
        self.enabled, self.tracker.current = enabled, cases

    def after_backward(self) -> None:
        """Makes the patch what it was before the backward pass, if one changed it."""
        if self.before is not None:
            (_, self.enabled, self.tracker.current), self.before = self.before, None

    def refuse_replaced(self, decoder: nn.Module) -> None:
        """Raises RuntimeError where a site's module was replaced by one without it: its edits would be lost unseen."""
        for name, module in self.hooked:
            there: nn.Module | None = decoder
            for part in name.split("."):
                there = None if there is None else there._modules.get(part)
            if there is module or any(module in around.modules() for around in (there, decoder) if around is not None):
                continue  # at most an adapter has come around it
            raise RuntimeError(
                f"{name} was replaced after patch {self.tracker.name!r} was made, so its edits do not act: remove the "
                "patch (unpatch) and patch again"
            )

    def __getstate__(self) -> dict[str, Any]:
        # On, though the copy was made inside `disabled`: nothing could switch it on later.
        return {**self.__dict__, "enabled": True, "native": None, "places": None, "before": None}


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with."""
    return args[0] if args else kwargs["hidden_states"]


# ---------------------------------------------------------------------------------------------------------- sites


class AttentionSite:
    """What one patch's hooks in and around one self-attention share while it runs.

    `queue`: the sites of all patches on this self-attention, oldest first, one list for all of them. Each patch mixes
    into what the one before left, so a site mixes before the output projection only where all before it have done so.
    """

    def __init__(
        self, runtime: Runtime, router: Router | None, shift: KnowledgeShift | None, projections: Projections
    ) -> None:
        self.runtime, self.router, self.shift, self.projections = runtime, router, shift, projections
        self.queue: list[AttentionSite] = [self]
        self.attention: nn.Module | None = None  # while it runs, between its first and its last own step
        self.tap: Tensor | None = None  # what it was called with
        self.projected: Tensor | None = None  # what its q_proj made of that
        self.version: int | None = None  # of that tensor, so that writing to it is noticed
        self.writes, self.watched = False, False  # whether the layer writes to that tensor, and whether that was seen
        self.copied: Tensor | None = None  # that tensor's copy, in the pass that tells
        self.waiting = False  # this pass's shift is still to come

    def join(self, queue: "list[AttentionSite]") -> None:
        """Puts this site behind those of the patches that are there already."""
        queue.append(self)
        self.queue = queue

    def leave(self) -> None:
        """Takes this site out again, with its patch."""
        if self in self.queue:
            self.queue.remove(self)
        self.clear()

    def clear(self) -> None:
        """After the self-attention: nothing outlives its pass."""
        self.attention = self.tap = self.projected = self.version = self.copied = None
        self.waiting = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attention": None, "tap": None, "projected": None, "copied": None, "waiting": False}

    @property
    def query(self) -> Tensor | None:
        """[T, H hd] q_proj's output; None where it was not seen, or has been written to (rotated in place) since."""
        return _rows(self.projected) if self.projected is not None and self.unwritten() else None

    def unwritten(self) -> bool:
        """Whether q_proj's output, if it was seen, is still what that made.

        torch counts writes, but not in inference mode, nor those of others' kernels (some rotate in place): so a copy
        of the first pass of several tokens is compared, once.
        """
        if not is_compiling() and self.copied is not None and self.projected is not None:
            self.writes, self.watched = not torch.equal(self.copied, self.projected), True
            self.copied = None
        if self.writes:
            return self.projected is None
        return self.projected is None or self.version is None or self.projected._version == self.version

    def route(self, tap: Tensor, cases: Cases) -> None:
        """Decides once per case which edits act on it, for all layers and all later tokens."""
        state = cases.state
        if self.router is None or state.chosen or (cases.decided and state.selected is not None):
            return
        scores, selected = self.router(tap[cases.case_tokens.clamp(min=0)])
        if state.selected is not None and state.route_scores is not None:
            selected = cases.keep_decided(selected, state.selected, -1)
            scores = cases.keep_decided(scores, state.route_scores, -torch.inf)
        state.selected, state.route_scores = selected, scores


class AttentionInputHook:
    """Forward pre-hook on `self_attn`: routes cases (at the first edited layer), and opens the site for its pass."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        site = self.site
        site.projected = site.version = site.copied = None
        runtime = site.runtime
        if not runtime.enabled:
            site.clear()
            return
        tap = hidden_states_of(args, kwargs)
        if site.router is not None and (runtime.native is None or runtime.native.state.selected is None):
            site.route(_rows(tap), runtime.cases(tap))
        if site.shift is not None:
            site.attention, site.tap, site.waiting = module, tap, True


class QueryHook(OwnHook):
    """Forward hook on `q_proj`: keeps what the layer itself computes, so that q is not computed twice."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        site = self.site
        # The very tensor that the layer was called with: the shift calls q_proj too, on other rows.
        attention = site.attention
        if attention is None or not args or args[0] is not site.tap:
            return
        projections = site.projections
        here = attention._modules.get(projections.q_proj) is module or projections.is_query(attention, module)
        if here and isinstance(output, Tensor):
            eager = not is_compiling()
            counted = eager and not output.is_inference()
            site.projected, site.version = output, output._version if counted else None
            if eager and not site.watched and output.dim() > 1 and output.shape[-2] > 1 and may_ask():
                site.copied = output.detach().clone()


class HeadsHook(OwnHook):
    """Forward pre-hook on the output projection: mixes the knowledge into the heads, where alpha is known by then."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        site = self.site
        attention, shift = site.attention, site.shift
        if not site.waiting or attention is None or shift is None or not args:
            return None
        projections = site.projections
        if attention._modules.get(projections.out_proj) is not module and not projections.is_output(attention, module):
            return None  # an adapter came around it since: it would see the heads as they were
        if module._forward_pre_hooks and any(not isinstance(h, OwnHook) for h in module._forward_pre_hooks.values()):
            return None  # what others do to the heads is to reach the knowledge too
        for earlier in site.queue:
            if earlier is site:
                break
            if earlier.waiting:
                return None
        heads, tap, q = args[0], site.tap, site.projected
        native = site.runtime.native
        if native is not None and q is not None and site.unwritten():
            if projections.sites.q_norm is not None:
                q = projections.query(attention, q, q)
            mixed = shift.mix_natively(heads, q, native, own_product(module))
            if mixed is not None:
                site.waiting = False
                return None if mixed is heads else ((mixed, *args[1:]), kwargs)
        assert tap is not None
        cases = site.runtime.cases(tap)
        mixed = shift.mix(_rows(heads), _rows(tap), site.query, attention, site.projections, cases)
        if mixed is None:
            return None
        site.waiting = False
        return (mixed.reshape(heads.shape), *args[1:]), kwargs


class AttentionHook:
    """Forward hook on `self_attn`, called even where that failed: shifts the output, unless the heads already were."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        site = self.site
        waiting = site.waiting
        query = site.query if waiting else None
        for every in site.queue:
            every.attention = None  # from here on its projections are called by shifts, not by the layer
        site.tap = site.projected = site.version = site.copied = None
        site.waiting = False
        if not waiting or output is None or not site.runtime.enabled:
            return None
        assert site.shift is not None
        tap = hidden_states_of(args, kwargs)
        h_att = output[0] if isinstance(output, tuple) else output
        cases = site.runtime.cases(tap)
        h = site.shift.shift(_rows(tap), _rows(h_att), query, module, site.projections, cases)
        h = h.reshape(h_att.shape)
        return (h, *output[1:]) if isinstance(output, tuple) else h


def _rows(x: Tensor) -> Tensor:
    """[T, d] of [..., d]."""
    return x.reshape(-1, x.shape[-1])


class FfnInputHook:
    """Forward pre-hook on an FFN's first module: keeps its input for the hook at the FFN's output."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.x: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.runtime.enabled:
            self.x = hidden_states_of(args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "x": None}


class FfnOutputHook:
    """Forward hook on an FFN's last module: adds what the extra neurons compute from the FFN's input."""

    def __init__(self, runtime: Runtime, neurons: ExtraNeurons, source: FfnInputHook | None, positions: str) -> None:
        self.runtime, self.neurons, self.source, self.positions = runtime, neurons, source, positions
        self.fused: Any = None  # the layer's FusedFfn, in a patch of mode "fuse"

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        runtime = self.runtime
        if not runtime.enabled:
            return None
        source = self.source
        if source is None:
            x: Tensor | None = hidden_states_of(args, kwargs)
        else:
            x, source.x = source.x, None  # given up, so that it does not outlive its pass
        if self.fused is not None and self.fused.take_done():
            return None
        if x is None:  # switched on between the FFN's first and last module
            return None
        native = runtime.native
        if native is not None and not torch.is_grad_enabled() and not is_compiling():
            mine = own_product(module) or _may_write(module, x, output)
            if mine and self.neurons.add_natively(output, x, native):
                return None
        cases = runtime.cases(x)
        selected = cases.selected
        # None: always on, every group acts on every token (the paper)
        rows = None if selected is None else cases.rows(self.positions)
        if selected is not None and all_missing(selected):
            return None
        if _may_write(module, x, output):
            self.neurons.add_(output, x, rows, selected)
            return None
        return output + self.neurons(x, rows, selected)


def _may_write(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether the FFN's output is a tensor of its own that nobody else may have kept: then it is added to in place."""
    if torch.is_grad_enabled() or is_compiling() or output.dtype is not x.dtype:
        return False
    if not output.is_contiguous():
        return False
    if own_product(module):
        return True
    if _ON_ALL:  # a profiler or the like may have kept what the module's last part made
        return False
    if output.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return False
    for around in (module, *module._modules.values()):
        for hook in around._forward_hooks.values() if around is not None else ():
            if not isinstance(hook, FfnOutputHook):
                return False
    return True


# -------------------------------------------------------------------------------------------------------- decoder


class BeginHook:
    """Forward pre-hook on the decoder: finds the cases of the pass."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        runtime = self.runtime
        if not is_compiling():
            mine = threading.get_ident()
            if _running.setdefault(id(runtime), mine) != mine and not within(_running[id(runtime)], module):
                _running[id(runtime)] = mine  # torch calls no hook after a pass that Ctrl-C broke off
            if _running[id(runtime)] != mine:
                raise RuntimeError(another_thread(runtime.tracker.name))
            if runtime.places is None:
                runtime.places = [(vars(forward.module), forward) for forward in runtime.forwards]
            for own, forward in runtime.places:
                if own.get("forward") is not forward:
                    for hook in forward.before:
                        if isinstance(hook, LabelsHook):
                            hook.warn_if_missed(forward.module)
                    forward.give_way()
        runtime.native = None
        if runtime.before is not None and torch._C._current_graph_task_id() < 0:
            runtime.after_backward()  # one failed
        tracker = runtime.tracker
        if not runtime.enabled:
            tracker.skip(args, kwargs)
            return
        runtime.again = tracker.begin(args, kwargs)
        current = tracker.current
        if current is not None:
            if current.native:
                runtime.native = current
            elif not current.decided and not is_compiling():
                runtime.refuse_replaced(module)


class EndHook:
    """Forward hook on the decoder: leaves the decisions on the KV cache, and the cases for a recomputation.

    Called even where the decoder failed: the pass is over.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        runtime = self.runtime
        if not is_compiling():
            if _running.get(id(runtime)) != threading.get_ident():
                return  # refused: the other thread's pass goes on
            del _running[id(runtime)]
        runtime.native = None
        if output is None:
            return
        tracker = runtime.tracker
        if runtime.enabled:
            if runtime.again:  # the decisions are on the cache that was given
                return
            tracker.end(output, args, kwargs)
            if tracker.current is None:
                return
        if not torch.is_grad_enabled() or is_compiling():
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        for states in (hidden, *(getattr(output, "hidden_states", None) or ())):
            if isinstance(states, Tensor) and states.requires_grad:
                states.register_hook(RestoreCases(runtime, runtime.enabled, tracker.current))


class RestoreCases:
    """Gradient hook on what the decoder gave: gradient checkpointing runs its layers again, maybe after other passes.

    Those of a pass without the edits run without them again, whatever the patch does by then.
    """

    def __init__(self, runtime: Runtime, enabled: bool, cases: Cases | None) -> None:
        self.runtime, self.enabled, self.cases = runtime, enabled, cases

    def __call__(self, grad: Tensor) -> None:
        self.runtime.recompute(self.enabled, self.cases)

"""What a patch decided for each case, in words that a person can act on: the first debugging question."""

from dataclasses import dataclass

from .cases import Cases
from .edits import Edits


@dataclass(frozen=True)
class LayerReport:
    """One layer's decision for one case: items as (name, cosine), nearest first, and the strength of the shift.

    "memory[i]" is item i of the memory, which the editor made from `editor.triplets[editor.states.kept[i]]`; edits keep
    no texts of these. "edit x" is the own item of the edit with id x.
    """

    layer: int
    items: tuple[tuple[str, float], ...]
    alpha: float


@dataclass(frozen=True, repr=False)
class CaseReport:
    """One case: the edits that act on it, as (id, routing score or None where none was routed), then each layer."""

    case: int
    edits: tuple[tuple[str, float | None], ...]
    layers: tuple[LayerReport, ...]

    def _acting(self, most: int | None = None) -> str:
        """The first edits that act, with their scores."""
        names = [i if s is None else f"{i} ({s:.3f})" for i, s in self.edits]
        more = [] if most is None or len(names) <= most else [f"{len(names) - most} more"]
        return ", ".join([*names[:most], *more]) or "none"

    def __repr__(self) -> str:
        alphas = ", ".join(f"{layer.alpha:.3f} at layer {layer.layer}" for layer in self.layers) or "none"
        return f"CaseReport(case {self.case}; edits that act: {self._acting(3)}; alpha: {alphas})"

    def __str__(self) -> str:
        lines = [f"case {self.case}: edits that act: {self._acting()}"]
        for layer in self.layers:
            items = ", ".join(f"{name} {score:.3f}" for name, score in layer.items[:5]) or "nothing retrieved"
            more = f", and {len(layer.items) - 5} more" if len(layer.items) > 5 else ""
            lines.append(f"  layer {layer.layer}: alpha {layer.alpha:.3f}; {items}{more}")
        return "\n".join(lines)


def report(cases: Cases, edits: Edits) -> list[CaseReport]:
    """One CaseReport per case of a pass that just ran with `edits` on the model."""
    state = cases.state
    out = []
    for case in range(state.size):
        acting: list[tuple[str, float | None]] = [(i, None) for i in edits.ids]
        if state.selected is not None:
            groups = state.selected[case].tolist()
            scores = [None] * len(groups) if state.route_scores is None else state.route_scores[case].tolist()
            acting = [(edits.ids[group], score) for group, score in zip(groups, scores, strict=True) if group >= 0]
        layers = []
        for index, decision in sorted(state.layers.items()):
            shared = len(edits.shared[index].h_sem)
            pairs = zip(decision.indices[case].tolist(), decision.scores[case].tolist(), strict=True)
            items = tuple(
                (f"memory[{i}]" if i < shared else f"edit {edits.ids[i - shared]}", score)
                for i, score in pairs
                if i >= 0
            )
            layers.append(LayerReport(index, items, float(decision.alpha[case])))
        out.append(CaseReport(case, tuple(acting), tuple(layers)))
    return out

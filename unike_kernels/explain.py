"""What a patch decided for each case, in words that a person can act on: the first debugging question."""

from dataclasses import dataclass

from .cases import Cases
from .edits import Edits


@dataclass(frozen=True)
class LayerReport:
    """One layer's decision for one case: items as (name, cosine), nearest first, and the strength of the shift."""

    layer: int
    items: tuple[tuple[str, float], ...]
    alpha: float


@dataclass(frozen=True)
class CaseReport:
    """One case: the edits that act on it, as (id, routing score or None where none was routed), then each layer."""

    case: int
    edits: tuple[tuple[str, float | None], ...]
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        acting = ", ".join(i if s is None else f"{i} ({s:.3f})" for i, s in self.edits) or "none"
        lines = [f"case {self.case}: edits that act: {acting}"]
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

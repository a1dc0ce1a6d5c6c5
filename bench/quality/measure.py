"""The points that the specification leaves to measurement, each decided on the development split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from bench.quality.ablation import World
from bench.quality.rows import Row, RowEditor
from bench.quality.world import request
from unike_kernels.config import RoutingConfig, UnikeConfig

Change = Callable[[UnikeConfig], UnikeConfig]


def shift(**changes: Any) -> Change:
    """Other shift settings."""
    return lambda c: replace(c, shift=replace(c.shift, **changes))


def neurons(**changes: Any) -> Change:
    """Other neuron settings."""
    return lambda c: replace(c, neurons=replace(c.neurons, **changes))


def routing(**changes: Any) -> Change:
    """Other routing settings."""
    return lambda c: replace(c, routing=replace(c.routing, **changes))


def encoders(**changes: Any) -> Change:
    """Other encoder settings."""
    return lambda c: replace(c, encoders=replace(c.encoders, **changes))


@dataclass(frozen=True)
class Variant:
    """One alternative: which point it belongs to, what it changes, whether the encoders must be fitted again."""

    point: str
    name: str
    change: Change
    refit: bool = False


VARIANTS = (
    Variant("attention", "projected", shift(attention="projected")),
    Variant("attention", "raw", shift(attention="raw"), refit=True),
    Variant("alpha and items", "per case", shift(per="case")),
    Variant("alpha and items", "per token", shift(per="token")),
    Variant("positions", "all", shift(positions="all")),
    Variant("positions", "from_case_token", shift(positions="from_case_token")),
    Variant("encoders", "affine", encoders(activation="identity"), refit=True),
    Variant("encoders", "gelu", encoders(activation="gelu"), refit=True),
    Variant("encoders", "relu", encoders(activation="relu"), refit=True),
    Variant("anchor of Enc_sem", "h_att", encoders(anchor="h_att"), refit=True),
    Variant("anchor of Enc_sem", "h_sem", encoders(anchor="h_sem"), refit=True),
    Variant("W_zeta", "linear decoder", encoders(w_zeta="decoder"), refit=True),
    Variant("W_zeta", "trained on training-split edits", encoders(w_zeta="trained"), refit=True),
    *(Variant("beta", f"{b:g}", neurons(beta=b)) for b in (0.0, 0.03, 0.1, 0.3, 0.9)),
    *(Variant("rate of the keys", f"{r:g}", neurons(lr_keys=r)) for r in (0.0, 1e-3, 3e-3, 1e-2, 3e-2)),
    *(Variant("rate of the values", f"{r:g}", neurons(lr_values=r)) for r in (3e-3, 1e-2, 3e-2)),
    *(
        Variant("both rates", f"keys {k:g}, values {v:g}", neurons(lr_keys=k, lr_values=v))
        for k, v in (
            *((r, r) for r in (1e-2, 5e-3, 3e-3, 2e-3, 1e-3)),
            *((3e-2, 1e-2), (1e-2, 3e-3), (5e-3, 3e-3), (3e-3, 1e-2), (3e-3, 1e-3)),
        )
    ),
    *(Variant("threshold of the keys", f"{t:g}", neurons(key_threshold=t)) for t in (0.0, 0.3, 0.5, 0.7)),
    *(Variant("steps", f"{n}", neurons(steps=n)) for n in (25, 50, 200)),
    *(Variant("margin", f"{m:g}", neurons(margin=m)) for m in (1.0, 2.0)),
    *(
        Variant("routing", f"margin {m:g}, {'the same question' if a else 'any question'}", routing(margin=m, asking=a))
        for m, a in ((0.15, False), (0.2, True), (0.15, True), (0.1, True), (0.05, True))
    ),
    *(Variant("neurons a layer", f"{n}", neurons(per_layer=n)) for n in (5, 10, 20)),
    Variant("keys centred", "yes", neurons(center_keys=True)),
    Variant("keys centred", "no", neurons(center_keys=False)),
)


def run(seed: int, items: Sequence[dict[str, Any]], points: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """UniKE, always on, routed, and routed in stacks, under every variant (of `points`) of the library's defaults."""
    world = World(seed, items, UnikeConfig())
    out, trained = [], ""
    chosen = [v for v in VARIANTS if points is None or v.point in points]
    for variant in tqdm(chosen, desc=f"model {seed}", unit="variant"):
        like = RowEditor(world.editor.model, world.editor.collator.processor, variant.change(world.editor.config))
        like.prepare(Row("UniKE"), world.editor)
        like.config = variant.change(like.config)
        if variant.refit:
            like.fit()
        editor = RowEditor(world.editor.model, world.editor.collator.processor, like.config)
        editor.prepare(Row("UniKE"), like)
        unrouted = replace(like.config, routing=RoutingConfig()).to_json()
        if trained != unrouted:  # edits are trained always on: variants of routing alone share them
            edits = editor.edit([request(r) for r in items], independent=True, progress=False)
            always, trained = world.score(Row("UniKE"), editor, edits), unrouted
        edits = replace(edits, config=like.config)
        row = Row("UniKE, routed", routed=True)
        routed, stacked = world.score(row, editor, edits), world.stacked(row, editor, edits)
        out.append(
            {
                "point": variant.point,
                "variant": variant.name,
                "missed": sum(not e.success for e in edits.entries),
                "always": always["metrics"],
                "routed": routed["metrics"],
                "stacked": stacked["metrics"],
                "alpha": always["alpha"],
                "exact": always["exact"],
                "acts": routed["routed"],
            }
        )
    return out

"""Small random objects that several tests need."""

from dataclasses import replace

import torch

from unike_kernels.config import UnikeConfig
from unike_kernels.edits import BaseFingerprint, Calibration, EditEntry, Edits, LayerEdits, LayerShared


def make_base(*, d: int = 8, gated: bool = False, num_layers: int = 6, heads: int = 2) -> BaseFingerprint:
    """A fingerprint of a model that does not exist."""
    return BaseFingerprint(
        family="llama" if gated else "opt",
        hidden_size=d,
        ffn_size=4 * d,
        num_layers=num_layers,
        gated=gated,
        act="silu" if gated else "relu",
        heads=heads,
        kv_heads=heads,
        head_dim=d // heads,
        name_or_path="tiny",
        probe=(0.125, -0.5, 0.25),
    )


def make_edits(
    n_edits: int = 3,
    d: int = 8,
    layers: tuple[int, ...] = (2, 3),
    gated: bool = False,
    n_items: int = 5,
    *,
    n_cases: int | None = 4,
    encoder_maps: int = 2,
    neurons: int | list[list[int]] = 2,
    ids: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shared_seed: int = 0,
    base: BaseFingerprint | None = None,
    config: UnikeConfig | None = None,
) -> Edits:
    """Random Edits that `validate`; equal `shared_seed` and sizes give equal memory, encoders and calibration.

    neurons: the size of every group, or one list of sizes per edit (one size per layer). n_cases: None leaves out the
    calibration. base: by default `make_base`'s, with room for the layers asked for.
    """
    own, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1_000_003 + shared_seed)
    base = base or make_base(d=d, gated=gated, num_layers=max(6, *(layer + 1 for layer in layers)))
    sizes = [[neurons] * len(layers)] * n_edits if isinstance(neurons, int) else neurons
    ids = ids if ids is not None else [f"edit-{seed}-{e}" for e in range(n_edits)]

    def rand(generator: torch.Generator, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def layer_edits(column: int) -> LayerEdits:
        ptr = torch.tensor([0, *(row[column] for row in sizes)], dtype=torch.int64).cumsum(0)
        n = int(ptr[-1])
        return LayerEdits(
            keys=rand(own, n, d),
            key_bias=rand(own, n),
            values=rand(own, n, d),
            group_ptr=ptr,
            zeta=rand(own, n_edits, d),
            up=rand(own, n, d) if gated else None,
            up_bias=rand(own, n) if gated else None,
            h_sem=rand(own, n_edits, d),
            h_pos=rand(own, n_edits, d),
        )

    entries = [
        EditEntry(
            id=ids[e],
            prompt=f"What is in picture {ids[e]}?",
            target=f"thing {e}",
            image=f"picture-{ids[e]}",
            neurons=dict(zip(layers, sizes[e], strict=True)),
            loss=0.25 * e,
            success=e % 2 == 0,
            steps=10 + e,
        )
        for e in range(n_edits)
    ]
    maps = range(encoder_maps)
    return Edits(
        config=config or replace(UnikeConfig(), layers=tuple(layers)),
        base=base,
        entries=entries,
        layers={layer: layer_edits(column) for column, layer in enumerate(layers)},
        shared={
            layer: LayerShared(
                h_sem=rand(common, n_items, d),
                h_pos=rand(common, n_items, d),
                encoder=tuple((rand(common, d, d), rand(common, d)) for _ in maps),
            )
            for layer in layers
        },
        calibration=None
        if n_cases is None
        else Calibration(layer=min(layers), center=rand(common, d), cases=rand(common, n_cases, d)),
    )

"""What every site should add, from the specification alone, and what a patched model was seen to add."""

from dataclasses import replace

import torch

from unike_kernels import reference
from unike_kernels.config import UnikeConfig
from unike_kernels.models import find_decoder, get_module


def shift_of(base: UnikeConfig, **changes) -> UnikeConfig:
    return replace(base, shift=replace(base.shift, **changes))


class Recording:
    """What enters and leaves the sites of the edited layers, before and after the patch's own hooks."""

    def __init__(self, model, layers):
        self.decoder, self.seen, self.of, self.hooks, self.first = find_decoder(model), {}, {}, [], []
        for i in layers:
            sites = self.decoder.layers[i]
            for what, name in (("tap", sites.attention), ("x", sites.ffn_input)):
                hook = self._input(i, what)
                self.hooks.append(get_module(model, name).register_forward_pre_hook(hook, with_kwargs=True))
            # Knowledge may be mixed into what enters the output projection, so "before" is computed from there.
            self._put_first(get_module(model, sites.out_proj), "before", self._heads(i))
            self._put_first(get_module(model, sites.ffn_output), "after", self._output(i, "ffn before"))
            for what, name in (("att", sites.attention), ("ffn", sites.ffn_output)):
                hook = self._output(i, f"{what} after")
                self.hooks.append(get_module(model, name).register_forward_hook(hook, with_kwargs=True))

    def _put_first(self, module, when, hook):
        """Before the patch's own hooks, where there are any: hooks of others stand around those."""
        hooked = vars(module).get("forward")
        if hooked is not None:
            getattr(hooked, when).insert(0, hook)
            self.first.append((getattr(hooked, when), hook))
        elif when == "before":
            self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            self.hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def _input(self, layer, what):
        def hook(module, args, kwargs):
            self.seen[layer, what] = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2)

        return hook

    def _heads(self, layer):
        def hook(module, args, kwargs):
            tap = self.seen.get((layer, "tap"))
            if tap is not None and self.of.get(layer) is not tap:  # the layer's own call comes first
                self.of[layer] = tap
                self.seen[layer, "att before"] = torch.nn.functional.linear(
                    args[0].flatten(0, -2), module.weight, module.bias
                )

        return hook

    def _output(self, layer, what):
        def hook(module, args, kwargs, output):
            # Copied: what the patch's own hooks see first they may write to.
            self.seen[layer, what] = (output[0] if isinstance(output, tuple) else output).clone().flatten(0, -2)

        return hook

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for hook in self.hooks:
            hook.remove()
        for hooks, hook in self.first:
            hooks.remove(hook)


def item_keys_values(attention, sites, h_pos):
    """k and v [N, Hkv, hd] of the items, from the weights."""
    parts = []
    for name in (sites.k_proj, sites.v_proj):
        linear = attention.get_submodule(name.rpartition(".")[2])
        y = h_pos @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        parts.append(y.view(len(y), sites.kv_heads, sites.head_dim))
    return normed(attention.k_norm, parts[0]) if sites.k_norm else parts[0], parts[1]


def normed(norm, heads):
    """q or k [N, H, hd] after the layer's norm: of every head, or of all heads as one row."""
    whole = norm.weight.numel() > heads.shape[-1]
    return norm(heads.flatten(-2)).view_as(heads) if whole else norm(heads)


def know(attention, sites, config, query, h_pos):
    """h_know [d] of one token, for the items that it or its case retrieved."""
    if config.shift.attention == "raw":
        return torch.softmax(query @ h_pos.T / len(query) ** 0.5, -1) @ h_pos
    k, v = item_keys_values(attention, sites, h_pos)
    q = query @ attention.q_proj.weight.T + (0 if attention.q_proj.bias is None else attention.q_proj.bias)
    q = q.view(sites.heads, sites.head_dim)
    if sites.q_norm:
        q = normed(attention.q_norm, q)
    heads = []
    for h in range(sites.heads):
        of = h * sites.kv_heads // sites.heads
        scores = sites.scaling * (k[:, of] @ q[h])
        if sites.softcap is not None:
            scores = sites.softcap * torch.tanh(scores / sites.softcap)
        heads.append(torch.softmax(scores, 0) @ v[:, of])
    out = attention.get_submodule(sites.out_proj.rpartition(".")[2])
    return torch.cat(heads) @ out.weight.T + (0 if out.bias is None else out.bias)


def expected_attention(attention, sites, edits, layer, tap, h_att, rows, selected):
    """The shifted self-attention output, token by token. rows: (tokens, case token) of every case."""
    config, shared, own = edits.config, edits.shared[layer], edits.layers[layer]
    out = h_att.clone()
    if not config.shift.enabled:
        return out
    for case, (tokens, case_token) in enumerate(rows):
        acting = range(len(edits)) if selected is None else [g for g in selected[case] if g >= 0]
        if selected is not None and not acting:
            continue
        sem, pos = shared.h_sem.to(tap), shared.h_pos.to(tap)
        if config.shift.own_item:
            sem, pos = (torch.cat([a, b[list(acting)].to(tap)]) for a, b in ((sem, own.h_sem), (pos, own.h_pos)))
        encoder = [(w.to(tap), b.to(tap)) for w, b in shared.encoder]

        def found(token, sem=sem, pos=pos):
            order = torch.cosine_similarity(tap[token], sem, dim=-1).argsort(descending=True, stable=True)
            return pos[order[: config.shift.k]]

        def strength(token, items, encoder=encoder):
            if config.shift.alpha is not None:
                return config.shift.alpha
            h = know(attention, sites, config, tap[token], items)
            return reference.alpha(
                h, h_att[token], encoder=encoder, act=config.encoders.activation, clamp=config.shift.clamp
            )

        items, alpha = found(case_token), strength(case_token, found(case_token))
        for token in tokens:
            if config.shift.positions == "from_case_token" and token < case_token:
                continue
            if config.shift.per == "token":
                items, alpha = found(token), strength(token, found(token))
            h = know(attention, sites, config, tap[token], items)
            if config.shift.attention == "raw":
                h = h * h_att[token].norm() / h.norm()
            weights = (1 - alpha, alpha) if config.shift.orientation == "knowledge" else (alpha, 1 - alpha)
            out[token] = weights[0] * h_att[token] + weights[1] * h
    return out


def expected_ffn(edits, layer, x, y, rows, selected, act):
    """The FFN's output with the groups of every token's case, neuron by neuron."""
    own, beta = edits.layers[layer], edits.config.neurons.beta
    out, activation = y.clone(), reference.activation(act)
    ptr = own.group_ptr.tolist()
    of_token = {t: (case, token) for case, (tokens, token) in enumerate(rows) for t in tokens}
    for t in range(len(x)):
        acting = range(len(edits))
        if selected is not None:
            case, case_token = of_token.get(t, (None, 0))
            before = edits.config.shift.positions == "from_case_token" and t < case_token
            acting = [] if case is None or before else [g for g in selected[case] if g >= 0]
        for g in acting:
            for n in range(ptr[g], ptr[g + 1]):
                o = activation(x[t] @ own.keys[n].to(x) + own.key_bias[n].to(x))
                if own.up is not None:
                    o = o * (x[t] @ own.up[n].to(x) + own.up_bias[n].to(x))
                out[t] = out[t] + o * (own.values[n].to(x) + beta * own.zeta[g].to(x))
    return out


def cases_of(inputs):
    """[(tokens, case token)] of a padded batch, flattened."""
    length, out = inputs["attention_mask"].shape[1], []
    for row, mask in enumerate(inputs["attention_mask"]):
        tokens = [row * length + i for i in mask.nonzero().flatten().tolist()]
        out.append((tokens, tokens[-1]))
    return out

"""Edits on LAVIS's own Blip2OPT, in LAVIS's own environment: run.sh makes that and runs this file.

Every function whose name starts with `check_` takes a fresh tiny model; the exit status is 0 when all of them pass.
"""

import copy
import pickle
import sys
import traceback
from contextlib import contextmanager, nullcontext

import torch
import transformers
from torch import Tensor

import unike_kernels as uk
from tests.factories import make_edits
from tests.lavis.tiny_lavis import EOS, PIXELS, QUERIES, WIDTH, Letters, build
from unike_kernels.models import find_decoder
from unike_kernels.patching import fingerprint

ROUTINGS = ("always", "routed")
PROMPT = "what is"
TEXTS = ["what is it", "what is there now", "what is"]
STEPS = 6


def pictures(n: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def samples() -> dict:
    return {"image": pictures(), "text_input": TEXTS, "prompt": PROMPT}


def edits_for(model):
    """Random edits of all that can be edited; without calibration cases the router lets every case through."""
    decoder = find_decoder(model)
    layers = decoder.default_layers()
    base = fingerprint(model, decoder, layers)
    edits = make_edits(d=WIDTH, layers=layers, base=base, dtype=torch.float64, n_cases=0)
    for layer in edits.layers.values():
        layer.values.mul_(0.3)  # louder ones make the model say one word for every picture
        layer.zeta.mul_(0.3)
    return edits


@contextmanager
def heard(model):
    """Inside, collects the language model's outputs: LAVIS itself returns a loss or texts only."""
    outputs: list = []
    hook = model.opt_model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def logits(model, given: dict | None = None) -> Tensor:
    """[B, S, V] of LAVIS's forward."""
    with heard(model) as outputs:
        model(samples() if given is None else given)
    return outputs[0].logits


def generate(model, beams: int, image: Tensor | None = None) -> list[str]:
    image = pictures() if image is None else image
    return model.generate({"image": image, "prompt": PROMPT}, num_beams=beams, max_length=STEPS, min_length=0)


@contextmanager
def named(handle):
    """Inside, the case token of every row is the prompt's last token, however long the row has grown."""
    prompt = QUERIES + len(Letters().ids(PROMPT))
    handle.set_cases(case_positions=torch.tensor([prompt - 1]))
    try:
        yield
    finally:
        handle.set_cases()


@contextmanager
def without_cache(model, handle):
    """Inside, generation computes every step from the whole sequence; LAVIS's own `generate` does the rest."""
    model.opt_model.config.use_cache = False
    try:
        with named(handle):
            yield
    finally:
        model.opt_model.config.use_cache = True


def caches_in_generate() -> bool:
    """transformers 4.26 renamed an argument, so LAVIS's language model never gets its cache back there."""
    return transformers.__version__ < "4.26"


# Where the edits go, and that nothing else changes


def check_decoder_is_found(model):
    decoder = find_decoder(model)
    assert decoder.name == "opt_model.model.decoder" and decoder.family == "opt", decoder
    assert decoder.layers[0].ffn_input == "opt_model.model.decoder.layers.0.fc1"


def check_patch_leaves_no_trace(model):
    classes = {type(m) for m in model.modules()}
    before = {c: dict(vars(c)) for c in classes}
    base, keys = logits(model), list(model.state_dict())
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with uk.patch(model, edits_for(model), routing="routed") as handle:
        edited = logits(model)
        assert (edited - base).abs().max() > 0.1
        assert model(samples())["loss"].isfinite()
        assert list(model.state_dict()) == keys
        with handle.disabled():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), edited)
    assert torch.equal(logits(model), base)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert before == {c: dict(vars(c)) for c in classes}
    assert "_reorder_cache" not in vars(model.opt_model)


def check_copies(model):
    base = logits(model)
    with uk.patch(model, edits_for(model), routing="routed"):
        edited = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), edited)
            uk.unpatch(other)
            assert torch.equal(logits(other), base)
        assert torch.equal(logits(model), edited)


def check_refused_calls_change_nothing(model):
    edits, base, keys = edits_for(model), logits(model), list(model.state_dict())
    hooks = {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}

    def refused(*args, **kw) -> None:
        try:
            uk.patch(*args, **kw)
        except ValueError:
            return
        raise AssertionError(f"not refused: {kw}")

    refused(model, make_edits(d=WIDTH // 2))
    refused(model, edits, layers=[0])
    refused(model, edits, routing="sometimes")
    assert hooks == {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}
    assert list(model.state_dict()) == keys and not uk.status(model)
    assert torch.equal(logits(model), base)
    with uk.patch(model, edits):
        edited = logits(model)
        refused(model, edits)  # the name is taken
        assert torch.equal(logits(model), edited)
    assert torch.equal(logits(model), base)


# Cases


def check_labels_name_the_case_tokens(model):
    """With a prompt the case token is its last token, without one the picture's last query."""
    for prompt, at in (("", QUERIES - 1), (PROMPT, QUERIES + len(Letters().ids(PROMPT)) - 1)):
        model.prompt = prompt
        model.prompt_length = torch.tensor([len(Letters().ids(prompt))])
        with uk.patch(model, edits_for(model), routing="routed") as handle:
            length = logits(model).shape[1]
            found = handle.record.runtime.tracker.current.case_tokens
        assert found.tolist() == [row * length + at for row in range(3)], (prompt, found)


def check_padded_rows_equal_single_rows(model):
    """With LAVIS's labels and, as in scoring, without: then the case token is each row's last token."""
    for routing, labelled in ((r, labelled) for r in ROUTINGS for labelled in (True, False)):
        with uk.patch(model, edits_for(model), routing=routing):
            keep = (lambda *_: None) if labelled else (lambda m, args, kwargs: (args, {**kwargs, "labels": None}))
            hook = model.opt_model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
            together = logits(model)
            for row, text in enumerate(TEXTS):
                alone = logits(model, {"image": pictures()[row : row + 1], "text_input": [text]})[0]
                assert len(alone) < together.shape[1] or text == max(TEXTS, key=len)
                torch.testing.assert_close(together[row, : len(alone)], alone)
            hook.remove()


# Generation


def check_generation_equals_recomputation(model):
    """Decisions taken at the prompt's end hold while a sequence decodes: greedily, and through LAVIS's five beams."""
    for beams in (1, 5):
        base = generate(model, beams)
        for routing in ROUTINGS:
            with uk.patch(model, edits_for(model), routing=routing) as handle:
                with without_cache(model, handle):
                    expected = generate(model, beams)
                assert expected != base and len(set(expected)) > 1, expected
                with nullcontext() if caches_in_generate() else named(handle):
                    assert generate(model, beams) == expected
                with handle.disabled():
                    assert generate(model, beams) == base
            assert generate(model, beams) == base


def check_rows_generate_as_alone(model):
    for beams in (1, 5):
        with uk.patch(model, edits_for(model), routing="routed") as handle:
            together = generate(model, beams)
            alone = [generate(model, beams, picture[None])[0] for picture in pictures()]
            assert together == alone
            with without_cache(model, handle):
                assert generate(model, beams) == [generate(model, beams, picture[None])[0] for picture in pictures()]


def prefill(model, picture: Tensor, text: str) -> tuple[Tensor, tuple, Tensor]:
    """(logits, tuple cache, attention mask) of one picture and text, as LAVIS's generate starts."""
    seen = model.ln_vision(model.visual_encoder(picture[None]))
    asked = {"query_embeds": model.query_tokens, "encoder_hidden_states": seen, "return_dict": True}
    query = model.opt_proj(model.Qformer.bert(**asked).last_hidden_state)
    ids = torch.tensor([Letters().ids(text)])
    mask = torch.ones(1, QUERIES + ids.shape[1], dtype=torch.long)
    out = model.opt_model(input_ids=ids, query_embeds=query, attention_mask=mask, use_cache=True)
    return out.logits, out.past_key_values, mask


def decode(model, state: tuple[Tensor, tuple, Tensor]) -> tuple[Tensor, tuple, Tensor]:
    """One greedy step further."""
    before, cache, mask = state
    token = before[:, -1:].argmax(-1)
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    out = model.opt_model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
    return out.logits, out.past_key_values, mask


def check_sequences_that_decode_in_turn(model):
    """Prefill A, prefill B, then both decode in turn: each as if it were alone."""
    a, b = pictures(2)
    for routing in ROUTINGS:
        with uk.patch(model, edits_for(model), routing=routing):
            alone = []
            for picture, text in ((a, "what"), (b, "where is it")):
                state = prefill(model, picture, text)
                steps = [state[0]]
                for _ in range(3):
                    state = decode(model, state)
                    steps.append(state[0])
                alone.append(steps)
            states = [prefill(model, a, "what"), prefill(model, b, "where is it")]
            for step in range(1, 4):
                states = [decode(model, state) for state in states]
                for state, expected in zip(states, alone, strict=True):
                    assert torch.equal(state[0], expected[step])


def check_decoding_with_a_cache_equals_recomputation(model):
    """By hand, so that it holds with either version of transformers: cached steps against whole sequences."""
    picture = pictures(1)[0]
    for routing in ROUTINGS:
        with uk.patch(model, edits_for(model), routing=routing) as handle:
            with without_cache(model, handle):
                expected = [int(i) for i in generate(model, 1, picture[None])[0].split()]
            state, tokens = prefill(model, picture, PROMPT), []
            while len(tokens) < len(expected):
                tokens.append(int(state[0][0, -1].argmax()))
                state = decode(model, state)
            assert len(expected) > 2 and tokens == expected and EOS not in tokens


def check_reordered_caches_keep_their_decisions(model):
    with uk.patch(model, edits_for(model), routing="routed"):
        state = prefill(model, pictures(1)[0], PROMPT)
        expected = decode(model, state)[0]
        before, cache, mask = state
        twice = model.opt_model._reorder_cache(cache, torch.tensor([0]))
        assert torch.equal(decode(model, (before, twice, mask))[0], expected)


def main() -> int:
    """Runs all checks, prints a line for each, and returns the number of failures."""
    checks = {name: f for name, f in globals().items() if name.startswith("check_")}
    failed = 0
    for name, check in checks.items():
        try:
            with torch.no_grad():
                check(build())
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAIL  {name}")
        else:
            print(f"pass  {name}")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{len(checks) - failed} of {len(checks)} checks passed on LAVIS's Blip2OPT ({versions})")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))

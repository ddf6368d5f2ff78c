"""The model against written-out references: RoPE, grouped attention, cache, padding, hook sites, capture, compilation.

Shapes: B rows, T tokens, S keys, H query heads, G key/value heads, K head_dim, D model width, V vocabulary.
"""

import cmath
import itertools
import math
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama3.args import ModelArgs, RopeScaling
from llama3.cache import attention_mask
from llama3.model import Transformer, fold_mask, grouped_attention
from llama3.rope import apply_rotary_emb, as_factors, frequencies, precompute_freqs_cis
from llama3.sites import LAYER_SITES, NO_HOOKS, SiteHooks
from tests.tiny import tiny_args

V = 61
SCALINGS = {
    "plain": None,
    "3.1": RopeScaling(factor=8.0, original_max_position_embeddings=16),
    "3.2": RopeScaling(factor=32.0, original_max_position_embeddings=16),
}
SHAPES: dict[str, dict[str, Any]] = {
    "one key head per query head (MHA)": {"n_kv_heads": 4},
    "two query heads per key head (GQA)": {"n_kv_heads": 2},
    "one key head for all (MQA)": {"n_kv_heads": 1},
    "heads wider than dim / n_heads": {"head_dim": 12},
    "scaled RoPE of 3.1": {"rope_scaling": SCALINGS["3.1"]},
}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Transformer:
    """A tiny model whose weights are large enough for every part to matter in the logits."""
    model = Transformer(tiny_args(**({"vocab_size": V} | overrides))).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1))
    return model.to(dtype).eval()


def some_tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- references: loops, float64, nothing shared with the code under test ---------------------------------------------------


def reference_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> list[float]:
    """Pair by pair, with the three cases of Llama 3.1's scaling written out."""
    result = []
    for pair in range(head_dim // 2):
        freq = theta ** (-2 * pair / head_dim)
        if scaling is not None:
            context, wavelength = scaling.original_max_position_embeddings, 2 * math.pi / freq
            if wavelength > context / scaling.low_freq_factor:
                freq /= scaling.factor
            elif wavelength >= context / scaling.high_freq_factor:
                low, high = scaling.low_freq_factor, scaling.high_freq_factor
                share = (context / wavelength - low) / (high - low)
                freq = (1 - share) * freq / scaling.factor + share * freq
        result.append(freq)
    return result


def reference_rotate(x: list[float], position: int, freqs: list[float]) -> list[float]:
    out = []
    for pair, freq in enumerate(freqs):
        turned = complex(x[2 * pair], x[2 * pair + 1]) * cmath.exp(1j * position * freq)
        out += [turned.real, turned.imag]
    return out


def reference_logits(model: Transformer, tokens: list[int]) -> Tensor:
    """Logits (T, V), float64, of one sequence without padding: every head and every query on its own."""
    args, weight = model.params, {name: p.double() for name, p in model.named_parameters()}
    freqs = reference_frequencies(args.head_dim, args.rope_theta, args.rope_scaling)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + args.norm_eps).sqrt() * weight[name]

    def heads(x: Tensor, name: str, rotate: bool) -> Tensor:
        y = (x @ weight[name].T).view(len(tokens), -1, args.head_dim)
        if rotate:
            rows = [[reference_rotate(head, t, freqs) for head in row] for t, row in enumerate(y.tolist())]
            y = torch.tensor(rows, dtype=torch.float64)
        return y

    x = weight["tok_embeddings.weight"][tokens]
    for i in range(args.n_layers):
        at = f"layers.{i}"
        h = norm(x, f"{at}.attention_norm.weight")
        q, k = (heads(h, f"{at}.attention.{w}.weight", True) for w in ("wq", "wk"))
        v = heads(h, f"{at}.attention.wv.weight", False)
        mixed = torch.zeros(len(tokens), args.n_heads, args.head_dim, dtype=torch.float64)
        for head, t in itertools.product(range(args.n_heads), range(len(tokens))):
            group = head // (args.n_heads // args.n_kv_heads)
            scores = k[: t + 1, group] @ q[t, head] / math.sqrt(args.head_dim)
            mixed[t, head] = scores.softmax(0) @ v[: t + 1, group]
        x = x + mixed.flatten(1) @ weight[f"{at}.attention.wo.weight"].T
        h = norm(x, f"{at}.ffn_norm.weight")
        gate, up = (h @ weight[f"{at}.feed_forward.{w}.weight"].T for w in ("w1", "w3"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ weight[f"{at}.feed_forward.w2.weight"].T
    head = weight.get("output.weight", weight["tok_embeddings.weight"])
    return norm(x, "norm.weight") @ head.T


# --- RoPE -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_the_written_out_rule(scaling: RopeScaling | None) -> None:
    expected = torch.tensor(reference_frequencies(16, 10_000.0, scaling))
    torch.testing.assert_close(frequencies(16, 10_000.0, scaling), expected, rtol=1e-5, atol=0)


def test_published_scalings_reach_all_three_cases() -> None:
    """Real Llama 3.1 and 3.2: high frequencies kept, low ones divided, some between; otherwise the test above proves little."""
    plain = frequencies(128, 500_000.0, None)
    for factor in (8.0, 32.0):
        ratio = frequencies(128, 500_000.0, RopeScaling(factor=factor)) / plain
        assert ratio[0] == 1
        assert ratio[-1] == pytest.approx(1 / factor)
        assert ((ratio < 0.99) & (ratio > 1.01 / factor)).any()


def test_rotation_is_a_turn_of_neighbouring_pairs() -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    freqs = reference_frequencies(8, 100.0, None)
    expected = [[[reference_rotate(h, t, freqs) for h in heads] for t, heads in enumerate(row)] for row in x.tolist()]
    turned = apply_rotary_emb(x, as_factors(precompute_freqs_cis(8, 5, 100.0)))
    torch.testing.assert_close(turned, torch.tensor(expected), rtol=0, atol=1e-5)


def test_both_forms_of_the_rotation_agree() -> None:
    """The real form runs in compiled graphs alone, the complex one in eager mode alone."""
    x, real = torch.randn(2, 5, 3, 8), precompute_freqs_cis(8, 5, 100.0).unsqueeze(-3)
    turned = apply_rotary_emb(x, torch.view_as_complex(real))
    torch.testing.assert_close(turned, apply_rotary_emb(x, real), rtol=0, atol=1e-6)


# --- the whole forward pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_reference(overrides: dict[str, Any]) -> None:
    model, tokens = make_model(**overrides), some_tokens(2, 9)
    for row, logits in zip(tokens.tolist(), model(tokens), strict=True):
        torch.testing.assert_close(logits.double(), reference_logits(model, row), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.25), (torch.float16, 0.03)], ids=["bf16", "fp16"])
def test_narrow_dtypes_stay_near_float32(dtype: torch.dtype, atol: float) -> None:
    tokens = some_tokens(2, 9)
    logits = make_model(dtype=dtype)(tokens)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), make_model()(tokens), rtol=0, atol=atol)


def test_positions_stay_exact_in_narrow_dtypes() -> None:
    """Casting a model must not round its RoPE table: in bf16 the angles of positions 300 and 301 would be the same."""
    model = make_model()
    table = model.freqs_cis
    assert torch.equal(model.to(torch.bfloat16).freqs_cis, table)
    with torch.device("meta"):
        empty = Transformer(model.params)
    assert torch.equal(empty.to_empty(device="cpu").freqs_cis, table)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_grouped_attention_equals_repeated_keys(n_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 8, generator=generator)  # (B, T, H, K)
    k, v = torch.randn(2, 2, n_kv_heads, 7, 8, generator=generator)  # (B, G, S, K) each
    seen = attention_mask(torch.rand(2, 7, generator=generator) > 0.3, 3)
    mask = fold_mask(seen, tiny_args(vocab_size=V, n_kv_heads=n_kv_heads), torch.float32)
    repeated = [x.repeat_interleave(4 // n_kv_heads, dim=1) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(grouped_attention(q, k, v, mask), expected, rtol=0, atol=1e-5)


def test_tied_head_is_the_embedding() -> None:
    model = make_model(tie_word_embeddings=True)
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())


# --- cache and padding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 1, 1, 1, 1, 1], [3, 3, 3], [5, 4]], ids=str)
@pytest.mark.parametrize("overrides", [{"n_kv_heads": 1}, {"n_kv_heads": 2}, {"n_kv_heads": 4}], ids=["MQA", "GQA", "MHA"])
def test_cached_steps_equal_the_whole_pass(cuts: list[int], overrides: dict[str, int]) -> None:
    """One token at a time, and in chunks, because a chunk after the first needs a mask that the others do not."""
    model, tokens = make_model(**overrides), some_tokens(2, 9)
    cache = model.new_cache(2, 9)
    steps = torch.cat([model(part, cache=cache) for part in tokens.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(steps, model(tokens), rtol=0, atol=1e-4)


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different length as (tokens, mask), both (B, T); the padding is token 0, which is a real token elsewhere."""
    width = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, at] = torch.tensor(row)
        mask[i, at] = True
    return tokens, mask


ROWS = [some_tokens(1, n, seed=n)[0].tolist() for n in (9, 4, 1, 6)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_padding_changes_no_row(side: str, cached: bool) -> None:
    model = make_model()
    tokens, mask = padded(ROWS, side)
    logits = model(tokens, mask=mask, cache=model.new_cache(4, 20) if cached else None)
    assert logits.isfinite().all(), "padding must not make NaN, which would spread through the cache"
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(logits[i][mask[i]], model(torch.tensor([row]))[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_after_padding_equals_each_row_alone(side: str) -> None:
    """Three tokens more for each row, some of them padding themselves, as in a batch where rows finish at different times."""
    model = make_model()
    tokens, mask = padded(ROWS, side)
    cache = model.new_cache(4, 12)
    model(tokens, mask=mask, cache=cache)
    more = some_tokens(4, 3, seed=7)
    going = torch.tensor([[True] * 3, [True, False, False], [True] * 3, [True, True, False]])
    for step in range(3):
        logits = model(more[:, step : step + 1], mask=going[:, step : step + 1], cache=cache)
        for i, row in enumerate(ROWS):
            if going[i, step]:
                alone = model(torch.tensor([row + more[i, : step + 1].tolist()]))[0, -1]
                torch.testing.assert_close(logits[i, 0], alone, rtol=0, atol=1e-4)


def test_unpadded_chunk_after_padding_equals_each_row_alone() -> None:
    model = make_model()
    tokens, mask = padded(ROWS, "left")
    cache, more = model.new_cache(4, 12), some_tokens(4, 3, seed=7)
    model(tokens, mask=mask, cache=cache)
    logits = model(more, cache=cache)
    for i, row in enumerate(ROWS):
        alone = model(torch.tensor([row + more[i].tolist()]))[0, -3:]
        torch.testing.assert_close(logits[i], alone, rtol=0, atol=1e-4)


def test_a_mask_of_ones_takes_the_path_without_mask() -> None:
    model, tokens = make_model(), some_tokens(2, 6)
    cache = model.new_cache(2, 6)
    assert torch.equal(model(tokens, mask=torch.ones(2, 6, dtype=torch.bool), cache=cache), model(tokens))
    assert cache.valid is None


def test_two_caches_share_nothing() -> None:
    model, tokens = make_model(), some_tokens(2, 8)
    first, second = model.new_cache(1, 8), model.new_cache(1, 8)
    outputs: list[list[Tensor]] = [[], []]
    for t in range(8):
        for row, cache in enumerate((first, second)):
            outputs[row].append(model(tokens[row : row + 1, t : t + 1], cache=cache))
    torch.testing.assert_close(torch.cat([torch.cat(o, dim=1) for o in outputs]), model(tokens), rtol=0, atol=1e-4)


def test_context_and_cache_limits_are_named() -> None:
    model = make_model(max_seq_len=8)
    with pytest.raises(ValueError, match="the context holds 8 tokens; this sequence has 9"):
        model(some_tokens(1, 9))
    with pytest.raises(ValueError, match="the context holds 8 tokens; this sequence has 9"):
        model(some_tokens(1, 9), cache=model.new_cache(1, 20))
    with pytest.raises(ValueError, match="the KV cache holds 4 tokens; 5 are needed"):
        model(some_tokens(1, 5), cache=model.new_cache(1, 4))
    with pytest.raises(ValueError, match=r"mask must be bool \[1, 5\]"):
        model(some_tokens(1, 5), mask=torch.ones(1, 5))


def test_padding_takes_no_room_in_the_context() -> None:
    """A row of 3 tokens beside one of 8 in a context of 8 may still grow by 5; the ninth position is refused."""
    model = make_model(max_seq_len=8)
    tokens, mask = padded([ROWS[0][:8], ROWS[1][:3]], "left")
    cache = model.new_cache(2, 20)
    model(tokens, mask=mask, cache=cache)
    going = torch.tensor([[False], [True]])
    more = some_tokens(2, 5, seed=3)
    for t in range(5):
        logits = model(more[:, t : t + 1], mask=going, cache=cache)
    alone = model(torch.tensor([ROWS[1][:3] + more[1].tolist()]))[0, -1]
    torch.testing.assert_close(logits[1, 0], alone, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="the context holds 8 tokens; a row has 9"):
        model(more[:, :1], mask=going, cache=cache)


# --- sites ----------------------------------------------------------------------------------------------------------------

SITES = ["embed", *[f"layers.{i}.{name}" for i in range(3) for name in LAYER_SITES], "final_norm"]


def with_input_of(reader: Any, part: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What the submodule `reader` of `part` is given in `part(*arguments)`, and what that returns."""
    seen: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = part(*arguments)
    handle.remove()
    return seen[0], out


def reference_sites(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Every site computed from the model's parts, step by step."""
    rope, x = as_factors(model.freqs_cis[: tokens.shape[1]]), model.tok_embeddings(tokens)
    sites = {"embed": x}
    for i in range(model.params.n_layers):
        layer: Any = model.layers[i]
        values = {"resid_pre": x, "attn_norm": layer.attention_norm(x)}
        attention, feed_forward = layer.attention, layer.feed_forward
        values["attn_heads"], values["attn_out"] = with_input_of(
            attention.wo, attention, values["attn_norm"], rope, None, None, NO_HOOKS
        )
        values["resid_mid"] = x + values["attn_out"]
        values["ffn_norm"] = layer.ffn_norm(values["resid_mid"])
        values["ffn_hidden"], values["ffn_out"] = with_input_of(feed_forward.w2, feed_forward, values["ffn_norm"], NO_HOOKS)
        x = values["resid_post"] = values["resid_mid"] + values["ffn_out"]
        sites |= {f"layers.{i}.{name}": value for name, value in values.items()}
    return sites | {"final_norm": model.norm(x)}


def test_widths_of_the_sites() -> None:
    model = make_model(head_dim=12)  # 4 heads; d_model 32, SwiGLU width 96
    widths = {site.rpartition(".")[2]: model.width(site) for site in SITES}
    assert (widths.pop("attn_heads"), widths.pop("ffn_hidden")) == (48, 96)
    assert set(widths.values()) == {32}
    with pytest.raises(ValueError, match=r"'layers\.3\.ffn_hidden'"):
        model.width("layers.3.ffn_hidden")


@pytest.mark.parametrize("overrides", [{}, {"head_dim": 12}], ids=["heads as wide as the model", "wider heads"])
def test_every_site_reads_the_right_tensor_in_prefill_and_decode(overrides: dict[str, int]) -> None:
    model, tokens = make_model(**overrides), some_tokens(2, 6)
    expected = reference_sites(model, tokens)
    assert list(expected) == SITES
    read: dict[str, list[Tensor]] = {site: [] for site in SITES}
    cache = model.new_cache(2, 6)
    with model.hooks({site: read[site].append for site in SITES}):  # type: ignore[dict-item]
        model(tokens[:, :4], cache=cache)
        for t in (4, 5):
            model(tokens[:, t : t + 1], cache=cache)
    for site in SITES:
        assert [tuple(part.shape) for part in read[site]] == [(2, n, model.width(site)) for n in (4, 1, 1)]
        torch.testing.assert_close(torch.cat(read[site], dim=1), expected[site], rtol=0, atol=1e-4)
    assert model.capture(tokens, SITES).keys() == set(SITES)


@pytest.mark.parametrize("site", SITES)
def test_every_site_can_be_edited_in_prefill_and_decode(site: str) -> None:
    """An edit must reach the logits, the same way with the cache as without, and be gone after the block."""
    model, tokens = make_model(head_dim=12), some_tokens(2, 6)
    plain = model(tokens)
    shift = torch.randn(model.width(site), generator=torch.Generator().manual_seed(5))
    with model.hooks({site: lambda x: x + shift}):
        whole = model(tokens)
        cache = model.new_cache(2, 6)
        steps = torch.cat([model(part, cache=cache) for part in tokens.split([4, 1, 1], dim=1)], dim=1)
    assert (whole - plain).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-4)
    assert torch.equal(model(tokens), plain)


def test_an_edit_is_what_follows_from_it() -> None:
    """Replacing resid_post of the last layer by zeros leaves the norm of zeros, and so logits of zero."""
    model = make_model()
    with model.hooks({"layers.2.resid_post": torch.zeros_like}):
        assert model(some_tokens(1, 4)).abs().max() == 0


def test_hooks_of_nested_blocks_and_lists_apply_in_order() -> None:
    model, tokens = make_model(), some_tokens(1, 4)
    site, order = "layers.1.resid_mid", []

    def note(name: str) -> Any:
        return lambda x: order.append(name)

    with model.hooks({site: [note("a"), note("b")]}), model.hooks({site: note("c"), "embed": note("first")}):
        model(tokens)
    model(tokens)
    assert order == ["first", "a", "b", "c"]


def test_hooks_leave_after_an_error() -> None:
    model, tokens = make_model(), some_tokens(1, 4)
    plain = model(tokens)

    def fail(x: Tensor) -> None:
        raise RuntimeError("from the hook")

    with pytest.raises(RuntimeError, match="from the hook"), model.hooks({"embed": fail}):
        model(tokens)
    assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize(
    "site",
    ["layers.3.resid_post", "layers.-1.embed", "layers.01.resid_pre", "layers.0.resid", "embed.0", "", "layers.x.ffn_out"],
)
def test_unknown_sites_are_refused_by_name(site: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"unknown site .*expected embed, final_norm or layers\.0 to layers\.2"):
        model.capture(some_tokens(1, 4), [site])


def test_capture_runs_nothing_after_the_last_site(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model(), some_tokens(2, 5)
    expected = reference_sites(model, tokens)

    def must_not_run(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("ran after the last site that was asked for")

    monkeypatch.setattr(model.layers[1].feed_forward, "forward", must_not_run)
    monkeypatch.setattr(model.layers[2], "forward", must_not_run)
    monkeypatch.setattr(model.norm, "forward", must_not_run)
    monkeypatch.setattr(model.output, "forward", must_not_run)
    wanted = ["layers.1.ffn_norm", "embed", "layers.0.resid_post", "layers.0.ffn_hidden", "layers.1.attn_heads"]
    captured = model.capture(tokens, wanted)
    assert set(captured) == set(wanted)
    for site in wanted:
        torch.testing.assert_close(captured[site], expected[site], rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="ran after"):
        model.capture(tokens, ["layers.1.ffn_out"])


def test_a_string_counts_as_one_site() -> None:
    model, tokens = make_model(), some_tokens(1, 4)
    site = "layers.1.resid_post"
    one, several = model.capture(tokens, site), model.capture(tokens, iter([site]))
    assert list(one) == list(several) == [site]
    assert torch.equal(one[site], several[site])
    with pytest.raises(ValueError, match=r"'layers\.7\.embed'"):
        model.capture(tokens, "layers.7.embed")


def test_editing_what_a_matrix_reads_is_editing_what_it_writes() -> None:
    """Zeros into wo and w2 are zeros out of attention and feed-forward."""
    model, tokens = make_model(head_dim=12), some_tokens(1, 4)
    for inner, outer in (("attn_heads", "attn_out"), ("ffn_hidden", "ffn_out")):
        logits = []
        for name in (inner, outer):
            with model.hooks({f"layers.1.{name}": torch.zeros_like}):
                logits.append(model(tokens))
        assert torch.equal(*logits)
        assert not torch.equal(logits[0], model(tokens))


def test_capture_skips_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(model.output, "forward", None)
    assert model.capture(some_tokens(1, 4), ["final_norm"])["final_norm"].shape == (1, 4, 32)


def test_capture_of_padded_rows_equals_each_row_alone() -> None:
    model = make_model()
    tokens, mask = padded(ROWS, "right")
    captured = model.capture(tokens, ["layers.1.resid_post"], mask=mask)["layers.1.resid_post"]
    for i, row in enumerate(ROWS):
        alone = model.capture(torch.tensor([row]), ["layers.1.resid_post"])["layers.1.resid_post"][0]
        torch.testing.assert_close(captured[i, : len(row)], alone, rtol=0, atol=1e-4)


def test_threads_do_not_see_each_others_hooks() -> None:
    """Two threads with opposite edits, and one without, run at once; each must get its own logits every time."""
    model, tokens = make_model(), some_tokens(1, 5)
    edits: list[Mapping[str, Any]] = [{}, {"layers.0.resid_post": lambda x: x + 1}, {"layers.0.resid_post": lambda x: x - 1}]
    expected = []
    for edit in edits:
        with model.hooks(edit):
            expected.append(model(tokens))
    assert not torch.equal(expected[0], expected[1])
    wrong: list[int] = []
    start = threading.Barrier(len(edits))

    def run(which: int) -> None:
        start.wait()
        for _ in range(30):
            with model.hooks(edits[which]):
                if not torch.equal(model(tokens), expected[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=run, args=(which,)) for which in range(len(edits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_constructor_options_are_the_short_form_at_attn_norm() -> None:
    args, tokens = tiny_args(vocab_size=V), some_tokens(1, 4)
    edited = Transformer(args, store_layer_activ=[0, 1], sae_layer_forward_fn={1: lambda x: x * 2}).requires_grad_(False)
    plain = make_model()
    edited.load_state_dict(plain.state_dict())
    with plain.hooks({"layers.1.attn_norm": lambda x: x * 2}):
        expected = plain(tokens)
        read = plain.capture(tokens, ["layers.0.attn_norm", "layers.1.attn_norm"])
    assert torch.equal(edited(tokens), expected)
    assert torch.equal(edited.stored_activations[0], read["layers.0.attn_norm"])
    assert torch.equal(edited.stored_activations[1], read["layers.1.attn_norm"]), "what is stored is what attention reads"
    with pytest.raises(ValueError, match=r"unknown site 'layers\.3\.attn_norm'"):
        Transformer(args, store_layer_activ=[3])


# --- compilation ----------------------------------------------------------------------------------------------------------


def test_compiled_layer_stack_is_one_graph() -> None:
    """Graphs are counted with a backend that runs them as they are, so that no compiler is needed."""
    model, tokens = make_model(n_layers=2), some_tokens(2, 4)
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(sum("scaled_dot_product_attention" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=count)
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=0, atol=1e-4)
    assert graphs == [2], "both layers belong into one graph, and nothing else makes another"
    for name in ("resid_post", "attn_heads", "ffn_hidden"):
        with model.hooks({f"layers.1.{name}": lambda x: x * 2}):
            torch.testing.assert_close(compiled(tokens), model(tokens), rtol=0, atol=1e-4)
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=0, atol=1e-4)
    graphs.clear()
    cache = model.new_cache(2, 4)
    steps = torch.cat([compiled(part, cache=cache) for part in tokens.split([2, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(steps, model(tokens), rtol=0, atol=1e-4)
    assert set(graphs) == {2}
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["", "attn_heads", "ffn_hidden"])
def test_layer_stack_compiles_without_a_graph_break(name: str) -> None:
    """`fullgraph` raises at the first break. The model itself has one before its layers: it reads the active hooks."""
    model = make_model()
    hooks = SiteHooks({name: (lambda x: x * 2,)}) if name else NO_HOOKS

    def stack(x: Tensor) -> Tensor:
        rope = as_factors(model.freqs_cis[: x.shape[1]])
        for layer in model.layers:
            x = layer(x, rope, None, None, hooks)
        return x

    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(stack, backend="eager", fullgraph=True)(x), stack(x), rtol=0, atol=1e-4)
    torch._dynamo.reset()


# --- the configuration ----------------------------------------------------------------------------------------------------

META_8B = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
}  # fmt: skip


def test_params_of_the_published_models() -> None:
    """SwiGLU widths and RoPE factors as in the `config.json` files of the same releases."""
    llama3 = ModelArgs.from_params(META_8B)
    assert (llama3.hidden_dim, llama3.head_dim, llama3.rope_scaling, llama3.max_seq_len) == (14336, 128, None, 8192)
    llama31 = ModelArgs.from_params(META_8B | {"use_scaled_rope": True})
    assert llama31.rope_scaling == RopeScaling(factor=8.0)
    assert llama31.max_seq_len == 131_072
    small = META_8B | {"use_scaled_rope": True, "multiple_of": 256}
    one = ModelArgs.from_params(small | {"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5})
    three = ModelArgs.from_params(small | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0})
    assert (one.hidden_dim, one.head_dim, three.hidden_dim, three.head_dim) == (8192, 64, 8192, 128)
    assert one.rope_scaling == three.rope_scaling == RopeScaling(factor=32.0)
    seventy = {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "use_scaled_rope": True}
    assert ModelArgs.from_params(META_8B | seventy).hidden_dim == 28672


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": 1, "vision_chunk_size": 448}, r"unknown key\(s\) moe, vision_chunk_size"),
        ({"dim": "4096"}, "dim must be a whole number of at least 1; found '4096'"),
        ({"vocab_size": -1}, "vocab_size must be a whole number of at least 1; found -1"),
        ({"n_layers": True}, "n_layers must be a whole number"),
        ({"norm_eps": float("nan")}, "norm_eps must be a number above 0; found nan"),
        ({"n_kv_heads": 5}, "n_heads must be a multiple of n_kv_heads; found n_heads=32, n_kv_heads=5"),
        ({"n_heads": 0}, "n_heads must be a whole number of at least 1"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"n_heads": None}, r"missing key\(s\) n_heads"),
    ],
)
def test_bad_params_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_params(META_8B | change)


HF = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_hf_rope_settings_of_transformers_4_and_5() -> None:
    old = ModelArgs.from_hf_config(HF | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5})
    new = ModelArgs.from_hf_config(HF | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}})
    assert old == new
    assert new.rope_scaling == RopeScaling(factor=32.0)
    assert new.rope_theta == 5e5
    what_we_run = {"partial_rotary_factor": 1.0, "attention_factor": None}
    assert ModelArgs.from_hf_config(HF | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5} | what_we_run}) == new
    plain = ModelArgs.from_hf_config(HF | {"rope_scaling": None})
    assert (plain.rope_theta, plain.rope_scaling, plain.n_kv_heads) == (10_000.0, None, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "expected model_type llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type 'linear' is not supported"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 of RoPE is not supported; expected 1",
        ),
        ({"rope_parameters": LLAMA3_ROPE | {"attention_factor": 0.9}}, "attention_factor = 0.9 of RoPE"),
        ({"rope_scaling": LLAMA3_ROPE | {"beta": 1}}, r"unknown RoPE setting\(s\) beta"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"missing key\(s\) low_freq_factor"),
        ({"intermediate_size": None}, r"missing key\(s\) intermediate_size"),
        ({"hidden_size": "big"}, "dim must be a whole number"),
    ],
)
def test_unsupported_hf_configs_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_hf_config(HF | change)


def test_decoding_in_8_bits_leaves_prompts_exact() -> None:
    exact, model = make_model(vocab_size=64), make_model(vocab_size=64)
    model.decode_in_8_bits()
    tokens = some_tokens(1, 12)
    with torch.no_grad():
        caches = exact.new_cache(1, 14), model.new_cache(1, 14)
        assert torch.equal(exact(tokens, cache=caches[0]), model(tokens, cache=caches[1]))
        step = tokens[:, :1]
        expected, found = exact(step, cache=caches[0]), model(step, cache=caches[1])
    assert not torch.equal(expected, found)
    assert float((expected - found).norm() / expected.norm()) < 0.05


def test_decoding_in_8_bits_needs_float32_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="bfloat16 on cpu"):
        make_model(dtype=torch.bfloat16).decode_in_8_bits()

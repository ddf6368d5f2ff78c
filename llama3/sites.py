"""Hook sites: the named places of a forward pass where activations can be read or replaced."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Hook = Callable[[Tensor], Tensor | None]

LAYER_SITES = (
    "resid_pre",
    "attn_norm",
    "attn_heads",
    "attn_out",
    "resid_mid",
    "ffn_norm",
    "ffn_hidden",
    "ffn_out",
    "resid_post",
)
"""In the order of a forward pass. `attn_heads` is what `wo` reads, `ffn_hidden` what `w2` reads."""
MODEL_SITES = ("embed", "final_norm")


class CaptureDone(Exception):
    """Raised by the reader of the last site asked for, to skip the rest of the forward pass."""


def as_sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    """A string counts as one site."""
    return (sites,) if isinstance(sites, str) else tuple(sites)


def default_site(n_layers: int) -> str:
    """The residual stream at 5/6 of the depth, where the reference run looks too."""
    return f"layers.{round(5 / 6 * n_layers) - 1}.resid_post"


def check_sites(sites: str | Iterable[str], n_layers: int) -> None:
    """ValueError naming the first site that a model of `n_layers` does not have."""
    for site in as_sites(sites):
        head, _, rest = site.partition(".")
        layer, _, name = rest.partition(".")
        if site in MODEL_SITES or (
            head == "layers"
            and layer.isdecimal()
            and str(int(layer)) == layer
            and int(layer) < n_layers
            and name in LAYER_SITES
        ):
            continue
        raise ValueError(
            f"unknown site {site!r}: expected {', '.join(MODEL_SITES)} or layers.0 to layers.{n_layers - 1} "
            f"followed by .{', .'.join(LAYER_SITES)}"
        )


def entry(site: str, n_layers: int) -> tuple[str, int]:
    """The last place on the residual stream up to `site`, itself a site, and the layer that a pass resumes at from there.

    A site on the residual stream is its own entry, so that its activation may be replaced and handed to `Transformer.resume`.
    """
    if site == "embed":
        return site, 0
    if site == "final_norm":
        return f"layers.{n_layers - 1}.resid_post", n_layers
    _, layer, name = site.split(".")
    return (site, int(layer) + 1) if name == "resid_post" else (f"layers.{layer}.resid_pre", int(layer))


class SiteHooks:
    """Hooks by site name, as one forward pass uses them: looked up once, so that the layers see plain Python objects."""

    def __init__(self, fns: dict[str, tuple[Hook, ...]]) -> None:
        self.fns = fns
        self._layers: dict[int, SiteHooks] = {}
        for site, hooks in fns.items():
            if site.startswith("layers."):
                _, layer, name = site.split(".")
                self._layers.setdefault(int(layer), SiteHooks({})).fns[name] = hooks

    def layer(self, index: int) -> "SiteHooks":
        """The hooks of layer `index`, by the last part of their names."""
        return self._layers.get(index, NO_HOOKS)

    def at(self, name: str, x: Tensor) -> Tensor:
        """Apply the hooks of this site to `x` (B, T, width)."""
        for fn in self.fns.get(name, ()):
            replaced = fn(x)
            if replaced is not None:
                x = replaced
        return x


NO_HOOKS = SiteHooks({})


class ActiveHooks:
    """The hooks of one model: permanent ones, and those of the `with` blocks that the current thread or task is inside."""

    def __init__(self) -> None:
        self._permanent = NO_HOOKS
        self._active: ContextVar[SiteHooks | None] = ContextVar("llama3_hooks", default=None)

    def current(self) -> SiteHooks:
        return self._active.get() or self._permanent

    def add_permanent(self, fns: Mapping[str, Hook | Sequence[Hook]]) -> None:
        self._permanent = self._merged(fns)

    @contextmanager
    def adding(self, fns: Mapping[str, Hook | Sequence[Hook]]) -> Iterator[None]:
        token = self._active.set(self._merged(fns))
        try:
            yield
        finally:
            self._active.reset(token)

    def _merged(self, fns: Mapping[str, Hook | Sequence[Hook]]) -> SiteHooks:
        merged = dict(self.current().fns)
        for site, fn in fns.items():
            merged[site] = (*merged.get(site, ()), *([fn] if callable(fn) else fn))
        return SiteHooks(merged)

"""A session: a model with its SAEs, to read texts, find features, and steer with them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from core.runtime import pick_device
from inference.card import card_of
from inference.dialogue import prepare, style_of
from inference.finding import Hit, by_prompts, by_words
from inference.recipes import described, recipe_of
from inference.row import Row, grow, hooks_of, new_row
from inference.session import Feature, Features, InferenceConfig, open_session
from inference.session import Session as Loaded
from inference.steering import Recipe
from inference.terminal import SamplingConfig
from inference.watch import Watch, Watched
from llama3.chat_format import ROLES, Message, Role
from llama3.generate import Sampling
from llama3.model import Transformer
from llama3.tokenizer import Tokenizer
from llama3_sae.results import Active, Completion, FeatureCard, Hits, TextFeatures, TokenFeatures, Tokens
from sae.model import SAE

log = logging.getLogger("llama3_sae")

Paths = str | Path | Sequence[str | Path]
Said = Message | Mapping[str, str] | tuple[str, str] | str
Edits = Mapping[int | Feature, float | str] | Recipe | str | Path


def open(
    model: str | Path = "demo",
    sae: Paths = (),
    top: Paths = (),
    explanations: Paths = (),
    strengths: Paths = (),
    device: str = "auto",
    other_weights: bool = False,
    int8: bool = False,
) -> "Session":
    """A session with a model and SAEs of it.

    `model` is a folder in Meta's or Hugging Face's layout, a GGUF file, a Hub id, `smollm2`, or
    `demo`, the embedded model; for these two words the SAE that ships is taken. `sae` names folders
    of SAEs, each at a site of its own, `top` their top sentences, where the maxima of the latents
    are read, and `explanations` their labels, both in the order of `sae`; `strengths` names folders
    of `inference.steering_eval`. Without `sae` a session captures and completes. `other_weights`
    accepts a model whose weights are not those of training, such as the unquantised copy of a
    quantised one; the FVU on stored sentences is then logged. `int8` decodes on a CPU with weights
    in 8 bits.

    ValueError where a part is missing or belongs to another model or SAE.
    """
    config = InferenceConfig(
        model=str(model),
        sae=_paths(sae),
        top=_paths(top),
        explanations=_paths(explanations),
        strengths=_paths(strengths),
        other_weights=other_weights,
        int8=int8,
    )
    return Session(open_session(config, pick_device(device, 0)), config.model)


def _paths(given: Paths) -> tuple[Path, ...]:
    return tuple(map(Path, [given] if isinstance(given, str | Path) else given))


@dataclass(frozen=True, repr=False)
class Session:
    """What `open` returns. Nothing in it changes: steering makes a value of its own."""

    loaded: Loaded
    """The same that the app and the terminal work on."""
    model_name: str

    @property
    def model(self) -> Transformer:
        return self.loaded.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def saes(self) -> tuple[Features, ...]:
        """Each SAE with its site, top sentences, explanations and best strengths."""
        return self.loaded.features

    @property
    def sae(self) -> SAE:
        """The first SAE. ValueError where none is loaded."""
        return self.loaded.needs_features().sae

    def __repr__(self) -> str:
        loaded = [f"{one.n_latents:,} latents at {one.site}" for one in self.saes] or ["no SAE"]
        return f"Session({self.loaded.name}, {self.model.params.n_layers} layers; {'; '.join(loaded)})"

    def tokens(self, text: str) -> Tokens:
        """The tokens of `text` as the model reads it: with BOS where it was trained so."""
        ids = self.tokenizer.encode_prompt(text)
        return Tokens(tuple(ids), tuple(self.tokenizer.pieces(ids)))

    @overload
    def capture(self, text: str, site: str | None = None) -> Tensor: ...
    @overload
    def capture(self, text: str, site: list[str] | tuple[str, ...]) -> dict[str, Tensor]: ...
    @torch.no_grad()
    def capture(self, text: str, site: str | list[str] | tuple[str, ...] | None = None) -> Tensor | dict[str, Tensor]:
        """Activations [T, width] at one site, a row for each of `tokens(text)`; for a list of sites a tensor for each.

        None is the site that the (first) SAE reads.
        """
        if site is None:
            site = self.loaded.needs_features().site
        wanted = [site] if isinstance(site, str) else list(site)
        ids = torch.tensor([self.tokens(text).ids], device=self.model.device)
        found = {name: x[0] for name, x in self.model.capture(ids, sites=wanted).items()}
        return found[site] if isinstance(site, str) else found

    def features(self, text: str, n: int = 3, site: str = "") -> TextFeatures:
        """The `n` latents that are strongest on each token of `text`, by share of their maximum on the corpus.

        Of all SAEs together, or of the one at `site`. Position 0 is not read: it is the attention sink.
        """
        ids = self.tokens(text).ids
        if len(ids) == self.loaded.lead:
            raise ValueError("the text is empty; write one to read")
        active: list[list[Active]] = [[] for _ in ids]
        for of in self._saes(site):
            reading = self.loaded.read(ids, of.site)
            for position, (values, latents) in enumerate(zip(reading.values.tolist(), reading.indices.tolist(), strict=True)):
                active[position] += [
                    _active(of, latent, value) for latent, value in zip(latents, values, strict=True) if value > 0
                ]
        active[0] = []
        strongest = [tuple(sorted(found, key=lambda one: (-(one.share or 0.0), one.feature))[:n]) for found in active]
        lead = self.loaded.lead
        pieces = self.tokenizer.pieces(ids[lead:])
        return TextFeatures(
            tuple(TokenFeatures(position, piece, strongest[position]) for position, piece in enumerate(pieces, lead))
        )

    def search(
        self,
        text: str = "",
        *,
        positive: str | Sequence[str] = (),
        negative: str | Sequence[str] = (),
        n: int = 10,
        site: str = "",
    ) -> Hits:
        """Features by words or by prompts, at most `n`.

        `text` is looked for in the explanations, each of its words as the beginning of a word; where
        no explanation holds them all, the features that fire on the text are found. `positive` and
        `negative` are texts on which features should and should not fire. Hits of several SAEs take
        turns; `site` keeps to one of them.
        """
        wanted, against = _texts(positive), _texts(negative)
        words = text.strip()
        if bool(words) == bool(wanted) or (words and against):
            raise ValueError("give either words to search for, or prompts: search(positive=[...], negative=[...])")
        by, query, found = "words", repr(text), [by_words(of, text, n) for of in self._saes(site)] if words else []
        if not any(found):
            by, positives = "prompts", wanted or [text]
            query = ", ".join(map(repr, positives)) + (f", not on {', '.join(map(repr, against))}" if against else "")
            found = [by_prompts(self.loaded, of, positives, against, n) for of in self._saes(site)]
        return Hits(query, by, tuple(_in_turns(found))[:n])

    def feature(self, feature: int | Feature) -> FeatureCard:
        """All that is known about a latent of the (first) SAE, or about a `Feature`, which names its site."""
        site, latent = _named(feature)
        return FeatureCard(**vars(card_of(self.loaded.at(site), latent)))

    def steer(self, edits: Edits) -> "Steered":
        """The model with some latents changed: `{561: 1.5, 20: "ablate"}`.

        A number is added, in multiples of the latent's maximum; `"2:clamp"` and `"2:add:generated"`
        name a mode and positions, as `--steer` does. Keys are latents of the first SAE, or each a
        `Feature`. A recipe, its file, or edits as text will do too. ValueError for a latent that does
        not exist or never fired.
        """
        return Steered(self, recipe_of(self.loaded, edits))

    @overload
    def complete(self, prompts: str, **sampling: Any) -> Completion: ...
    @overload
    def complete(self, prompts: Sequence[str], **sampling: Any) -> list[Completion]: ...
    def complete(self, prompts: str | Sequence[str], **sampling: Any) -> Completion | list[Completion]:
        """As `Steered.complete`, unsteered."""
        return Steered(self, Recipe()).complete(prompts, **sampling)

    def chat(self, messages: str | Sequence[Said], style: str = "auto", **sampling: Any) -> Completion:
        """As `Steered.chat`, unsteered."""
        return Steered(self, Recipe()).chat(messages, style, **sampling)

    def stream(self, prompt: str | Sequence[Said], **sampling: Any) -> Iterator[str]:
        """As `Steered.stream`, unsteered."""
        return Steered(self, Recipe()).stream(prompt, **sampling)

    def watch(self, latents: Sequence[int | Feature], prompt: str, alarm: float | None = None, **sampling: Any) -> Watched:
        """As `Steered.watch`, unsteered."""
        return Steered(self, Recipe()).watch(latents, prompt, alarm, **sampling)

    def _saes(self, site: str) -> Sequence[Features]:
        """The SAE at `site`; all where that is empty."""
        first = self.loaded.at(site)
        return [first] if site else self.saes


@dataclass(frozen=True, repr=False)
class Steered:
    """A session with a recipe. Sampling goes by keywords (`max_new_tokens`, `temperature`, `seed`, ...: the fields of
    `llama3.Sampling`), whose defaults are those of the terminal commands."""

    session: Session
    recipe: Recipe

    def __repr__(self) -> str:
        edits = "".join(f"\n  {line}" for line in described(self.session.loaded, self.recipe))
        return f"Steered({self.session!r}){edits}"

    @overload
    def complete(self, prompts: str, **sampling: Any) -> Completion: ...
    @overload
    def complete(self, prompts: Sequence[str], **sampling: Any) -> list[Completion]: ...
    def complete(self, prompts: str | Sequence[str], **sampling: Any) -> Completion | list[Completion]:
        """Continue one prompt, or several in one batch; a text does not depend on its neighbours."""
        loaded = self.session.loaded
        rows = [new_row(loaded, prompt) for prompt in _texts(prompts)]
        for _ in grow(loaded, rows, _sampling(sampling), hooks_of(loaded, self.recipe, rows)):
            pass
        done = [_completion(row) for row in rows]
        return done[0] if isinstance(prompts, str) else done

    def chat(self, messages: str | Sequence[Said], style: str = "auto", **sampling: Any) -> Completion:
        """The answer to the last of `messages`: each is `{"role": ..., "content": ...}`, a pair of
        both, or the text of a user.

        `style` is the model's own chat format (auto), `template`, `llama3`, or `plain`, a transcript.
        """
        row, how = self._asked(messages, style, _sampling(sampling))
        rows = [row]
        for _ in grow(self.session.loaded, rows, how, hooks_of(self.session.loaded, self.recipe, rows)):
            pass
        done = _completion(rows[0])
        return replace(done, text=done.text.strip())

    def stream(self, prompt: str | Sequence[Said], style: str = "auto", **sampling: Any) -> Iterator[str]:
        """The text after a prompt, or the answer to a list of messages, piece by piece as it is written.

        What can be refused is refused before the first piece is asked for.
        """
        loaded, how = self.session.loaded, _sampling(sampling)
        row, how = (new_row(loaded, prompt), how) if isinstance(prompt, str) else self._asked(prompt, style, how)
        rows = [row]
        pieces = grow(loaded, rows, how, hooks_of(loaded, self.recipe, rows))
        return (piece.text for piece in pieces if piece.text)

    def watch(self, latents: Sequence[int | Feature], prompt: str, alarm: float | None = None, **sampling: Any) -> Watched:
        """Continue `prompt` and read `latents`, all of one SAE, at every token, after steering.

        `alarms` of the result holds the tokens where one is above `alarm` times its maximum.
        """
        loaded, chosen = self.session.loaded, [_named(one) for one in latents]
        sites = {site or loaded.needs_features().site for site, _ in chosen}
        if len(sites) != 1:
            raise ValueError(f"watch latents of one SAE at a time; found {', '.join(sorted(sites)) or 'none'}")
        watch = Watch(loaded.at(sites.pop()), [latent for _, latent in chosen], alarm)
        rows = [new_row(loaded, prompt)]
        for _ in grow(loaded, rows, _sampling(sampling), hooks_of(loaded, self.recipe, rows, watch)):
            pass
        return watch.result(self.session.tokenizer, rows[0].ids)

    def _asked(self, messages: str | Sequence[Said], style: str, sampling: Sampling) -> tuple[Row, Sampling]:
        """A conversation as a row about to be continued, and the sampling that ends where the answer does."""
        session = self.session
        said = [_message(one) for one in ([messages] if isinstance(messages, str) else messages)]
        if not any(message.role != "system" for message in said):
            raise ValueError("there is no message to answer; give at least one of the user's")
        turn = prepare(session.loaded, said, style_of(style, session.model_name, session.tokenizer), sampling.max_new_tokens)
        if turn.dropped:
            log.warning("the context is full: the oldest %d message(s) are left out", turn.dropped)
        return new_row(session.loaded, said[-1].content, turn.ids), turn.ended(sampling)


def _sampling(changes: Mapping[str, Any]) -> Sampling:
    """The terminal's sampling with `changes`."""
    return replace(SamplingConfig().sampling(), **changes)


def _active(features: Features, latent: int, value: float) -> Active:
    maximum = float(features.top.max_values[latent])
    share = value / maximum if maximum > 0 else None
    return Active(Feature(features.site, latent), value, share, features.label(latent))


def _completion(row: Row) -> Completion:
    return Completion(row.prompt, row.text, row.finished, row.ids)


def _named(feature: int | Feature) -> Feature:
    """A feature whose site is empty where only the latent was given."""
    return feature if isinstance(feature, Feature) else Feature("", feature)


def _texts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _in_turns(found: Sequence[Sequence[Hit]]) -> Iterator[Hit]:
    """The best of each list, then the second of each, ..."""
    for rank in zip_longest(*found):
        yield from (hit for hit in rank if hit is not None)


def _message(said: Said) -> Message:
    """A message as users write them. ValueError for another shape or an unknown role."""
    if isinstance(said, str):
        return Message("user", said)
    role, content = (said.get("role"), said.get("content")) if isinstance(said, Mapping) else said[:2]
    if role not in ROLES or not isinstance(content, str):
        raise ValueError(f"a message has a role ({', '.join(ROLES)}) and content (text); found {said!r:.80}")
    return Message(cast(Role, role), content)

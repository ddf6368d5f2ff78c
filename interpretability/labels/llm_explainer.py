"""Explanations by a language model: one request a latent, from the sentences that scoring does not use."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from interpretability.labels.prompts import MalformedReply, Style, parse, system_prompt, user_prompt
from interpretability.labels.token_statistics import split
from interpretability.llm.client import Asker, Reply, Request
from interpretability.records import Explanation, TopSentences


class LLMExplainer:
    """A backend of `explain` that asks `asker` about every latent with sentences. At most `examples` of them are shown."""

    def __init__(self, asker: Asker, top: TopSentences, style: Style, examples: int) -> None:
        self.name, self.model = asker.name, asker.model
        self._asker, self._top, self._style, self._examples = asker, top, style, examples

    def requests(self, latents: Sequence[int]) -> list[Request]:
        """One for each of `latents` that has sentences."""
        return [self._request(latent) for latent in latents if not self._top.silence(latent)]

    def _request(self, latent: int) -> Request:
        shown, _ = split(self._top.sentences(latent, "max"))
        user = user_prompt(self._top.statistics(latent), shown[: self._examples])
        return Request(f"latent-{latent}", system_prompt(self._style), user)

    def explain(self, latents: Sequence[int]) -> Iterator[Explanation]:
        """One explanation a latent, in order; `failed` with the raw reply where there is no answer in it."""
        replies = {reply.key: reply for reply in self._asker.ask(self.requests(latents))}
        yield from self.explanations(latents, replies)

    def explanations(self, latents: Sequence[int], replies: Mapping[str, Reply]) -> Iterator[Explanation]:
        for latent in latents:
            yield self._explanation(latent, replies.get(f"latent-{latent}"))

    def _explanation(self, latent: int, reply: Reply | None) -> Explanation:
        failed = Explanation(latent, "", "", self.name, self.model, "failed")
        if reply is None:
            return replace(failed, reason=self._top.silence(latent))
        if reply.problem:
            return replace(failed, reason=reply.problem, reply=reply.text)
        try:
            answer = parse(self._style, reply.text)
        except MalformedReply as error:
            return replace(failed, reason=f"malformed reply: {error}", reply=reply.text)
        details = answer.details | {"style": self._style}
        return replace(
            failed,
            title=answer.title,
            explanation=answer.explanation,
            state="valid",
            details=details,
            certainty=answer.certainty,
        )

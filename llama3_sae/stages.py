"""The table of all stages, with a line each. It imports nothing, so listing them is quick."""

from typing import NamedTuple


class Stage(NamedTuple):
    """A command: `python -m MODULE`, or `llama3-sae NAME`."""

    module: str
    does: str

    @property
    def name(self) -> str:
        """The module's name without its package."""
        return self.module.rpartition(".")[2]


STAGES = (
    Stage("capture.sentences", "text (files, the Hub, S3) to a corpus of sentences"),
    Stage("capture.activations", "a corpus to the activations of a model, on disk"),
    Stage("capture.merge", "the parts of a capture, made on several machines, to one folder"),
    Stage("sae.preprocess", "activations to batches in random order, with their statistics"),
    Stage("sae.train", "batches to a trained SAE"),
    Stage("sae.evaluate", "FVU, L0, dead latents and loss recovered on held-out sentences"),
    Stage("sae.probe", "what a few latents know of labelled texts, and latents as alarms with error rates"),
    Stage("sae.adopt", "a published SAE, measured on its model, as one of ours"),
    Stage("sae.convert", "an SAE to and from the formats of other libraries"),
    Stage("sae.push", "an SAE to the Hugging Face Hub, with a model card"),
    Stage("sae.pull", "an SAE from the Hugging Face Hub, verified"),
    Stage("interpretability.top_sentences", "the sentences in which each latent fires most"),
    Stage("interpretability.explain", "a title and an explanation for each latent"),
    Stage("interpretability.score", "how well explanations predict sentences their explainer did not see"),
    Stage("interpretability.search", "features by prompts, by words of their explanations, or by direction"),
    Stage("interpretability.report", "an HTML report of all features"),
    Stage("interpretability.map", "a map of the features in one HTML file"),
    Stage("interpretability.splitting", "which latents of a large SAE each latent of a small one became"),
    Stage("interpretability.completeness", "for how many concepts the SAE has a feature"),
    Stage("interpretability.attribute", "which features of a prompt move its answer, and what ablating them does"),
    Stage("interpretability.steerability", "which latents would steer, before anything is generated"),
    Stage("inference.complete", "continue texts in the terminal, steered or not"),
    Stage("inference.chat", "talk with a model in the terminal, steered or not"),
    Stage("inference.app", "find features and steer with them in a browser"),
    Stage("inference.steering_eval", "does steering work? features against random directions"),
    Stage("demo", "the whole path on the embedded model, then the app"),
)

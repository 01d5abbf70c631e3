"""Losses of a language model in float32, whatever the dtype of the model."""

from typing import Any


class Float32Losses:
    """Stands in for a language model in SAELens's ``run_evals``, with its losses in float32.

    SAELens averages the losses of all tokens in the dtype of the model. A bfloat16 mean near 3 has
    steps of 0.016, and the share of the CE loss recovered then has steps of about 0.002, which is
    more than most SAEs differ by.
    """

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits and losses, for ``return_type="both"``, the only one ``run_evals`` asks for."""
        logits, losses = self._model(*args, **kwargs)
        return logits, losses.float()

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """The same under hooks."""
        logits, losses = self._model.run_with_hooks(*args, **kwargs)
        return logits, losses.float()

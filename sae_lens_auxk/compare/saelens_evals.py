"""What SAELens's evaluators are given: the same data for each SAE, and losses in float32.

SAELens's own sources would move on to new data for each SAE.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from sae_lens_auxk.compare.norms import RowFilter


class SameFeatures:
    """Stands in for SAELens's activation generator, and returns the same activations each time.

    The generator itself would draw new ones for every case from torch's global random state.
    """

    def __init__(self, batches: list[torch.Tensor]):
        self._batches = iter(batches)

    def sample(self, _batch_size: int) -> torch.Tensor:
        """(n, n_features), the next batch, whatever size is asked for."""
        return next(self._batches).to_dense()


class SamePrompts:
    """Stands in for SAELens's activation store in ``run_evals``, with the same prompts each time.

    The store itself would read on, and every case would be measured on different text.
    """

    def __init__(self, tokens: list[torch.Tensor]):
        self._tokens = itertools.cycle(tokens)
        self.store_batch_size_prompts, self.context_size = tokens[0].shape

    def get_batch_tokens(self, _batch_size: int) -> torch.Tensor:
        """(prompts, context_size), whatever size is asked for."""
        return next(self._tokens)

    def reset_input_dataset(self) -> None:
        """SAELens rewinds the text here; there is nothing to rewind."""


class Float32Losses:
    """Stands in for a language model in SAELens's ``run_evals``, with its losses in float32.

    SAELens averages the losses of all tokens in the dtype of the model. A bfloat16 mean near 3 has
    steps of 0.016, and the share of the CE loss recovered then has steps of about 0.002, which is
    more than most SAEs differ by.

    Rows that ``row_filter`` leaves out are not replaced, neither by zero nor by a reconstruction:
    no SAE was trained on them.
    """

    def __init__(self, model: Any, row_filter: RowFilter | None = None):
        self._model = model
        self._row_filter = row_filter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits and losses, for ``return_type="both"``, the only one ``run_evals`` asks for."""
        logits, losses = self._model(*args, **kwargs)
        return logits, losses.float()

    def run_with_hooks(self, *args: Any, fwd_hooks: list[tuple[str, Any]], **kwargs: Any) -> Any:
        """The same under hooks."""
        if self._row_filter is not None:
            fwd_hooks = [(name, _sparing(hook, self._row_filter)) for name, hook in fwd_hooks]
        logits, losses = self._model.run_with_hooks(*args, fwd_hooks=fwd_hooks, **kwargs)
        return logits, losses.float()


def _sparing(replace: Callable[..., torch.Tensor], row_filter: RowFilter) -> Any:
    """A hook that replaces only the rows that stay; a row may be several heads."""

    def hook_fn(activations: torch.Tensor, hook: Any) -> torch.Tensor:
        rows = activations.flatten(2)
        kept = row_filter.keeps(rows)[..., None]
        replaced = replace(activations, hook=hook).flatten(2)
        return torch.where(kept, replaced, rows).view_as(activations)

    return hook_fn

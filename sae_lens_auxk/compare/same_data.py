"""The same data for each SAE that SAELens evaluates; its own sources would move on to new data."""

import itertools

import torch


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

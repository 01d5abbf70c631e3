"""Which latents are dead, counted in tokens.

The state is one int64 tensor ``tokens_since_fired`` (d_sae,): tokens (rows) that the SAE has
trained on since each latent last fired. Tokens rather than steps make the threshold mean the
same at every batch size (Gao et al. 2024 count 10 million tokens).
"""

import torch


def fired_in_batch(feature_acts: torch.Tensor) -> torch.Tensor:
    """(d_sae,) bool: which latents are active in at least one row.

    ``feature_acts`` is (B, d_sae), dense or sparse COO, and not negative.
    """
    if feature_acts.is_sparse:
        latents, values = feature_acts._indices()[-1], feature_acts._values().detach()
        return values.new_zeros(feature_acts.shape[-1]).index_add_(0, latents, values) > 0
    # Activations are never negative. On CPU this is four times as fast as (acts > 0).any().
    return feature_acts.detach().amax(dim=0) > 0


@torch.no_grad()
def count_tokens(
    tokens_since_fired: torch.Tensor, fired: torch.Tensor, n_tokens: int | torch.Tensor
) -> None:
    """Count a batch in place: 0 for latents that fired in it, ``n_tokens`` more for the rest."""
    tokens_since_fired.add_(n_tokens).masked_fill_(fired, 0)

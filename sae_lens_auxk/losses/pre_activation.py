"""Pre-activation loss: a constant push towards the firing threshold."""

from typing import Any

import torch

from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss


@register_aux_loss(
    "pre_activation", default_coefficient=3e-6, sync_free=True, capturable=True, shardable=True
)
def pre_activation(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:  # noqa: ARG001
    """``mean_b sum_{i in D} relu(threshold - h_bi)``.

    The threshold is what ``h`` must exceed to fire: the row's smallest active ``h`` (TopK;
    0 in a row where nothing fired), ``topk_threshold`` (BatchTopK, Matryoshka), the learned
    one, with its gradient (JumpReLU), 0 (Standard, Gated).

    Source: Anthropic, Circuits Updates January 2025, "Dictionary Learning Optimization
    Techniques". Deviations: only dead latents are counted (as in SAELens's
    ``pre_act_loss_coefficient``), and they are not weighted by their decoder norms. AbsTopK:
    ``|h_bi|`` is compared with the row's smallest active one, as in its selection.
    """
    dead = inputs.dead_columns()
    threshold = inputs.dead_threshold(dead).to(dead.h.dtype)
    missing = (threshold - inputs.nearness(dead.h)).relu().where(dead.real, 0)
    return inputs.total(missing).mean()

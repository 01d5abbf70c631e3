"""Prompts of a language model, and what their next tokens cost after a change at the hook."""

import re
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformer_lens import HookedTransformer

from sae_lens_auxk.compare.norms import RowFilter

TOKENS_AT_ONCE = 4096
"""Tokens in one forward pass. Their logits, with a vocabulary of 50,000, take 0.8 GB."""


class Prompts:
    """Prompts whose activations can be changed at a hook.

    Attributes:
        rows: (N, d_in) the activations that an SAE is measured on, in the order of the text. Each
            is that of a token with a next one.
        prompt: (N,) int64, the prompt that a row belongs to.
    """

    def __init__(
        self,
        model: Any,
        hook_name: str,
        tokens: torch.Tensor,
        is_measured: torch.Tensor,
        row_filter: RowFilter | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ):
        """
        Args:
            model: SAELens's model.
            hook_name: where the activations are.
            tokens: (n, length) int64.
            is_measured: (n, length) bool, the tokens whose activations the SAE is measured on.
            row_filter: leaves out some of these.
            model_kwargs: for the model's forward pass.
        """
        self._model, self._hook_name = model, hook_name
        self._n_at_once = max(1, TOKENS_AT_ONCE // tokens.shape[1])
        self._kwargs: dict[str, Any] = {"return_type": "logits", **(model_kwargs or {})}
        # A forward pass with a change at the hook can begin at the hook's block.
        block = _block_of(model, hook_name)
        names = [hook_name] if block is None else [hook_name, f"blocks.{block}.hook_resid_pre"]
        at_hook: list[torch.Tensor] = []
        inputs: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        for part in tokens.split(self._n_at_once):
            with torch.no_grad():
                logits, cache = model.run_with_cache(part, names_filter=names, **self._kwargs)
            at_hook.append(cache[hook_name].flatten(2))
            inputs.append(part if block is None else cache[names[-1]])
            scores = logits[:, :-1].float().flatten(0, 1)
            loss = cross_entropy(scores, part[:, 1:].flatten().to(scores.device), reduction="none")
            losses.append(loss.view(len(part), -1))
        if block is not None:
            self._kwargs["start_at_layer"] = block
        activations = torch.cat(at_hook).float()
        # A model may be spread over several devices.
        self._inputs = torch.cat(inputs)
        self._losses = torch.cat(losses).to(activations.device)
        self._tokens = tokens.to(activations.device)
        is_measured = is_measured.to(activations.device)
        if row_filter is not None:
            is_measured = is_measured & row_filter.keeps(activations)
        self.prompt, self._position = is_measured[:, :-1].nonzero(as_tuple=True)
        self.rows = activations[self.prompt, self._position]

    @torch.no_grad()
    def rise(
        self, rows: torch.Tensor, changes: torch.Tensor, together: torch.Tensor
    ) -> torch.Tensor:
        """(m,): the rise of the next token's CE, in nats, at rows that something is taken out of.

        Args:
            rows: (m,) int64, which of ``rows``.
            changes: (m, d_in) what is subtracted there.
            together: (m,) int64. What is taken out of rows of one prompt with the same number is
                taken out in the same forward pass, and nothing else is.
        """
        rows, together = rows.to(self.rows.device), together.to(self.rows.device)
        prompts, positions = self.prompt[rows], self._position[rows]
        keys, which = torch.unique(together * len(self._tokens) + prompts, return_inverse=True)
        # No token sees those after it, so a pass ends with the last one that is asked for.
        last = torch.zeros_like(keys).scatter_reduce(0, which, positions, "amax")
        last, by_length = last.sort()
        keys, (which, order) = keys[by_length], by_length.argsort()[which].sort()
        starts = torch.arange(0, len(keys) + self._n_at_once, self._n_at_once, device=which.device)
        bounds = torch.searchsorted(which, starts).tolist()
        risen = torch.empty(len(rows), device=self.rows.device)
        for first, begin, end in zip(starts.tolist(), bounds, bounds[1:], strict=False):
            at = order[begin:end]
            run, position = which[begin:end] - first, positions[at]
            of_runs = slice(first, first + self._n_at_once)
            scores = self._scores(
                keys[of_runs] % len(self._tokens),
                int(last[of_runs].max()) + 1,
                run,
                position,
                changes[at.to(changes.device)],
            )
            targets = self._tokens[prompts[at], position + 1]
            before = self._losses[prompts[at], position]
            risen[at] = cross_entropy(scores, targets, reduction="none") - before
        return risen

    def _scores(
        self,
        prompts: torch.Tensor,
        length: int,
        run: torch.Tensor,
        position: torch.Tensor,
        change: torch.Tensor,
    ) -> torch.Tensor:
        """(j, n_tokens) at the places where a change (j, d_in) is subtracted from the first
        ``length`` tokens of prompts; ``run`` and ``position`` (j,) say where."""

        def subtract(activations: torch.Tensor, **_: Any) -> torch.Tensor:
            changed = activations.flatten(2).clone()
            rest = changed[run, position].float() - change.to(changed.device)
            changed[run, position] = rest.to(changed.dtype)
            return changed.view(activations.shape)

        logits = self._model.run_with_hooks(
            self._inputs[prompts.to(self._inputs.device), :length],
            fwd_hooks=[(self._hook_name, subtract)],
            **self._kwargs,
        )
        return logits[run.to(logits.device), position.to(logits.device)].float().to(run.device)


def _block_of(model: Any, hook_name: str) -> int | None:
    """The block that a hook is in, where the model can start a forward pass at a block."""
    found = re.match(r"blocks\.(\d+)\.", hook_name)
    if not found or not isinstance(model, HookedTransformer):
        return None
    # These would need more than the block's input.
    if model.cfg.positional_embedding_type == "shortformer":
        return None
    if model.tokenizer is not None and model.tokenizer.padding_side == "left":
        return None
    return int(found[1])

"""The losses written out slowly, row by row and latent by latent, in float64.

Nothing of the package is used here: only the formulas. What a reference gets is the SAE's
own pre-activations with their graph, so that its gradient can be compared too.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Step:
    x: torch.Tensor  # (B, d_in)
    sae_out: torch.Tensor  # (B, d_in)
    h: torch.Tensor  # (B, d_sae), with graph
    a: torch.Tensor  # (B, d_sae)
    W_dec: torch.Tensor  # (d_sae, d_in), with graph
    b_dec: torch.Tensor  # (d_in,), with graph
    dead: list[bool]
    n_latents: int  # of the SAE, also where this is one Matryoshka level
    rescaled: bool
    threshold: torch.Tensor | None  # (d_sae,), or None for TopK's own
    scale: list[float]  # factor from the decoder's output to x, a number a row
    shift: list[float]  # offset from the decoder's output to x, a number a row
    by_magnitude: bool = False  # AbsTopK: |h| is selected, compared and raised


def reference_loss(variant: str, step: Step, cfg: Any) -> torch.Tensor:
    return _LOSSES[variant](step, cfg)


def _rows(step: Step) -> range:
    return range(step.x.shape[0])


def _latent(step: Step, i: int) -> torch.Tensor:
    row = step.W_dec[i]
    return row / row.pow(2).sum().sqrt() if step.rescaled else row


def _residual(step: Step, b: int) -> torch.Tensor:
    return (step.x[b] - step.sae_out[b]).detach()


def _dead(step: Step) -> list[int]:
    return [i for i, is_dead in enumerate(step.dead) if is_dead]


def _nearness(step: Step, value: Any) -> Any:
    """How near to firing a pre-activation is, or how well a latent matches."""
    return abs(value) if step.by_magnitude else value


def _nearest(step: Step, b: int, cfg: Any) -> list[int]:
    k_aux = cfg.k_aux
    if k_aux is None:  # the power of two nearest to d_in / 2, by its logarithm
        powers = [2**n for n in range(20)]
        d_in, d_sae = step.x.shape[1], step.n_latents
        k_aux = min(powers, key=lambda power: abs(math.log2(power) - math.log2(d_in / 2)))
        k_aux = min(k_aux, d_sae)
    return sorted(_dead(step), key=lambda i: -_nearness(step, step.h[b, i].item()))[:k_aux]


def _auxk(step: Step, cfg: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in _rows(step):
        error = -_residual(step, b)
        for i in _nearest(step, b, cfg):
            act = step.h[b, i]
            if cfg.aux_relu and act.item() <= 0:
                continue
            error = error + step.scale[b] * act * _latent(step, i)
        if cfg.aux_bias == "decoder":
            error = error + step.scale[b] * step.b_dec
        if cfg.aux_bias == "matched":
            error = error + step.scale[b] * (step.b_dec - step.b_dec.detach())
        total = total + (error * error).sum()
    loss = total / len(_rows(step))
    if not cfg.aux_normalize:
        return loss
    targets = [_residual(step, b) for b in _rows(step)]
    if cfg.aux_bias == "matched":
        targets = [r + step.scale[b] * step.b_dec.detach() for b, r in enumerate(targets)]
    inputs = [step.x[b] - step.shift[b] for b in _rows(step)]
    variance = _variance(targets)
    return loss * (_variance(inputs) / variance if variance > 0 else 0.0)


def _variance(rows: list[torch.Tensor]) -> float:
    mean = sum(rows) / len(rows)
    return sum(((row - mean) ** 2).sum().item() for row in rows) / len(rows)


def _straight_through(step: Step, cfg: Any) -> torch.Tensor:
    """A loss with straight_through's gradient, not its value."""
    total = torch.zeros((), dtype=torch.float64)
    for b in _rows(step):
        for i in _nearest(step, b, cfg):
            pull = 2 * step.scale[b] * (_residual(step, b) * _latent(step, i)).sum().item()
            total = total - pull * step.h[b, i]
    return total / len(_rows(step))


def _pursuit(step: Step, cfg: Any) -> torch.Tensor:
    """A loss with pursuit's gradient, not its value."""
    total = torch.zeros((), dtype=torch.float64)
    usual = [
        math.sqrt(
            sum((_residual(step, b) * _latent(step, i)).sum().item() ** 2 for b in _rows(step))
        )
        for i in range(len(step.dead))
    ]
    for b in _rows(step):
        residual, scale = _residual(step, b), step.scale[b]
        squares = [_latent(step, i).pow(2).sum().item() for i in range(len(step.dead))]
        products = [(residual * _latent(step, i)).sum().item() for i in range(len(step.dead))]
        for j in _nearest(step, b, cfg):
            h = step.h[b, j].item()
            if h > 0 or step.by_magnitude:
                downhill = products[j] - scale * h * squares[j]
                if downhill * h < 0:
                    total = total - 2 * scale * downhill * step.h[b, j]

        matches = [p / root if root else 0.0 for p, root in zip(products, usual, strict=True)]
        i = max(range(len(matches)), key=lambda j: _nearness(step, matches[j]))
        if not step.dead[i] or _nearness(step, matches[i]) <= 0:
            continue
        # sae_out = scale (a W + b), so what explains most is a = p / |W| in the decoder's units.
        a = products[i] / squares[i] / scale
        norm = step.W_dec[i].detach().pow(2).sum().sqrt() if step.rescaled else 1.0
        fired = scale * a / norm * step.W_dec[i]
        total = total - 2 * scale * products[i] * step.h[b, i] - 2 * (residual * fired).sum()
    return total / len(_rows(step))


def _reanimation(step: Step, cfg: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in _rows(step):
        for i in _dead(step):
            total = total + _nearness(step, step.h[b, i])
    return -step.x.shape[1] * total / (step.h.shape[0] * step.n_latents)


def _pre_activation(step: Step, cfg: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in _rows(step):
        active = [_nearness(step, v) for v in step.a[b].tolist() if _nearness(step, v) > 0]
        for i in _dead(step):
            if step.threshold is None:
                threshold: Any = min(active) if active else 0.0
            else:
                threshold = step.threshold[i]
            missing = threshold - _nearness(step, step.h[b, i])
            if missing.item() > 0:
                total = total + missing
    return total / len(_rows(step))


def _ghost_gradients(step: Step, cfg: Any) -> torch.Tensor:
    ghost_total = torch.zeros((), dtype=torch.float64)
    main_total = 0.0
    for b in _rows(step):
        residual = _residual(step, b)
        # scale cancels in the ratio of norms
        out = torch.zeros_like(residual)
        for i in _dead(step):
            out = out + step.h[b, i].exp() * _latent(step, i)
        factor = math.sqrt((residual**2).sum().item()) / (
            2 * math.sqrt((out.detach() ** 2).sum().item())
        )
        ghost_total = ghost_total + ((factor * out - residual) ** 2).sum()
        main_total += (residual**2).sum().item()
    return ghost_total * (main_total / ghost_total.item()) / len(_rows(step))


def _multi_topk(step: Step, cfg: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    n = min(int(4 * cfg.k), step.h.shape[1])
    for b in _rows(step):
        nearness = [_nearness(step, h) for h in step.h[b].tolist()]
        chosen = sorted(range(step.h.shape[1]), key=lambda i: -nearness[i])[:n]
        out = step.b_dec
        for i in chosen:
            if nearness[i] <= 0:
                continue
            out = out + step.h[b, i] * _latent(step, i)
        error = step.x[b] - (step.scale[b] * out + step.shift[b])
        total = total + (error * error).sum()
    return total / len(_rows(step))


def _none(step: Step, cfg: Any) -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


_LOSSES = {
    "auxk": _auxk,
    "straight_through": _straight_through,
    "pursuit": _pursuit,
    "reanimation": _reanimation,
    "pre_activation": _pre_activation,
    "ghost_gradients": _ghost_gradients,
    "multi_topk": _multi_topk,
    "none": _none,
}

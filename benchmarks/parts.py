"""Time each part of a sparse training step, and the alternatives that were tried.

Run by ``python -m benchmarks.performance --sections parts``.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.benchmark import Timer

from sae_lens_auxk.ops.matrices import LatentGradient, transposed
from sae_lens_auxk.ops.selection import (
    InColumns,
    Pairs,
    Selected,
    gather_columns,
    group_size,
    matmul_to,
    top_k,
    top_k_of_batch,
)

D_IN, K, K_AUX = 768, 32, 512


def show(name: str, function: Callable[[], Any]) -> None:
    threads = torch.get_num_threads()
    timer = Timer("function()", globals={"function": function}, num_threads=threads)
    milliseconds = timer.blocked_autorange(min_run_time=0.3).median * 1e3
    print(f"{name:50s} {milliseconds:8.2f} ms", flush=True)


def decode(selected: Selected, values: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    return selected.weighted_sums(values, selected.matrix(W))


def dots(selected: Selected, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    return selected.dots(x, selected.matrix(W))


@torch.no_grad()
def measure_parts(device: str, n: int, B: int, dead_shares: tuple[float, ...]) -> None:
    """Print the milliseconds of each part, for ``n`` latents and a batch of ``B``."""
    torch.manual_seed(0)
    half = torch.bfloat16 if device == "cuda" else torch.float32

    x = torch.randn(B, D_IN, device=device)
    W_enc, W_dec = torch.randn(D_IN, n, device=device) / 28, torch.randn(n, D_IN, device=device)
    x_half, W_half = x.to(half), W_enc.to(half)
    h = x_half @ W_half
    show("encoder: x @ W_enc", lambda: x_half @ W_half)
    show("norms of W_dec", lambda: W_dec.norm(dim=-1))

    size = group_size(n, K)
    show("selection: torch.topk", lambda: h.topk(K, sorted=False))
    show("selection: group maxima by amax", lambda: h.unflatten(1, (-1, size)).amax(dim=-1))
    show("selection: top_k, two levels", lambda: top_k(h, K))
    show("BatchTopK: torch.topk of the flat batch", lambda: h.flatten().topk(K * B, sorted=False))
    show("BatchTopK: top_k_of_batch", lambda: top_k_of_batch(h, K * B))

    values, latents = top_k(h, K)
    values = values.flatten().float()

    def fresh() -> Pairs:  # one whose order by latent is not known yet
        return Pairs.per_row(latents, n)

    pairs = fresh()
    show("decoder: embedding_bag", lambda: pairs.weighted_sums(values, W_dec))
    show("gradient of the activations", lambda: pairs.dots(x, W_dec))
    show("order by latent", lambda: fresh().by_latent)
    order, _, starts = pairs.by_latent
    show(
        "weight gradient: embedding_bag",
        lambda: torch.nn.functional.embedding_bag(
            pairs.rows[order], x, starts[:-1], per_sample_weights=values[order], mode="sum"
        ),
    )
    show("weight gradient", lambda: pairs.add_to(LatentGradient(W_dec), values, x, False))
    filled = LatentGradient(W_dec)
    pairs.add_to(filled, values, x, False)
    show("weight gradient, added to one", lambda: pairs.add_to(filled, values, x, False))
    show("W_enc's layout: torch", lambda: W_dec.T.contiguous())
    show("W_enc's layout: transposed", lambda: transposed(W_dec))

    norm = W_dec.norm(dim=-1)
    for share in dead_shares:
        dead = torch.rand(n, device=device) < share
        columns = dead.nonzero().squeeze(1)
        columns = columns[: len(columns) // 64 * 64]  # as the training step pads them
        print(f"\n{columns.numel()} of {n} latents dead")
        W_lent = W_dec.to(half)
        show("columns of h: index_select", lambda c=columns: h.index_select(1, c))
        show("columns of h: gather_columns", lambda c=columns: gather_columns(h, c))
        h_dead = gather_columns(h, columns)
        show(f"torch.topk {K_AUX} of the columns", lambda c=h_dead: c.topk(K_AUX, sorted=False))
        show(f"top_k {K_AUX} of the columns", lambda c=h_dead: top_k(c, K_AUX))
        show(f"top_k {K_AUX} of h among the dead", lambda d=dead: top_k(h, K_AUX, d))
        aux_values, positions = top_k(h_dead, K_AUX)
        aux_values = aux_values.float()
        forms = {
            "columns": (InColumns(columns, positions, n), W_lent, x_half),
            "pairs": (Pairs.per_row(columns[positions], n), W_lent, x_half),
        }
        if device != "cuda":  # embedding_bag takes float32 only
            forms["pairs"] = (forms["pairs"][0], W_dec, x)
        for form, (chosen, W, x_) in forms.items():
            add = partial(chosen.add_to, filled, aux_values, x_, False)
            show(f"{form}: decode", partial(decode, chosen, aux_values, W))
            show(f"{form}: gradient of activations", partial(dots, chosen, x_, W))
            show(f"{form}: weight gradient, added to one", add)
        show("pairs: order by latent", lambda p=forms["pairs"][0]: replace(p).by_latent)
        # What a loss with a gradient for every dead latent needs, however few the rows are.
        few, few_x = h_dead[:256], x_half[:256]
        filled_enc = LatentGradient(W_enc, transpose=True)
        filled_enc.add_rows(torch.zeros_like(W_dec))
        sums = matmul_to(few.T, few_x, W_dec.dtype)
        show("all dead: gradient of 256 rows", partial(matmul_to, few.T, few_x, W_dec.dtype))
        show("all dead: scaled, added", partial(filled_enc.add_scaled, sums, norm, columns, None))
    buffer = torch.zeros_like(W_dec)

    def add_norm_gradient() -> None:
        gradient = LatentGradient(W_dec)
        gradient.add_rows(buffer)
        gradient.add_along(norm)
        gradient.take()

    show("\nnorms' gradient, added to W_dec's", add_norm_gradient)
    show("W_dec in half precision", lambda: W_dec.to(half))

    with torch.enable_grad():
        parameters = [torch.nn.Parameter(W.clone()) for W in (W_enc, W_dec)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    show("clipping", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    show("Adam", torch.optim.Adam(parameters).step)

"""The parts of a sparse training step, and what was tried in their place, one by one.

python benchmarks/parts.py --device cuda                                 # H100: bf16
python benchmarks/parts.py --device cpu --latents 12288 --batch 1024
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

from sae_lens_auxk.ops.encoder import gather_columns
from sae_lens_auxk.ops.selected import Selected, dots, outer_sums, transposed, weighted_sums
from sae_lens_auxk.ops.topk import group_size, top_k, top_k_of_batch

D_IN, K, K_AUX = 768, 32, 512


def show(name: str, function: Callable[[], Any]) -> None:
    threads = torch.get_num_threads()
    timer = Timer("function()", globals={"function": function}, num_threads=threads)
    milliseconds = timer.blocked_autorange(min_run_time=0.3).median * 1e3
    print(f"{name:50s} {milliseconds:8.2f} ms", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--batch", type=int, default=4096)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    B, n, device = args.batch, args.latents, args.device
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

    def fresh() -> Selected:  # one whose order by latent is not known yet
        return Selected.per_row(latents, n)

    selected = fresh()
    show("decoder: weighted_sums", lambda: weighted_sums(values, W_dec, selected))
    show("gradient of the activations: dots", lambda: dots(x, W_dec, selected))
    show("order by latent", lambda: fresh().by_latent)
    order, starts = selected.by_latent
    show(
        "weight gradient: embedding_bag",
        lambda: torch.nn.functional.embedding_bag(
            selected.rows[order], x, starts[:-1], per_sample_weights=values[order], mode="sum"
        ),
    )
    show("weight gradient: outer_sums", lambda: outer_sums(values, x, selected, selected.rows))
    show("W_enc's layout: torch", lambda: W_dec.T.contiguous())
    show("W_enc's layout: transposed", lambda: transposed(W_dec))

    dead = torch.arange(0, n, 2, device=device)
    h_dead, W_dead = h.index_select(1, dead), W_dec.to(half).index_select(0, dead)
    show("dead half: index_select of columns", lambda: h.index_select(1, dead))
    show("dead half: gather_columns", lambda: gather_columns(h, dead))
    show(f"dead half: torch.topk {K_AUX}", lambda: h_dead.topk(K_AUX, sorted=False))
    show(f"dead half: top_k {K_AUX}", lambda: top_k(h_dead, K_AUX))
    aux_values, positions = top_k(h_dead, K_AUX)
    pairs = Selected.per_row(dead[positions], n)
    aux_values = aux_values.flatten().float()
    show("AuxK forward, dense product", lambda: h_dead @ W_dead)
    show("AuxK forward, pairs", lambda: weighted_sums(aux_values, W_dec, pairs))
    show("AuxK gradient of activations, dense", lambda: x_half @ W_dead.T)
    show("AuxK gradient of activations, pairs", lambda: dots(x, W_dec, pairs))
    show("AuxK weight gradient, dense", lambda: h_dead.T @ x_half)
    show("AuxK weight gradient, pairs", lambda: outer_sums(aux_values, x, pairs, pairs.rows))

    with torch.enable_grad():
        parameters = [torch.nn.Parameter(W.clone()) for W in (W_enc, W_dec)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    show("clipping", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    show("Adam", torch.optim.Adam(parameters).step)


if __name__ == "__main__":
    main()

"""k-sparse probes on the SAEs of a comparison: what few latents know of a token.

    python -m studies.rivals.probes rivals/best-smollm2-15-topk

Gurnee et al. 2023 (arXiv 2305.01610), as in sae-probes (Kantamneni et al. 2025): for each property
of a token the k latents with the largest difference between the means of both classes, a logistic
regression on them, and the area under its ROC curve on other rows of the text. The rows are those
that no seed trains on. Writes probes.json beside the results: for each run the areas of
all properties, k 1 and 5.
"""

import argparse
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from sae_lens import SAE
from transformers import AutoTokenizer

from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.norms import RowFilter
from sae_lens_auxk.compare.sources import LanguageModel
from sae_lens_auxk.files import write_json

N_ROWS = 384
"""Rows of the text: those that ``compare`` holds out."""
TRAIN = 2 / 3
KS = (1, 5)
STEPS, RIDGE = 20, 1e-3

ARTICLES = {"the", "a", "an"}
PREPOSITIONS = {"of", "in", "to", "for", "with", "on", "at", "from", "by", "as", "into", "between"}
PRONOUNS = {"i", "you", "he", "she", "it", "we", "they", "this", "that", "these", "those", "them"}
VERBS = {"is", "are", "was", "were", "be", "been", "has", "have", "had", "do", "does", "did"}
MODALS = {"can", "could", "will", "would", "may", "might", "must", "should", "shall"}
JOINING = {"and", "or", "but", "if", "because", "while", "when", "then", "than", "so"}

# Of a token's text, with its space, and of the next token's.
PROPERTIES: dict[str, Callable[[str, str], bool]] = {
    "begins a word": lambda t, _: t.startswith(" "),
    "within a word": lambda t, _: t[:1].isalpha(),
    "ends a word": lambda t, n: t[-1:].isalpha() and not n[:1].isalpha(),
    "capital": lambda t, _: t.strip()[:1].isupper(),
    "all capitals": lambda t, _: len(t.strip()) > 1 and t.strip().isupper(),
    "digit": lambda t, _: t.strip().isdigit(),
    "punctuation": lambda t, _: bool(t.strip()) and all(c in string.punctuation for c in t.strip()),
    "full stop": lambda t, _: t.strip() == ".",
    "comma": lambda t, _: t.strip() == ",",
    "opens a bracket": lambda t, _: t.strip()[:1] in ("(", "["),
    "quote": lambda t, _: "'" in t or '"' in t,
    "hyphen": lambda t, _: "-" in t,
    "one character": lambda t, _: len(t.strip()) == 1,
    "long": lambda t, _: len(t.strip()) > 7,
    "-ing": lambda t, _: t.endswith("ing"),
    "-ed": lambda t, _: t.endswith("ed"),
    "-s": lambda t, _: len(t) > 3 and t.endswith("s"),
    "-ly": lambda t, _: t.endswith("ly"),
    "-tion": lambda t, _: t.endswith("tion"),
    "article": lambda t, _: t.strip().lower() in ARTICLES,
    "preposition": lambda t, _: t.strip().lower() in PREPOSITIONS,
    "pronoun": lambda t, _: t.strip().lower() in PRONOUNS,
    "auxiliary verb": lambda t, _: t.strip().lower() in VERBS,
    "modal verb": lambda t, _: t.strip().lower() in MODALS,
    "conjunction": lambda t, _: t.strip().lower() in JOINING,
    "before punctuation": lambda _, n: n[:1] in string.punctuation,
}


def auc(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """(p,) areas under the ROC curves of scores (n, p) for classes (n, p); ties count half."""
    values = []
    for score, mask in zip(scores.T, positive.T, strict=True):
        low, high = score[~mask].sort().values, score[mask]
        below = torch.searchsorted(low, high).double()
        upto = torch.searchsorted(low, high, right=True).double()
        values.append(((below + upto) / 2).mean() / len(low))
    return torch.stack(values)


def logistic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(p, k + 1) weights, the last of a constant, for features x (p, n, k) and classes y (p, n).

    Newton's method with a ridge, for all p at once.
    """
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1).double()
    y = y.double()
    w = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)
    ridge = RIDGE * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    for _ in range(STEPS):
        p = torch.sigmoid(torch.einsum("pnk,pk->pn", x, w))
        gradient = torch.einsum("pnk,pn->pk", x, p - y) / x.shape[1] + w @ ridge
        curve = torch.einsum("pnk,pn,pnj->pkj", x, p * (1 - p), x) / x.shape[1] + ridge
        w = w - torch.linalg.solve(curve, gradient)
    return w


@torch.no_grad()
def probe(acts: torch.Tensor, classes: torch.Tensor, n_train: int) -> dict[str, list[float]]:
    """The area of each property, by k, of activations (n, d_sae) and classes (n, p) bool."""
    # A probe must not depend on how large a latent's activations are.
    acts = acts / acts[:n_train].std(dim=0).clamp(min=1e-6)
    train, of_train = acts[:n_train], classes[:n_train].to(acts)
    n = of_train.sum(dim=0)
    inside = of_train.T @ train / n[:, None]
    outside = (1 - of_train).T @ train / (len(train) - n)[:, None]
    order = (inside - outside).abs().topk(max(KS), dim=1).indices
    found = {}
    for k in KS:
        chosen = acts[:, order[:, :k].T].permute(2, 0, 1).contiguous()  # (p, n, k)
        w = logistic(chosen[:, :n_train], of_train.T)
        scores = torch.einsum("pnk,pk->np", chosen[:, n_train:].double(), w[:, :-1])
        found[f"k{k}"] = auc(scores, classes[n_train:]).tolist()
    return found


@torch.no_grad()
def held_out(
    comparison: Resolved, source: LanguageModel
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Activations (n, d_in), classes (n, p) bool and the names of p properties that are frequent
    enough: 50 tokens of each class at least in both parts."""
    text = load_dataset(comparison.dataset_path or "", split="train", streaming=True)
    rows = torch.tensor([row["input_ids"] for row in text.take(N_ROWS)])
    device = comparison.device
    acts = []
    for part in rows.split(16):
        names = [source.hook_name]
        _, cache = source.model.run_with_cache(part.to(device), names_filter=names)
        acts.append(cache[source.hook_name][:, 1:-1].float().flatten(0, 1))
    tokenizer = AutoTokenizer.from_pretrained(comparison.model_name)
    texts = {int(t): tokenizer.decode([int(t)]) for t in rows.unique()}
    pairs = [(texts[a], texts[b]) for row in rows.tolist() for a, b in zip(row[1:-1], row[2:])]  # noqa: B905
    classes = torch.tensor([[has(*pair) for has in PROPERTIES.values()] for pair in pairs])
    x, classes = torch.cat(acts), classes.to(device)
    if comparison.max_norm_multiple is not None:
        keeps = RowFilter(x, comparison.max_norm_multiple).keeps(x)
        x, classes = x[keeps], classes[keeps]
    n_train = int(TRAIN * len(x))
    counts = torch.stack([part.sum(0) for part in classes.split([n_train, len(x) - n_train])])
    frequent = (counts >= 50).all(dim=0)
    names = [name for name, is_frequent in zip(PROPERTIES, frequent, strict=True) if is_frequent]
    return x, classes[:, frequent], names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    results = read_results(folder)
    comparison = resolve(Comparison(**results["comparison"]))
    source = LanguageModel(comparison)
    x, classes, names = held_out(comparison, source)
    n_train = int(TRAIN * len(x))
    found: list[dict[str, Any]] = []
    for run in results["runs"]:
        path = folder / (run["folder"] or "")
        if run["status"] != "finished" or not path.is_dir():
            continue
        sae = SAE.load_from_disk(path, device=comparison.device)
        with torch.no_grad():
            parts = (sae.encode(rows) for rows in x.split(4096))
            acts = torch.cat([p.to_dense() if p.is_sparse else p for p in parts])
        areas = probe(acts, classes, n_train)
        found.append({"case": run["case"], "seed": run["seed"], **areas})
        print(run["name"], {k: round(sum(v) / len(v), 4) for k, v in areas.items()}, flush=True)
    write_json(folder / "probes.json", {"properties": names, "n_rows": len(x), "runs": found})


if __name__ == "__main__":
    main()

"""Local folders to publish: a trained SAE, its checkpoint, a comparison."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from sae_lens import SAE, LanguageModelSAETrainingRunner
from safetensors.torch import save_file

from sae_lens_auxk import runner_config
from tests import tiny_model
from tests.helpers import build_sae
from tests.hub.server import Hub

# The smallest PNG: one pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360000000000500010d0a2db40000000049454e44ae426082"
)


def train(folder: Path, **fields: Any) -> dict[str, Path]:
    """A short run of SAELens's runner: its ``output``, and the ``checkpoint`` at half of it."""
    cfg = runner_config(
        "auxk-batchtopk",
        **{
            **tiny_model.run_fields(
                output_path=str(folder / "output"),
                checkpoint_path=str(folder / "checkpoints"),
                n_checkpoints=1,
                dataset_path="someone/tokens",
                dead_threshold_tokens=200,
                aux_variant="straight_through",
                k=4,
            ),
            **fields,
        },
    )
    torch.manual_seed(0)
    LanguageModelSAETrainingRunner(
        cfg, override_model=tiny_model.gpt2(), override_dataset=tiny_model.tokens()
    ).run()
    (checkpoint,) = (folder / "checkpoints").glob("*/*")
    return {"output": folder / "output", "checkpoint": checkpoint}


def comparison(folder: Path, n_seeds: int = 3) -> Path:
    """A comparison's folder as ``sae-lens-auxk compare`` leaves it, with made-up figures."""
    empty: dict[str, Any] = {"error": None, "sae_config": {}, "history": {}, "metrics": {}}
    empty |= {"density": None, "silent_latents": None, "peeking": None, "training_samples": 0}
    runs: list[dict[str, Any]] = []
    for seed in range(n_seeds):
        torch.manual_seed(seed)
        sae = build_sae("auxk-topk", aux_variant="auxk")
        relative = f"runs/seed-{seed}/auxk-k3"
        sae.save_inference_model(folder / relative)
        save_file({"sparsity": torch.randn(24) - 3}, folder / relative / "sparsity.safetensors")
        metrics = {"explained_variance": 0.9 + seed / 100, "l0": 3.0, "f1": None}
        run = {"name": f"auxk, seed {seed}", "case": "auxk", "architecture": "auxk-topk", "k": 3}
        runs.append(
            {**empty, **run, "seed": seed, "status": "finished", "folder": relative}
            | {"metrics": metrics, "training_samples": 400_000}
        )
    unfinished = {**runs[0], **empty, "status": "unfinished", "folder": None}
    unfinished |= {"name": "none, seed 0", "case": "none"}
    results = {
        "version": 1,
        "name": "three seeds",
        "created": "2026-11-22T01:00:00+00:00",
        "finished": False,
        "packages": {},
        "machine": "a test",
        "comparison": {"variants": ["auxk"], "seeds": list(range(n_seeds))},
        "command": "sae-lens-auxk compare --output three",
        "data": {"kind": "synthetic", "description": "1,024 known features"},
        "runs": [*runs, unfinished],
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "report.html").write_text("<html></html>", encoding="utf-8")
    (folder / "figures").mkdir()
    (folder / "figures" / "pareto.png").write_bytes(PNG)
    return folder


def same(first: SAE[Any], second: SAE[Any]) -> bool:
    x = torch.randn(64, first.cfg.d_in)
    return torch.equal(first(x), second(x)) and torch.equal(first.encode(x), second.encode(x))


def fetched(repo_id: str, sae_id: str, folder: Path) -> Path:
    """The local folder of an SAE, fetched as ``hf download`` does it."""
    snapshot_download(repo_id, allow_patterns=f"{sae_id}/*", local_dir=folder)
    return folder / sae_id


def ids(hub: Hub, repo_id: str) -> list[str]:
    """The repository's folders with a config and weights."""
    folders = {path.rpartition("/")[0] for path in hub.files(repo_id)}
    names = ("cfg.json", "sae_weights.safetensors")
    return sorted(
        folder
        for folder in folders
        if {f"{folder}/{name}" for name in names} <= {*hub.files(repo_id)}
    )

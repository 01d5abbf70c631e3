"""Where the time of a whole training run goes: the language model, the buffer, or the SAE's step.

    python -m benchmarks.whole_run --device cuda --out docs/performance/whole-run-gpt2.json
    python -m benchmarks.whole_run --device cuda --model smollm2 \
        --out docs/performance/whole-run-smollm2.json

Each run is SAELens's ``LanguageModelSAETrainingRunner``, stock or with this package's architecture,
on random tokens and a model of random weights in the shape of GPT-2 small or SmolLM2-135M: the time
depends on neither. "before" is a step that is not captured, with Adam as SAELens asks for it. A run
is made twice. The first gives tokens a second; the second waits for the device around each part and
gives the parts, of them ``captures`` by themselves. The dead window is 20 steps, so that latents
are dead in so short a run; ``dead`` is their share at its end. ``cached`` reads activations that
SAELens's ``CacheActivationsRunner`` wrote to disk. Steps before ``--warm_up`` fill the buffer and
are not counted. A run that processes share is measured by ``benchmarks.scale --whole_run``.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from datasets import Dataset
from sae_lens import (
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAETrainingRunner,
)
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.made_by import made_by
from sae_lens_auxk import runner_config
from sae_lens_auxk.files import write_json
from sae_lens_auxk.step.captured import Graph

SAES: dict[str, dict[str, Any]] = {
    "SAELens topk": {"architecture": "topk"},
    "auxk-topk, none": {"architecture": "auxk-topk", "aux_variant": "none"},
    "auxk-topk, auxk": {"architecture": "auxk-topk", "aux_variant": "auxk", "k_aux": 512},
    "auxk-topk, pursuit": {"architecture": "auxk-topk", "aux_variant": "pursuit", "k_aux": 512},
}
SAES["auxk-topk, auxk, before"] = SAES["auxk-topk, auxk"]
SAES["auxk-topk, pursuit, before"] = SAES["auxk-topk, pursuit"]
BEST = {"autocast_lm": True, "store_batch_size_prompts": 128}
STORES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "autocast_lm": {"autocast_lm": True},
    "best": BEST,
    "cached": {"use_cached_activations": True},
}
"""Settings of SAELens's activation store, which by itself reads 32 prompts at a time."""
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_name": "gpt2",
        "model_class_name": "HookedTransformer",
        "hook_name": "blocks.6.hook_resid_pre",
        "d_in": 768,
    },
    "smollm2": {
        "model_name": "HuggingFaceTB/SmolLM2-135M",
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.15",
        "d_in": 576,
    },
}


DEAD_WINDOW = 20


class Clock:
    """Seconds by part, from a step of the trainer on. Waits for the device where it is told to."""

    trainer: Any

    def __init__(self, device: str, warm_up: int, wait: bool):
        self.device, self.warm_up, self.wait = device, warm_up, wait
        self.step, self.begin, self.seconds = 0, 0.0, defaultdict[str, float](float)

    def now(self, wait: bool) -> float:
        if wait and self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            begin = self.now(self.wait)
            result = function(*args, **keywords)
            self.seconds[name] += self.now(self.wait) - begin
            return result

        return call

    def counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            if self.step == self.warm_up:
                self.begin = self.now(wait=True)
                self.seconds.clear()
            self.step += 1
            self.trainer = args[0]
            return step(*args, **keywords)

        return call


def random_gpt2(device: str) -> HookedTransformer:
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=12,
            d_model=768,
            n_ctx=1024,
            n_heads=12,
            d_head=64,
            d_vocab=50257,
            act_fn="gelu_new",
            model_name="gpt2",
            device=device,
        )
    )


def random_smollm2(device: str) -> HookedProxyLM:
    cfg = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return HookedProxyLM(LlamaForCausalLM(cfg).to(device), cast(Any, None))


def fields_of_run(args: argparse.Namespace, n_steps: int) -> dict[str, Any]:
    return {
        **MODELS[args.model],
        "d_sae": args.d_sae,
        "k": args.k,
        "dead_feature_window": DEAD_WINDOW,
        "dataset_path": "random tokens",
        "context_size": args.context_size,
        "streaming": False,
        "prepend_bos": False,
        "n_batches_in_buffer": args.n_batches_in_buffer,
        "training_tokens": n_steps * args.batch,
        "train_batch_size_tokens": args.batch,
        "device": args.device,
        "autocast": args.device.startswith("cuda"),
        "checkpoint_path": None,
        "log_to_wandb": False,
        "verbose": False,
    }


def run(
    args: argparse.Namespace, model: Any, tokens: Dataset, fields: dict[str, Any], wait: bool
) -> dict[str, float]:
    """Milliseconds a step: ``all``, and with ``wait`` of each part."""
    n_steps = args.warm_up + args.steps
    cfg = runner_config(**{**fields_of_run(args, n_steps), **fields})
    runner = args.runner(cfg, tokens, model)
    clock = Clock(args.device, args.warm_up, wait)
    timed = {
        "model": (ActivationsStore, "get_activations"),
        "data": (ActivationsStore, "__next__"),
        "sae": (SAETrainer, "step"),
        "captures": (Graph, "__init__"),
    }
    with ExitStack() as patches:
        for name, (owner, method) in timed.items():
            function = clock.timed(name, getattr(owner, method))
            if name == "sae":
                function = clock.counted(function)
            patches.enter_context(patch.object(owner, method, function))
        runner.run()
        total = clock.now(wait=True) - clock.begin
    # The batch of the first step that is counted came before the clock began.
    if not wait:
        dead = clock.trainer.n_forward_passes_since_fired >= DEAD_WINDOW
        return {"all": 1e3 * total / args.steps, "dead": float(dead.float().mean())}
    seconds = clock.seconds
    parts = {
        "model": seconds["model"],
        "buffer": seconds["data"] - seconds["model"],
        "SAE step": seconds["sae"] - seconds["captures"],
        "captures": seconds["captures"],
        "rest": total - seconds["data"] - seconds["sae"],
    }
    return {name: 1e3 * value / args.steps for name, value in parts.items()}


def write_cache(args: argparse.Namespace, model: Any, tokens: Dataset, folder: str) -> None:
    n_tokens = len(tokens) * args.context_size
    cfg = CacheActivationsRunnerConfig(
        dataset_path="random tokens",
        **MODELS[args.model],
        model_batch_size=32,
        training_tokens=n_tokens,
        context_size=args.context_size,
        new_cached_activations_path=folder,
        shuffle=False,
        buffer_size_gb=min(
            1.0, 4e-9 * MODELS[args.model]["d_in"] * n_tokens
        ),  # it fills whole buffers only
        device=args.device,
        prepend_bos=False,
        streaming=False,
    )
    with patch("sae_lens.cache_activations_runner.load_model", return_value=model):
        CacheActivationsRunner(cfg, tokens).run()


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model = {"gpt2": random_gpt2, "smollm2": random_smollm2}[args.model](args.device)
    n_rows = (args.warm_up + args.steps) * args.batch // args.context_size
    n_rows += args.n_batches_in_buffer + 128
    rows = torch.randint(0, args.vocabulary, (n_rows, args.context_size))
    tokens = Dataset.from_dict({"tokens": rows.tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as cache:
        for store in args.stores:
            where = {**STORES[store]}
            if store == "cached":
                write_cache(args, model, tokens, cache)
                where["cached_activations_path"] = cache
            for sae in args.saes:
                fields = {**SAES[sae], **where}
                for switch in ("GRAPH", "FUSED"):
                    os.environ[f"SAE_LENS_AUXK_{switch}"] = str(int("before" not in sae))
                whole = run(args, model, tokens, fields, wait=False)
                parts = run(args, model, tokens, fields, wait=True)
                yield {
                    "store": store,
                    "sae": sae,
                    "tokens_per_second": 1e3 * args.batch / whole["all"],
                    "dead": whole["dead"],
                    "ms": {"all": whole["all"], **parts},
                }


def print_table(results: dict[str, Any]) -> None:
    parts = [*results["runs"][0]["ms"]]
    print(f"| store | SAE | tokens a second | {' | '.join(['ms a step', *parts[1:]])} |")
    print("|---" * (3 + len(parts)) + "|")
    for run_ in results["runs"]:
        ms = " | ".join(f"{value:.1f}" for value in run_["ms"].values())
        print(f"| {run_['store']} | {run_['sae']} | {run_['tokens_per_second']:,.0f} | {ms} |")


def parser_of_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file of the results")
    parser.add_argument("--table", type=Path, default=None, help="print such a file, run nothing")
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--vocabulary", type=int, default=40_000)
    parser.add_argument("--d_sae", type=int, default=24_576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--context_size", type=int, default=256)
    parser.add_argument("--n_batches_in_buffer", type=int, default=256)
    parser.add_argument("--warm_up", type=int, default=64)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--saes", nargs="+", choices=SAES, default=list(SAES))
    return parser


def main() -> None:
    args = parser_of_flags().parse_args()
    if args.table is not None:
        print_table(json.loads(args.table.read_text()))
        return
    warnings.simplefilter("ignore")
    settings = {key: str(value) for key, value in vars(args).items()}
    results: list[dict[str, Any]] = []
    args.runner = LanguageModelSAETrainingRunner
    for result in measure(args):
        results.append(result)
        print(json.dumps(result), flush=True)
        if args.out is not None:
            write_json(args.out, {**made_by(args.device), "settings": settings, "runs": results})


if __name__ == "__main__":
    main()

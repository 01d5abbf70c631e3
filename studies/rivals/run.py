"""Each rival at its best learning rate: prevention beside auxiliary losses, on two model families.

    python -m studies.rivals.run rates smollm2 15 topk    # one seed at three learning rates
    python -m studies.rivals.run best smollm2 15 topk     # three others, each arm at its best rate
    python -m studies.rivals.run slow gemma3 12 topk      # the same, all arms at 3e-4
    python -m studies.rivals.run slow smollm2 15 jumprelu --l0_coefficient 0.1 --rates 1e-3

Each call is one comparison, in a folder of ``--output`` named after its arguments, and may be
repeated, or made by several processes at once, each of which takes a seed. Seeds in another folder
cannot find each other's latents. The rate of an arm is the one with the highest explained variance,
of the mean over both layers of SmolLM2, for TopK and BatchTopK separately: studies.rivals.rates
collects them, and no rate is chosen on Gemma 3. Matryoshka takes BatchTopK's. Synthetic models have
no layers (0) and rates of their own. README.md says how to get the models and the text.

SAELens's loss is SAELens's own class; its unit rows are computed by this package's step, which ends
with SAELens's weights (tests/saelens/test_swapped_class.py).
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.made_by import commit
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison
from sae_lens_auxk.compare.run import run_comparison
from studies.rivals import candidates  # noqa: F401  registers its losses
from studies.rivals.rates import read_rates

RATES = (3e-4, 1e-3, 2e-3)
SYNTHETIC = {
    "synthsaebench": Path(__file__).with_name("synthsaebench.yaml"),
    "synthetic": Path(__file__).parents[1] / "pursuit" / "heldout.yaml",  # a small one, for a CPU
}
MODELS = ("smollm2", "gemma3", *SYNTHETIC)
USUAL = (10.0, 9216, 4096)
"""Millions of tokens, latents and rows of a batch."""
SIZES = {"synthsaebench": (10.0, 4096, 4096), "synthetic": (0.6, 768, 512)}
FAMILIES = ("topk", "batchtopk", "matryoshka-batchtopk", "jumprelu")
SPECIAL = {"smollm2": [0], "gemma3": [2]}
"""The first token of each row, whose norm is hundreds of times the others'."""
DEAD_AFTER = 1_000_000
JUMPRELU: dict[str, Any] = {
    "jumprelu_sparsity_loss_mode": "quadratic",
    "target_l0": 32.0,
    "jumprelu_bandwidth": 2.0,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_ste_to_input": True,
}
"""The penalty is Gemma Scope 2's, which aims at one L0 in every arm; the gradients are Anthropic's
(Circuits Updates, January 2025), and so is a coefficient that rises all the time."""
UNIT_ROWS: dict[str, Any] = {"decoder_init_norm": 1.0}
TRIED: dict[str, dict[str, Any]] = {
    "pursuit, only dead": {"aux_variant": "pursuit_dead"},
    "pursuit, gated": {"aux_variant": "pursuit_gated"},
    "pursuit, exchange": {"aux_variant": "pursuit_exchange"},
    "unit rows, pursuit": {"aux_variant": "pursuit", **UNIT_ROWS},
    "unit rows, mean, pursuit": {"aux_variant": "pursuit", **UNIT_ROWS, "b_dec_init": "mean"},
    "unit rows, mean, auxk": {"aux_variant": "auxk", **UNIT_ROWS, "b_dec_init": "mean"},
}
"""Changes to pursuit, and losses on top of unit rows. They run only if ``--arms`` names them, at
pursuit's rate where they have none of their own."""


def arms(family: str) -> dict[str, dict[str, Any]]:
    """The fields of each, by name."""
    own: dict[str, dict[str, Any]] = {
        "unit rows, no loss": {"aux_variant": "none", **UNIT_ROWS},
        "unit rows, mean, no loss": {"aux_variant": "none", **UNIT_ROWS, "b_dec_init": "mean"},
        "auxk": {"aux_variant": "auxk"},
        "resampling": {"aux_variant": "none", "resample_every_steps": 500},
        "pursuit": {"aux_variant": "pursuit"},
        "pursuit, mean": {"aux_variant": "pursuit", "b_dec_init": "mean"},
        **TRIED,
    }
    own = {name: {"architecture": f"auxk-{family}", **row} for name, row in own.items()}
    saelens: dict[str, Any] = {"architecture": family.replace("-", "_")}
    if family == "jumprelu":  # SAELens has a loss against dead latents there, but off
        saelens["pre_act_loss_coefficient"] = 3e-6
    return {"SAELens": saelens, **own}


def folder_of(args: argparse.Namespace) -> Path:
    parts = [args.stage, args.model, str(args.layer), args.family]
    if args.family == "jumprelu":
        parts.append(f"{args.l0_coefficient:g}")
    tokens, d_sae, _ = SIZES.get(args.model, USUAL)
    if args.d_sae != d_sae:
        parts.append(str(args.d_sae))
    if args.tokens != tokens:
        parts.append(f"{args.tokens:g}m")
    if args.stage == "slow" and args.rates[0] != RATES[0]:
        parts.append(f"{args.rates[0]:g}")
    return args.output / "-".join(parts)


def best_rates(model: str, family: str) -> dict[str, float]:
    """The learning rate of each arm, as the module says."""
    chosen_on = model if model in SYNTHETIC else "smollm2"
    layers = [
        arms
        for name, arms in read_rates().items()
        if name.split("-")[0] == chosen_on and name.split("-")[2:] == [family.split("-")[-1]]
    ]
    if not layers:
        sys.exit(f"{chosen_on}, {family}: no rates yet. Run the stage rates, then .rates.")
    return {
        arm: float(max(rates, key=lambda lr, arm=arm: np.mean([of[arm][lr] for of in layers])))
        for arm, rates in layers[0].items()
    }


def cases_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    own = arms(args.family)
    chosen = args.arms or [name for name in own if name not in TRIED]
    if unknown := [name for name in chosen if name not in own]:
        sys.exit(f"--arms {', '.join(unknown)}: must be of {', '.join(own)}.")
    own = {name: own[name] for name in own if name in chosen}
    if args.stage == "rates":
        return [
            {"name": f"{name}, {lr:g}", "lr": lr, **row}
            for name, row in own.items()
            for lr in args.rates
        ]
    if args.stage == "best":
        rates = best_rates(args.model, args.family)
        if "pursuit" in rates:
            rates = dict.fromkeys(TRIED, rates["pursuit"]) | rates
    else:
        rates = dict.fromkeys(own, args.rates[0])
    if missing := [name for name in own if name not in rates]:
        sys.exit(
            f"{', '.join(missing)}: no rates yet. Run the stage rates, then studies.rivals.rates."
        )
    return [{"name": name, "lr": rates[name], **row} for name, row in own.items()]


def comparison_of(args: argparse.Namespace) -> Comparison:
    n_tokens = int(1e6 * args.tokens)
    shared: dict[str, Any] = {
        "architecture": [f"auxk-{args.family}"],
        "preset": [],
        "d_sae": args.d_sae,
        "training_samples": n_tokens,
        "batch_size": args.batch_size,
        "dead_after": min(DEAD_AFTER, n_tokens // 10),
        "eval_samples": min(65_536, n_tokens // 10),
        "seeds": [0] if args.stage == "rates" else args.seeds,
        "device": args.device,
        "autocast": args.device.startswith("cuda"),
        "cases": cases_of(args),
    }
    if args.model in SYNTHETIC:
        given = yaml.safe_load(SYNTHETIC[args.model].read_text(encoding="utf-8"))
        names = ("k", "n_features", "d_in", "synthetic_model")
        return Comparison(**shared, **{name: given[name] for name in names})
    sae: dict[str, Any] = {"normalize_activations": "expected_average_only_in"}
    if args.family == "jumprelu":
        n_steps = n_tokens // args.batch_size
        sae |= {**JUMPRELU, "l0_coefficient": args.l0_coefficient, "l0_warm_up_steps": n_steps}
    prompts = 16 if args.model == "smollm2" else 4  # of whose logits there are five times as many
    return Comparison(
        **shared,
        model_name=str(args.data / args.model / "model"),
        model_class_name="AutoModelForCausalLM",
        dataset_path=str(args.data / args.model / "text"),
        hook_name=f"model.layers.{args.layer}",
        k=[32],
        max_norm_multiple=10.0,
        context_size=256,
        effect=args.effect,
        sae=sae,
        language_model={
            "streaming": False,
            "prepend_bos": False,
            "exclude_special_tokens": SPECIAL[args.model],
            "store_batch_size_prompts": 64,
            "n_batches_in_buffer": 1024,
            "n_eval_batches": 2 if args.stage == "rates" else 128 // prompts,
            "eval_batch_size_prompts": prompts,
            "model_from_pretrained_kwargs": {"dtype": "bfloat16"},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("rates", "best", "slow"))
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("layer", type=int)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument(
        "--data", type=Path, default=Path(), help="the folder of the models' folders"
    )
    parser.add_argument("--output", type=Path, default=Path("rivals"))
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=RATES,
        help="learning rates of the stage rates; slow has the first",
    )
    parser.add_argument("--tokens", type=float, help="millions")
    parser.add_argument("--l0_coefficient", type=float, default=0.1, help="of jumprelu")
    parser.add_argument("--d_sae", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", help="only these; studies/merge.py merges results")
    parser.add_argument("--effect", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    usual = SIZES.get(args.model, USUAL)
    for name, value in zip(("tokens", "d_sae", "batch_size"), usual, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.family == "jumprelu" and args.model in SYNTHETIC:
        sys.exit(f"{args.model} jumprelu: only on a language model. studies/jumprelu has another.")
    folder = folder_of(args)
    comparison = resolve(comparison_of(args))
    command = f"python -m studies.rivals.run {shlex.join(sys.argv[1:])}  # commit {commit()}"
    print(run_comparison(comparison, folder, command, say=print))


if __name__ == "__main__":
    main()

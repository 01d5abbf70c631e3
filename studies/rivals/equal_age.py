"""The same latents replaced and trained on with each loss, so that their age is nearly equal.

    python -m studies.rivals.equal_age rivals/best-smollm2-15-topk    # --seeds 1 in each process

Equal: every arm goes on from the same SAE, in which the same rare latents are replaced by random
ones, and trains on the same text in the same order. Replaced latents are too weak to fire and count
as dead from the first step; ``ever_fired`` of "none" says how many revive by themselves. Not equal:
the learning rate (each arm's best), when a latent revives, and resampling, which replaces latents
again. Replaced latents are measured beside as many rare ones that were left alone, and found again
in what the comparison trained with other seeds. Writes equal_age-<seed>.json beside the results.
"""

import argparse
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE

from benchmarks.made_by import commit
from sae_lens_auxk.compare.cases import cases_of
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.effect import effects_of
from sae_lens_auxk.compare.files import EFFECTS_FILENAME, read_results
from sae_lens_auxk.compare.latents import ROWS_PER_CHUNK, count_firings
from sae_lens_auxk.compare.measure import reconstruction
from sae_lens_auxk.compare.reproducibility import alive_latents, best_cosines
from sae_lens_auxk.compare.schema import FOUND_AGAIN, Run
from sae_lens_auxk.compare.sources import Pass, Source, source_of
from sae_lens_auxk.compare.train import LockstepTrainer, build_sae
from sae_lens_auxk.files import write_json
from sae_lens_auxk.saelens.checkpoints import open_sae
from sae_lens_auxk.step.dead import Counts
from studies.rivals.run import arms, best_rates

ARMS = ("none", "SAELens", "auxk", "resampling", "pursuit")
DEAD_AFTER = 500_000
RARE = 0.01
"""Latents are drawn from those that fire on a smaller share of held-out rows: no dense ones."""
STRENGTH = 0.25
"""A replaced latent's largest h on held-out rows, relative to what it would need to fire there. At
0.5 a quarter of them fired with no loss in a small trial, since the SAE changes; at 0.25 none."""
Tensors = dict[str, torch.Tensor]


def continued(before: Resolved, case: str, n_tokens: int, device: str) -> Resolved:
    """The comparison with the arms of this script and their training."""
    architecture = before.architecture[0]
    family = architecture.removeprefix("auxk-")
    rates = best_rates(Path(before.model_name or "").parent.name, family)
    rates["none"] = rates[case]  # at which the SAE was trained so far
    rows = {**arms(family), "none": {"architecture": architecture, "aux_variant": "none"}}
    return replace(
        before,
        cases=[{"name": arm, "lr": rates[arm], **rows[arm]} for arm in ARMS],
        training_samples=n_tokens,
        dead_after=min(DEAD_AFTER, n_tokens // 10),
        device=device,
        autocast=device.startswith("cuda"),
    )


def begin_from(sae: TrainingSAE[Any], saved: Tensors, scale: float) -> None:
    """Give ``sae``, which is trained on activations times ``scale``, the weights of a saved SAE.

    The decoder rows of that have length 1, so its activations grow with its input.
    """
    weights = saved | {name: scale * saved[name] for name in ("b_dec", "b_enc")}
    if "threshold" in weights:  # of BatchTopK
        weights["topk_threshold"] = scale * weights.pop("threshold")[0]
    sae.load_state_dict(weights, strict=False)  # without the counts, which begin at 0


@torch.no_grad()
def weak_encoder(sae: SAE[Any], x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(d_in, n): the directions ``rows`` (n, d_in), as long as STRENGTH says.

    Firing takes more than the row's smallest activation (TopK) or the threshold (BatchTopK).
    """
    most, threshold = rows.new_zeros(len(rows)), sae.state_dict().get("threshold")
    for part in x.split(ROWS_PER_CHUNK):
        acts = sae.encode(part)
        smallest = acts.where(acts > 0, torch.inf).amin(dim=1, keepdim=True)
        needed = smallest if threshold is None else threshold[0]
        most = most.maximum((sae.process_sae_in(part) @ rows.T / needed).amax(dim=0))
    return STRENGTH * rows.T / most


def train(
    saes: dict[str, TrainingSAE[Any]], data: Pass, own: Resolved, scale: float, which: torch.Tensor
) -> Tensors:
    """Train the arms. For each: after how many tokens the latents first fired, 0 for never."""
    which = which.to(own.device)
    first = {arm: torch.zeros_like(which) for arm in saes}

    def note(_: int) -> None:
        for arm, log in trainer.logs.items():
            fires = log.tokens_since_fired[which] == 0
            first[arm].masked_fill_(fires & (first[arm] == 0), log.n_samples)

    def fail(_: str, error: Exception) -> None:
        raise error

    rates = {case.name: case.lr or own.lr for case in cases_of(own)}
    trainer = LockstepTrainer(
        data.trainer_config, saes, data.hook_name, data.batches(), own.dead_after, rates, note, fail
    )
    for of_arm in trainer.trainers.values():
        of_arm.activation_scaler.scaling_factor = scale  # before fit() estimates another
        of_arm.n_forward_passes_since_fired[which] = own.dead_feature_window + 1
        if isinstance(of_arm.sae, Counts):  # SAELens's class counts above
            of_arm.sae.tokens_since_fired[which] = own.dead_after
    trainer.fit()
    return first


def run_seed(
    args: argparse.Namespace, own: Resolved, source: Source, runs: list[Run], seed: int
) -> None:
    """Train and measure the arms of a seed; its file is written again after each measurement."""
    n, n_rows = args.n_latents, own.batch_size
    paths = {run["seed"]: args.folder / (run["folder"] or "") for run in runs}
    lives = [alive_latents(run, args.folder, own.device) for run in runs if run["seed"] != seed]
    configs = {case.name: case.sae_config(own, source.d_in) for case in cases_of(own)}
    saes = {arm: build_sae(config, seed) for arm, config in configs.items()}
    data = source.open(seed, saes)
    x = data.held_out().to(own.device)
    scale = source.d_in**0.5 / x.float().norm(dim=-1).mean().item()  # as SAELens estimates it
    base = open_sae(paths[seed], own.device).eval()
    generator = torch.Generator().manual_seed(seed)
    shares = count_firings(base, x).cpu() / len(x)
    rare = ((shares > 0) & (shares < RARE)).nonzero().flatten()
    if len(rare) < 2 * n:
        sys.exit(f"--n_latents {n}: of {len(rare)} that fire rarely, as many again are left alone.")
    rare = rare[torch.randperm(len(rare), generator=generator)]
    groups = {"replaced": rare[:n], "untouched": rare[n : 2 * n]}

    @torch.no_grad()
    def measure(name: str, sae: SAE[Any]) -> dict[str, Any]:
        metrics, rates = reconstruction(sae, x, n_rows)
        others = [of.decoder for of in lives if of is not None]
        best = torch.stack([best_cosines(sae.W_dec.float(), other)[0] for other in others]).cpu()
        numbers: dict[str, Any] = {"explained_variance": metrics["explained_variance"]}
        for group, latents in groups.items():
            fire = latents[rates.cpu()[latents] > 0]
            numbers[group] = {"alive": len(fire) / n}
            for part, of in (("", latents), ("_of_alive", fire)):
                found = (best[:, of] > FOUND_AGAIN).float().mean().item()
                numbers[group][f"found_again{part}"] = found
                numbers[group][f"mean_best_cosine{part}"] = best[:, of].mean().item()
        print(f"seed {seed}, {name}:", numbers, flush=True)
        return numbers

    command = f"python -m studies.rivals.equal_age {shlex.join(sys.argv[1:])}  # commit {commit()}"
    content: dict[str, Any] = {"command": command, "start": {"saved": measure("saved", base)}}
    content |= {"arms": {}, "comparison": own.to_dict()}
    weights: Tensors = base.state_dict()  # what is changed here is changed in base
    weights["b_enc"][groups["replaced"]] = -1e9
    content["start"]["removed"] = measure("removed", base)
    rows = torch.randn(n, source.d_in, generator=generator).to(base.W_dec)
    rows = torch.nn.functional.normalize(rows, dim=-1)
    weights["W_dec"][groups["replaced"]] = rows
    weights["W_enc"][:, groups["replaced"]] = weak_encoder(base, x, rows)
    weights["b_enc"][groups["replaced"]] = 0.0

    with tempfile.TemporaryDirectory() as temporary:
        of_arm = {arm: Path(temporary) / arm for arm in ("replaced", *saes)}

        def reopened(arm: str, sae: TrainingSAE[Any]) -> SAE[Any]:
            sae.save_inference_model(of_arm[arm])
            return open_sae(of_arm[arm], own.device).eval()

        start = build_sae(configs["none"], seed)
        for sae in (start, *saes.values()):
            begin_from(sae, weights, scale)
        start.fold_activation_norm_scaling_factor(scale)
        content["start"]["replaced"] = measure("replaced", reopened("replaced", start))
        first = train(saes, data, own, scale, groups["replaced"])
        prompts = None if args.no_effect else data.prompts()
        for arm, trained in saes.items():
            sae = reopened(arm, trained)
            content["arms"][arm] = numbers = measure(arm, sae)
            fired = first[arm][first[arm] > 0].float()
            numbers |= {"ever_fired": len(fired) / n, "tokens_to_first": fired.median().item()}
            write_json(args.folder / f"equal_age-{seed}.json", content)
            if prompts is not None:
                pair = {"revived": groups["replaced"], "never_died": groups["untouched"]}
                at, file = prompts.rows.to(own.device), of_arm[arm] / EFFECTS_FILENAME
                numbers["effect"] = effects_of(sae, at, pair, prompts, file)
                print(f"seed {seed}, {arm}:", numbers["effect"], flush=True)
                write_json(args.folder / f"equal_age-{seed}.json", content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a finished comparison of studies.rivals.run")
    parser.add_argument("--case", default="auxk", help="the SAEs that training goes on from")
    parser.add_argument("--tokens", type=float, default=5, help="millions")
    parser.add_argument("--n_latents", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no_effect", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    results = read_results(args.folder)
    runs = [r for r in results["runs"] if r["case"] == args.case and r["status"] == "finished"]
    before = resolve(Comparison(**results["comparison"]))
    own = continued(before, args.case, int(1e6 * args.tokens), args.device)
    source = source_of(own)
    for seed in args.seeds:
        run_seed(args, own, source, runs, seed)


if __name__ == "__main__":
    main()

"""Resume runs with other fields, and count.

Of a checkpoint of a random architecture, of this package or of SAELens, a run with one to three
other fields is started. It must be refused, by the config or by naming nothing but changed fields,
or go on with weights that compute exactly what they did, on the same activations, to its end.
"""

import re
import warnings
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens import logger as sae_lens_logger
from sae_lens.registry import get_sae_training_class
from typing_extensions import override

from sae_lens_auxk import runner_config
from tests import tiny_model
from tests.fuzz import LENGTH, some_random
from tests.fuzz.test_configs import NORMALIZATIONS, RIGHT
from tests.helpers import ARCHITECTURES, STOCK

SAME_ACTIVATIONS = ("hook_name", "hook_head_index", "normalize_activations")
N_STEPS = {"training_tokens": [20 * 64, 11 * 64, 12 * 64, 40 * 64], "lr": [1e-3, 1e-2, 0.1]}
OTHER: dict[str, list[Any]] = {
    **N_STEPS,
    **{name: RIGHT[name] for name in ("aux_variant", "aux_bias", "dead_criterion", "b_dec_init")},
    **{name: RIGHT[name] for name in ("aux_loss_coefficient", "k_aux", "dead_threshold_tokens")},
    **{name: RIGHT[name] for name in ("aux_warm_up_steps", "resample_every_steps", "aux_relu")},
    "aux_decay_start_step": [None, 3, 15],
    "aux_batch_fraction": [1.0, 0.5],
    "d_in": [16, 8],
    "d_sae": [48, 24, 96],
    "k": [4, 4.0, 2, 4.5],
    "dtype": ["float32", "float64", "bfloat16"],
    "normalize_activations": [*NORMALIZATIONS, "covariance_whitening"],
    "matryoshka_widths": [[12], [12, 48], [24, 48]],
    "decoder_init_norm": [0.1, 0.5, None],
    **{name: [True, False] for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm")},
    "hook_name": ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"],
    "hook_head_index": [None, 0],
    "model_name": ["tiny", "elsewhere/tiny"],
    "train_batch_size_tokens": [64, 32],
    "feature_sampling_window": [1, 7, 2000],
    "dead_feature_window": [1, 1000],
    "seed": [42, 1],
    "n_checkpoints": [0, 2],
}
X = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))


class Noting(LanguageModelSAETrainingRunner):
    """SAELens's runner; what its SAE computes when the training begins."""

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        self.began_at = computed(self.sae)
        return super().run_trainer_with_interruption_handling(trainer)


@torch.no_grad()
def computed(sae: TrainingSAE[Any]) -> torch.Tensor:
    acts = sae.encode(X.to(sae.dtype))
    return torch.cat([acts, sae.decode(acts)], dim=-1)


def given(architecture: str, normalization: str) -> dict[str, Any]:
    own: dict[str, Any] = {"normalize_activations": normalization, "n_batches_for_norm_estimate": 2}
    if "topk" in architecture:
        own["k"] = 4
    if "matryoshka" in architecture:
        own["matryoshka_widths"] = [12, 48]
    return tiny_model.run_fields(**own)


def attack(rng: Random, folder: Path, checkpoint: Any) -> str:
    architecture = rng.choice(ARCHITECTURES)
    config_class = get_sae_training_class(architecture)[1]
    normalization = rng.choice(("none", *NORMALIZATIONS))
    if normalization in config_class.unsupported_normalizations:
        normalization = "none"
    source = rng.choice((architecture, STOCK[architecture]))
    if normalization == "layer_norm":  # in which SAELens's own loss fails
        source = architecture
    path, there = checkpoint(source, normalization)
    base = {"dead_threshold_tokens": 200, **given(architecture, normalization)}
    known = {field.name for field in fields(config_class)} | {*base} | {"n_checkpoints", "seed"}
    known |= {"hook_head_index", "feature_sampling_window", "dead_feature_window"}
    names = rng.sample(sorted({*OTHER} & known), rng.choice((1, 1, 2, 3)))
    changed = {name: rng.choice(OTHER[name]) for name in names}
    here = rng.choice((*[architecture] * 5, *ARCHITECTURES))
    if here != architecture:
        base = {**base, **given(here, normalization)}
        changed = {"architecture": here}
    case = f"{source} {normalization}: {changed}"
    run = {**base, **(changed if here == architecture else {}), "resume_from_checkpoint": path}
    try:
        cfg = runner_config(here, **run | {"checkpoint_path": str(folder / "checkpoints")})
    except (ValueError, TypeError):
        return "refused by the config"
    try:
        runner = Noting(cfg, tiny_model.tokens(), tiny_model.gpt2())
    except ValueError as error:
        named = {*re.findall(r"(\w+)=\S+(?: \S+\])? must be", str(error))}
        if " is of another SAE: " not in str(error) or not named or named - {*changed}:
            return f"{case}: {error}"
        return "refused by name"
    same = all(changed.get(n, base.get(n)) == base.get(n) for n in SAME_ACTIVATIONS)
    try:
        trained = runner.run()
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"
    if not same or not torch.equal(runner.began_at, there):
        return f"{case}: computes something else"
    finite = all(parameter.isfinite().all() for parameter in trained.parameters())
    return "resumed" if finite else f"{case}: not finite"


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_is_refused_or_computes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae_lens_logger.setLevel("CRITICAL")

    @cache
    def checkpoint(architecture: str, normalization: str) -> tuple[str, torch.Tensor]:
        folder = tmp_path / f"{architecture} {normalization}"
        more = {"n_checkpoints": 1, "checkpoint_path": str(folder)}
        tiny_model.run(runner_config(architecture, **given(architecture, normalization) | more))
        path = next(folder.glob("*/*"))
        return str(path), computed(TrainingSAE.load_from_disk(path))

    rng = some_random()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = Counter(attack(rng, tmp_path, checkpoint) for _ in range(20 * LENGTH))
    with capsys.disabled():
        print(f"\n{counts.total()} resumes; {dict(counts)}")
    assert {*counts} == {"refused by the config", "refused by name", "resumed"}

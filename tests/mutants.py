"""Mutation testing: do the tests notice faults in the package?

Each mutant replaces one snippet of the package's source, wherever it stands, by a realistic fault:
a wrong sign, a missing detach, a comparison that is off by one. The runner applies one at a time to
a copy of the tree, runs the tests of its area and reports whether one of them failed ("caught") or
none did ("survived"). First it runs the same tests on the unchanged tree, where they must pass.

    python tests/mutants.py --check            are all snippets in exactly one place? (no tests)
    python tests/mutants.py -j 2               all mutants, two at once
    python tests/mutants.py --only losses --only put_in_wrong_dim
    python tests/mutants.py --output results.json

Run it in the environment of the tests, on Linux: it forks, so that SAELens is imported only once.
The exit status is 1 if a mutant survived that is not in KNOWN_SURVIVORS, 2 if something is wrong
with the mutants or the unchanged tree. A timeout counts as caught.

After moving code, correct the snippets that --check names and the paths in AREA_TESTS.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# As in conftest.py, before anything imports torch.
os.environ.update(
    HF_HUB_OFFLINE="1",
    WANDB_MODE="disabled",
    TQDM_DISABLE="1",
    OMP_NUM_THREADS="1",
    SPARSIFY_DISABLE_TRITON="1",
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sae_lens_auxk"
PYTEST = ["-x", "-q", "-p", "no:cacheprovider"]
SLOWEST = 8
"""A mutant may take this many times as long as the unchanged tree (and MIN_TIMEOUT_S)."""
MIN_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        area: whose tests should notice it.
        name: unique.
        old: source that is in exactly one place of the package.
        new: what is put there instead.
        tests: pytest arguments instead of the area's.
    """

    area: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    @property
    def pytest_args(self) -> tuple[str, ...]:
        return self.tests or AREA_TESTS[self.area]


# The fastest first, and those that are most likely to fail.
AREA_TESTS: dict[str, tuple[str, ...]] = {
    "losses": (
        "tests/losses/test_aux_losses.py",
        "tests/losses/test_gradient_isolation.py",
        "tests/losses/test_own_losses.py",
        "tests/step/test_batch_fraction.py",
        "-k",
        "not entry_point and not imports_modules and not mean_over_the_samples",
    ),
    "step": (
        "tests/step/test_dead_latents.py",
        "tests/step/test_resampling.py",
        "tests/losses/test_aux_losses.py",
        "tests/step/test_step_surroundings.py",
        "tests/step/test_batch_fraction.py",
        "tests/step/test_finite_rows.py",
        "tests/test_architectures.py",
        "tests/step/test_training_runs.py",
        "-k",
        "not mean_over_the_samples and not cannot_be_imported and not compiled",
    ),
    "ops": (
        "tests/ops/test_ops.py",
        "tests/losses/test_aux_losses.py",
        "tests/step/test_step_surroundings.py",
        "tests/losses/test_gradient_isolation.py",
        "tests/test_architectures.py",
        "-k",
        "not interpreter and not without_triton and not cannot_be_imported",
    ),
    "sharded": (
        "tests/sharded/test_latents.py",
        "tests/sharded/test_files.py",
        "tests/sharded/test_step.py",
        "tests/sharded/test_training.py",
        "-k",
        "not 4 and not float32 and (not 60_steps or topk-2)",
    ),
    "compare": (
        "tests/compare/test_measure.py",
        "tests/compare/test_latents.py",
        "tests/compare/test_peeking.py",
        "tests/compare/test_split.py",
        "tests/compare/test_reproducibility.py",
        "tests/compare/test_config.py",
        "tests/compare/test_train.py",
        "tests/compare/test_files.py",
        "tests/compare/test_run.py",
        "-k",
        "not dead_process and not planted_correctors",
    ),
    "hub": (
        "tests/hub/test_upload_conflicts.py",
        "tests/hub/test_upload.py",
        "-k",
        "not without_the_plugin and not large_file",
    ),
    "saelens": (
        "tests/step/test_run.py",
        "tests/test_config.py",
        "tests/saelens/test_runner_config.py",
        "tests/saelens/test_checkpoints.py",
        "tests/saelens/test_names.py",
        "tests/saelens/test_pretrained.py",
        "tests/step/test_training_runs.py",
        "-k",
        "not compiled",
    ),
}

RESAMPLING_WHERE_SHARED = ("tests/sharded/test_training.py", "-k", "60_steps and topk-2")
RESAMPLING_RUNS = ("tests/step/test_resampling_runs.py", "-k", "not compiled")
HUB_CARD = ("tests/hub/test_model_card.py",)
HUB_PRIVATE = ("tests/hub/test_private.py", "-k", "not real_report")
SHARED_COMMAND = ("tests/sharded/test_command.py", "-k", "d_sae")
COMPARE_LANGUAGE_MODEL = ("tests/compare/test_language_model.py",)
COMPARE_COMMAND = ("tests/cli/test_compare.py",)
COMPARE_EFFECT = ("tests/compare/test_effect.py",)
COMPARE_NORMS = ("tests/compare/test_norms.py",)
COMPARE_REPORT = ("tests/compare/test_report.py",)
COMPARE_SEEDS = ("tests/compare/test_seeds.py",)
EVALUATION = ("tests/step/test_evaluation.py",)
OWN_METHODS = ("tests/step/test_own_methods.py",)
B_DEC = ("tests/step/test_bias.py",)
FUNCTION_OF_TENSORS = (
    "tests/step/test_function_of_tensors.py",
    "-k",
    "matryoshka and auxk-fields0",
)
ADAM = ("tests/step/test_adam.py",)
OPTIMIZERS_STEP = ("tests/step/test_optimizers_step.py",)
SWAPPED_CLASS = ("tests/saelens/test_swapped_class.py", "-k", "not 200_steps")
DEVICES = ("tests/step/test_devices.py", "-k", "auxk-topk or auxk-gated-pre_activation")
INTERRUPTED = ("tests/cli/test_train.py",)
DATA = ("tests/sharded/test_data.py",)
SHARED_RUN = (
    "tests/sharded/test_command.py",
    "-k",
    "test_another_field or test_other or only_rank",
)
START = ("tests/saelens/test_start.py",)
RESUME = ("tests/saelens/test_resume.py",)
OLD_CHECKPOINTS = ("tests/saelens/test_old_checkpoints.py",)
DTYPE = ("tests/step/test_dtype.py",)
GOLDEN = ("tests/test_golden.py", "-k", "batchtopk/pursuit/sparse")

KNOWN_SURVIVORS: set[str] = {
    "card_with_the_first_sae",  # after an interruption no test looks at the card
    "short_token_published",  # no token of fewer than 30 characters with two kinds of them
    "any_row_of_length_1",  # no decoder has some rows of length 1 and others not
}
"""Mutants that no test notices at present."""

MUTANTS = [
    # --- losses ------------------------------------------------------------------------------
    Mutant("losses", "auxk_relu_inverted", "if cfg.aux_relu:", "if not cfg.aux_relu:"),
    Mutant(
        "losses",
        "auxk_bias_of_decoder_left_out",
        'if cfg.aux_bias != "none":',
        'if cfg.aux_bias == "matched":',
    ),
    Mutant(
        "losses",
        "auxk_matched_bias_with_gradient",
        "inputs.to_output_units(inputs.b_dec.detach())",
        "inputs.to_output_units(inputs.b_dec)",
    ),
    Mutant(
        "losses",
        "auxk_normalized_upside_down",
        "_variance(inputs.x) / variance)",
        "variance / _variance(inputs.x))",
    ),
    Mutant("losses", "auxk_zero_variance", ".where(variance > 0, 0)", ".where(variance >= 0, 0)"),
    Mutant("losses", "auxk_variance_not_centred", "(y - y.mean(dim=0)).square()", "y.square()"),
    Mutant(
        "losses",
        "ghost_norm_not_halved",
        "residual.norm(dim=-1, keepdim=True) / 2",
        "residual.norm(dim=-1, keepdim=True)",
    ),
    Mutant(
        "losses",
        "ghost_scale_with_gradient",
        "ghost_mse.detach().clamp(min=tiny)",
        "ghost_mse.clamp(min=tiny)",
    ),
    Mutant("losses", "multi_topk_twice_k", "int(4 * cfg.k)", "int(2 * cfg.k)"),
    Mutant(
        "losses",
        "multi_topk_without_bias",
        "inputs.to_output_units(reconstruction + inputs.b_dec)",
        "inputs.to_output_units(reconstruction)",
    ),
    Mutant(
        "losses",
        "pre_activation_sum_over_rows",
        "inputs.total(missing).mean()",
        "inputs.total(missing).sum()",
    ),
    Mutant("losses", "pursuit_pulls_negative_matches", "inputs.fire(product)", "product"),
    Mutant(
        "losses",
        "pursuit_fires_at_projection",
        "decode_as(product / norm / norm)",
        "decode_as(product / norm)",
    ),
    Mutant(
        "losses",
        "pursuit_pushes_the_other_way",
        "missing.where(missing * acts < 0, 0)",
        "missing.where(missing * acts > 0, 0)",
    ),
    Mutant("losses", "pursuit_norm_not_squared", "acts * norm * norm", "acts * norm"),
    Mutant(
        "losses",
        "pursuit_wrong_sign",
        "gain.mean().detach() - gain.mean()",
        "gain.mean() - gain.mean().detach()",
    ),
    Mutant(
        "losses",
        "pursuit_largest_match",
        "unit_columns_(scaled_product(x, self.W[latents].T, None))",
        "scaled_product(x, self.W[latents].T, 1 / row_norms(self.W[latents]))",
    ),
    Mutant(
        "losses",
        "pursuit_largest_match_dense",
        "unit_columns_(x.to(rows.dtype) @ rows.T)",
        "x.to(rows.dtype) @ rows.T / row_norms(rows)",
    ),
    Mutant(
        "losses",
        "pursuit_matches_of_all_levels",
        "self.encoder.decoder.all_matches(x, level)",
        "self.encoder.decoder.all_matches(x, slice(None))",
    ),
    Mutant(
        "losses",
        "pursuit_counts_from_the_level",
        "        best += level.start or 0\n",
        "",
    ),
    Mutant(
        "losses",
        "pursuit_matches_of_all_levels_dense",
        "rows = self.W_dec[level]",
        "rows = self.W_dec",
    ),
    Mutant(
        "losses",
        "pursuit_counts_from_the_level_dense",
        "keepdim=True) + (level.start or 0)",
        "keepdim=True)",
    ),
    Mutant(
        "losses",
        "pursuit_teaches_live_latents_dense",
        "scatter_(-1, best, among[best])",
        "scatter_(-1, best, True)",
    ),
    Mutant("losses", "pursuit_teaches_live_latents", "h.where(among[best], -torch.inf)", "h"),
    Mutant(
        "losses", "pursuit_best_by_sign", "top_k(self.nearness(products), 1)", "top_k(products, 1)"
    ),
    Mutant(
        "losses",
        "pursuit_best_by_sign_dense",
        "self.nearness(unit_columns_(x.to(rows.dtype) @ rows.T))",
        "unit_columns_(x.to(rows.dtype) @ rows.T)",
    ),
    Mutant(
        "losses",
        "pursuit_usual_for_the_row",
        "norms = column_norms(products)",
        "norms = column_norms(products.T).unsqueeze(1)",
    ),
    Mutant(
        "losses",
        "pursuit_usual_by_magnitude",
        "norms = column_norms(products)",
        "norms = products.abs().sum(dim=0)",
    ),
    Mutant(
        "losses",
        "pursuit_usual_is_the_spread",
        "norms = column_norms(products)",
        "norms = column_norms(products - products.mean(dim=0))",
    ),
    Mutant(
        "losses",
        "pursuit_no_match_is_the_largest",
        "products.div_(norms.where(norms > 0, torch.inf))",
        "products.div_(norms)",
    ),
    Mutant(
        "ops",
        "pursuit_small_matches_are_the_largest",
        "products.div_(norms.where(norms > 0, torch.inf))",
        "products.div_(norms.clamp(min=torch.finfo(norms.dtype).tiny))",
    ),
    Mutant(
        "ops",
        "pursuit_usual_of_the_first_rows",
        "for rows in x.split(ROWS_AT_ONCE)]",
        "for rows in x.split(ROWS_AT_ONCE)[:1]]",
    ),
    Mutant(
        "ops",
        "pursuit_usual_in_half_precision",
        "rows.to(dtype).square().sum(dim=0)",
        "rows.square().sum(dim=0)",
    ),
    Mutant("losses", "reanimation_wrong_sign", "-d_in * total", "d_in * total"),
    Mutant(
        "losses",
        "reanimation_mean_over_dead",
        "total / (B * inputs.d_sae)",
        "total / (B * inputs.n_dead.clamp(min=1))",
    ),
    Mutant(
        "losses",
        "straight_through_factor",
        "2 * nearest.project(inputs.to_output_units(inputs.residual))",
        "nearest.project(inputs.to_output_units(inputs.residual))",
    ),
    Mutant("losses", "straight_through_has_a_value", "loss - loss.detach()", "loss"),
    Mutant(
        "losses",
        "value_without_dead_latents",
        "value.where(seen.n_dead > 0, 0)",
        "value.where(seen.n_dead >= 0, 0)",
    ),
    Mutant(
        "losses",
        "threshold_of_other_rows",
        "of_all.index_select(0, rows) if of_all.ndim == 2",
        "of_all[: len(rows)] if of_all.ndim == 2",
    ),
    # --- step --------------------------------------------------------------------------------
    Mutant(
        "step",
        "fired_latents_get_the_batch",
        ".add_(n_tokens).masked_fill_(fired, 0)",
        ".masked_fill_(fired, 0).add_(n_tokens)",
    ),
    Mutant(
        "step",
        "dead_one_token_late",
        "   dead = self.tokens_since_fired >= threshold",
        "   dead = self.tokens_since_fired > threshold",
    ),
    Mutant("step", "fired_where_zero", "acts.amax(dim=0) > 0", "acts.amax(dim=0) >= 0"),
    Mutant(
        "step", "negative_activations_not_fired", "acts.amin(dim=0) < 0", "acts.amin(dim=0) > 0"
    ),
    Mutant("step", "revived_inverted", "(was_dead & fired).sum()", "(was_dead & ~fired).sum()"),
    Mutant(
        "step",
        "bad_rows_count_as_tokens",
        "fired, batch.n_tokens)",
        "fired, len(batch.sae_in))",
    ),
    Mutant("step", "loss_of_no_usable_row", "output.loss * some", "output.loss"),
    Mutant(
        "step",
        "aux_loss_without_coefficient",
        "loss + batch.coefficient * value",
        "loss + value",
    ),
    Mutant(
        "step",
        "coefficient_read_from_the_device",
        "loss + batch.coefficient * value",
        "loss + float(batch.coefficient) * value",
        FUNCTION_OF_TENSORS,
    ),
    Mutant(
        "step",
        "threshold_rebound",
        "setattr(self, name, buffer.copy_(moved))",
        "setattr(self, name, moved)",
        FUNCTION_OF_TENSORS,
    ),
    Mutant(
        "step",
        "dead_soon_of_one_step",
        "threshold - STEPS_AHEAD * n_tokens",
        "threshold - n_tokens",
    ),
    Mutant(
        "step",
        "fused_in_the_checkpoint",
        'for group in ours:\n            group["fused"] = None',
        'for group in ours:\n            group["fused"] = True',
        ADAM,
    ),
    Mutant(
        "step",
        "adams_steps_on_the_device_only",
        'state["step"] = state["step"].to(parameter.device, torch.float32)',
        'state["step"] = state["step"] + 1',
        ADAM,
    ),
    Mutant(
        "step",
        "matryoshka_levels_not_nested",
        "parts.cumsum(dim=1) + self.b_dec",
        "parts + self.b_dec",
    ),
    Mutant(
        "step",
        "topk_threshold_average_swapped",
        "(1 - lr) * self.topk_threshold + lr * smallest",
        "lr * self.topk_threshold + (1 - lr) * smallest",
        ("tests/test_architectures.py", "-k", "sparse_activations_moves"),
    ),
    Mutant(
        "step", "batch_topk_rounds_k_down", "int(self.cfg.k * B)", "int(self.cfg.k) * B", GOLDEN
    ),
    Mutant(
        "step",
        "matryoshka_level_off_by_one",
        "(latents >= width).long()",
        "(latents > width).long()",
    ),
    Mutant(
        "step",
        "matryoshka_dead_of_inner_levels",
        "dead[start:end] = record.dead[start:end]",
        "dead[:end] = record.dead[:end]",
    ),
    Mutant(
        "step",
        "same_rows_every_step",
        "Generator(device).manual_seed(step)",
        "Generator(device).manual_seed(0)",
    ),
    Mutant(
        "step",
        "no_row_of_a_small_fraction",
        "max(1, round(self.cfg.aux_batch_fraction * n_rows))",
        "round(self.cfg.aux_batch_fraction * n_rows)",
    ),
    Mutant("step", "largest_norm_too_large", ".max ** 0.25", ".max ** 0.5"),
    Mutant(
        "step",
        "bad_row_replaced_by_bad_row",
        "usable.int().argmax(dim=0",
        "usable.int().argmin(dim=0",
    ),
    Mutant(
        "step",
        "constant_norm_units",
        "x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5",
        "x.norm(dim=-1, keepdim=True) / x.shape[-1]",
    ),
    Mutant(
        "step",
        "layer_norm_not_centred",
        "x - x.mean(dim=-1, keepdim=True), residual",
        "x, residual",
    ),
    Mutant(
        "step",
        "rows_drawn_by_their_loss",
        "(drawable / drawable.max()).square()",
        "(drawable / drawable.max())",
    ),
    Mutant(
        "step",
        "put_in_wrong_dim",
        "moment.index_fill_(dim, new.latents, 0)",
        "moment.index_fill_(0, new.latents, 0)",
    ),
    Mutant(
        "step",
        "put_in_keeps_the_count",
        "self.tokens_since_fired.index_fill_(0, new.latents, 0)",
        "pass",
    ),
    Mutant(
        "step",
        "put_in_zero_thresholds",
        ".index_fill_(0, new.latents, value)",
        ".index_fill_(0, new.latents, 0.0)",
    ),
    Mutant(
        "step",
        "mean_length_over_all_latents",
        "encoder / counts.sum(), decoder / counts.sum()",
        "encoder / counts.numel(), decoder / counts.numel()",
    ),
    Mutant(
        "step",
        "resamples_latents_that_fired",
        "dead & ~fired_in_batch(output.feature_acts)",
        "dead",
    ),
    # --- what evaluation leaves alone, whose methods are called, what is fitted ---------------
    Mutant(
        "step",
        "evaluation_counts",
        "if batch.counts:\n            count_tokens",
        "if True:\n            count_tokens",
        EVALUATION,
    ),
    Mutant(
        "step",
        "evaluation_moves_threshold",
        "some & batch.counts",
        "some",
        EVALUATION,
    ),
    Mutant(
        "step",
        "evaluation_moves_the_step",
        "if self.training:\n            self._steps_before_run",
        "if True:\n            self._steps_before_run",
        EVALUATION,
    ),
    Mutant(
        "step",
        "evaluation_draws",
        "if not batch.counts:\n            return\n        output.metrics[METRIC]",
        "output.metrics[METRIC]",
        EVALUATION,
    ),
    Mutant(
        "step",
        "evaluation_lifts_thresholds",
        "self.threshold.data.copy_(before)",
        "pass",
        EVALUATION,
    ),
    Mutant(
        "step",
        "own_class_made_by_a_call_is_captured",
        "if base not in (ABC, Generic, object))",
        "if base.__module__ not in ('abc', 'typing', 'builtins'))",
        ("tests/step/test_replay.py", "-k", "ones_own"),
    ),
    Mutant("step", "own_class_ignored", "getattr(cls, name) is m for", "True for", OWN_METHODS),
    Mutant(
        "step",
        "own_instance_ignored",
        "not any(name in own for name in REPLACED)",
        "True",
        OWN_METHODS,
    ),
    Mutant(
        "step", "own_k_ignored", 'getattr(select, "k", None) == self.cfg.k', "True", OWN_METHODS
    ),
    Mutant(
        "step",
        "global_hooks_ignored",
        "not torch.nn.modules.module._has_any_global_hook()",
        "True",
        OWN_METHODS,
    ),
    Mutant(
        "step",
        "own_reshaping_ignored",
        '.__module__.startswith("sae_lens.") for name',
        '.__module__ != "" for name',
        OWN_METHODS,
    ),
    Mutant(
        "step",
        "other_hook_points_ignored",
        "type(modules[name]) in HOOK_POINT_CLASSES for",
        "True for",
        OWN_METHODS,
    ),
    Mutant(
        "step", "patched_saelens_ignored", "getattr(owner, name) is f for", "True for", OWN_METHODS
    ),
    Mutant(
        "step",
        "early_patches_ignored",
        "return function if function.__module__.startswith(known) else None",
        "return function",
        OWN_METHODS,
    ),
    Mutant(
        "step",
        "forward_of_an_instance_ignored",
        '"forward" in vars(module)\n        or',
        "",
        OWN_METHODS,
    ),
    Mutant(
        "step",
        "b_dec_of_sinks_too",
        "rows[norms <= MAX_NORM_MULTIPLE * norms.median()]",
        "rows",
        B_DEC,
    ),
    Mutant(
        "step",
        "b_dec_after_a_load",
        "sae._b_dec_is_set = True",
        "pass",
        B_DEC,
    ),
    Mutant(
        "step",
        "b_dec_in_a_run_that_goes_on",
        "if batch.n_training_steps == 0:\n            usable",
        "if True:\n            usable",
        B_DEC,
    ),
    Mutant(
        "step",
        "median_without_weights",
        "(rows * weights).sum(dim=0) / weights.sum()",
        "rows.mean(dim=0)",
        B_DEC,
    ),
    Mutant(
        "saelens",
        "drawn_stays",
        "drawn, sae.drawn = sae.drawn, None",
        "drawn = sae.drawn",
        OPTIMIZERS_STEP,
    ),
    Mutant(
        "saelens",
        "hook_of_all_optimizers",
        "optimizer.register_step_post_hook(after_step)",
        "torch.optim.optimizer.register_optimizer_step_post_hook(after_step)",
        OPTIMIZERS_STEP,
    ),
    Mutant(
        "saelens",
        "window_up_to_the_whole_run",
        "2 * window <= run.total_training_samples",
        "window <= run.total_training_samples",
        SWAPPED_CLASS,
    ),
    Mutant(
        "saelens",
        "k_aux_rounded_down",
        "2 ** round(log2(d_in / 2))",
        "2 ** int(log2(d_in / 2))",
        SWAPPED_CLASS,
    ),
    Mutant(
        "saelens",
        "k_aux_above_d_sae",
        "min(max(1, 2 ** round(log2(d_in / 2))), d_sae)",
        "max(1, 2 ** round(log2(d_in / 2)))",
        SWAPPED_CLASS,
    ),
    Mutant(
        "saelens",
        "old_warm_up_starts_again",
        'scheduler.load_state_dict({"current_step": max(steps)})',
        "pass",
        OLD_CHECKPOINTS,
    ),
    Mutant("saelens", "float16_accepted", 'in ("float16", "fp16", "half")', "in ()", DTYPE),
    Mutant(
        "saelens",
        "dtype_of_the_run_only",
        "cfg.sae = replace(cfg.sae, dtype=cfg.dtype)",
        "pass",
        DTYPE,
    ),
    # --- ops ---------------------------------------------------------------------------------
    Mutant(
        "ops",
        "top_k_place_in_group",
        "groups.gather(1, found // size) * size + found % size",
        "groups.gather(1, found // size) * size",
    ),
    Mutant(
        "ops",
        "top_k_excluded_are_zero",
        "masked_fill_(~among.view(-1, size)[groups], -torch.inf)",
        "masked_fill_(~among.view(-1, size)[groups], 0)",
    ),
    Mutant(
        "compare",
        "lock_follows_links",
        "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW",
        "os.O_RDWR | os.O_CREAT",
        ("tests/test_files.py",),
    ),
    Mutant(
        "compare",
        "folder_may_be_a_link",
        "if path.is_symlink() or (path.exists() and not path.is_dir()):",
        "if path.exists() and not path.is_dir():",
        ("tests/test_files.py",),
    ),
    Mutant(
        "compare",
        "foreign_folder_is_claimed_first",
        "    _require_own(folder)\n    with claim(folder):\n",
        "    with claim(folder):\n        _require_own(folder)\n",
        ("tests/compare/test_links.py", "-k", "foreign"),
    ),
    Mutant(
        "compare",
        "link_to_a_pass_is_followed",
        "folder / FIGURES_FOLDER, *passes):",
        "folder / FIGURES_FOLDER):",
        ("tests/compare/test_links.py", "-k", "no_link"),
    ),
    Mutant(
        "compare",
        "link_to_a_case_is_followed",
        "            require_no_link(folder / own.name)\n",
        "",
        ("tests/compare/test_links.py", "-k", "no_link or elsewhere"),
    ),
    Mutant(
        "compare",
        "sae_of_a_pass_may_be_elsewhere",
        'if run["folder"] != own.as_posix() or not is_in_it:',
        "if not is_in_it:",
        ("tests/compare/test_links.py", "-k", "elsewhere"),
    ),
    Mutant(
        "compare",
        "effects_are_dropped_by_a_call_without_them",
        "has_effect = comparison.effect or ",
        "has_effect = comparison.effect and ",
        ("tests/compare/test_effect.py", "-k", "synthetic_model"),
    ),
    Mutant(
        "compare",
        "effects_out_of_order_are_taken",
        "bool((latents.diff() > 0).all() and ",
        "bool(",
        ("tests/compare/test_effect.py", "-k", "damaged"),
    ),
    Mutant(
        "compare",
        "report_without_a_claim",
        "        with claim(folder):\n            return write_report(",
        "        if folder:\n            return write_report(",
        ("tests/cli/test_compare.py", "-k", "report_alone"),
    ),
    Mutant(
        "saelens",
        "late_errors_of_the_text_are_tracebacks",
        """        if isinstance(raised, ValueError) or is_for_a_file(raised):
            return refuse(f"{str(raised).rstrip('.')}. {how""",
        """        if is_for_a_file(raised):
            return refuse(f"{str(raised).rstrip('.')}. {how""",
        ("tests/cli/test_train.py", "-k", "text_that"),
    ),
    Mutant(
        "saelens",
        "full_disk_names_no_file",
        "            error.filename = str(path)\n",
        "            pass\n",
        ("tests/cli/test_train.py", "-k", "full_disk_keeps"),
    ),
    Mutant(
        "saelens",
        "what_was_measured_is_lost_with_its_file",
        """            print("\\n".join(f"{name:20}{value}" for name, value in lines.items()))
            what = "what was measured is not"
            if folder is not None:
                write_evaluation(folder, found)
""",
        """            if folder is not None:
                write_evaluation(folder, found)
            print("\\n".join(f"{name:20}{value}" for name, value in lines.items()))
""",
        ("tests/cli/test_train.py", "-k", "full_disk_keeps"),
    ),
    Mutant(
        "compare",
        "sae_is_not_tried",
        "    sae.encode(sae.W_dec.new_zeros(1, 1, sae.cfg.d_in))\n",
        "",
        ("tests/compare/test_effect.py", "-k", "synthetic_model"),
    ),
    Mutant(
        "compare",
        "nested_as_deep_as_one_likes",
        "if _is_deeper(content, MAX_DEPTH):",
        "if _is_deeper(content, 10_000):",
        ("tests/test_files.py",),
    ),
    Mutant(
        "compare",
        "true_is_an_integer",
        "not isinstance(value, kind) or (kind is int and isinstance(value, bool))",
        "not isinstance(value, kind)",
        ("tests/compare/test_files.py", "-k", "damaged"),
    ),
    Mutant(
        "hub",
        "evaluation_of_other_weights",
        'if found.get("weights") == _weights(folder) else None',
        'if found.get("weights") else None',
        HUB_CARD,
    ),
    Mutant(
        "hub",
        "card_names_local_paths",
        'return f"PATH/TO/{PureWindowsPath(without_user_name(name)).name}" if is_local else name',
        "return name",
        HUB_CARD,
    ),
    Mutant("ops", "bound_rounded_down", "n = -bound // 64 * -64", "n = bound // 64 * 64"),
    Mutant(
        "ops",
        "one_column_too_many",
        "torch.arange(len(columns), device=columns.device) >= n_columns",
        "torch.arange(len(columns), device=columns.device) > n_columns",
    ),
    Mutant("ops", "b_dec_gradient_sign", "-(W @ grad)", "(W @ grad)"),
    Mutant(
        "ops",
        "activations_gradient_without_norm",
        "grad * decoder.norm_at(selected, pre), None",
        "grad, None",
    ),
    Mutant(
        "ops",
        "times_norm_gradient",
        "return grad * norm, None, None, None",
        "return grad, None, None, None",
    ),
    Mutant(
        "ops",
        "norm_gradient_of_last_use_only",
        "scale if self._along is None else self._along + scale",
        "scale",
    ),
    Mutant(
        "ops", "sums_left_from_another_pass", "if current != self._pass:", "if self._pass == -1:"
    ),
    Mutant(
        "ops",
        "dense_rows_replace_the_others",
        "rows if into is None else into.add_(rows)",
        "rows",
    ),
    Mutant(
        "ops",
        "norm_of_zero_row",
        "W.detach().norm(dim=-1).clamp(min=torch.finfo(W.dtype).tiny)",
        "W.detach().norm(dim=-1)",
    ),
    Mutant(
        "ops",
        "bias_gradient_mean_over_rows",
        "index_add_(0, self.columns, values.sum(dim=0))",
        "index_add_(0, self.columns, values.mean(dim=0))",
    ),
    Mutant(
        "ops",
        "sums_linear_in_magnitudes",
        "if self.nearness(encoder.x) is not encoder.x:",
        "if False:",
    ),
    Mutant(
        "ops",
        "smallest_active_of_all",
        "acts.masked_fill(acts <= 0, torch.inf)",
        "acts.masked_fill(acts < 0, torch.inf)",
    ),
    Mutant("ops", "second_derivative_not_refused", "if torch.is_grad_enabled():", "if False:"),
    Mutant(
        "ops",
        "dense_rows_not_normalized",
        "rows / rows.norm(dim=-1, keepdim=True) if rescaled else rows",
        "rows",
    ),
    Mutant("ops", "dense_largest_by_sign", "_largest(self.nearness(h), k)", "_largest(h, k)"),
    Mutant(
        "step",
        "sparse_step_everywhere",
        "            and has_sparse_operations(sae_in)\n",
        "",
        DEVICES,
    ),
    Mutant(
        "ops", "static_indices_everywhere", "if has_sparse_operations(mask):", "if True:", DEVICES
    ),
    Mutant(
        "saelens", "stock_steps_forgotten", "sae.training_steps.fill_(max(steps))", "sae", RESUME
    ),
    Mutant(
        "saelens", "no_checkpoint_when_told_to_stop", "if told_to_stop:", "if False:", INTERRUPTED
    ),
    Mutant("saelens", "full_disks_not_known", 'or "inline_container" in text', "", INTERRUPTED),
    Mutant("saelens", "signals_not_given_back", "before.items():", "{}.items():", INTERRUPTED),
    Mutant(
        "saelens", "second_sigterm_kills", "if number == signal.SIGINT:", "if True:", INTERRUPTED
    ),
    Mutant("saelens", "ignored_signals_noted", "is not signal.SIG_IGN", "is not None", INTERRUPTED),
    Mutant(
        "saelens",
        "late_signal_forgotten",
        "if runner.noted:  # in its",
        "if False:  #",
        INTERRUPTED,
    ),
    Mutant(
        "saelens", "folders_where_they_go", "Path(trial, path.rel", "Path(there, path.rel", START
    ),
    Mutant("saelens", "one_prompt_tried", "torch.zeros((2, cfg", "torch.zeros((1, cfg", START),
    Mutant("saelens", "d_sae_counts_as_width", '== [config["d_sae"]] else', "== [] else", RESUME),
    Mutant("saelens", "missing_k_accepted", "if absent := [", "if False and [", RESUME),
    Mutant(
        "sharded", "another_block_resumed", "group.size() and is_dealt_so", "group.size()", DATA
    ),
    Mutant("saelens", "last_buffer_too_small", "buffer < smallest", "buffer < smallest - 1", START),
    Mutant(
        "sharded",
        "ranks_may_differ",
        "fields[name] for name in fields if",
        "fields[name] for name in () if",
        SHARED_RUN,
    ),
    # --- sharded -----------------------------------------------------------------------------
    Mutant(
        "sharded",
        "all_ties_chosen",
        "above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))",
        "above | equal",
    ),
    Mutant(
        "sharded",
        "one_tie_too_few",
        "dtype=torch.int32) <= room",
        "dtype=torch.int32) < room",
    ),
    Mutant(
        "sharded",
        "own_among_not_shifted",
        "new.latents[mine] - self.shard.start",
        "new.latents[mine]",
        RESAMPLING_WHERE_SHARED,
    ),
    Mutant(
        "sharded",
        "gradient_not_summed",
        "dist.all_reduce(total, group=ctx.group)",
        "pass",
    ),
    Mutant("sharded", "unchosen_latents_fire", "h.where(h != -torch.inf, 0)", "h"),
    Mutant("sharded", "clipped_by_own_norm", "sum_over(square, sae.shard.group)", "square"),
    Mutant(
        "sharded",
        "fired_latents_not_shifted",
        "(selected.latents + self.start).int()",
        "selected.latents.int()",
    ),
    Mutant(
        "sharded",
        "own_slice_not_shifted",
        "slice(first, max(first, min(stop - self.start, self.n)))",
        "slice(first, max(first, min(stop, self.n)))",
    ),
    Mutant(
        "sharded",
        "whole_batch_on_each",
        "store.train_batch_size_tokens //= n",
        "store.train_batch_size_tokens //= 1",
    ),
    Mutant("sharded", "rows_read_off_by_one", "(by_rank + 1).sum() - 1", "by_rank.sum()"),
    Mutant(
        "sharded",
        "position_of_other_count",
        "+ 1) / group.size()) - 1",
        "+ 1) / group.size())",
    ),
    Mutant(
        "sharded",
        "reads_the_first_part",
        "slice(held.start, held.start + held.n)",
        "slice(0, held.n)",
    ),
    Mutant(
        "sharded",
        "of_all_padded_backwards",
        "(self.start, self.d_sae - self.start - self.n)",
        "(self.d_sae - self.start - self.n, self.start)",
    ),
    Mutant(
        "sharded", "rows_dealt_one_by_one", "rows // min(block, len(dataset) // n)", "rows", DATA
    ),
    Mutant(
        "sharded",
        "smallest_over_processes",
        "largest, op=dist.ReduceOp.MAX",
        "largest, op=dist.ReduceOp.MIN",
    ),
    Mutant("sharded", "weights_of_the_first", "self._draw(self.shard.start)", "self._draw(0)"),
    Mutant(
        "sharded",
        "odd_d_sae_not_refused",
        "if cfg.d_sae % n_processes:",
        "if False:",
        SHARED_COMMAND,
    ),
    # --- compare -----------------------------------------------------------------------------
    Mutant(
        "compare",
        "junk_inverted",
        "(cosine < JUNK).float().mean().item()",
        "(cosine > JUNK).float().mean().item()",
    ),
    Mutant(
        "compare",
        "covered_counts_latents",
        "match[cosine > JUNK].unique().numel()",
        "match[cosine > JUNK].numel()",
    ),
    Mutant(
        "compare",
        "age_is_youth",
        "1 - (alive_since * revived)[latents] / training_samples",
        "(alive_since * revived)[latents] / training_samples",
    ),
    Mutant(
        "compare",
        "nearest_latent_is_itself",
        "near[latents[:, None] == alive] = -1.0",
        "pass",
    ),
    Mutant("compare", "junk_is_duplicate", "(second & ~is_junk)", "(second)"),
    Mutant(
        "compare",
        "split_judged_on_the_same_rows",
        "judge.add(acts[1::2], targets[1::2])",
        "judge.add(acts[::2], targets[::2])",
    ),
    Mutant("compare", "suppressor_splits", "(new <= 0) | (of_own <= 0)", "(new <= 0)"),
    Mutant(
        "compare",
        "found_of_the_alive",
        "found.sum().item() / run.d_sae",
        "found.mean().item()",
    ),
    Mutant(
        "compare",
        "pairs_as_if_independent",
        "n * mean(everywhere) - (n - 1) * rest for rest in without",
        "2 * mean(everywhere) - rest for rest in without",
        COMPARE_SEEDS,
    ),
    Mutant(
        "compare",
        "normal_for_students_interval",
        "stdev(differences) / sqrt(n)",
        "stdev(differences) / n",
        COMPARE_SEEDS,
    ),
    Mutant("compare", "two_seeds_tell_apart", "MIN_SEEDS = 3", "MIN_SEEDS = 2", COMPARE_SEEDS),
    Mutant("compare", "any_l0", "0 < high <= MAX_L0_RATIO * low", "0 < high", COMPARE_SEEDS),
    Mutant(
        "compare",
        "winner_of_three_latents",
        'key == "found_again" and n_latents(a, key) < MIN_LATENTS',
        "False",
        COMPARE_SEEDS,
    ),
    Mutant(
        "compare",
        "winner_of_three_latents_less",
        "n_latents(b, key) - n_latents(a, key) < MIN_LATENTS",
        "False",
        COMPARE_SEEDS,
    ),
    Mutant(
        "compare",
        "near_one_but_not_each_other",
        "if have_one_l0(low, other) and _l0(other) >= _l0(low)",
        "if have_one_l0(low, other)",
        COMPARE_SEEDS,
    ),
    Mutant(
        "compare",
        "pairs_of_seeds_without_an_effect",
        "_over_seeds(compared or of_seeds)",
        "_over_seeds(of_seeds)",
        COMPARE_EFFECT,
    ),
    Mutant(
        "compare",
        "spread_of_run_means",
        'found["std"][key] = spread(over_pairs(runs, key, latents))',
        "pass",
        COMPARE_SEEDS,
    ),
    Mutant("compare", "worst_matching", "maximize=True", "maximize=False"),
    Mutant("compare", "revived_not_alive", 'alive = ~lived["dead"]', 'alive = ~lived["ever_dead"]'),
    Mutant("compare", "chance_of_one", "below**n_latents", "below"),
    Mutant(
        "compare",
        "window_one_step_long",
        "ceil(self.dead_after / self.batch_size) - 1",
        "ceil(self.dead_after / self.batch_size)",
    ),
    Mutant(
        "compare",
        "alive_since_last_fired",
        "masked_fill_(self.dead & fired, self.n_samples)",
        "masked_fill_(fired, self.n_samples)",
    ),
    Mutant("compare", "only_dead_now", "self.ever_dead |= self.dead", "self.ever_dead = self.dead"),
    Mutant(
        "compare",
        "measured_on_training_data",
        "torch.manual_seed(seed + HELD_OUT_SEED)",
        "torch.manual_seed(seed)",
    ),
    Mutant(
        "compare",
        "long_rows_trained_on",
        "kept.append(batch[self.keeps(batch)])",
        "kept.append(batch)",
        COMPARE_NORMS,
    ),
    Mutant(
        "compare",
        "long_rows_replaced_in_the_ce_loss",
        "torch.where(kept, replaced, rows)",
        "torch.where(kept, replaced, replaced)",
        COMPARE_NORMS,
    ),
    Mutant(
        "compare",
        "long_rows_measured",
        "self._held_out = held_out[self._row_filter.keeps(held_out)]",
        "self._held_out = held_out",
        COMPARE_NORMS,
    ),
    Mutant(
        "compare",
        "effect_of_all_latents_at_once",
        "torch.unique(together * len(self._tokens) + prompts,",
        "torch.unique(0 * together + prompts,",
        COMPARE_EFFECT,
    ),
    Mutant(
        "compare",
        "effect_on_the_token_itself",
        "self._tokens[prompts[at], position + 1]",
        "self._tokens[prompts[at], position]",
        COMPARE_EFFECT,
    ),
    Mutant(
        "compare",
        "error_not_kept",
        "(2 * error * change + change**2).sum(dim=1)",
        "(change**2).sum(dim=1)",
        COMPARE_EFFECT,
    ),
    Mutant(
        "compare",
        "one_firing_too_few",
        "fires &= fires.cumsum(dim=0) <= left",
        "fires &= fires.cumsum(dim=0) < left",
        COMPARE_EFFECT,
    ),
    Mutant(
        "compare",
        "pairs_alike_in_one_thing",
        "(apart <= log(ALIKE) + 1e-6).all(dim=0)",
        "(apart <= log(ALIKE) + 1e-6).any(dim=0)",
        COMPARE_EFFECT,
    ),
    Mutant(
        "compare",
        "few_pairs_compared",
        "            if len(latents) < MIN_PAIRS:",
        "            if len(latents) < MIN_PAIRS - 1:",
        COMPARE_EFFECT,
    ),
    Mutant(
        "compare",
        "found_again_by_the_dead",
        '"found": alive & found,',
        '"found": found,',
        COMPARE_EFFECT,
    ),
    Mutant(
        "compare",
        "effects_before_all_seeds",
        'if not results["finished"]:',
        "if False:",
        COMPARE_EFFECT,
    ),
    Mutant("compare", "rates_not_logarithmic", "log = firings.log()", "log = firings"),
    Mutant(
        "compare",
        "spread_of_two_seeds",
        "stdev(values) if len(values) > 1",
        "stdev(values) if len(values) > 2",
    ),
    Mutant(
        "compare",
        "trained_on_held_out_text",
        "_after(store.n_dataset_processed + 1, store.dataset)",
        "_after(0, store.dataset)",
        COMPARE_LANGUAGE_MODEL,
    ),
    Mutant(
        "compare",
        "worst_case_first",
        'reverse=metric.better == "up"',
        'reverse=metric.better != "up"',
        COMPARE_REPORT,
    ),
    Mutant(
        "compare",
        "failed_stay_failed",
        'bool(runs) and all(run["status"] == "finished" for run in runs)',
        "bool(runs)",
    ),
    Mutant(
        "compare",
        "whole_pass_trained_again",
        "left = [slug for slug in cases if slug not in kept]",
        "left = [*cases]",
    ),
    Mutant(
        "compare",
        "failed_by_another_tried_at_once",
        "if _written(folder, seed) != at_start[seed] or _is_finished(folder, seed):",
        "if _is_finished(folder, seed):",
    ),
    Mutant(
        "compare",
        "last_update_not_looked_at",
        "if not all(p.isfinite().all() for p in trainer.sae.parameters()):",
        "if False:",
    ),
    Mutant(
        "compare",
        "a_model_for_each_seed",
        '{"seed": 0, **(comparison.synthetic_model or {})}',
        '{"seed": None, **(comparison.synthetic_model or {})}',
    ),
    Mutant(
        "compare",
        "the_best_start_keeps_its_b_dec",
        '"decoder_init_norm": 1.0,\n            "b_dec_init": "mean",\n',
        '"decoder_init_norm": 1.0,\n',
    ),
    Mutant(
        "compare",
        "status_0_after_a_failure",
        'return int(any(run["status"] == "failed" for run in results["runs"]))',
        "return 0",
        COMPARE_COMMAND,
    ),
    Mutant(
        "compare",
        "dry_run_trains",
        "            if options.dry_run:",
        "            if False:",
        COMPARE_COMMAND,
    ),
    # --- hub ---------------------------------------------------------------------------------
    Mutant("hub", "card_with_the_first_sae", "change is pending[-1]", "change is pending[0]"),
    Mutant("hub", "no_parent_commit", "parent_commit=commit", "parent_commit=None"),
    Mutant("hub", "public_repository_taken", "if private and not info.private:", "if False:"),
    Mutant(
        "hub",
        "same_size_is_same_file",
        "git_hash(local.read_bytes()) == remote.blob_id",
        "True",
    ),
    Mutant(
        "hub",
        "same_size_is_same_large_file",
        "sha_fileobj(file).hex() == remote.lfs.sha256",
        "True",
    ),
    Mutant("hub", "old_files_stay", "name in remote and name not in files", "False"),
    Mutant("hub", "read_token_accepted", 'token.get("role") == "read"', "False"),
    Mutant("hub", "scaling_not_folded", "fold_scaling_beside(sae, checkpoint)", "pass"),
    Mutant(
        "hub",
        "user_name_published",
        "public = without_user_name(text)",
        "public = text",
        HUB_PRIVATE,
    ),
    Mutant(
        "hub",
        "password_published",
        "if found := _PASSWORD_IN_URL.search(text):",
        "if found := None:",
        HUB_PRIVATE,
    ),
    Mutant(
        "hub", "short_token_published", "kinds >= (3 if found[1] else 2)", "kinds >= 3", HUB_PRIVATE
    ),
    Mutant(
        "hub",
        "rest_of_the_card_lost",
        "before + part + rest.split(end, 1)[1]",
        "before + part",
        HUB_CARD,
    ),
    Mutant(
        "hub",
        "dtype_left_out",
        'if dtype.removeprefix("torch.") != "float32":',
        "if False:",
        HUB_CARD,
    ),
    Mutant(
        "hub", "link_followed", "not target.is_relative_to(folder.resolve())", "False", HUB_PRIVATE
    ),
    Mutant(
        "hub",
        "unfinished_run_published",
        'if run.get("status") != "finished":',
        "if False:",
    ),
    Mutant(
        "hub",
        "rates_left_behind",
        "for name in (SPARSITY_FILENAME, RUNNER_CFG_FILENAME,",
        "for name in (RUNNER_CFG_FILENAME,",
    ),
    # --- saelens -----------------------------------------------------------------------------
    Mutant("saelens", "resampled_until_the_end", "max(0, n_steps - window)", "n_steps"),
    Mutant("saelens", "last_resampling_is_refused", "if every > last:", "if every >= last:"),
    Mutant(
        "saelens",
        "window_rounded_down",
        "ceil(cfg.resolved_dead_threshold_tokens / run.train_batch_size_samples)",
        "cfg.resolved_dead_threshold_tokens // run.train_batch_size_samples",
    ),
    Mutant(
        "saelens",
        "warns_one_token_early",
        "cfg.resolved_dead_threshold_tokens > n_samples",
        "cfg.resolved_dead_threshold_tokens >= n_samples",
    ),
    Mutant(
        "saelens",
        "warns_one_step_late",
        "dead_feature_window >= n_steps - 1",
        "dead_feature_window >= n_steps",
    ),
    Mutant(
        "saelens",
        "thresholds_may_differ",
        "(threshold != threshold[0]).any()",
        "(threshold != threshold[0]).all()",
    ),
    Mutant("saelens", "norm_not_folded", "if is_rescaled and not wanted:", "if False:"),
    Mutant(
        "saelens",
        "any_row_of_length_1",
        "- 1).abs() > _ROUNDING).any()",
        "- 1).abs() > _ROUNDING).all()",
    ),
    Mutant(
        "saelens",
        "scaling_inverted",
        "fold_activation_norm_scaling_factor(scaler.scaling_factor)",
        "fold_activation_norm_scaling_factor(1 / scaler.scaling_factor)",
    ),
    Mutant(
        "saelens",
        "missing_scaling_not_refused",
        "if mode in ESTIMATED_SCALING and found is None:",
        "if False:",
    ),
    Mutant(
        "saelens",
        "silent_latents_not_counted",
        "log_sparsity <= log_sparsity.new_tensor(1e-10)",
        "log_sparsity < log_sparsity.new_tensor(1e-10)",
    ),
    Mutant(
        "saelens",
        "given_sae_ignored",
        "        if sae is None:\n            given.arguments",
        "        if True:\n            given.arguments",
    ),
    Mutant("saelens", "another_k_resumed", '"dtype", "k", "matry', '"dtype", "matry', RESUME),
    Mutant("saelens", "any_runner_resumes", "if isinstance(sae_cfg, ours):", "if False:", RESUME),
    Mutant(
        "saelens", "given_sae_not_asked", "cfg.sae if sae is None else sae.cfg", "cfg.sae", RESUME
    ),
    Mutant(
        "saelens",
        "resumed_schedule_starts_again",
        "before = int(self.training_steps) - n_steps",
        "before = 0",
    ),
    Mutant(
        "saelens",
        "new_run_goes_on",
        "if n_steps == 0:\n            before = 0\n        elif self._loaded:",
        "if self._loaded:",
    ),
    Mutant(
        "saelens",
        "counts_cast_without_bytes",
        "count.to(torch.uint8).contiguous().view(torch.int64)",
        "count.to(torch.int8).contiguous().view(torch.int64) & 0xFF",
    ),
    Mutant(
        "saelens",
        "warm_up_one_step_ahead",
        "TrainCoefficientConfig(alpha, self.cfg.aux_warm_up_steps)",
        "TrainCoefficientConfig(alpha, self.cfg.aux_warm_up_steps + 1)",
    ),
    Mutant("saelens", "decays_below_zero", "max(0.0, 1.0 - decayed)", "(1.0 - decayed)"),
    Mutant("saelens", "resamples_one_step_late", "n_steps % every != 0", "step % every != 0"),
    Mutant("saelens", "stops_one_step_early", "n_steps <= stop", "n_steps < stop", RESAMPLING_RUNS),
    Mutant(
        "saelens",
        "logs_the_last_step_only",
        "self._n_resampled += len(new.latents)",
        "self._n_resampled = len(new.latents)",
        RESAMPLING_RUNS,
    ),
    Mutant(
        "saelens",
        "unknown_moments_accepted",
        "key not in MOMENTS or not plain",
        "not plain",
        RESAMPLING_RUNS,
    ),
    Mutant(
        "saelens",
        "warns_in_the_same_step",
        "drawn.step < step",
        "drawn.step <= step",
        RESAMPLING_RUNS,
    ),
    Mutant(
        "saelens",
        "two_loggers",
        'if logger and "logger" in keywords:',
        "if False:",
    ),
    Mutant(
        "saelens",
        "decay_may_not_follow_warm_up",
        "cfg.aux_decay_start_step < cfg.aux_warm_up_steps",
        "cfg.aux_decay_start_step <= cfg.aux_warm_up_steps",
    ),
]


def problems() -> list[str]:
    """What is wrong with the list: snippets that are not in exactly one place, names in use."""
    sources = {path: path.read_text(encoding="utf-8") for path in _sources(ROOT)}
    found: list[str] = []
    for mutant in MUTANTS:
        places = [
            f"{path.relative_to(ROOT)} ({n} times)"
            for path, text in sources.items()
            if (n := text.count(mutant.old))
        ]
        if sum(text.count(mutant.old) for text in sources.values()) != 1:
            where = ", ".join(places) or "no file"
            found.append(f"{mutant.area} {mutant.name}: {mutant.old!r} is in {where}")
        if mutant.old == mutant.new:
            found.append(f"{mutant.name} changes nothing")
        if mutant.area not in AREA_TESTS:
            found.append(f"{mutant.name}: there is no area {mutant.area}")
    names = [mutant.name for mutant in MUTANTS]
    found += [f"two mutants are called {name}" for name in {*names} if names.count(name) > 1]
    found += [f"no mutant is called {name}" for name in KNOWN_SURVIVORS - {*names}]
    for args in {mutant.pytest_args for mutant in MUTANTS}:
        paths = (arg.split("::")[0] for arg in args if arg.startswith("tests/"))
        found += [f"there is no {path}" for path in paths if not (ROOT / path).exists()]
    return found


def _sources(root: Path) -> list[Path]:
    return sorted((root / PACKAGE).rglob("*.py"))


# --- running ---------------------------------------------------------------------------------


@dataclass
class Job:
    """One run of tests in a child process; ``mutant`` is None for the unchanged tree."""

    name: str
    args: tuple[str, ...]
    mutant: Mutant | None
    timeout: float
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mutant-")))
    pid: int = 0
    start: float = 0.0


class FirstFailure:
    """A pytest plugin that writes the id of the first failing test to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._note(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed and not self._path.exists():
            self._path.write_text(report.nodeid, encoding="utf-8")


def import_slow_things() -> None:
    """Import what each child would import, but not the package."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import sae_lens  # noqa: F401
    import torch
    import transformer_lens  # noqa: F401
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    assert PACKAGE not in sys.modules, f"{PACKAGE} must not be imported here"


def copy_tree(target: Path) -> None:
    """Copy the files that git knows or would add, without large results and pictures."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in listed.split("\0"):
        source = ROOT / name
        if source.is_file() and not name.startswith("studies/") and source.suffix != ".png":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    if (ROOT / "studies").is_dir():
        (target / "studies").symlink_to(ROOT / "studies")


def mutate(root: Path, mutant: Mutant) -> None:
    """Apply a mutant to a copy of the tree."""
    (path,) = (p for p in _sources(root) if mutant.old in p.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8").replace(mutant.old, mutant.new)
    path.write_text(text, encoding="utf-8")


def begin(job: Job) -> None:
    """Start a job's child process."""
    tree = job.folder / "tree"
    tree.mkdir()
    copy_tree(tree)
    if job.mutant is not None:
        mutate(tree, job.mutant)
    job.start = time.monotonic()
    sys.stdout.flush()
    job.pid = os.fork()
    if job.pid == 0:
        status = 99
        try:
            os.setsid()  # so that what the tests start can be ended with it
            status = _run_tests(tree, job)
        finally:
            os._exit(status)


def _run_tests(tree: Path, job: Job) -> int:
    """In the child: the status of pytest, or 98 if it has tested another copy of the package."""
    import pytest

    output = os.open(job.folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    (job.folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(job.folder / "tmp")
    tempfile.tempdir = None
    os.chdir(tree)
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", here, str(ROOT)))]
    os.environ["PYTHONPATH"] = str(tree)
    status = int(pytest.main([*PYTEST, *job.args], plugins=[FirstFailure(job.folder / "failed")]))
    package = sys.modules.get(PACKAGE)
    if package is not None and not str(package.__file__).startswith(str(tree)):
        print(f"tested {package.__file__}, not the copy")
        status = 98
    sys.stdout.flush()
    return status


def end(job: Job, running: bool) -> None:
    """End what is left of a job's processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    if running:
        os.waitpid(job.pid, 0)


def run_all(jobs: list[Job], at_once: int, report: Any) -> dict[str, dict[str, Any]]:
    """Run jobs, ``at_once`` of them at a time; return what came of each by its name."""
    results: dict[str, dict[str, Any]] = {}
    waiting, running = jobs[::-1], list[Job]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop())
                begin(running[-1])
            time.sleep(0.05)
            for job in [*running]:
                pid, status = os.waitpid(job.pid, os.WNOHANG)
                seconds = time.monotonic() - job.start
                if pid == 0 and seconds < job.timeout:
                    continue
                end(job, running=pid == 0)
                running.remove(job)
                code = os.waitstatus_to_exitcode(status) if pid else None
                results[job.name] = _result(job, code, seconds)
                report(job, results[job.name])
                shutil.rmtree(job.folder, ignore_errors=True)
    finally:
        for job in running:
            end(job, running=True)
            shutil.rmtree(job.folder, ignore_errors=True)
    return results


def _result(job: Job, code: int | None, seconds: float) -> dict[str, Any]:
    failed, output = job.folder / "failed", job.folder / "output.txt"
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    if code in (5, 98):
        stop(f"{job.name}: no test ran, or on another copy of the package\n{text[-3000:]}")
    test = failed.read_text(encoding="utf-8") if failed.exists() else None
    if test is None and code:
        test = f"pytest ended with {code}: {text.strip()[-300:]}"
    outcome = "timeout" if code is None else "caught" if code else "survived"
    result = {"result": outcome, "seconds": round(seconds, 1), "test": test}
    if job.mutant is None and code != 0:
        result["output"] = text
    return result


def stop(message: str) -> None:
    """End with status 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def main() -> int:
    parser = argparse.ArgumentParser(description="Do the tests notice faults in the package?")
    parser.add_argument("--check", action="store_true", help="only look for the snippets")
    parser.add_argument("--only", action="append", metavar="AREA_OR_NAME", default=[])
    parser.add_argument("-j", type=int, default=2, metavar="N", help="mutants at once (2)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()

    if found := problems():
        stop("\n".join(found))
    unknown = {*options.only} - {*AREA_TESTS} - {mutant.name for mutant in MUTANTS}
    if unknown:
        stop(f"there is no area or mutant {', '.join(sorted(unknown))}")
    mutants = [m for m in MUTANTS if not options.only or {m.area, m.name} & {*options.only}]
    counts = {area: sum(m.area == area for m in mutants) for area in AREA_TESTS}
    print(f"{len(mutants)} mutants:", ", ".join(f"{n} {area}" for area, n in counts.items() if n))
    if options.check:
        return 0

    start = time.monotonic()
    import_slow_things()

    def report(job: Job, result: dict[str, Any]) -> None:
        area = job.mutant.area if job.mutant else "unchanged"
        test = " ".join((result["test"] or "").split())
        print(f"{result['result']:9}{result['seconds']:6.1f} s  {area} {job.name}  {test}")

    selections = dict.fromkeys(mutant.pytest_args for mutant in mutants)
    jobs = [Job(" ".join(args), args, None, 900.0) for args in selections]
    unchanged = run_all(jobs, options.j, report)
    for name, result in unchanged.items():
        if result["result"] != "survived":
            stop(f"the unchanged tree fails: {name}\n{result.get('output', '')[-5000:]}")

    jobs = []
    for mutant in mutants:
        usual = unchanged[" ".join(mutant.pytest_args)]["seconds"]
        timeout = max(MIN_TIMEOUT_S, SLOWEST * usual)
        jobs.append(Job(mutant.name, mutant.pytest_args, mutant, timeout))
    results = run_all(jobs, options.j, report)
    results = {m.name: {"area": m.area, **results[m.name]} for m in mutants}

    survivors = [name for name, result in results.items() if result["result"] == "survived"]
    new = [name for name in survivors if name not in KNOWN_SURVIVORS]
    seconds = time.monotonic() - start
    print(f"{len(results) - len(survivors)} of {len(results)} caught in {seconds / 60:.1f} minutes")
    for name in survivors:
        print(f"survived: {name}{'' if name in new else ' (known)'}")
    for name in KNOWN_SURVIVORS & {*results} - {*survivors}:
        print(f"caught, but in KNOWN_SURVIVORS: {name}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if new else 0


if __name__ == "__main__":
    raise SystemExit(main())

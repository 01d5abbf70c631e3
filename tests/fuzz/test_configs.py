"""Give configs random values, valid and invalid, and count the outcomes.

In a valid config of a random architecture, one to three fields get a random value: another right
one, one of another type, NaN, infinity, a negative or huge number, a text. An accepted config must
train for two steps, keep finite weights, and be the same again after a round trip through JSON.
A refused one must be a ValueError or TypeError whose text names a field that was changed, or says
``name=value is not allowed`` of a field that does not go with it. The fields of a comparison get
the same values. An accepted comparison runs, unless it is about a language model or too large.

"package" are configs in which it was a field of this package that did it, "SAELens" those in which
a field of SAELens did it alone, which are printed only.
"""

import contextlib
import io
import json
import multiprocessing
import random
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import logger as sae_lens_logger
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.run import run_comparison
from sae_lens_auxk.config import AuxConfig
from tests.fuzz import LENGTH, some_random
from tests.helpers import ARCHITECTURES, VARIANTS, build_config, build_trainer, kill_latents

OUTCOMES = ("works", "refused by name", "refused without", "crash", "not finite", "round trip")
OUTCOMES += ("hang", "not run")
GOOD = ("works", "refused by name", "not run")
SECONDS = 20
LARGE = 2000
MEMORY = 8 * 2**30
"""A huge d_sae must be refused by the allocator, not by the kernel."""

WRONG = (None, True, False, 0, 1, -1, -(2**63), 2**31, 2**63 - 1, 2**63, 10**400, 2.5, -0.5, 1e-300)
WRONG += (1e30, 1e308, float("nan"), float("inf"), -float("inf"), "", "12", "nan", "auto", "\x00")
WRONG += ([], [1], [[1]], ["auxk"], (1, 2), {}, {"a": 1}, {1}, b"x", 1j, object(), print, int)
WRONG += (Decimal(1), Fraction(1, 2), np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(1))
WRONG += (np.array([1, 2]), np.array(3), torch.tensor(3), torch.tensor([1.0, 2.0]), torch.float32)

NORMALIZATIONS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]
COUNTS = [1, 2, 3, 24, 25, 10**6]
RIGHT: dict[str, list[Any]] = {
    "aux_variant": [*VARIANTS, "auxkk", "AUXK"],
    "aux_loss_coefficient": [None, 0, 0.0, 1, 1 / 32, 1e-30, 1e10],
    "k_aux": [None, *COUNTS],
    "aux_bias": ["decoder", "matched", "none", "Decoder"],
    "aux_relu": [True, False],
    "dead_criterion": [None, "tokens", "steps", "batch", "epochs"],
    "dead_threshold_tokens": [None, *COUNTS],
    "aux_batch_fraction": [1, 0.5, 1e-9, 1.0, 2],
    "aux_warm_up_steps": [0, *COUNTS],
    "aux_decay_start_step": [None, 0, *COUNTS],
    "aux_decay_steps": [0, *COUNTS],
    "resample_every_steps": [None, *COUNTS],
    "resample_stop_step": [None, *COUNTS],
    "b_dec_init": ["zeros", "mean", "geometric_median", "median"],
    "d_in": [1, 2, 8],
    "d_sae": [1, 2, 24],
    "k": [1, 2, 0.5, 2.5, 24, 25],
    "dtype": ["float32", "float64", "bfloat16", "float16"],
    "normalize_activations": NORMALIZATIONS,
    "matryoshka_widths": [[24], [1, 24], [1, 2, 3], [True, 24], [24, 12], [8, 24.0]],
}
RIGHT_IN_COMPARISON: dict[str, list[Any]] = {
    **{name: [1, 2, 8, 24, 32, 320, 321] for name in ("d_sae", "training_samples", "batch_size")},
    **{name: [None, 1, 8, 33] for name in ("dead_after", "eval_samples", "n_features", "d_in")},
    "preset": [None, ["saelens"], ["biases"], ["variants", "saelens"], ["saelens", "saelens"]],
    "aux_variant": [None, ["none"], [*VARIANTS], ["auxk", "auxkk"]],
    "aux_loss_coefficient": [None, [0.1], [0, 1], [-1], ["1"], [float("nan")], [10**400]],
    "architecture": [[name] for name in ARCHITECTURES] + [ARCHITECTURES, ["topk"]],
    "k": [None, [1, 2], [24], [25], [1, 1]],
    "seeds": [[0], [1, 2], [0, 0], [2**63 - 1], [2**62]],
    "lr": [None, 1e-3, 1, 1e10],
    "device": ["cpu", "cuda:7", "meta", "gpu"],
    "cases": [[{}], [{"name": "a"}, {"name": "b"}], [{"architecture": "auxk-gated"}]],
    "sae": [{}, {"aux_relu": True}, {"nothing": 1}, {"topk_threshold_lr": 0.1}],
    "synthetic_model": [None, {}, {"seed": 3}, {"hidden_dim": 3}, {"nothing": 1}, "no/such", ""],
    "model_name": [None, "", "no-such-model"],
    "dataset_path": [None, "", "no-such-text"],
    "model_class_name": ["HookedTransformer", "AutoModelForCausalLM", "GPT"],
    "hook_name": [None, "", "blocks.1.hook_resid_pre"],
    "context_size": [1, 2, 128],
    "language_model": [{}, {"seed": 1}, {"nothing": 1}, {"n_batches_in_buffer": 4}],
}
SMALL: dict[str, Any] = {
    "aux_variant": ["auxk"],
    "k": [2],
    "seeds": [0],
    "d_sae": 24,
    "training_samples": 320,
    "batch_size": 32,
    "dead_after": 64,
    "eval_samples": 64,
    "n_features": 16,
    "d_in": 8,
}
LANGUAGE = {"model_name": "no-such-model", "dataset_path": "no-such-text"}
SIZES = ("training_samples", "eval_samples", "d_sae", "n_features", "d_in", "context_size")

OWN = {field.name for field in fields(AuxConfig)}
KNOWN = OWN | {field.name for field in fields(Comparison)}


class Hang(BaseException):
    """A config that takes longer than ``SECONDS``."""


@contextlib.contextmanager
def time_limit() -> Generator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def outcome(make: Callable[[], Any], use: Callable[[Any], str], changed: set[str]) -> list[str]:
    """The outcome of a config, and the error."""
    with time_limit():
        try:
            made = make()
        except Hang:
            return ["hang", "while it was made"]
        except Exception as error:
            named = isinstance(error, ValueError | TypeError) and names(error, changed)
            return ["refused by name" if named else "refused without", shown(error)]
        try:
            return [use(made), ""]
        except Hang:
            return ["hang", "while it was used"]
        except MemoryError:
            return ["not run", ""]
        except Exception as error:
            if "can't allocate memory" in str(error):
                return ["not run", ""]
            # A model that is not there is told only when it is looked for.
            named = isinstance(error, ValueError | OSError) and names(error, changed)
            return ["refused by name" if named else "crash", shown(error)]


def names(error: Exception, changed: set[str]) -> bool:
    named = {*re.findall(r"\w+", str(error))}
    other = {*re.findall(r"\b(\w+)=\S+ is not allowed", str(error))}
    return bool(named & changed or other & KNOWN)


def shown(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:160]}"


def train(cfg: Any) -> str:
    """Two steps, with dead latents for the loss; the config's round trip."""
    if max(cfg.d_in, cfg.d_sae) > LARGE:
        return "not run"
    written = json.dumps(cfg.to_dict())
    again = TrainingSAEConfig.from_dict(json.loads(written))
    if type(again) is not type(cfg) or json.dumps(again.to_dict()) != written or again != cfg:
        return "round trip"
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    kill_latents(sae, cfg.d_sae // 2)
    trainer = build_trainer(sae, dead_feature_window=0)
    for _ in range(2):
        trainer.step(torch.randn(16, cfg.d_in, dtype=sae.dtype))
    finite = all(parameter.isfinite().all() for parameter in sae.parameters())
    return "works" if finite else "not finite"


def compare(comparison: Resolved) -> str:
    """The comparison itself; the round trip of its fields."""
    given = comparison.to_dict()
    if json.loads(json.dumps(given)) != given or Resolved(**given) != comparison:
        return "round trip"
    if comparison.model_name or any((getattr(comparison, name) or 0) > LARGE for name in SIZES):
        return "not run"
    with tempfile.TemporaryDirectory() as folder:
        run_comparison(comparison, Path(folder))
        results = json.loads(Path(folder, "results.json").read_text())
    # A case may fail by itself, as with too large a learning rate, and the report says so.
    failed = [run["error"] for run in results["runs"] if run["status"] != "finished"]
    if unclear := [error for error in failed if not error.startswith("FloatingPointError: the")]:
        raise RuntimeError(unclear[0])
    return "works"


def config_attack(rng: random.Random) -> tuple[str, str, dict[str, Any], str]:
    """Its outcome, whose it is, the fields and the error."""
    architecture = rng.choice(ARCHITECTURES)
    config_class = type(build_config(architecture))
    known = [field.name for field in fields(config_class) if field.name != "metadata"]
    own = [name for name in known if name in OWN]
    chosen = rng.sample(own if rng.random() < 0.5 else known, rng.choice((1, 1, 2, 3)))
    given = {name: value_for(rng, name, RIGHT) for name in chosen}

    def attempt(values: dict[str, Any]) -> list[str]:
        return outcome(lambda: build_config(architecture, **values), train, set(values))

    result, error = attempt(given)
    whose = "package" if OWN & {*given} else "SAELens"
    theirs = {name: value for name, value in given.items() if name not in OWN}
    if result not in GOOD and theirs and attempt(theirs)[0] not in GOOD:
        whose = "SAELens"
    return result, whose, {"architecture": architecture, **given}, error


def comparison_attack(rng: random.Random) -> tuple[str, str, dict[str, Any], str]:
    """The same of a comparison."""
    base = dict(SMALL)
    if rng.random() < 0.2:
        base |= {"n_features": None, "d_in": None, **LANGUAGE}
    names_known = [field.name for field in fields(Comparison)]
    given = {
        name: value_for(rng, name, RIGHT_IN_COMPARISON)
        for name in rng.sample(names_known, rng.choice((1, 1, 2, 3)))
    }
    for name, key in (("sae", None), ("cases", 0)):
        if name in given and rng.random() < 0.6:  # one of the SAE's fields
            field = rng.choice([*RIGHT])
            inner = {field: value_for(rng, field, RIGHT)}
            given[name] = inner if key is None else [inner]
    changed = {*given, *given["sae"]} if isinstance(given.get("sae"), dict) else {*given}
    # What is wrong in a case is said of the case.
    changed |= {"case"} if {"sae", "cases"} & changed else set()

    def make() -> Resolved:
        return resolve(Comparison(**(base | given)))

    result, error = outcome(make, compare, changed)
    # Of a case's dtype and the like, SAELens finds out in training.
    inner = [field for name in ("sae", "cases") for field in RIGHT if field in str(given.get(name))]
    theirs = bool(inner) and not OWN & {*inner}
    return result, "SAELens" if theirs else "comparison", given, error


def value_for(rng: random.Random, name: str, right: dict[str, list[Any]]) -> Any:
    if name in right and rng.random() < 0.5:
        return rng.choice(right[name])
    return rng.choice(WRONG)


def attack() -> None:
    warnings.simplefilter("ignore")
    sae_lens_logger.setLevel("CRITICAL")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rng = some_random()
    counts: dict[str, Counter[str]] = {}
    bad: dict[tuple[str, str, str], tuple[dict[str, Any], str]] = {}
    for attempt in [config_attack] * (200 * LENGTH) + [comparison_attack] * (50 * LENGTH):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            result, whose, given, error = attempt(rng)
        counts.setdefault(whose, Counter())[result] += 1
        if result not in GOOD:
            kind = re.sub(r"[0-9]+|'[^']*'", "_", error)[:60]
            bad.setdefault((whose, result, kind), (given, error))
    print("\n| fields of |", " | ".join(OUTCOMES), "|")
    print("|---" * (len(OUTCOMES) + 1) + "|")
    for whose, counted in counts.items():
        print(f"| {whose} |", " | ".join(str(counted[name]) for name in OUTCOMES), "|")
    for (whose, result, _), (given, error) in bad.items():
        print(f"{whose}, {result}: {str(given)[:300]} {error}", file=sys.stderr)
    assert all(counts["package"][outcome] > 0 for outcome in ("works", "refused by name"))
    sys.exit(int(any(whose != "SAELens" for whose, *_ in bad)))


def test_a_field_works_or_is_refused_by_name() -> None:
    # In its own process: the limit on memory is for good.
    process = multiprocessing.get_context("fork").Process(target=attack)
    process.start()
    process.join()
    assert process.exitcode == 0

"""Put methods of one's own into SAEs, and something between their steps, and count.

A random SAE is trained for six steps, and again on the same batches with

- something between the steps: a validation, SAELens's own evaluations, a save, a copy that trains
  on. It must end bit for bit as without.
- methods of one's own, of a subclass or set on the instance, that call the package's, and may
  change the result. They must be called where SAELens's step calls them, the training must end as
  it does with SAELens's own dense step, bit for bit, and no step may be captured.

Of an SAE of the TopK family without them, two steps must run the same operations, for a CUDA graph.
"""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from types import MethodType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sae_lens import ActivationsStore, TrainingSAE, run_evals
from sae_lens.evals import get_eval_everything_config

from sae_lens_auxk import runner_config
from sae_lens_auxk.ops import selection
from sae_lens_auxk.saelens.names import ActivationScaler
from sae_lens_auxk.step.sparse import REPLACED
from tests import tiny_model
from tests.fuzz import LENGTH, some_random
from tests.helpers import (
    PAIRS,
    TOPK_ARCHITECTURES,
    build_config,
    build_trainer,
    forward,
    kill_latents,
    step_input,
)
from tests.step.test_function_of_tensors import require_the_same_operations

D_IN, BATCH, N_STEPS = tiny_model.D_MODEL, 16, 6
CRITERIA = (None, "tokens", "steps", "batch")
TOPK_PAIRS = [pair for pair in PAIRS if pair[0] in TOPK_ARCHITECTURES]
ELSEWHERE = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(7)) * 3 + 2

# --- between steps ---------------------------------------------------------------------------


@torch.no_grad()
def validate(trainer: Any, folder: Path) -> None:  # noqa: ARG001
    trainer.sae.eval()
    forward(trainer.sae, ELSEWHERE, torch.arange(trainer.sae.cfg.d_sae) < 9, 0)
    trainer.sae.train()


@torch.no_grad()
def look(trainer: Any, folder: Path) -> None:  # noqa: ARG001
    trainer.sae(ELSEWHERE)
    trainer.sae.decode(trainer.sae.encode(ELSEWHERE))
    torch.randn(100)


def evaluate(trainer: Any, folder: Path) -> None:  # noqa: ARG001
    """As SAELens's runner does between steps, and with all that it can measure."""
    model = tiny_model.gpt2()
    run = tiny_model.run_fields(k=3)
    store = ActivationsStore.from_config(
        model, runner_config("auxk-topk", **run), tiny_model.tokens()
    )
    trainer.sae.cfg.metadata.hook_name = run["hook_name"]
    trainer.sae.eval()
    with patch("sae_lens.evals.get_special_token_ids", return_value=[]):
        run_evals(
            trainer.sae, store, model, ActivationScaler(), get_eval_everything_config(2, 1, 1), {}
        )
    trainer.sae.train()


def save(trainer: Any, folder: Path) -> None:
    trainer.sae.save_model(folder / "model")
    trainer.sae.save_inference_model(folder / "inference")


def train_a_copy(trainer: Any, folder: Path) -> None:  # noqa: ARG001
    other = build_trainer(copy.deepcopy(trainer.sae), dead_feature_window=2)
    for _ in range(3):
        other.step(ELSEWHERE)


BETWEEN = (validate, look, evaluate, save, train_a_copy)

# --- methods of one's own --------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "encode_with_hidden_pre": lambda _, result: (result[0] * 1.5, result[1]),
    "process_sae_in": lambda _, result: result * 0.5,
    "decode": lambda _, result: result + 0.1,
    "calculate_aux_loss": lambda sae, result: {**result, "extra": sae.W_enc.square().sum()},
    "get_coefficients": lambda _, result: result,
    "training_forward_pass": lambda _, result: result,
    "encode": lambda _, result: result * 2,
    "forward": lambda _, result: result * 2,
}


def with_own(sae: Any, names: dict[str, bool], of: str, called: set[str]) -> None:
    """Give an SAE methods of its own; ``names`` says which change the result."""

    def method(name: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
        def own(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            result = theirs(self, *args, **kwargs)
            return CHANGES[name](self, result) if names[name] else result

        return own

    cls = type(sae)
    methods = {name: method(name, getattr(cls, name)) for name in names}
    if of == "subclass":
        sae.__class__ = type("Own", (cls,), methods)
    else:
        for name, own in methods.items():
            setattr(sae, name, MethodType(own, sae))


# ---------------------------------------------------------------------------------------------


def some_config(rng: Random, pairs: list[tuple[str, str]], criteria: tuple[Any, ...]) -> Any:
    architecture, variant = rng.choice(pairs)
    modes = ("none", "none", "layer_norm", "constant_norm_rescale")
    fields: dict[str, Any] = {
        "aux_variant": variant,
        "d_in": D_IN,
        "dead_threshold_tokens": 40,
        "dead_criterion": rng.choice(criteria),
        "aux_bias": rng.choice(("decoder", "matched", "none")),
        "aux_relu": rng.random() < 0.5,
        "k_aux": rng.choice((None, 1, 4)),
        "aux_batch_fraction": rng.choice((1.0, 0.5)),
        "aux_warm_up_steps": rng.choice((0, 4)),
        "resample_every_steps": rng.choice((None, None, 2)),
        "b_dec_init": rng.choice(("zeros", "mean", "geometric_median")),
        "normalize_activations": rng.choice(modes),
        "apply_b_dec_to_input": rng.random() < 0.5,
        "dtype": rng.choice(("float32", "float32", "float64")),
    }
    config_class = type(build_config(architecture))
    if fields["normalize_activations"] in config_class.unsupported_normalizations:
        fields["normalize_activations"] = "none"
    return build_config(architecture, **fields)


def trained(cfg: Any, prepare: Any = None, between: Any = ()) -> dict[str, Any]:
    """The state of SAE and optimizer after the steps; ``between`` are done in turn before them."""
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    kill_latents(sae, 8)
    if prepare is not None:
        prepare(sae)
    trainer = build_trainer(sae, dead_feature_window=2, total_training_samples=BATCH * N_STEPS)
    generator = torch.Generator().manual_seed(1)
    for step in range(N_STEPS):
        for do in between[step : step + 1]:
            do(trainer)
        trainer.step(torch.randn(BATCH, D_IN, generator=generator, dtype=sae.dtype))
        trainer.n_training_steps += 1
    moments = trainer.optimizer.state_dict()["state"]
    state = {f"{i} {name}": x for i, of in moments.items() for name, x in of.items()}
    return {**sae.state_dict(), **state}


def require_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    differing = {name for name in {*a, *b} if not torch.equal(a[name], b[name])}
    assert not differing, differing


def between_steps(rng: Random, folder: Path, counts: Counter[str]) -> None:
    cfg = some_config(rng, PAIRS, CRITERIA)
    chosen = rng.choices(BETWEEN, k=N_STEPS)
    counts.update(do.__name__ for do in chosen)
    between = [partial(do, folder=folder) for do in chosen]
    require_same(trained(cfg), trained(cfg, between=between))


def own_methods(rng: Random, folder: Path, counts: Counter[str]) -> None:  # noqa: ARG001
    cfg = some_config(rng, PAIRS, CRITERIA)
    names = [name for name in CHANGES if hasattr(TrainingSAE, name) or name in REPLACED]
    changed = {name: rng.random() < 0.5 for name in rng.sample(names, rng.choice((1, 1, 2)))}
    of, called = rng.choice(("subclass", "instance")), set[str]()
    is_replaced = bool({*changed} & {*REPLACED})
    counts.update([of, *changed])

    def theirs(sae: Any) -> None:
        with_own(sae, changed, of, called)
        if cfg.architecture() in TOPK_ARCHITECTURES and (is_replaced or of == "subclass"):
            batch = sae._prepare(step_input(torch.randn(BATCH, D_IN)))
            assert not sae._captured._can_be_captured(sae, batch)

    def saelens_step(sae: Any) -> None:
        with_own(sae, changed, of, set())
        sae.may_be_sparse = not is_replaced

    require_same(trained(cfg, theirs), trained(cfg, saelens_step))
    assert {*changed} & {*REPLACED, "training_forward_pass"} <= called, changed


def captured(rng: Random, folder: Path, counts: Counter[str]) -> None:  # noqa: ARG001
    cfg = some_config(rng, TOPK_PAIRS, (None, "tokens", "batch"))
    counts[cfg.aux_variant] += 1
    require_the_same_operations(TrainingSAE.from_dict(cfg.to_dict()))


@pytest.mark.filterwarnings("ignore")
def test_steps_are_what_saelens_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selection, "SLOW_TO_ALLOCATE", ())  # as on a GPU
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    rng, counts, bad = some_random(), Counter[str](), list[str]()
    for attack in (between_steps, own_methods, captured) * (8 * LENGTH):
        counts[attack.__name__] += 1
        try:
            attack(rng, tmp_path, counts)
        except Exception as error:
            bad.append(f"{attack.__name__}: {type(error).__name__}: {str(error)[:300]}")
    with capsys.disabled():
        print(f"\n{dict(counts)}")
    assert not bad, bad

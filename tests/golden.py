"""Training runs whose results may not change: what ``golden.safetensors`` records.

Each case is 200 steps by SAELens's own runner, interrupted after a checkpoint in the middle, from
which a second runner goes on to the end. Every field that matters is given here, so that no default
does. Latents die, are revived by the loss, and are resampled.

The SAE is in float64, and its inputs are multiples of 1/1024 that every machine computes exactly.
No two rows are equal, so no selection has a tie.

Write a record, which on one machine stays the same bit for bit until a computation changes, and
compare two::

    python -m tests.golden FILE [--dtype float32] [--device cuda]
    python -m tests.golden --compare A B
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_auxk import runner_config

FILE = Path(__file__).with_name("golden.safetensors")

N_STEPS = 200
D_IN = 12
D_SAE = 32
BATCH_SIZE = 32
N_TOKENS = N_STEPS * BATCH_SIZE

COMMON: dict[str, Any] = {
    # the SAE
    "d_in": D_IN,
    "d_sae": D_SAE,
    "decoder_init_norm": 0.5,
    "reshape_activations": "none",
    # the auxiliary loss
    "dead_criterion": "tokens",
    "dead_threshold_tokens": 5 * BATCH_SIZE,
    "aux_warm_up_steps": 10,
    "aux_decay_start_step": 150,
    "aux_decay_steps": 40,
    "resample_every_steps": 60,
    "resample_stop_step": 150,
    # the run
    "model_name": "tiny",
    "hook_name": "blocks.0.hook_resid_pre",
    "context_size": BATCH_SIZE,
    "streaming": False,
    "prepend_bos": False,
    "training_tokens": N_TOKENS,
    "train_batch_size_tokens": BATCH_SIZE,
    # One prompt is one training batch, and nothing is shuffled, so that the resumed run sees the
    # batches that come after those of the first.
    "store_batch_size_prompts": 1,
    "n_batches_in_buffer": 1,
    "activations_mixing_fraction": 0.0,
    "seed": 0,
    "lr": 5e-3,
    "lr_end": 5e-4,
    "lr_scheduler_name": "constant",
    "lr_warm_up_steps": 5,
    "lr_decay_steps": 20,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "autocast": False,
    "dead_feature_window": 5,
    "feature_sampling_window": 50,
    "output_path": None,
    "save_final_checkpoint": False,
    "log_to_wandb": False,
    "verbose": False,
}

TOPK: dict[str, Any] = {"k": 3, "use_sparse_activations": False}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "auxk-topk": {
        **TOPK,
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "k_aux": 6,
        "aux_bias": "decoder",
        "aux_relu": False,
        "aux_normalize": False,
        "aux_batch_fraction": 1.0,
    },
    "auxk-batchtopk": {
        **TOPK,
        "k": 2.5,
        "topk_threshold_lr": 0.02,
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": False,
        "normalize_activations": "constant_norm_rescale",
        "k_aux": 6,
        "aux_bias": "matched",
        "aux_relu": True,
        "aux_normalize": True,
        "aux_batch_fraction": 1.0,
    },
    "auxk-matryoshka-batchtopk": {
        **TOPK,
        "matryoshka_widths": [8, 16, 32],
        "use_matryoshka_aux_loss": True,
        "topk_threshold_lr": 0.01,
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "k_aux": 2,
        "aux_bias": "none",
        "aux_relu": False,
        "aux_normalize": False,
        "aux_batch_fraction": 0.5,
    },
    "auxk-abstopk": {
        **TOPK,
        "rescale_acts_by_decoder_norm": False,
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",
        "k_aux": 4,
        "aux_bias": "none",
        "aux_relu": False,
        "aux_normalize": True,
        "aux_batch_fraction": 1.0,
    },
    "auxk-jumprelu": {
        "jumprelu_init_threshold": 0.1,
        "jumprelu_bandwidth": 0.2,
        "jumprelu_sparsity_loss_mode": "step",
        "l0_coefficient": 0.1,
        "l0_warm_up_steps": 10,
        "pre_act_loss_coefficient": None,
        "jumprelu_tanh_scale": 4.0,
        "jumprelu_ste_to_input": False,
        "target_l0": None,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "k_aux": 1,
        "aux_bias": "matched",
        "aux_relu": False,
        "aux_normalize": False,
        "aux_batch_fraction": 0.5,
    },
    "auxk-standard": {
        "dead_threshold_tokens": 3 * BATCH_SIZE,
        "l1_coefficient": 1.5,
        "lp_norm": 1.0,
        "l1_warm_up_steps": 10,
        "apply_b_dec_to_input": False,
        "normalize_activations": "constant_norm_rescale",
        "k_aux": 1,
        "aux_bias": "decoder",
        "aux_relu": False,
        "aux_normalize": True,
        "aux_batch_fraction": 1.0,
    },
    "auxk-gated": {
        "dead_threshold_tokens": 3 * BATCH_SIZE,
        "l1_coefficient": 1.5,
        "l1_warm_up_steps": 10,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "k_aux": 1,
        "aux_bias": "decoder",
        "aux_relu": False,
        "aux_normalize": False,
        "aux_batch_fraction": 1.0,
    },
}

COEFFICIENTS = {"auxk": 1 / 4, "pursuit": 1 / 2, "none": 0.0}


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        architecture: a name in SAELens's registry.
        variant: the ``aux_variant``.
        step: "sparse", what the package does by itself, or "dense". Architectures outside the TopK
            family have one step, which goes by "dense".
    """

    architecture: str
    variant: str
    step: str

    @property
    def name(self) -> str:
        return f"{self.architecture}/{self.variant}/{self.step}"


CASES = [
    Case(architecture, variant, step)
    for architecture in ARCHITECTURES
    for variant in COEFFICIENTS
    for step in (["sparse", "dense"] if "topk" in architecture else ["dense"])
]


def record(case: Case, dtype: str = "float64", device: str = "cpu") -> dict[str, torch.Tensor]:
    """Train, and return the final parameters and counts, and the losses of all steps, by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            sae, steps = run(case, Path(folder), dtype=dtype, device=device)
    finally:
        torch.set_num_threads(threads)
    result = dict(sae.named_parameters())
    for name in ("topk_threshold", "tokens_since_fired"):
        if hasattr(sae, name):
            result[name] = getattr(sae, name)
    result["losses"] = torch.stack([step.loss for step in steps])
    for name, value in result.items():
        value = value.detach().cpu()
        result[name] = value.double() if value.is_floating_point() else value
    return result


def run(case: Case, folder: Path, **fields: Any) -> tuple[Any, list[Any]]:
    """Train with an interruption.

    Args:
        case: what to train.
        folder: an empty folder for the checkpoint.
        fields: further fields of the config, which replace those of the case.

    Returns:
        The SAE, and SAELens's ``TrainStepOutput`` of each step.
    """
    first = _runner(case, n_checkpoints=1, checkpoint_path=str(folder), **fields)
    outputs = _outputs_of(first, interrupted=lambda: any(folder.glob("*/*")))
    checkpoint = next(folder.glob("*/*"))
    second = _runner(case, checkpoint_path=None, resume_from_checkpoint=str(checkpoint), **fields)
    outputs += _outputs_of(second)
    assert len(outputs) == N_STEPS
    return second.sae, outputs


def _runner(case: Case, **fields: Any) -> LanguageModelSAETrainingRunner:
    """A runner with a new SAE."""
    fields = {
        **COMMON,
        **ARCHITECTURES[case.architecture],
        "aux_variant": case.variant,
        "aux_loss_coefficient": COEFFICIENTS[case.variant],
        **fields,
    }
    cfg = runner_config(case.architecture, **fields)
    model, dataset = _model(cfg.device), _dataset()
    torch.manual_seed(0)  # after the model, which is made only once
    runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    if hasattr(runner.sae, "threshold") and cfg.dtype == "float64":
        _keep_threshold_in_float64(runner.sae)
    _weaken(runner.sae, D_SAE // 4)
    if case.step == "dense":  # a hook needs the dense tensors
        runner.sae.hook_sae_input.register_forward_hook(lambda module, inputs, output: None)
    return runner


def _keep_threshold_in_float64(sae: Any) -> None:
    """Leave out what SAELens's JumpReLU does in ``_apply``: cast the threshold to float32.

    Adam's steps in float32 are not the same on every CPU.
    """
    sae._apply = partial(torch.nn.Module._apply, sae)
    sae.threshold.data = sae.threshold.data.double()


@torch.no_grad()
def _weaken(sae: Any, n: int) -> None:
    """Start with ``n`` latents that hardly ever fire."""
    sae.W_enc[:, :n] *= 0.125
    for name in ("b_enc", "b_gate", "b_mag"):
        if hasattr(sae, name):
            getattr(sae, name)[:n] -= 0.25


class _Interrupted(Exception):
    pass


def _outputs_of(
    runner: LanguageModelSAETrainingRunner, interrupted: Callable[[], bool] = lambda: False
) -> list[Any]:
    """Run to the end or until interrupted, and return what each step of the SAE returned."""
    outputs: list[Any] = []
    step: Callable[..., Any] = runner.sae.training_forward_pass

    def noting(step_input: Any) -> Any:
        if interrupted():
            raise _Interrupted
        # Before 2.12 torch has no gradient of the squared error of float64 and float32.
        step_input.sae_in = step_input.sae_in.to(runner.sae.dtype)
        outputs.append(step(step_input=step_input))
        return outputs[-1]

    runner.sae.training_forward_pass = noting  # type: ignore[method-assign]
    with suppress(_Interrupted):
        runner.run()
    return outputs


@cache
def _model(device: str) -> HookedTransformer:
    """A model that maps each token to a sum of some of 24 directions, a constant and noise."""
    generator = torch.Generator().manual_seed(0)
    integers = partial(torch.randint, generator=generator)
    directions = integers(-8, 9, (24, D_IN)) / 16
    shares = torch.tensor([24, 16, 12, 8, 6, 4, 3, 2, 2, 1, 1, 1] * 2)  # in percent
    active = integers(0, 100, (N_TOKENS, 24)) < shares
    amounts = integers(8, 32, (N_TOKENS, 24)) / 16
    noise = integers(-64, 65, (N_TOKENS, D_IN)) / 1024
    constant = integers(-4, 5, (D_IN,)) / 8
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1,
            d_model=D_IN,
            n_ctx=BATCH_SIZE,
            n_heads=1,
            d_head=4,
            d_vocab=N_TOKENS,
            act_fn="relu",
            model_name="tiny",
            seed=0,
            device=device,
        )
    )
    model.W_E.data.copy_((amounts * active) @ directions + constant + noise)
    model.W_pos.data.zero_()
    return model


@cache
def _dataset() -> Dataset:
    """Each token once."""
    rows = torch.arange(N_TOKENS).view(-1, BATCH_SIZE)
    return Dataset.from_list([{"tokens": row} for row in rows.tolist()])


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Print how much two records differ, case by case, and return whether they are bit-equal."""
    equal = True
    for case in CASES:
        of_a, of_b = of_case(a, case), of_case(b, case)
        if of_a.keys() != of_b.keys():
            print(f"{case.name}: {sorted(of_a)} and {sorted(of_b)}")
            equal = False
            continue
        if all(torch.equal(of_a[name], of_b[name]) for name in of_a):
            print(f"{case.name}: {'bit-equal' if of_a else 'in neither'}")
            continue
        equal = False
        apart = {name: float((of_a[name] - of_b[name]).abs().max()) for name in of_a}
        most = max(apart, key=lambda name: apart[name])
        text = f"{case.name}: {apart[most]:.1e} apart in {most}"
        differ = (of_a["losses"] != of_b["losses"]).nonzero()
        if len(differ) > 0:
            text += f", the loss from step {int(differ[0])} on"
        print(text)
    return equal


def of_case(tensors: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """The tensors of one case in a file of all cases."""
    start = f"{case.name}/"
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="where to write the record")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two records")
    args = parser.parse_args()
    if args.compare:
        a, b = map(load_file, args.compare)
        return 0 if compare(a, b) else 1
    if args.file is None:
        parser.error("FILE or --compare A B is needed")
    tensors = {
        f"{case.name}/{name}": value
        for case in CASES
        for name, value in record(case, args.dtype, args.device).items()
    }
    save_file(tensors, args.file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""One training step of an SAE whose latents are shared is that of one process."""

from typing import Any

import pytest
import torch

from tests.helpers import TOPK_ARCHITECTURES, VARIANTS, forward, gradients_of
from tests.sharded.helpers import D_IN, D_SAE, both, part
from tests.sharded.processes import COUNTS, SEVERAL, device, in_processes

FIELDS: list[dict[str, Any]] = [
    {},
    {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False},
    {"dead_criterion": "batch", "aux_batch_fraction": 0.5, "k_aux": 40},
    {"dead_criterion": "batch", "aux_normalize": True, "aux_bias": "matched", "k_aux": 2},
    {"dead_criterion": "batch", "b_dec_init": "geometric_median"},
]


def _equal_steps(architecture: str, variants: list[str], fields: list[dict[str, Any]]) -> None:
    for variant in variants:
        for given in fields:
            if given.get("use_matryoshka_aux_loss") and variant == "multi_topk":
                continue
            _equal_step(
                architecture,
                **{"aux_variant": variant, "dead_criterion": "steps", "dtype": "float64", **given},
            )


def _equal_step(architecture: str, n_rows: int = 13, **fields: Any) -> None:
    what = f"{architecture} {fields}"
    whole, shared = both(architecture, **fields)
    torch.manual_seed(2)
    x = torch.randn(n_rows, D_IN, dtype=whole.dtype, device=device())
    dead = (torch.rand(D_SAE) < 0.4).to(x.device)
    a, b = (forward(sae, x, dead) for sae in (whole, shared))
    assert {*a.losses} == {*b.losses}, what
    for name, loss in a.losses.items():
        torch.testing.assert_close(b.losses[name], loss, msg=lambda m, n=name: f"{what} {n}: {m}")
    torch.testing.assert_close(b.sae_out, a.sae_out)
    torch.testing.assert_close(b.feature_acts.to_dense(), a.feature_acts.to_dense())
    for name, metric in a.metrics.items():
        torch.testing.assert_close(b.metrics[name], metric, msg=lambda m, n=name: f"{what} {n} {m}")
    whole_grads, grads = (gradients_of(out.loss, sae) for out, sae in ((a, whole), (b, shared)))
    for name, gradient in whole_grads.items():
        expected = part(name, gradient, shared)
        torch.testing.assert_close(grads[name], expected, msg=lambda m, n=name: f"{what} {n}: {m}")
    torch.testing.assert_close(shared.b_dec, whole.b_dec)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(dict(shared.named_buffers())[name], buffer)


# Only Matryoshka's levels end where a process's latents do, with some counts and not with others.
# With one GPU the first case is listed twice.
CASES = [
    ("auxk-topk", 1),
    *[(name, n) for name in TOPK_ARCHITECTURES for n in COUNTS if n == SEVERAL or "mat" in name],
]


@pytest.mark.parametrize(("architecture", "n"), dict.fromkeys(CASES))
def test_losses_and_gradients_are_those_of_one_process(architecture: str, n: int) -> None:
    fields = FIELDS
    if "matryoshka" in architecture:
        fields = [*FIELDS, {"use_matryoshka_aux_loss": True}]
    in_processes(n, _equal_steps, architecture, VARIANTS, fields)


def _refuses_a_dense_step() -> None:
    shared = both("auxk-topk")[1]
    x = torch.randn(5, D_IN, device=device())
    forward(shared, x)
    handle = shared.hook_sae_acts_post.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="supports only the sparse training step: no hooks"):
        forward(shared, x)
    handle.remove()
    shared.may_be_sparse = False
    with pytest.raises(RuntimeError, match="not SAE_LENS_AUXK_OPS=dense"):
        forward(shared, x)


def test_a_step_that_has_to_be_dense_is_refused() -> None:
    in_processes(2, _refuses_a_dense_step)


def _measures() -> None:
    shared = both("auxk-batchtopk", dead_threshold_tokens=5, resample_every_steps=1)[1]
    x = torch.randn(5, D_IN, device=device())
    forward(shared, x)
    before, drawn = {k: v.clone() for k, v in shared.state_dict().items()}, shared.drawn
    shared.eval()
    with torch.no_grad():
        forward(shared, x + 1, step=1)
    assert shared.drawn is drawn is not None
    for name, value in shared.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_step_in_eval_mode_changes_nothing() -> None:
    in_processes(2, _measures)

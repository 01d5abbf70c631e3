"""The evaluation beside an SAE is of that SAE, and its numbers are right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_lens_auxk import runner_config
from sae_lens_auxk.cli.train import _Runner
from sae_lens_auxk.saelens.evaluation import measure, read_evaluation
from tests import tiny_model
from tests.tiny_model import CONTEXT_SIZE


def test_train_keeps_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = tiny_model.run_fields(n_eval_batches=3, output_path=str(tmp_path), k=4)
    cfg = runner_config("auxk-topk", dead_threshold_tokens=200, **fields)
    torch.manual_seed(0)
    model: Any = tiny_model.gpt2()
    runner = _Runner(cfg, override_model=model, override_dataset=tiny_model.tokens())
    trained = runner.run()
    assert read_evaluation(tmp_path) is None
    read: list[torch.Tensor] = []
    get = runner.activations_store.get_batch_tokens

    def noted(*args: Any, **keywords: Any) -> torch.Tensor:
        read.append(get(*args, **keywords))
        return read[-1]

    runner.activations_store.get_batch_tokens = noted  # type: ignore[method-assign]
    assert measure(runner, lambda: trained) == 0
    said = capsys.readouterr().out
    found = read_evaluation(tmp_path)
    assert found is not None
    n_tokens = 3 * 4 * CONTEXT_SIZE
    assert (found["tokens"], found["ce_tokens"]) == (n_tokens, n_tokens)
    assert f"{found['silent_latents']} of 48 in {n_tokens} tokens" in said

    sae = SAE.load_from_disk(tmp_path)
    first, then = torch.cat(read[:3]), torch.cat(read[3:])
    hook = "blocks.1.hook_resid_pre"
    with torch.no_grad():
        x = model.run_with_cache(first, names_filter=[hook])[1][hook].flatten(0, 1)
        acts = sae.encode(x)
        rest = (x - sae.decode(acts)).square().sum() / (x - x.mean(0)).square().sum()

        def loss(change: Any) -> float:
            hooks = [(hook, lambda value, hook: change(value))]  # noqa: ARG005
            return model.run_with_hooks(then, return_type="loss", fwd_hooks=hooks).item()

        plain, zeros = loss(lambda value: value), loss(torch.zeros_like)
        with_sae = loss(lambda value: sae.decode(sae.encode(value)))
    assert found["explained_variance"] == pytest.approx(1 - rest.item(), abs=1e-4)
    assert found["l0"] == pytest.approx((acts > 0).sum().item() / n_tokens)
    assert found["silent_latents"] == int((acts == 0).all(dim=0).sum())
    assert found["ce_loss"] == pytest.approx(plain, abs=1e-4)
    assert found["ce_loss_with_sae"] == pytest.approx(with_sae, abs=1e-4)
    score = (zeros - with_sae) / (zeros - plain)
    assert found["ce_loss_score"] == pytest.approx(score, rel=1e-2)

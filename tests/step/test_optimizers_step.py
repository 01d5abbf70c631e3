"""What a step has drawn is put in by a hook of the optimizer, and by no other's."""

import copy
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from sae_lens_auxk import resample_with
from tests.helpers import build_sae, build_trainer, forward, kill_latents

N_DEAD = 9


def sae_with_dead(seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    sae = build_sae("auxk-topk", dead_threshold_tokens=100, **{"resample_every_steps": 2, **fields})
    kill_latents(sae, N_DEAD)
    sae.tokens_since_fired[:N_DEAD] = 1000
    return sae


def n_resampled(output: Any) -> int:
    return output.metrics["resampled_latents"]()


def train(trainer: Any, n_steps: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for _ in range(n_steps):
        counts.append(n_resampled(trainer.step(torch.randn(16, 8, generator=generator))))
        trainer.n_training_steps += 1
    return counts


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD", "RMSprop", "NAdam"])
def test_another_optimizer_puts_them_in_once_it_is_told(optimizer: str) -> None:
    sae = sae_with_dead()
    trainer = build_trainer(sae)
    trainer.optimizer = getattr(torch.optim, optimizer)(sae.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="or gives it another optimizer, must call"):
        assert train(trainer, 3) == [0, 0, 0]
    handle = resample_with(sae, trainer.optimizer)
    assert train(trainer, 2)[:2] in ([N_DEAD, 0], [0, N_DEAD])
    handle.remove()
    sae.tokens_since_fired[:N_DEAD] = 1000
    assert train(trainer, 1) == [0]


def test_each_trainer_puts_in_what_its_own_sae_has_drawn() -> None:
    """Steps of two trainers in turn; the one that does not resample stays as it is alone."""
    alone = sae_with_dead(seed=1, resample_every_steps=None)
    trainer = build_trainer(alone)
    for x in torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(5)):
        trainer.step(x)
        trainer.n_training_steps += 1

    a, b = sae_with_dead(seed=0), sae_with_dead(seed=1, resample_every_steps=None)
    of_a, of_b = build_trainer(a), build_trainer(b)
    counts = []
    for x in torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(5)):
        counts.append(n_resampled(of_a.step(x)))
        assert "resampled_latents" not in of_b.step(x).metrics
        of_a.n_training_steps += 1
        of_b.n_training_steps += 1
    assert counts == [0, N_DEAD, 0, 0]
    for name, value in alone.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def test_saes_of_one_trainer_each_get_their_own() -> None:
    saes = {"a": sae_with_dead(0), "b": sae_with_dead(1, resample_every_steps=3)}
    cfg = build_trainer(build_sae("auxk-topk")).cfg
    multi = MultiSAETrainer(cfg, saes, dict.fromkeys(saes, "x"), iter(()))
    counts: dict[str, list[int]] = {name: [] for name in saes}
    for x in torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(5)):
        for name, trainer in multi.trainers.items():
            counts[name].append(n_resampled(trainer.step(x)))
            trainer.n_training_steps += 1
    assert counts == {"a": [0, N_DEAD, 0, 0, 0, 0], "b": [0, 0, N_DEAD, 0, 0, 0]}


def test_trainings_in_threads_are_those_of_one_after_the_other() -> None:
    def run(seed: int, into: dict[int, Any], trainer: Any) -> None:
        into[seed] = (train(trainer, 12, seed), trainer.sae.state_dict())

    results: list[dict[int, Any]] = [{}, {}]
    for at_once, into in enumerate(results):
        trainers = [build_trainer(sae_with_dead(seed)) for seed in range(3)]
        threads = [
            threading.Thread(target=run, args=(seed, into, trainer))
            for seed, trainer in enumerate(trainers)
        ]
        for thread in threads:
            thread.start()
            if not at_once:
                thread.join()
        for thread in threads:
            thread.join()
    assert sum(results[0][0][0]) >= N_DEAD
    for seed in range(3):
        assert results[0][seed][0] == results[1][seed][0]
        for name, value in results[0][seed][1].items():
            assert torch.equal(value, results[1][seed][1][name]), name


def test_what_no_step_puts_in_is_dropped_by_the_next_forward() -> None:
    sae = sae_with_dead()
    trainer = build_trainer(sae)
    before = copy.deepcopy(sae.state_dict())
    forward(sae, torch.randn(16, 8), step=1)  # draws; the optimizer makes no step
    assert len(sae.drawn.latents) == N_DEAD
    with pytest.warns(UserWarning, match="this training loop resamples nothing"):
        forward(sae, torch.randn(16, 8), step=2)
    assert sae.drawn is None
    trainer.optimizer.step()
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(sae.state_dict()[name], before[name])


def test_parts_of_an_accumulated_batch_draw_anew_without_a_warning() -> None:
    sae = sae_with_dead()
    optimizer = torch.optim.Adam(sae.parameters())
    resample_with(sae, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            output = forward(sae, torch.randn(16, 8), step=1)
            output.loss.backward()
        optimizer.step()
    assert sae.drawn is None
    assert n_resampled(output) == N_DEAD


def test_an_error_in_a_step_leaves_nothing_for_the_next() -> None:
    """As a batch that is out of memory, whose step a caller may try again."""
    sae = sae_with_dead()
    trainer = build_trainer(sae)
    trainer.n_training_steps = 1

    def fail(_: Any) -> None:
        raise MemoryError

    handle = sae.W_dec.register_hook(fail)
    with pytest.raises(MemoryError):
        trainer.step(torch.randn(16, 8))
    handle.remove()
    trainer.optimizer.zero_grad()
    assert len(sae.drawn.latents) == N_DEAD
    trainer.n_training_steps = 2
    with pytest.warns(UserWarning, match="resamples nothing"):
        assert train(trainer, 1) == [0]


def test_a_load_drops_what_was_drawn(tmp_path: Path) -> None:
    sae = sae_with_dead()
    trainer = build_trainer(sae)
    sae.save_model(tmp_path)
    forward(sae, torch.randn(16, 8), step=1)
    sae.load_weights_from_checkpoint(tmp_path)
    assert sae.drawn is None
    trainer.optimizer.step()


def test_a_parametrised_weight_is_refused_at_the_first_step() -> None:
    sae = sae_with_dead()
    torch.nn.utils.parametrize.register_parametrization(sae, "W_dec", torch.nn.Identity())
    with pytest.raises(ValueError, match="does not work with a parametrised W_dec"):
        build_trainer(sae).step(torch.randn(16, 8))


def test_without_resampling_the_optimizer_has_no_hook() -> None:
    sae = sae_with_dead(resample_every_steps=None)
    assert not build_trainer(sae).optimizer._optimizer_step_post_hooks
    assert not sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks

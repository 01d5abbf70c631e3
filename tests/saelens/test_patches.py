"""What importing the package changes of SAELens: two constructors, and no training."""

from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner, SAETrainer
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from tests import fresh

pytestmark = pytest.mark.oldest

SNAPSHOT = """
import sys, types
import sae_lens, sae_lens.synthetic
def members():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("sae_lens", "torch") or name.startswith("torch._"):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                for member, of_class in list(vars(value).items()):
                    if not isinstance(of_class, (dict, list)):
                        found[name, key + "." + member] = id(of_class)
    return found
before = members()
registered = set(sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY)
inference = set(sae_lens.registry.SAE_CLASS_REGISTRY)
import sae_lens_auxk
after = members()
print(sorted({key for (_, key), old in before.items() if after[_, key] != old and "." in key}))
print(sorted(set(sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY) - registered))
print(sorted(set(sae_lens.registry.SAE_CLASS_REGISTRY) - inference))
"""


def test_two_methods_of_saelens_are_patched_and_nothing_else() -> None:
    printed = fresh.run(SNAPSHOT).splitlines()
    assert eval(printed[0]) == ["LanguageModelSAETrainingRunner.__init__", "SAETrainer.__init__"]
    assert len(eval(printed[1])) == 7
    assert eval(printed[2]) == []


def test_both_know_the_method_that_they_stand_for() -> None:
    for owner in (SAETrainer, LanguageModelSAETrainingRunner):
        original: Any = owner.__init__.__wrapped__
        assert original.__module__.startswith("sae_lens.")


TRAININGS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, sae_lens
if sys.argv[1] == "imported":
    import sae_lens_auxk
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
results = {}
for architecture in sys.argv[3:]:
    for autocast in (False, True):
        for mode in ("none", "expected_average_only_in"):
            torch.manual_seed(0)
            fields = {"d_in": 8, "d_sae": 24, "normalize_activations": mode}
            if "topk" in architecture:
                fields["k"] = 3
            if architecture == "matryoshka_batchtopk":
                fields["matryoshka_widths"] = [8, 24]
            if architecture == "temporal":
                continue
            sae = TrainingSAE.from_dict(get_sae_training_class(architecture)[1](**fields).to_dict())
            generator = torch.Generator().manual_seed(1)
            cfg = SAETrainerConfig(
                total_training_samples=30 * 16, train_batch_size_samples=16, lr=1e-2, lr_end=1e-3,
                lr_scheduler_name="constant", lr_warm_up_steps=3, lr_decay_steps=3, device="cpu",
                adam_beta1=0.9, adam_beta2=0.999, n_restart_cycles=1, autocast=autocast,
                n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
                dead_feature_window=3, feature_sampling_window=7,
                logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=2,
            )
            data = iter(lambda: torch.randn(16, 8, generator=generator), None)
            SAETrainer(cfg, sae, data).fit()
            for name, value in sae.state_dict().items():
                results[f"{architecture} {autocast} {mode} {name}"] = value
torch.save(results, sys.argv[2])
"""


def test_trainings_of_saelens_are_bit_equal_with_and_without_the_import(tmp_path: Any) -> None:
    stock = [
        name
        for name, (cls, _) in SAE_TRAINING_CLASS_REGISTRY.items()
        if cls.__module__.startswith("sae_lens.") and "matching" not in name and name != "temporal"
    ]
    states = []
    for how in ("plain", "imported"):
        file = tmp_path / how
        fresh.run(TRAININGS, how, file, *stock)
        states.append(torch.load(file))
    plain, imported = states
    assert len({name.rpartition(" ")[0] for name in plain}) >= 7 * 4
    assert plain.keys() == imported.keys()
    for name, value in plain.items():
        assert torch.equal(value, imported[name]), name

"""What SAELens's own tests ask of its training SAEs, asked of these."""

import copy
import importlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAE
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    get_sae_training_class,
)
from sae_lens.saes.sae import SAEConfig, TrainingSAE

import sae_lens_auxk
from tests import fresh
from tests.helpers import (
    ARCHITECTURES,
    STOCK,
    build_config,
    build_sae,
    forward,
)

INFERENCE = {
    "auxk-topk": "topk",
    "auxk-batchtopk": "jumprelu",
    "auxk-matryoshka-batchtopk": "jumprelu",
    "auxk-jumprelu": "jumprelu",
    "auxk-standard": "standard",
    "auxk-gated": "gated",
    "auxk-abstopk": "abstopk",
}


@pytest.mark.oldest
def test_the_architectures_are_registered() -> None:
    assert set(INFERENCE) == set(ARCHITECTURES)
    assert set(ARCHITECTURES) <= set(SAE_TRAINING_CLASS_REGISTRY)
    for name, stock in STOCK.items():
        ours, ours_cfg = get_sae_training_class(name)
        theirs, theirs_cfg = get_sae_training_class(stock)
        assert issubclass(ours, theirs)
        assert issubclass(ours_cfg, theirs_cfg)


def test_importing_again_is_no_error() -> None:
    training, inference = dict(SAE_TRAINING_CLASS_REGISTRY), dict(SAE_CLASS_REGISTRY)
    importlib.reload(sae_lens_auxk)
    assert training == SAE_TRAINING_CLASS_REGISTRY
    assert inference == SAE_CLASS_REGISTRY


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inference_config_is_plain_saelens(architecture: str) -> None:
    cfg = build_config(architecture, aux_variant="straight_through")
    cfg_dict = cfg.get_inference_sae_cfg_dict()
    loaded = SAEConfig.from_dict(cfg_dict)
    assert loaded.architecture() == INFERENCE[architecture]
    assert type(loaded) is get_sae_class(INFERENCE[architecture])[1]
    assert loaded.to_dict() == cfg_dict
    assert loaded.metadata.training_architecture == architecture
    details = loaded.metadata.training_architecture_details
    prefixes = ("aux_", "dead_", "resample_")
    aux_fields = {f for f in cfg.to_dict() if f.startswith(prefixes)} | {"k_aux", "b_dec_init"}
    assert len(aux_fields) == 15
    assert {f: details[f] for f in aux_fields} == {f: getattr(cfg, f) for f in aux_fields}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_inference_model_is_plain_and_equal(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    sae = build_sae(architecture, dtype=dtype)
    sae.save_inference_model(tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    assert type(plain) is get_sae_class(INFERENCE[architecture])[0]
    if "batchtopk" not in architecture:  # whose threshold replaces the top-k
        tolerance = {"bfloat16": 5e-2}.get(dtype, 1e-5)
        x = torch.randn(32, 8)
        torch.testing.assert_close(plain(x).float(), sae(x).float(), rtol=tolerance, atol=tolerance)


@pytest.mark.oldest
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_checkpoint_opens_to_train_on(architecture: str, tmp_path: Path) -> None:
    sae = build_sae(architecture, dead_threshold_tokens=20)
    for step in range(3):
        forward(sae, torch.randn(16, 8), step=step)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    x = torch.randn(16, 8)
    a, b = forward(sae, x, step=3), forward(loaded, x, step=3)
    torch.testing.assert_close(a.loss, b.loss)
    assert torch.equal(sae.tokens_since_fired, loaded.tokens_since_fired)


@pytest.mark.oldest
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_of_saelens_own_can_be_trained_on(architecture: str, tmp_path: Path) -> None:
    cls, cfg_cls = get_sae_training_class(STOCK[architecture])
    cfg = build_config(architecture).to_dict()
    stock = cls(
        cfg_cls.from_dict({**cfg, "architecture": STOCK[architecture], "aux_loss_coefficient": 1.0})
    )
    stock.save_model(tmp_path)
    sae = build_sae(architecture)
    sae.load_weights_from_checkpoint(tmp_path)
    assert torch.equal(sae.W_enc, stock.W_enc)
    assert sae.tokens_since_fired.sum() == 0


@pytest.mark.oldest
def test_plain_saelens_loads_it_where_the_package_cannot_be_imported(tmp_path: Path) -> None:
    """In a process of its own, in which importing sae_lens_auxk fails."""
    x = torch.randn(16, 8)
    for architecture in ARCHITECTURES:
        sae = build_sae(architecture, aux_variant="straight_through", k_aux=7)
        folder = tmp_path / architecture
        sae.save_inference_model(folder)
        torch.save((x, SAE.load_from_disk(folder)(x).detach()), folder / "expected.pt")
    said = fresh.run(
        """
        import sys
        sys.modules["sae_lens_auxk"] = None
        from pathlib import Path
        import torch
        from sae_lens import SAE
        for folder in sorted(Path(sys.argv[1]).iterdir()):
            sae = SAE.load_from_disk(folder)
            x, expected = torch.load(folder / "expected.pt")
            assert torch.equal(sae(x), expected)
            details = sae.cfg.metadata.training_architecture_details
            assert sae.cfg.metadata.training_architecture == folder.name
            assert details["aux_variant"] == "straight_through" and details["k_aux"] == 7
            print(folder.name, type(sae).__name__)
        """,
        tmp_path,
    )
    assert len(said.splitlines()) == len(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_activation_norm_scaling_factor(architecture: str) -> None:
    sae = build_sae(architecture)
    x = torch.randn(64, 8)
    before = sae(x)
    sae.fold_activation_norm_scaling_factor(2.0)
    torch.testing.assert_close(2.0 * sae(x / 2.0), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_W_dec_norm(architecture: str) -> None:
    sae = build_sae(architecture)
    x = torch.randn(64, 8)
    before = sae(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(24))
    torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copy_and_pickle(architecture: str) -> None:
    sae = build_sae(architecture)
    forward(sae, torch.randn(16, 8))
    x = torch.randn(16, 8)
    assert torch.equal(copy.deepcopy(sae)(x), sae(x))
    cfg = pickle.loads(pickle.dumps(sae.cfg))
    assert cfg.to_dict() == sae.cfg.to_dict()


@pytest.mark.parametrize("leading", [(), (12,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_of_any_leading_shape(architecture: str, leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, 8)
    n_rows = x.numel() // 8
    torch.manual_seed(1)
    flat_sae = build_sae(architecture, dead_threshold_tokens=n_rows)
    torch.manual_seed(1)
    sae = build_sae(architecture, dead_threshold_tokens=n_rows)
    flat, shaped = forward(flat_sae, x.reshape(-1, 8)), forward(sae, x)
    torch.testing.assert_close(shaped.loss, flat.loss)
    assert shaped.losses.keys() == flat.losses.keys()
    assert shaped.sae_in.shape == shaped.sae_out.shape == x.shape
    assert shaped.feature_acts.shape == shaped.hidden_pre.shape == (*leading, 24)
    shaped.loss.backward()
    assert torch.equal(sae.tokens_since_fired, flat_sae.tokens_since_fired)


@pytest.mark.parametrize("leading", [(), (12,), (3, 4)])
def test_sparse_activations_of_any_leading_shape(leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, 8)
    outputs = []
    for use_sparse_activations in (False, True):
        torch.manual_seed(1)
        sae = build_sae(
            "auxk-topk",
            use_sparse_activations=use_sparse_activations,
            dead_threshold_tokens=x.numel() // 8,
        )
        outputs.append(forward(sae, x))
    dense, sparse = outputs
    assert sparse.feature_acts.is_sparse
    torch.testing.assert_close(sparse.feature_acts.to_dense(), dense.feature_acts)
    torch.testing.assert_close(sparse.loss, dense.loss)
    sparse.loss.backward()


@pytest.mark.parametrize(
    "architecture", ["auxk-topk", "auxk-batchtopk", "auxk-jumprelu", "auxk-standard"]
)
def test_hook_z_reshaping(architecture: str) -> None:
    """Runners flatten heads before the SAE; reshaping can also be turned on by hand.

    Not for Gated and Matryoshka, whose losses in SAELens take flat input only.
    """
    torch.manual_seed(1)
    flat_sae = build_sae(architecture, reshape_activations="hook_z", dead_threshold_tokens=6)
    torch.manual_seed(1)
    sae = build_sae(architecture, reshape_activations="hook_z", dead_threshold_tokens=6)
    x = torch.randn(6, 2, 4)
    flat = forward(flat_sae, x.flatten(1))
    sae.turn_on_forward_pass_hook_z_reshaping()
    shaped = forward(sae, x)
    torch.testing.assert_close(shaped.losses["aux_loss"], flat.losses["aux_loss"])
    assert shaped.sae_out.shape == x.shape


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("architecture", ["auxk-batchtopk", "auxk-matryoshka-batchtopk"])
def test_the_threshold_of_sparse_activations_moves_as_saelens_does(
    architecture: str, sparse: bool
) -> None:
    sae = build_sae(architecture, use_sparse_activations=sparse, topk_threshold_lr=0.1)
    theirs: Any = SimpleNamespace(cfg=sae.cfg, topk_threshold=sae.topk_threshold.clone())
    for step in range(5):
        acts = forward(sae, torch.randn(16, 8), step=step).feature_acts
        assert acts.is_sparse == sparse
        BatchTopKTrainingSAE.update_topk_threshold(theirs, acts.to_dense())
        torch.testing.assert_close(sae.topk_threshold, theirs.topk_threshold)
    assert sae.topk_threshold != 0.7
    before = sae.topk_threshold.clone()
    sae.update_topk_threshold(acts * 0)  # nothing fired
    assert sae.topk_threshold == before

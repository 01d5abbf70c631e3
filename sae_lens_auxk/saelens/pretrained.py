"""``from_pretrained_path``: continue from a trained SAE, with an auxiliary loss.

SAELens builds the SAE from the folder alone, with ``TrainingSAE.load_from_disk(path)``, so it
trains the class that the folder names, whatever ``cfg.sae`` says. That call does not see the
config; only the runner knows both. So a runner whose ``cfg.sae`` belongs to this package gets an
SAE of that config, with the folder's weights, as its ``override_sae``
(:mod:`sae_lens_auxk.saelens.patches`).

The new SAE computes the same function: its first forward pass gives the same output as the SAE in
the folder. A field that would change that function is refused.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE

from sae_lens_auxk.files import read_json
from sae_lens_auxk.saelens.checkpoints import ESTIMATED_SCALING, fold_scaling_beside
from sae_lens_auxk.saelens.names import (
    SAE_CFG_FILENAME,
    handle_config_defaulting,
    sae_lens_disk_loader,
)

DEFAULTS = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}
"""What SAELens did where an SAE's config lacks these fields."""

_SAME = ("apply_b_dec_to_input", "normalize_activations", "reshape_activations", "d_in", "d_sae")

# A released decoder row has length 1 up to the rounding of half precision.
_ROUNDING = 1e-3


def load_pretrained(cfg: Any, path: str | Path) -> Any:
    """Build an SAE from this package's config, with the weights of the SAE in a folder.

    Args:
        cfg: the config; it is not changed.
        path: a training checkpoint or a saved inference model, of this package or of SAELens. Its
            architecture must be that of ``cfg``, SAELens's own version of it, or the one that
            ``cfg`` is saved as for inference (a released BatchTopK is a ``jumprelu`` whose latents
            share a threshold). A checkpoint of this package also restores the counts of dead
            latents. The scaling of a checkpoint's data is folded into the weights.

    Raises:
        FileNotFoundError: there is no SAE at ``path``.
        ValueError: the SAE's config cannot be read, the architecture or shape does not fit, or a
            field of ``cfg`` would change the function that the weights compute.
    """
    if (config := Path(path) / SAE_CFG_FILENAME).is_file():
        read_json(config)  # whose error names the file
    given, state = sae_lens_disk_loader(path, cfg.device, {"dtype": cfg.dtype})
    given = {**DEFAULTS, **handle_config_defaulting(given)}
    _require_architecture(cfg, given, path)
    mode = given["normalize_activations"]
    if mode in ESTIMATED_SCALING:
        given["normalize_activations"] = "none"
    _require_same(cfg, given, path)
    _share_threshold(cfg, given, state, path)

    sae = TrainingSAE.from_dict(cfg.to_dict())
    sae.process_state_dict_for_loading(state)
    try:
        sae.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path} do not fit {cfg.architecture()}: {error}"
        ) from error
    if hasattr(cfg, "rescale_acts_by_decoder_norm"):
        sae.cfg.rescale_acts_by_decoder_norm = given["rescale_acts_by_decoder_norm"]
    if mode in ESTIMATED_SCALING:
        sae.cfg.normalize_activations = mode
        fold_scaling_beside(sae, Path(path))
    if hasattr(cfg, "rescale_acts_by_decoder_norm"):
        _rescale_as(sae, cfg, path)
    return sae


def stock_architecture(config_class: type[Any]) -> str:
    """SAELens's own architecture that a config class of this package extends."""
    theirs = (base for base in config_class.__mro__ if base.__module__.startswith("sae_lens."))
    return next(theirs).architecture()


def _require_architecture(cfg: Any, given: dict[str, Any], path: str | Path) -> None:
    ours, stock = cfg.architecture(), stock_architecture(type(cfg))
    inference = cfg.get_inference_config_class().architecture()
    fitting = dict.fromkeys((ours, stock, inference))
    if given["architecture"] not in fitting:
        raise ValueError(
            f"from_pretrained_path={str(path)!r} holds the architecture {given['architecture']}, "
            f"whose weights {ours} cannot load: it must be one of {', '.join(fitting)}."
        )


def _require_same(cfg: Any, given: dict[str, Any], path: str | Path) -> None:
    """Refuse fields that differ, all in one error; warn about a different ``k``."""
    differing = [
        f"{name}={getattr(cfg, name)!r} must be {given[name]!r}"
        for name in _SAME
        if getattr(cfg, name) != given[name]
    ]
    if differing:
        raise ValueError(
            f"from_pretrained_path={str(path)!r} does not hold the SAE that the config describes: "
            f"{', '.join(differing)}."
        )
    k = given.get("k")
    if k is not None and k != cfg.k:
        warnings.warn(f"k={cfg.k}, but the SAE in {path} was trained with k={k}", stacklevel=5)


def _share_threshold(
    cfg: Any, given: dict[str, Any], state: dict[str, torch.Tensor], path: str | Path
) -> None:
    """Recover BatchTopK's single threshold from the ``jumprelu`` that it is released as."""
    if given["architecture"] != "jumprelu" or not hasattr(cfg, "topk_threshold_lr"):
        return
    threshold = state.pop("threshold")
    if (threshold != threshold[0]).any():
        raise ValueError(
            f"from_pretrained_path={str(path)!r} holds a jumprelu with a threshold for each "
            f"latent, which {cfg.architecture()} does not have. auxk-jumprelu can take it over."
        )
    state["topk_threshold"] = threshold[0]


def _rescale_as(sae: Any, cfg: Any, path: str | Path) -> None:
    """Set ``rescale_acts_by_decoder_norm`` from ``cfg``, if the SAE's function stays the same."""
    wanted, is_rescaled = cfg.rescale_acts_by_decoder_norm, sae.cfg.rescale_acts_by_decoder_norm
    if is_rescaled and not wanted:
        sae.fold_W_dec_norm()
    elif wanted and not is_rescaled and ((sae.W_dec.norm(dim=-1) - 1).abs() > _ROUNDING).any():
        raise ValueError(
            f"rescale_acts_by_decoder_norm=True is not allowed: the SAE in {path} was trained "
            "without it, or is folded, and its decoder rows do not have length 1. It must be False."
        )
    sae.cfg.rescale_acts_by_decoder_norm = wanted


def sae_to_go_on_from(cfg: Any, ours: type[Any]) -> Any:
    """Load the SAE that a run's config names; None if there is nothing for this package to load.

    Args:
        cfg: the run's config.
        ours: the class of this package's SAE configs.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_pretrained`.
    """
    path = cfg.from_pretrained_path
    if path is None or not isinstance(cfg.sae, ours):
        return None
    return load_pretrained(cfg.sae, path)

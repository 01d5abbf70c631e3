"""Open a training checkpoint as the inference model that it would be saved as.

SAELens reads ``architecture`` from a checkpoint's config and looks that name up among its
inference classes. Under this package's names it finds a class of this kind, whose instance turns
into the plain SAELens class once the weights are loaded. From then on it is the same as an SAE
loaded from ``save_inference_model``'s folder.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAEConfig
from typing_extensions import override

from sae_lens_auxk.saved_sae import ESTIMATED_SCALING

if TYPE_CHECKING:
    _Base = SAE[Any]
else:
    _Base = object


class InferenceFromCheckpoint(_Base):
    """Mixin placed before a SAELens inference SAE and registered under a training architecture."""

    plain_class: ClassVar[type[SAE[Any]]]

    def __init__(self, cfg: TrainingSAEConfig, use_error_term: bool = False):
        # SAELens passes the weights and the config, but not the folder with the scaler, so nothing
        # can be folded here. Without folding, the SAE would be silently wrong.
        if cfg.normalize_activations in ESTIMATED_SCALING:
            raise ValueError(
                f"normalize_activations={cfg.normalize_activations!r}: SAE.load_from_disk does "
                "not see the activation scaling that this training checkpoint keeps in "
                f"{ACTIVATION_SCALER_CFG_FILENAME}. Load it with TrainingSAE.load_from_disk, then "
                "call sae_lens_auxk.saved_sae.fold_scaling_beside(sae, folder) and "
                "sae.save_inference_model; sae-lens-auxk upload does the same."
            )
        self._training_cfg = cfg
        super().__init__(_inference_config(cfg), use_error_term)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        training_class, _ = get_sae_training_class(self._training_cfg.architecture())
        training_sae = training_class(self._training_cfg)
        training_sae.process_state_dict_for_loading(state_dict)
        training_sae.load_state_dict(state_dict, assign=True)
        inference_state = training_sae.state_dict()
        training_sae.process_state_dict_for_saving_inference(inference_state)
        state_dict.clear()
        state_dict.update(inference_state)
        del self._training_cfg
        self.__class__ = self.plain_class  # type: ignore[assignment]


def _inference_config(cfg: TrainingSAEConfig) -> SAEConfig:
    # Through SAELens's own dict, so that the metadata says how the SAE was trained.
    return SAEConfig.from_dict(cfg.get_inference_sae_cfg_dict())

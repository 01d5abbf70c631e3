"""Every name of SAELens that SAELens does not export. Nothing else here imports one.

SAELens releases weekly. Its top-level exports (``sae_lens.__all__``) and what the users of an SAE
call (``encode``, ``save_model``, the fields of a config, ...) can be relied on; these names can
not. A release without one fails here, by name, and a difference between releases is bridged here.
tests/saelens/test_names.py says which members of SAELens's classes are used.
"""

# pyright: reportUnusedImport=false
from sae_lens import (
    logger as logger,
)
from sae_lens.config import (
    SAETrainerConfig as SAETrainerConfig,
)
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME as ACTIVATION_SCALER_CFG_FILENAME,
)
from sae_lens.constants import (
    ACTIVATION_WHITENING_FILENAME as ACTIVATION_WHITENING_FILENAME,
)
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME as ACTIVATIONS_STORE_STATE_FILENAME,
)
from sae_lens.constants import (
    RUNNER_CFG_FILENAME as RUNNER_CFG_FILENAME,
)
from sae_lens.constants import (
    SAE_CFG_FILENAME as SAE_CFG_FILENAME,
)
from sae_lens.constants import (
    SAE_WEIGHTS_FILENAME as SAE_WEIGHTS_FILENAME,
)
from sae_lens.constants import (
    SPARSITY_FILENAME as SPARSITY_FILENAME,
)
from sae_lens.constants import (
    TRAINER_STATE_FILENAME as TRAINER_STATE_FILENAME,
)
from sae_lens.evals import (
    EvalConfig as EvalConfig,
)
from sae_lens.evals import (
    ExplainedVarianceCalculator as ExplainedVarianceCalculator,
)
from sae_lens.llm_sae_training_runner import (
    _parse_cfg_args as _parse_cfg_args,
)
from sae_lens.load_model import (
    load_model as load_model,
)
from sae_lens.loading.pretrained_sae_loaders import (
    handle_config_defaulting as handle_config_defaulting,
)
from sae_lens.loading.pretrained_sae_loaders import (
    sae_lens_disk_loader as sae_lens_disk_loader,
)
from sae_lens.registry import (
    SAE_CLASS_REGISTRY as SAE_CLASS_REGISTRY,
)
from sae_lens.registry import (
    SAE_TRAINING_CLASS_REGISTRY as SAE_TRAINING_CLASS_REGISTRY,
)
from sae_lens.registry import (
    get_sae_training_class as get_sae_training_class,
)
from sae_lens.saes.abstopk_sae import (
    AbsTopK as AbsTopK,
)
from sae_lens.saes.batchtopk_sae import (
    BatchTopK as BatchTopK,
)
from sae_lens.saes.sae import (
    SAEMetadata as SAEMetadata,
)
from sae_lens.saes.sae import (
    TrainCoefficientConfig as TrainCoefficientConfig,
)
from sae_lens.saes.sae import (
    TrainStepInput as TrainStepInput,
)
from sae_lens.saes.sae import (
    TrainStepOutput as TrainStepOutput,
)
from sae_lens.saes.topk_sae import (
    TopK as TopK,
)
from sae_lens.saes.topk_sae import (
    act_times_W_dec as act_times_W_dec,
)
from sae_lens.synthetic import (
    RUNNER_CONFIG_FILENAME as RUNNER_CONFIG_FILENAME,
)
from sae_lens.synthetic import (
    L0Calculator as L0Calculator,
)
from sae_lens.synthetic import (
    SyntheticActivationIterator as SyntheticActivationIterator,
)
from sae_lens.synthetic import (
    SyntheticModel as SyntheticModel,
)
from sae_lens.synthetic import (
    SyntheticModelConfig as SyntheticModelConfig,
)
from sae_lens.synthetic import (
    SyntheticSAERunnerConfig as SyntheticSAERunnerConfig,
)
from sae_lens.synthetic import (
    ZipfianFiringProbabilityConfig as ZipfianFiringProbabilityConfig,
)
from sae_lens.synthetic import (
    eval_sae_on_synthetic_data as eval_sae_on_synthetic_data,
)
from sae_lens.training.activation_scaler import (
    ActivationScaler as ActivationScaler,
)
from sae_lens.training.multi_sae_trainer import (
    MultiSAETrainer as MultiSAETrainer,
)
from sae_lens.training.types import (
    MultiHookDataProvider as MultiHookDataProvider,
)
from sae_lens.util import (
    cosine_similarities as cosine_similarities,
)

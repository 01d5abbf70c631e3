"""Every name of SAELens that SAELens does not export. Nothing else here imports one.

SAELens releases weekly. Its top-level exports (``sae_lens.__all__``) and what the users of an SAE
call (``encode``, ``save_model``, the fields of a config, ...) can be relied on; these names can
not. A release without one fails here, by name, and a difference between releases is bridged here.
tests/saelens/test_names.py says which members of SAELens's classes are used.
"""

# pyright: reportUnusedImport=false
from sae_lens import (
    logger,
)
from sae_lens.config import (
    SAETrainerConfig,
)
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.evals import (
    EvalConfig,
    ExplainedVarianceCalculator,
)
from sae_lens.llm_sae_training_runner import (
    _parse_cfg_args,
)
from sae_lens.load_model import (
    load_model,
)
from sae_lens.loading.pretrained_sae_loaders import (
    handle_config_defaulting,
    sae_lens_disk_loader,
)
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_training_class,
)
from sae_lens.saes.abstopk_sae import (
    AbsTopK,
)
from sae_lens.saes.batchtopk_sae import (
    BatchTopK,
)
from sae_lens.saes.sae import (
    SAEMetadata,
    TrainCoefficientConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import (
    SparseHookPoint,
    TopK,
    act_times_W_dec,
)
from sae_lens.synthetic import (
    RUNNER_CONFIG_FILENAME,
    L0Calculator,
    SyntheticActivationIterator,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunnerConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.training._interruption import (
    InterruptedException,
)
from sae_lens.training.activation_scaler import (
    ActivationScaler,
)
from sae_lens.training.multi_sae_trainer import (
    MultiSAETrainer,
)
from sae_lens.training.types import (
    MultiHookDataProvider,
)
from sae_lens.util import (
    cosine_similarities,
)

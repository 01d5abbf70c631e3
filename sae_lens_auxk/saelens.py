"""Everything that depends on which SAELens is installed.

Supported are the versions that pyproject.toml allows; docs/compatibility.md says what was tested.
A difference between them is bridged here and nowhere else, each with its reason and version, except
for ``auxk-abstopk``, which ``architectures.py`` registers where SAELens has ``abstopk`` (6.53).

SAELens releases weekly. Its top-level exports (``sae_lens.__all__``) and what the users of
an SAE call (``encode``, ``save_model``, the fields of a config, ...) can be relied on. The names
below are private or not guaranteed; each is listed with the files that use it.
tests/test_saelens.py looks up every one of them, so a release without one fails and names it.

What an SAE is made of:

    sae_lens.saes.sae.SAEMetadata                                    aux_config.py
    sae_lens.saes.sae.TrainStepInput                aux_training.py dead_latents.py step_data.py
    sae_lens.saes.sae.TrainStepInput.sae_in                          aux_training.py dead_latents.py
    sae_lens.saes.sae.TrainStepInput.dead_neuron_mask
                                                      aux_training.py dead_latents.py resampling.py
    sae_lens.saes.sae.TrainStepInput.n_training_steps                aux_training.py
    sae_lens.saes.sae.TrainStepOutput
                                                     aux_training.py sparse_topk.py step_data.py
    sae_lens.saes.sae.TrainStepOutput.feature_acts                   aux_training.py sparse_topk.py
    sae_lens.saes.sae.TrainStepOutput.hidden_pre                     aux_training.py sparse_topk.py
    sae_lens.saes.sae.TrainStepOutput.losses                         compare/train.py sparse_topk.py
    sae_lens.saes.sae.TrainStepOutput.metrics                        aux_training.py sparse_topk.py
    sae_lens.saes.sae.SAE.fold_activation_norm_scaling_factor        saved_sae.py
    sae_lens.saes.sae.SAE.hook_sae_recons                            sparse_topk.py
    sae_lens.saes.sae.SAE.hook_z_reshaping_mode                      aux_training.py sparse_topk.py
    sae_lens.saes.sae.SAE.process_sae_in                             compare/latents.py
    sae_lens.saes.sae.SAE.process_state_dict_for_loading             aux_training.py
    sae_lens.saes.sae.SAE.process_state_dict_for_saving              aux_training.py
    sae_lens.saes.sae.SAE.reshape_fn_out                             sparse_topk.py
    sae_lens.saes.sae.SAE.run_time_activation_norm_fn_in             sparse_topk.py
    sae_lens.saes.sae.SAE.run_time_activation_norm_fn_out            sparse_topk.py
    sae_lens.saes.sae.TrainingSAE.calculate_aux_loss                 aux_training.py
    sae_lens.saes.sae.TrainingSAE.mse_loss_fn                        sparse_topk.py
    sae_lens.saes.sae.TrainingSAE.process_state_dict_for_saving_inference
                                                                     aux_training.py
    sae_lens.saes.sae.TrainingSAE.training_forward_pass              aux_training.py
    sae_lens.saes.sae.TrainingSAEConfig.decoder_init_norm            hub/sae_folder.py
    sae_lens.saes.sae.TrainingSAEConfig.get_inference_config_class   architectures.py
    sae_lens.saes.sae.TrainingSAEConfig.get_inference_sae_cfg_dict   inference_loading.py
    sae_lens.saes.topk_sae.act_times_W_dec                           sparse_topk.py
    sae_lens.saes.batchtopk_sae.BatchTopKTrainingSAE.topk_threshold  architectures.py
    sae_lens.saes.batchtopk_sae.BatchTopKTrainingSAE.update_topk_threshold
                                                                     sparse_topk.py
    sae_lens.saes.jumprelu_sae.JumpReLUTrainingSAE.threshold         architectures.py
    sae_lens.saes.matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE._iterable_decode
                                                                     architectures.py

``inference_loading.py`` changes the class of an SAE while ``process_state_dict_for_loading`` runs.

Registry, files and other pieces:

    sae_lens.logger                                                  cli/compare.py
    sae_lens.registry.SAE_CLASS_REGISTRY                             architectures.py
    sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY                    architectures.py runner.py
    sae_lens.registry.get_sae_training_class                         inference_loading.py
    sae_lens.constants                                               saelens.py
    sae_lens.constants.ACTIVATION_SCALER_CFG_FILENAME                saved_sae.py
    sae_lens.constants.ACTIVATIONS_STORE_STATE_FILENAME              sharded/data.py
    sae_lens.constants.RUNNER_CFG_FILENAME         hub/sae_folder.py sharded/runner.py
    sae_lens.constants.SAE_CFG_FILENAME                              hub/sae_folder.py
    sae_lens.constants.SAE_WEIGHTS_FILENAME                          hub/sae_folder.py
    sae_lens.constants.SPARSITY_FILENAME                             hub/sae_folder.py
    sae_lens.constants.TRAINER_STATE_FILENAME                        hub/sae_folder.py
    sae_lens.loading.pretrained_sae_loaders.handle_config_defaulting
                                                                     fine_tuning.py
    sae_lens.loading.pretrained_sae_loaders.sae_lens_disk_loader     fine_tuning.py
    sae_lens.llm_sae_training_runner.LanguageModelSAETrainingRunner.__init__
                                                                     fine_tuning.py
    sae_lens.evals.EvalConfig                                        compare/sources.py
    sae_lens.evals.ExplainedVarianceCalculator                       compare/measure.py
    sae_lens.load_model.load_model                                   compare/sources.py
    sae_lens.util.cosine_similarities                                compare/measure.py

Trainers and runners:

    sae_lens.llm_sae_training_runner._parse_cfg_args                 cli/train.py
    sae_lens.llm_sae_training_runner.LanguageModelSAETrainingRunner.run_trainer_with_interruption_handling
                                                                     sharded/runner.py
    sae_lens.llm_sae_training_runner.LanguageModelSAETrainingRunner.save_checkpoint
                                                                     sharded/runner.py
    sae_lens.llm_sae_training_runner.LanguageModelSAETrainingRunner.activations_store
                                                                     cli/train.py
    sae_lens.config.SAETrainerConfig                                 run_length.py
    sae_lens.config.SAETrainerConfig.dead_feature_window             run_length.py
    sae_lens.config.SAETrainerConfig.total_training_samples          run_length.py
    sae_lens.config.SAETrainerConfig.train_batch_size_samples        run_length.py
    sae_lens.training.activation_scaler.ActivationScaler             compare/sources.py
    sae_lens.training.activation_scaler.ActivationScaler.scaling_factor
                                                                     saved_sae.py
    sae_lens.training.activations_store.ActivationsStore._get_filtered_multi_hook_llm_batch
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore._iterate_tokenized_sequences
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore.dataset
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore.exclude_special_tokens
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore.get_batch_tokens
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore.get_multi_hook_data_loader
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore.iterable_sequences
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore.n_dataset_processed
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore.reset_input_dataset
                                                                     compare/same_data.py
    sae_lens.training.activations_store.ActivationsStore.shuffle_input_dataset
                                                                     compare/sources.py
    sae_lens.training.activations_store.ActivationsStore.load        sharded/data.py
    sae_lens.training.sae_trainer.SAETrainer.__init__                run_length.py
    sae_lens.training.sae_trainer.SAETrainer._train_step             sharded/clipping.py
    sae_lens.training.sae_trainer.SAETrainer.activation_scaler       compare/train.py
    sae_lens.training.sae_trainer.SAETrainer.build_train_step_log_dict
                                                                     resampling.py
    sae_lens.training.sae_trainer.SAETrainer.load_trainer_state      sharded/files.py
    sae_lens.training.sae_trainer.SAETrainer.log_feature_sparsity    compare/run.py
    sae_lens.training.sae_trainer.SAETrainer.n_forward_passes_since_fired
                                                                     compare/train.py
    sae_lens.training.sae_trainer.SAETrainer.n_training_steps        compare/train.py
    sae_lens.training.sae_trainer.SAETrainer.optimizer               compare/train.py resampling.py
    sae_lens.training.sae_trainer.SAETrainer.set_final_sae_metadata  compare/train.py
    sae_lens.training.sae_trainer.SAETrainer.step                    compare/train.py resampling.py
    sae_lens.training.multi_sae_trainer.MultiSAETrainer              compare/train.py
    sae_lens.training.multi_sae_trainer.MultiSAETrainer._estimate_scaling_factors
                                                                     compare/train.py
    sae_lens.training.multi_sae_trainer.MultiSAETrainer._maybe_log_sparsity
                                                                     compare/train.py
    sae_lens.training.multi_sae_trainer.MultiSAETrainer.n_training_samples
                                                                     compare/train.py
    sae_lens.training.multi_sae_trainer.MultiSAETrainer.trainers     compare/train.py
    sae_lens.training.types.MultiHookDataProvider                    compare/train.py
    sae_lens.multi_sae_training_runner.MultiSAETrainingRunner._set_sae_metadata
                                                                     compare/sources.py
    sae_lens.multi_sae_training_runner.MultiSAETrainingRunner.activations_store
                                                                     compare/sources.py
    sae_lens.multi_sae_training_runner.MultiSAETrainingRunnerConfig.hook_names_per_sae
                                                                     compare/sources.py
    sae_lens.multi_sae_training_runner.MultiSAETrainingRunnerConfig.to_sae_trainer_config
                                                                     compare/sources.py

Synthetic models:

    sae_lens.synthetic.L0Calculator                                  compare/measure.py
    sae_lens.synthetic.RUNNER_CONFIG_FILENAME                        hub/sae_folder.py
    sae_lens.synthetic.SyntheticActivationIterator                   compare/sources.py
    sae_lens.synthetic.SyntheticModel                                compare/sources.py
    sae_lens.synthetic.SyntheticModel.activation_generator           compare/sources.py
    sae_lens.synthetic.SyntheticModel.feature_dict                   compare/sources.py
    sae_lens.synthetic.SyntheticModel.load_from_source               compare/sources.py
    sae_lens.synthetic.SyntheticModelConfig                          compare/plan.py
    sae_lens.synthetic.SyntheticSAERunnerConfig                      compare/sources.py
    sae_lens.synthetic.SyntheticSAERunnerConfig.to_sae_trainer_config
                                                                     compare/sources.py
    sae_lens.synthetic.ZipfianFiringProbabilityConfig                compare/plan.py
    sae_lens.synthetic.eval_sae_on_synthetic_data                    compare/sources.py
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sae_lens import constants

if TYPE_CHECKING:
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening


ACTIVATION_WHITENING_FILENAME: str = getattr(
    constants, "ACTIVATION_WHITENING_FILENAME", "activation_whitening.safetensors"
)
"""File of the whitening in a checkpoint; SAELens has written it since 6.52."""


def whitening_of(scaler: "ActivationScaler") -> "ActivationWhitening | None":
    """The whitening that a scaler has estimated, or None.

    SAELens has ``covariance_whitening`` since 6.52. Before, a scaler has no such attribute, and a
    config refuses that normalisation.
    """
    return getattr(scaler, "whitening", None)


def wrap_once(owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
    """Make ``owner.name(...)`` call ``wrapper(method, self, ...)`` with the original method.

    A method that is already wrapped is left alone, for example if the package is imported again.
    """
    method = getattr(owner, name)
    if hasattr(method, "wrapped_by_sae_lens_auxk"):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(method, self, *args, **kwargs)

    wrapped.wrapped_by_sae_lens_auxk = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)

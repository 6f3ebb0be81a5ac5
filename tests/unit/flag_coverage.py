"""Which test would notice if a flag stopped doing what it says. `test_flag_coverage` keeps the table whole.

A flag is named by its long spelling; `--no-...` and short spellings belong to it. The test named sets the flag and
looks at what it changes: reading it from the command line is not enough.
"""

from collections.abc import Mapping

from sidestep.config.recipe import RECIPE_PINS
from sidestep.config.settings import flag_of

_ACCELERATE = "tests/torch/test_accelerate.py::"
_BATCHES = "tests/torch/test_batches.py::"
_BUILD = "tests/unit/test_build_dataset.py::test_a_good_folder_becomes_a_file_and_a_report"
_DOCTOR = "tests/torch/test_doctor.py::"
_ESTIMATE = "tests/torch/test_estimate_flags.py::"
_ESTIMATE_COMMAND = (
    "tests/torch/test_estimate_command.py::"
    "test_the_map_lies_beside_the_songs_with_its_picture_and_the_command_that_uses_it"
)
_ESTIMATE_RUN = "tests/torch/test_estimate_run.py::"
_OPTIMIZERS = "tests/torch/test_optimizers.py::"
_PREPROCESS = "tests/torch/test_preprocess_flags.py::"
_SAMPLES = "tests/torch/test_flags_work.py::test_samples_are_rendered_as_it_was_typed"
_STEP = "tests/torch/test_step.py::"
_TASKS = "tests/torch/test_task_flags.py::"
_VALIDATION = "tests/torch/test_validation.py::"
_WORK = "tests/torch/test_flags_work.py::"

_ADAPTER = _WORK + "test_an_adapter_has_the_kind_the_rank_the_dropout_and_the_biases_that_were_typed"
_HEARD = _TASKS + "test_every_word_of_a_sample_is_heard"
_LOKR = _WORK + "test_a_lokr_is_made_as_it_was_typed"
_MEASURED = _ESTIMATE + "test_what_is_measured_follows_what_was_typed"
_MODEL = _WORK + "test_the_model_and_its_folder_are_the_ones_that_were_typed"
_OBJECTIVE = _WORK + "test_the_objective_is_the_one_that_was_typed"
_PACE = _WORK + "test_a_run_goes_logs_saves_and_is_named_as_it_was_typed"
_PROOF = _ESTIMATE + "test_the_proof_trains_as_it_was_typed"
_READ = _WORK + "test_songs_are_read_as_it_was_typed_and_are_the_same"
_SCALE = _WORK + "test_what_scales_the_first_step_scales_what_is_written"
_SETTINGS = _WORK + "test_settings_come_from_a_preset_or_an_earlier_run_and_can_be_kept"

GLOBAL: Mapping[str, str] = {
    "--plain": _WORK + "test_plain_lines_hold_no_escape_code_even_on_a_terminal",
    "--yes": _WORK + "test_no_question_is_ever_asked",
    "--version": _WORK + "test_version_says_what_is_at_work",
}

TRAINING: Mapping[str, str] = {
    # Model and paths
    "--checkpoint-dir": _MODEL,
    "--model-variant": _MODEL,
    "--base-model": _MODEL,
    "--dataset-dir": _MODEL,
    "--output-dir": _PACE,
    "--run-name": _PACE,
    # Device and precision
    "--device": _WORK + "test_the_device_is_the_one_that_was_typed",
    "--precision": _WORK + "test_in_bfloat16_the_model_is_held_in_it_and_the_adapter_is_not",
    # Adapter
    "--adapter-type": _ADAPTER,
    "--rank": _ADAPTER,
    "--alpha": _SCALE,
    "--dropout": _ADAPTER,
    "--attention-type": _WORK + "test_the_adapter_sits_where_it_was_typed",
    "--target-modules": _WORK + "test_the_adapter_sits_where_it_was_typed",
    "--bias": _ADAPTER,
    "--use-rslora": _SCALE,
    "--lokr-factor": _LOKR,
    "--lokr-decompose-both": _LOKR,
    "--lokr-use-tucker": _LOKR,
    "--lokr-use-scalar": _LOKR,
    "--lokr-weight-decompose": _LOKR,
    "--rank-map": _ESTIMATE_RUN + "test_exactly_the_listed_modules_are_trained_and_saved",
    "--rank-map-start": _ESTIMATE_RUN + "test_the_adapter_starts_from_the_strongest_input_directions",
    "--init-from": _ESTIMATE_RUN + "test_a_checkpoint_is_an_adapter_to_start_from",
    # Training
    "--learning-rate": _SCALE,
    "--batch-size": _STEP + "test_four_passes_of_one_sample_train_like_one_pass_of_four",
    "--gradient-accumulation": _STEP + "test_four_passes_of_one_sample_train_like_one_pass_of_four",
    "--epochs": "tests/torch/test_saving.py::test_checkpoints_are_saved_every_so_many_epochs_and_at_the_end",
    "--max-steps": _PACE,
    "--warmup-steps": _SCALE,
    "--weight-decay": _OPTIMIZERS + "test_weight_decay_pulls_a_weight_that_has_no_gradient_towards_zero",
    "--max-grad-norm": _STEP + "test_the_gradient_is_clipped_to_its_norm_and_reported_as_it_was",
    "--seed": _WORK + "test_the_same_seed_gives_the_same_weights_and_another_one_others",
    "--optimizer-type": _OPTIMIZERS + "test_a_missing_package_is_an_error_with_the_remedy_and_never_another_optimizer",
    "--scheduler-type": "tests/torch/test_schedules.py::test_a_run_reports_the_rate_that_each_step_was_made_with",
    "--gradient-checkpointing":
        _STEP + "test_gradient_checkpointing_computes_every_block_twice_and_gives_the_same_gradients",
    "--gradient-checkpointing-ratio":
        _ACCELERATE + "test_a_part_of_the_blocks_is_recomputed_and_the_weights_are_the_same",
    "--quantize":
        "tests/torch/test_quantize.py::test_a_run_on_packed_weights_trains_saves_loads_and_exports_like_any_other",
    "--shard-base":
        "tests/torch/test_processes.py::"
        "test_a_base_spread_over_processes_trains_to_the_same_and_each_holds_its_half",
    "--auto-fit": _ACCELERATE + "test_with_auto_fit_settings_change_until_a_step_fits_and_each_change_is_said",
    "--compile": _ACCELERATE + "test_compiled_blocks_train_to_the_same_weights_dropout_included",
    "--offload-encoder": _PREPROCESS + "test_the_encoders_of_words_and_conditions_stay_off_the_gpu",
    "--ema-decay": "tests/torch/test_ema.py::test_the_average_is_the_one_its_rule_gives_over_a_run",
    "--val-split": _VALIDATION + "test_held_out_songs_are_chosen_by_their_names_and_never_trained_on",
    "--early-stop-patience": _VALIDATION + "test_patience_ends_a_run_that_learns_nothing_more",
    "--save-best": _VALIDATION + "test_the_best_adapter_is_not_kept_when_that_is_turned_off",
    # Objective
    "--cfg-ratio": _OBJECTIVE,
    "--loss-weighting": _STEP + "test_min_snr_weights_the_loss_of_a_step",
    "--snr-gamma": _STEP + "test_min_snr_weights_the_loss_of_a_step",
    "--timestep-mode": _OBJECTIVE,
    "--shift": _OBJECTIVE,
    "--chunk-duration": _BATCHES + "test_a_window_takes_its_latents_from_its_place_and_its_context_from_the_start",
    # Data loading
    "--num-workers": _READ,
    "--pin-memory": _WORK + "test_batches_are_pinned_for_a_gpu_alone_and_where_that_is_wanted",
    "--prefetch-factor": _READ,
    "--persistent-workers": _READ,
    "--dataset-repeats": _PACE,
    # Checkpointing and logging
    "--save-every": _PACE,
    "--resume-from": _WORK + "test_a_run_goes_on_from_the_checkpoint_that_was_typed",
    "--log-dir": _PACE,
    "--log-every": _PACE,
    "--log-heavy-every": _PACE,
    "--sample-every-n-epochs": _SAMPLES,
    "--sample-prompts": _SAMPLES,
    "--sample-duration": _SAMPLES,
    # Preprocessing
    "--preprocess": _PREPROCESS + "test_with_an_output_folder_training_follows",
    "--audio-dir": _PREPROCESS + "test_songs_of_the_folder_become_tensors_where_it_was_typed",
    "--dataset-json": _PREPROCESS + "test_a_dataset_file_says_which_songs_and_what_they_are",
    "--tensor-output": _PREPROCESS + "test_songs_of_the_folder_become_tensors_where_it_was_typed",
    "--max-duration": _PREPROCESS + "test_songs_are_cut_at_the_duration",
    "--normalize": _PREPROCESS + "test_songs_are_brought_to_the_peak",
    "--target-db": _PREPROCESS + "test_songs_are_brought_to_the_peak",
    "--target-lufs": _PREPROCESS + "test_songs_are_brought_to_the_loudness",
    # Presets
    "--preset": _SETTINGS,
    "--save-preset": _SETTINGS,
    "--config": _SETTINGS,
}  # fmt: skip

_PINNED = {flag_of(name) for name in RECIPE_PINS["vanilla"]}

COVERED: Mapping[str, Mapping[str, str]] = {
    "": GLOBAL,
    "fixed": {**GLOBAL, **TRAINING},
    # The same settings in the same loop, without those that the recipe pins.
    "vanilla": {**GLOBAL, **{flag: test for flag, test in TRAINING.items() if flag not in _PINNED}},
    "build-dataset": {
        **GLOBAL,
        "--input": _BUILD,
        "--output": "tests/unit/test_build_dataset.py::test_the_output_may_lie_elsewhere_but_is_a_file",
        "--name": _BUILD,
        "--tag": _BUILD,
        "--tag-position": _BUILD,
        "--genre-ratio": _BUILD,
    },
    "sample": {
        **GLOBAL,
        "--adapter": _TASKS + "test_an_adapter_is_heard_at_its_strengths_and_knows_its_model",
        "--prompt": _HEARD,
        "--prompts": _TASKS + "test_prompts_come_from_a_file",
        "--lyrics": _HEARD,
        "--language": _HEARD,
        "--bpm": _HEARD,
        "--keyscale": _HEARD,
        "--timesignature": _HEARD,
        "--output": _HEARD,
        "--strengths": _TASKS + "test_an_adapter_is_heard_at_its_strengths_and_knows_its_model",
        "--duration": _TASKS + "test_the_same_words_give_the_same_sound_and_the_duration_its_length",
        "--seed": _HEARD,
        "--steps": _HEARD,
        "--guidance": _HEARD,
        "--shift": _HEARD,
        "--checkpoint-dir": _HEARD,
        "--model-variant": _HEARD,
        "--base-model": _HEARD,
        "--device": _TASKS + "test_a_sample_on_a_device_that_is_not_there_is_refused",
        "--precision": _HEARD,
    },
    "export": {
        **GLOBAL,
        "--adapter": _TASKS + "test_an_adapter_is_exported_for_whom_and_to_where_it_was_typed",
        "--to": _TASKS + "test_an_adapter_is_exported_for_whom_and_to_where_it_was_typed",
        "--output": _TASKS + "test_an_adapter_is_exported_for_whom_and_to_where_it_was_typed",
        "--rank": _TASKS + "test_an_export_has_the_rank_that_was_typed",
        "--checkpoint-dir": _TASKS + "test_an_export_reads_the_model_that_was_typed",
        "--model-variant": _TASKS + "test_an_export_reads_the_model_that_was_typed",
        "--base-model": _TASKS + "test_an_export_reads_the_model_that_was_typed",
    },
    "estimate": {
        **GLOBAL,
        "--checkpoint-dir": _ESTIMATE + "test_the_model_and_the_device_are_the_ones_that_were_typed",
        "--model-variant": _ESTIMATE + "test_the_model_and_the_device_are_the_ones_that_were_typed",
        "--base-model": _ESTIMATE + "test_the_model_and_the_device_are_the_ones_that_were_typed",
        "--dataset-dir": _ESTIMATE_COMMAND,
        "--output": _MEASURED,
        "--device": _ESTIMATE + "test_the_model_and_the_device_are_the_ones_that_were_typed",
        "--precision": _MEASURED,
        "--method": _MEASURED,
        "--estimate-batches": _MEASURED,
        "--batch-size": _MEASURED,
        "--seed": _MEASURED,
        "--gradient-checkpointing": _ESTIMATE + "test_activations_are_recomputed_where_that_was_typed",
        "--quantize": _MEASURED,
        "--timestep-focus": _ESTIMATE_RUN + "test_the_focus_chooses_the_timesteps",
        "--granularity": _ESTIMATE_RUN + "test_with_layers_as_the_grain_all_modules_of_a_layer_share_a_rank",
        "--top-k": _ESTIMATE_COMMAND,
        "--log-dir": _ESTIMATE_COMMAND,
        "--attention-type": _ESTIMATE_RUN + "test_every_projection_of_every_block_is_looked_at",
        "--target-modules": _ESTIMATE_RUN + "test_every_projection_of_every_block_is_looked_at",
        "--rank": _ESTIMATE + "test_the_ranks_keep_their_bounds_and_the_uniform_adapter_is_the_budget",
        "--uniform-modules": _ESTIMATE + "test_the_ranks_keep_their_bounds_and_the_uniform_adapter_is_the_budget",
        "--parameters": _ESTIMATE_RUN + "test_the_budget_is_the_uniform_adapters_and_is_kept",
        "--rank-min": _ESTIMATE + "test_the_ranks_keep_their_bounds_and_the_uniform_adapter_is_the_budget",
        "--rank-max": _ESTIMATE + "test_the_ranks_keep_their_bounds_and_the_uniform_adapter_is_the_budget",
        "--save-directions": _ESTIMATE_COMMAND,
        "--recipe": _MEASURED,
        "--cfg-ratio": _MEASURED,
        "--loss-weighting": _MEASURED,
        "--snr-gamma": _ESTIMATE + "test_so_does_what_counts_only_beside_another_setting",
        "--timestep-mode": _MEASURED,
        "--shift": _ESTIMATE + "test_so_does_what_counts_only_beside_another_setting",
        "--chunk-duration": _MEASURED,
        "--val-split": _MEASURED,
        "--verify": _PROOF,
        "--verify-steps": _PROOF,
        "--verify-runs": _PROOF,
        "--learning-rate": _PROOF,
        "--alpha": _PROOF,
        "--gradient-accumulation": _PROOF,
    },
    "doctor": {
        **GLOBAL,
        "--checkpoint-dir": _DOCTOR + "test_a_machine_that_can_train_is_told_so",
        "--model-variant": _DOCTOR + "test_the_model_the_output_and_the_device_are_the_ones_that_were_typed",
        "--output-dir": _DOCTOR + "test_the_model_the_output_and_the_device_are_the_ones_that_were_typed",
        "--device": _DOCTOR + "test_the_model_the_output_and_the_device_are_the_ones_that_were_typed",
    },
    "demo": {**GLOBAL, "--folder": "tests/torch/test_demo.py::test_the_demo_goes_the_whole_way"},
}

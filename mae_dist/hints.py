"""What to write instead of a setting, or a value, that does not exist: the names of other codebases, and ours.

The words are those of timm, the official MAE code, Lightning, stable-pretraining, torchtitan, torchrun, Hugging Face's
Trainer and accelerate, and former names of our own. A word in several rows of NAMES gets all of their settings. Knows
settings by name only; `config` has their types and ranges.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SECTIONS = {
    "aug": "view", "augment": "view", "augmentation": "view", "board": "heads", "probe": "heads", "ckpt": "checkpoint",
    "dataset": "data", "dist": "machine", "distributed": "machine", "parallelism": "machine", "log": "track",
    "logger": "track", "logging": "track", "optimizer": "optim", "trainer": "train", "training": "train",
}  # fmt: skip
"""Section of another codebase, or a former one -> ours, where the key is the same."""

NAMES = {
    "out": "output_dir out_dir outdir output log_dir logdir save_dir default_root_dir dump_folder experiment exp_name "
           "run_name logging_dir dirpath work_dir run_dir",
    "init_from": "from start finetune pretrained initial_checkpoint checkpoint_path ckpt_path ckpt load_from "
                 "model_name_or_path pretrained_checkpoint init_checkpoint initial_load_path checkpoint",
    "data.path": "data data_path data_dir dataset dataset_path dataset_name train_dir train_path root data_root",
    "data.split": "train_split",
    "data.test_path": "val_path val_dir validation_dir eval_path test_dir val_data",
    "data.test_split": "val_split validation_split eval_split",
    "data.shuffle_window": "shuffle shuffle_buffer buffer_size shuffle_size shuffle_buffer_size",
    "data.aug_repeats": "num_repeats repeated_aug repeat_aug repeated_augmentation repeats",
    "data.channels": "in_chans in_channels num_channels",
    "data.mean": "img_mean image_mean pixel_mean",
    "data.std": "img_std image_std pixel_std",
    "view.crop": "train_crop_mode random_resized_crop crop_mode",
    "view.scale": "crop_scale rrc_scale min_scale crop_min",
    "view.ratio": "crop_ratio rrc_ratio",
    "view.pad": "padding random_crop_padding",
    "view.flip": "hflip horizontal_flip random_flip flip_prob",
    "view.randaugment": "aa auto_augment autoaugment rand_augment randaug",
    "view.color_jitter": "colour_jitter colorjitter jitter brightness contrast saturation",
    "view.random_erasing": "erase reprob re_prob random_erase random_erase_prob erasing_prob",
    "view.test_crop": "crop_pct center_crop test_crop_ratio",
    "model.name": "model arch architecture backbone model_name encoder flavor",
    "model.image_size": "input_size img_size image_resolution resolution crop_size resize",
    "model.pool": "global_pool cls_token pooling",
    "model.position": "pos_embed position_embedding use_abs_pos_emb",
    "model.drop_path": "drop_path_rate stochastic_depth stochastic_depth_prob drop_connect",
    "model.train_blocks": "freeze_backbone freeze num_trainable_blocks unfreeze_blocks",
    "mae.mask_ratio": "masking_ratio mask_prob",
    "mae.masking": "mask_type mask_strategy mask_mode",
    "mae.norm_pix": "norm_pix_loss",
    "mae.predict": "predict_ratio decoder_mask_ratio",
    "mae.decoder_dim": "decoder_embed_dim decoder_hidden_size",
    "mae.decoder_depth": "decoder_num_hidden_layers decoder_layers",
    "mae.decoder_heads": "decoder_num_heads decoder_num_attention_heads",
    "train.epochs": "max_epochs num_epochs num_train_epochs n_epochs total_epochs",
    "train.steps": "max_steps num_steps total_steps max_iters num_iterations iterations train_steps",
    "train.global_batch": "batch_size global_batch_size train_batch_size total_batch_size effective_batch_size bs",
    "train.seed": "random_seed data_seed manual_seed seed_everything",
    "train.precision": "amp fp16 bf16 use_amp amp_dtype mixed_precision mixed_precision_param dtype param_dtype "
                       "torch_dtype float16",
    "train.reduce_dtype": "reduce mixed_precision_reduce grad_reduce_dtype",
    "train.clip_grad": "clip clip_grad_norm gradient_clip_val max_norm max_grad_norm grad_clip clip_norm "
                       "gradient_clipping grad_norm_clip",
    "train.ema": "ema_decay model_ema model_ema_decay ema_rate ema_momentum use_ema",
    "train.label_smoothing": "smoothing label_smoothing_factor",
    "train.loss": "criterion bce_loss loss_fn",
    "optim.name": "optim optimizer opt optimizer_name optimizer_type",
    "optim.base_lr": "lr learning_rate blr base_learning_rate lr_base max_lr peak_lr init_lr",
    "optim.min_lr": "eta_min final_lr end_lr lr_min min_learning_rate min_lr_factor",
    "optim.schedule": "optim.decay decay sched scheduler lr_scheduler lr_scheduler_type lr_schedule decay_type",
    "optim.warmup_epochs": "warmup warmup_steps warmup_iters num_warmup_steps warmup_ratio lr_warmup_epochs",
    "optim.weight_decay": "wd decay weight_decay_rate",
    "optim.betas": "opt_betas beta1 beta2 adam_beta1 adam_beta2 adam_betas",
    "optim.layer_decay": "llrd layerwise_lr_decay lr_layer_decay layer_wise_decay",
    "mix.mixup": "mixup_alpha",
    "mix.cutmix": "cutmix_alpha",
    "mix.prob": "mixup_prob",
    "mix.switch": "mixup_switch_prob switch_prob",
    "knn.k": "knn_k num_neighbors n_neighbors nb_knn",
    "knn.temperature": "knn_temperature knn_t",
    "heads.lars": "lr_grid learning_rates",
    "heads.blocks": "layers n_last_blocks",
    "heads.held_out": "val_fraction validation_fraction val_ratio",
    "machine.processes": "devices gpus num_gpus nproc_per_node nproc num_processes world_size n_gpus accelerator "
                         "num_devices",
    "machine.micro_batch": "micro_batch_size per_device_train_batch_size per_device_batch_size local_batch_size "
                           "batch_size_per_gpu per_gpu_batch_size microbatch train_micro_batch_size_per_gpu chunk",
    "machine.workers": "num_workers dataloader_num_workers nworkers n_workers",
    "machine.strategy": "parallel fsdp ddp deepspeed distributed_strategy sharding_strategy use_fsdp "
                        "zero_stage distributed_backend",
    "machine.shards": "data_parallel_shard_degree shard_degree shard_group_size",
    "machine.activation_checkpointing": "recompute grad_checkpointing gradient_checkpointing "
                                        "activation_checkpoint use_checkpoint grad_ckpt activation_recomputation",
    "machine.compile": "torch_compile torchcompile use_compile compile_model",
    "machine.timeout": "ddp_timeout nccl_timeout init_timeout_seconds train_timeout_seconds collective_timeout",
    "machine.restarts": "max_restarts",
    "checkpoint.every": "save_freq save_steps save_interval checkpoint_freq checkpoint_interval interval save_every "
                        "every_n_train_steps save_every_n_epochs save_every_n_steps every_n_epochs ckpt_freq",
    "checkpoint.minutes": "train_time_interval recovery_interval",
    "checkpoint.keep": "save_total_limit checkpoint_hist keep_latest_k save_top_k max_to_keep keep_last",
    "checkpoint.keep_every": "keep_period keep_freq",
    "checkpoint.keep_best": "monitor save_best save_best_only best_metric metric_for_best_model load_best_model_at_end "
                            "eval_metric checkpoint_metric",
    "track.every": "log_every_n_steps log_interval log_freq logging_steps print_freq log_every log_steps print_every",
    "track.evaluate_every": "eval_freq eval_every eval_steps eval_interval val_check_interval check_val_every_n_epoch "
                            "val_freq eval_every_n_epochs val_interval",
    "track.online": "online_eval online_probe online_knn knn_eval linear_eval online_linear_eval rankme",
    "track.wandb": "log_wandb enable_wandb use_wandb report_to wandb_mode logger",
    "track.project": "wandb_project project_name",
}  # fmt: skip
"""Setting -> the words for it, in any section; `optim.decay` only in that one."""

NO_SETTING = {
    "accum_iter gradient_accumulation_steps accumulate_grad_batches grad_accum_steps accumulation_steps update_freq":
        "each rank splits its share of train.global_batch into micro-batches of machine.micro_batch images",
    "resume auto_resume resume_from resume_from_checkpoint start_epoch no_resume_opt load_step last_epoch":
        "the same command with the same out= resumes its run from the newest checkpoint",
    "overwrite_output_dir overwrite": "choose another out=, or remove the folder yourself",
    "num_nodes nnodes nodes num_machines node_rank rdzv_endpoint rdzv_backend main_process_ip machine_rank":
        "the number of nodes is given to torchrun (--nnodes) or to mae-dist submit (--nodes)",
    "dist_url dist_on_itp local_rank rank gpu master_addr master_port dist_backend dist_eval distributed init_method":
        "ranks and addresses come from torchrun, mae-dist submit, or machine.processes on one machine",
    "device": "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= (empty) selects the CPU",
    "pin_mem pin_memory no_pin_mem dataloader_pin_memory persistent_workers prefetch_factor drop_last no_prefetcher":
        "the loader pins memory and prefetches by itself; machine.workers is the number of its processes",
    "nb_classes num_classes n_classes num_labels": "the number of classes is read from the data's dataset.json",
    "patch_size patch": "the patch size is part of model.name: vit_b16 has patches of 16 x 16 pixels",
    "embed_dim hidden_size depth num_heads mlp_ratio num_layers hidden_dim":
        "the size of the backbone follows from model.name; `mae-dist models` lists all",
    "interpolation train_interpolation": "images are resized by antialiased bicubic interpolation",
    "vflip vertical_flip remode recount resplit aug_splits cutmix_minmax mixup_mode mixup_off_epoch":
        "leave it out: the augmentations are view.* and mix.*",
    "warmup_lr": "the lr rises from 0 in optim.warmup_epochs",
    "cooldown_epochs patience_epochs decay_epochs decay_rate decay_milestones lr_decay milestones gamma step_size":
        "the lr falls from its peak to optim.min_lr by optim.schedule=cosine or linear",
    "opt_eps eps epsilon adam_epsilon": "AdamW's epsilon is 1e-8",
    "drop dropout drop_rate attn_drop attention_dropout hidden_dropout_prob drop_block":
        "there is no dropout; model.drop_path is stochastic depth",
    "sync_bn sync_batchnorm dist_bn split_bn": "batch norm, where a head has one, is over the global batch",
    "find_unused_parameters no_ddp_bb static_graph gradient_as_bucket_view bucket_cap_mb":
        "leave it out: DDP needs no options here",
    "benchmark cudnn_benchmark worker_seeding": "train.seed decides everything random",
    "tensor_parallel_degree pipeline_parallel_degree context_parallel_degree tensor_parallel pipeline_parallel tp pp":
        "machine.strategy has ddp, fsdp and hsdp only",
    "data_parallel_replicate_degree": "the number of copies is the number of ranks over machine.shards",
    "fsdp_config fsdp_reshard_after_forward cpu_offload offload": "machine.strategy=fsdp needs no options",
    "async_mode async_save async_checkpoint": "checkpoints are always written in the background",
    "eval_only do_train do_eval evaluate test_only eval":
        "the verb decides: probe, knn and finetune end with an evaluation of the test split",
    "limit_train_batches limit_val_batches fast_dev_run overfit_batches num_sanity_val_steps":
        "train.steps gives a short run",
    "callbacks profiler plugins enable_checkpointing enable_progress_bar use_distributed_sampler save_last "
    "channels_last tf32 fused flash_attention attn_implementation":
        "leave it out: it is not configurable",
    "max_time": "stop_before_end of the cluster file saves and requeues a run before its time limit",
    "trust_coefficient": "the trust coefficient of LARS is 0.001",
}  # fmt: skip
"""Words for what is no setting here -> what to do instead."""

VALUES = {
    "machine.strategy": {
        "fsdp": "fsdp2 zero3 zero_3 zero-3 3 deepspeed deepspeed_stage_3 deepspeed_stage_2 zero2 zero1 zero full_shard "
                "fully_shard shard_grad_op sharded true",
        "hsdp": "hybrid_shard hybrid hsdp2 _hybrid_shard_zero2 zero++",
        "ddp": "dp ddp_spawn ddp_find_unused_parameters_true no_shard auto replicate single_device none distributed "
               "data_parallel nccl gloo",
    },
    "train.precision": {
        "fp16": "16 16-mixed fp16-mixed 16-true float16 half amp",
        "bf16": "bf16-mixed bf16-true bfloat16 true mixed",
        "fp32": "32 32-true float32 full no none false tf32 highest float",
    },
    "train.reduce_dtype": {"fp32": "float32 32", "bf16": "bfloat16 16 fp16 float16"},
    "train.loss": {"softmax": "ce cross_entropy crossentropy soft_target", "sigmoid": "bce binary_cross_entropy"},
    "optim.name": {
        "adamw": "adam adamw_torch adamw_torch_fused fused_adamw adam_w", "lars": "larc", "muon": "moonlight muonadamw",
    },
    "optim.schedule": {
        "cosine": "cosine_annealing cosineannealing cosineannealinglr warmup_cosine cosine_with_warmup half_cosine",
        "linear": "poly polynomial linear_with_warmup linear_decay",
    },
    "model.pool": {"cls": "token cls_token class_token first", "avg": "mean gap average global_pool true"},
    "model.position": {"sincos": "sin_cos sin-cos fixed sinusoidal sincos2d", "learned": "learnable absolute abs"},
    "view.crop": {
        "resized": "rrc random_resized_crop randomresizedcrop random", "pad": "shift random_crop randomcrop",
        "center": "centre center_crop none test",
    },
    "mae.masking": {"random": "uniform", "block": "blockwise block-wise beit", "grid": "uniform_grid checkerboard"},
    "mae.hidden": {"drop": "remove sparse mae none", "token": "mask_token simmim mask"},
    "mae.decoder": {"full": "self vit transformer", "cross": "cross_attention crossmae crossattention"},
    "heads.features": {"mean": "avg gap patch patches", "cls": "token cls_token", "both": "cls_mean concat cat"},
    "track.wandb": {"online": "true on yes wandb", "off": "false disabled none no"},
}  # fmt: skip
"""Setting -> our value -> the words for it."""


def wrong_value(name: str, value: Any, choices: Sequence[str]) -> str:
    """What is wrong with a value, or elements of a list, that are none of the choices; empty if nothing is."""
    wrong = [part for part in parts(value) if part is not None and choices and part not in choices]
    ours = [choice for part in wrong if (choice := _value_for(name, part))]
    hint = f"; use {', '.join(ours)}" if ours else ""
    return f"{given(name, value)}: must be one of {', '.join(choices)}{hint}" if wrong else ""


def wrong_name(name: str, value: Any, meanings: Mapping[str, str], verbs: Mapping[str, Sequence[str]]) -> str:
    """Why there is no setting of this name, and what to write. `meanings` has the settings that there are; `verbs` has
    those of all verbs and who reads them, and is empty if the settings are not those of a verb.
    """
    is_section = any(other.startswith(f"{name}.") for other in meanings)
    what = f"{name}: {'is a section of settings' if is_section else 'there is no such setting'}"
    if name in verbs:
        return f"{given(name, value)}: is for {', '.join(verbs[name])}; leave it out"
    meant = _settings_for(name, list(verbs), is_section) if verbs else []
    if uses := [setting for setting in meant if setting in meanings]:
        values = [_value_for(setting, value) for setting in uses]
        words = [f"{s}{f'={v}' if v else ''} ({meanings[s]})" for s, v in zip(uses, values, strict=True)]
        return f"{what}; use {' or '.join(words)}"
    if meant:
        return f"{what}; {meant[0]} is for {', '.join(verbs[meant[0]])}; leave it out"
    if verbs and (advice := _lookup({answer: words for words, answer in NO_SETTING.items()}, name)):
        return f"{what}; {advice[0]}"
    if is_section:
        return f"{what}; write {name}.KEY=value"
    near = difflib.get_close_matches(name, meanings, n=1)
    return what + (f"; did you mean {near[0]}?" if near else "")


def parts(value: Any) -> Sequence[Any]:
    """The elements of a list or tuple; of any other value, itself."""
    return value if isinstance(value, list | tuple) else (value,)


def given(name: str, value: Any) -> str:
    """A setting as it is written on the command line."""
    return f"{name}={shown(value)}"


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return {"???": "(required)", "None": "none", "True": "true", "False": "false"}.get(str(value), str(value))


def leaves(plain: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dict by their dotted names."""
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settings_for(name: str, known: Sequence[str], is_section: bool) -> list[str]:
    """The known settings that a wrong name may mean: those with its key in other sections, else those of NAMES."""
    section, _, key = name.rpartition(".")
    same = [] if is_section else [setting for setting in known if setting.endswith(f".{key}")]
    renamed = f"{SECTIONS.get(section)}.{key}"
    return [renamed] if renamed in same else same or _lookup(NAMES, name)


def _value_for(setting: str, value: object) -> str | None:
    found = _by_word(VALUES.get(setting, {})).get(str(value).lower())
    return found[0] if found else None


def _lookup(table: Mapping[str, str], name: str) -> list[str]:
    plain, found = name.lower().replace("-", "_").lstrip("_"), _by_word(table)
    return found.get(plain) or found.get(plain.rpartition(".")[2], [])


def _by_word(table: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for meaning, words in table.items():
        for word in words.split():
            found.setdefault(word, []).append(meaning)
    return found

"""Builds what is trained: language model, vision tower, projector, adapters, and which of them learn."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from dama.console import log
from dama.train.setup import join_ranks, loading_options, precision_of_weights, with_adapters
from llava.model.attention import SHARED_PREFIX
from llava.model.builder import WHOLE_MODULES, load_llava
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.tokenization import load_tokenizer
from llava.train.arguments import Arguments
from llava.train.base_model import validate_base


def setup_model(
    arguments: Arguments, attn_implementation: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[Any, PreTrainedTokenizerBase, Any]:
    """(model, tokenizer, image processor) as the flags describe them; the model may be a PeftModel.

    `dtype` overrides the precision of weights that training would choose.
    """
    model_args, data_args, args = arguments
    validate_base(arguments)
    join_ranks(args)
    set_seed(args.seed)  # new adapters and projectors start alike in every run
    dtype = dtype or precision_of_weights(args)
    options = loading_options(args, WHOLE_MODULES)
    shares_prefix = args.task == "DPO" and args.shared_prefix
    options["attn_implementation"] = SHARED_PREFIX if shares_prefix else attn_implementation or SHARED_PREFIX
    model = load_llava(str(model_args.model_name_or_path), dtype=dtype, cache_dir=args.cache_dir, **options)
    model.config.use_cache = False
    if model_args.freeze_backbone:
        model.model.requires_grad_(False)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()

    tokenizer = load_tokenizer(
        str(model_args.model_name_or_path), model_max_length=args.model_max_length, padding_side="right"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    llava = model
    if args.lora_enable:  # before the tower is there, or its layers would get adapters too
        model = with_lora(model, args)
    setup_vision(llava, tokenizer, arguments, dtype)
    llava.float32_logits = args.float32_logits
    if args.compile_layers and args.gradient_checkpointing:
        log("warning: --compile_layers True has no effect with gradient checkpointing, whose hooks stay eager")
    elif args.compile_layers:
        compile_layers(llava)
    return model, tokenizer, llava.get_model().load_vision_tower().image_processor


def compile_layers(model: LlavaLlamaForCausalLM) -> None:
    """Compiles every decoder layer by itself: one graph for all of them, whatever a batch's length.

    Attention stays what it is (see llava.model.attention); norms, rotary embedding, activation and residual sums become
    fused kernels.

    Raises:
        ValueError: under ZeRO-3, whose weights come and go by hooks inside a layer.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError("--compile_layers True: not possible under ZeRO-3; use scripts/zero2.json, or leave it out")
    for layer in model.get_model().layers:
        layer.compile(dynamic=True)


def setup_vision(
    model: LlavaLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: Arguments, dtype: torch.dtype
) -> None:
    """Tower and projector, and the config fields that a checkpoint records about them."""
    model_args, data_args, args = arguments
    model.get_model().initialize_vision_modules(model_args=model_args, fsdp=args.fsdp)
    # It never trains, so half precision is enough for it, also where the others' weights are fp32 under autocast.
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else dtype
    model.get_model().load_vision_tower().to(dtype=half, device=args.device)
    model.get_model().mm_projector.to(dtype=dtype)

    config = model.config
    config.image_aspect_ratio = data_args.image_aspect_ratio or getattr(config, "image_aspect_ratio", None)
    if config.image_aspect_ratio is None:
        config.image_aspect_ratio = "pad" if args.task == "DPO" else "square"  # LLaVA's default is square
    if config.image_aspect_ratio == "anyres" and not getattr(config, "image_grid_pinpoints", None):
        raise ValueError(
            "--image_aspect_ratio anyres: expected image_grid_pinpoints, the grids in pixels, in the checkpoint's "
            "config.json, got none; add them there, for example [[336, 672], [672, 336]], or use pad"
        )
    config.tokenizer_padding_side = tokenizer.padding_side
    config.tokenizer_model_max_length = args.model_max_length
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = args.freeze_mm_mlp_adapter
    config.mm_use_im_start_end = model_args.mm_use_im_start_end
    config.mm_use_im_patch_token = model_args.mm_use_im_patch_token
    config.mm_projector_lr = args.mm_projector_lr
    if model_args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(True)
    if args.freeze_mm_mlp_adapter:
        model.get_model().mm_projector.requires_grad_(False)
    model.initialize_vision_tokenizer(model_args, tokenizer=tokenizer)


def with_lora(model: LlavaLlamaForCausalLM, args: Any) -> Any:
    """The model under LoRA adapters on all linear layers of the language model."""
    from peft import LoraConfig

    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=find_all_linear_names(model),
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        task_type="CAUSAL_LM",
    )
    log(f"LoRA: rank {config.r} on {', '.join(sorted(config.target_modules))}")
    return with_adapters(model, config, args)


def find_all_linear_names(model: torch.nn.Module) -> list[str]:
    """Last names of the language model's linear layers, the output layer left out."""
    outside = ("mm_projector", "vision_tower", "vision_resampler", "lm_head")
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not any(part in name for part in outside)
        }
    )

"""What every model family does alike when it loads what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from dama.notices import QUANTIZATION_NOTICES, without_build_notices


def join_ranks(args: Any) -> None:
    """Start the ranks' communication before weights are loaded: ZeRO-3 spreads them while they are.

    On CPUs transformers would start DeepSpeed's with the trainer only.
    """
    _ = args.device
    if is_deepspeed_zero3_enabled() or (args.deepspeed and args.use_cpu):
        import deepspeed

        with without_build_notices():
            deepspeed.init_distributed(dist_backend="gloo" if args.use_cpu else None)


def enable_checkpointing(model: Any, options: dict[str, Any] | None = None) -> None:
    """Recompute activations in the backward pass, by the method's name in the installed transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def precision_of_weights(args: Any) -> torch.dtype:
    """bf16 or fp16 where DeepSpeed keeps fp32 master weights, or the base is frozen; else fp32 under autocast.

    AdamW on bf16 weights loses updates as small as DAMA's: 5e-7 is below the last bit of most of them.
    """
    if args.deepspeed or args.lora_enable:
        return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return torch.float32


def quantization_config(
    load_8bit: bool,
    skipped: Sequence[str],
    *,
    compute_dtype: torch.dtype = torch.float16,
    double_quant: bool = True,
    quant_type: str = "nf4",
) -> Any:
    """4 or 8 bits through bitsandbytes.

    Args:
        skipped: modules that are left in full precision.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"loading in {8 if load_8bit else 4} bits: expected the package bitsandbytes, which is not installed. "
            "`pip install bitsandbytes`, or load in 16 bits."
        )
    from transformers import BitsAndBytesConfig

    QUANTIZATION_NOTICES.release()
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=not load_8bit,
        llm_int8_skip_modules=list(skipped),
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
    )


def loading_options(args: Any, skipped: Sequence[str]) -> dict[str, Any]:
    """Options of from_pretrained for --bits 4 and 8."""
    if args.bits == 16:
        return {}
    compute_dtype = torch.bfloat16 if args.bf16 else torch.float16
    config = quantization_config(
        args.bits == 8, skipped, compute_dtype=compute_dtype, double_quant=args.double_quant, quant_type=args.quant_type
    )
    return {"device_map": {"": args.device}, "quantization_config": config}


# Fields of a generation config that mean nothing without sampling, and without beams.
OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
OF_BEAMS = ("early_stopping", "length_penalty")


def drop_unused_decoding(model: Any) -> None:
    """Empty what a model's generation config says without effect, as Vicuna's does: transformers refuses to save it."""
    config = model.generation_config
    if config is None:  # of a model that does not generate
        return
    unused = OF_SAMPLING * (not config.do_sample) + OF_BEAMS * ((config.num_beams or 1) == 1)
    for name in unused:
        if hasattr(config, name):
            setattr(config, name, None)


def keep_packing(model: Any) -> None:
    """Let layers of 4 bits stay as they were loaded.

    On CPUs with AVX512_BF16 bitsandbytes would repack them at the first batch without dropout: for good, without
    gradients from then on, and only widths of a multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def with_adapters(model: Any, config: Any, args: Any) -> Any:
    """The model under PEFT's adapters of `config`, over a base that --bits may have quantized.

    PEFT keeps adapters in fp32 over a base in half precision. ZeRO-3 joins the shares of all parameters in one buffer,
    which has one precision, and keeps fp32 copies of what is trained itself.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if args.bits != 16:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    return get_peft_model(model, config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())

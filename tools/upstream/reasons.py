"""What differs from LLaVA, and why: LEFT_OUT and CHANGED. docs/left_out.md is generated from these tables."""

from __future__ import annotations

from collections.abc import Mapping

_OTHER_MODELS = "LLaVA-v1.5 is built on LLaMA (Vicuna). Of models on MPT and Mistral only the templates are there."
_OTHER_TOWER = "Images at several scales (S2) belong to later models; LLaVA-v1.5 has one CLIP tower at one scale."
_ATTENTION = "transformers has the fast attention built in: SDPA, and FlashAttention where it is installed."
_TRANSFORMERS = "transformers' own method is inherited; `generate` has turned the images into embeddings before."
_SERVING = "Export the model (python -m llava.model.export --to hf) and serve it with vLLM or `transformers serve`."
_FRONT_END = "The page is written anew for one process and two models side by side; its callbacks are no interface."
_NO_CONTROLLER = "There is no controller to list models: they are named by --model-path and --compare."
_PUBLIC_DEMO = "For LLaVA's public demonstration: moderation, votes, logs of visitors, a page inside another."
_LOGGING = "Standard output is not swapped for a logger."
_OWN_DRIVERS = "Generation has one driver, llava/eval/generate.py, which model_vqa and model_vqa_loader put to work."
_OTHER_BENCHMARKS = "eval/ measures hallucination; for general benchmarks run lmms-eval or VLMEvalKit on the export."
_JUDGES = "Answers reviewed by GPT, a copy of the program for each benchmark. Benchmarks with a judge belong to eval/."
_DEMONSTRATION = "Images, tables and pages of LLaVA's own demonstration."
_OLD_SCRIPTS = "Commands of LLaVA before v1.5; those of v1.5 are in scripts/v1_5/."
_RESAMPLER = "A field without effect that v1.5's checkpoints carry; it is kept when such a checkpoint is saved."
_MODULE_STATE = "State of the module at run time; here it is asked for where it is needed."
_OWN_TEMPLATE = "Other models have chat templates of their own, so that a template that is given with them is refused."

LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "llava/model/language_model/llava_mpt.py",
            "llava/model/language_model/llava_mistral.py",
            "llava/model/__init__.py:LlavaM*",
            "llava/train/train.py:TrainingArguments.mpt_attn_impl",
        ),
        _OTHER_MODELS,
    ),
    "llava/model/multimodal_encoder/clip_encoder.py:CLIPVisionTowerS2": _OTHER_TOWER,
    "config.json:s2_scales": _OTHER_TOWER,
    "config.json:*_resampler*": _RESAMPLER,
    "llava/train/llama_flash_attn_monkey_patch.py": _ATTENTION,
    "llava/train/llama_xformers_attn_monkey_patch.py": _ATTENTION,
    "llava/train/train_xformers.py": _ATTENTION,
    "llava/model/language_model/llava_llama.py:LlavaLlamaForCausalLM.prepare_inputs_for_generation": _TRANSFORMERS,
    **dict.fromkeys(
        (
            "llava/serve/gradio_web_server.py:load_demo",
            "llava/serve/gradio_web_server.py:regenerate",
            "llava/serve/gradio_web_server.py:clear_history",
            "llava/serve/gradio_web_server.py:add_text",
            "llava/serve/gradio_web_server.py:http_bot",
            "llava/serve/gradio_web_server.py:*able_btn",
            "llava/serve/gradio_web_server.py:no_change_btn",
            "llava/serve/gradio_web_server.py:title_markdown",
            "llava/serve/gradio_web_server.py:block_css",
        ),
        _FRONT_END,
    ),
    **dict.fromkeys(
        (
            "llava/serve/gradio_web_server.py:get_model_list",
            "llava/serve/gradio_web_server.py:load_demo_refresh_model_list",
            "llava/serve/gradio_web_server.py:priority",
            "llava/serve/gradio_web_server.py:headers",
            "llava/serve/gradio_web_server.py:--controller-url",
            "llava/serve/gradio_web_server.py:--model-list-mode",
        ),
        _NO_CONTROLLER,
    ),
    **dict.fromkeys(
        (
            "llava/serve/gradio_web_server.py:get_conv_log_filename",
            "llava/serve/gradio_web_server.py:*vote_last_response",
            "llava/serve/gradio_web_server.py:flag_last_response",
            "llava/serve/gradio_web_server.py:logger",
            "llava/serve/gradio_web_server.py:get_window_url_params",
            "llava/serve/gradio_web_server.py:tos_markdown",
            "llava/serve/gradio_web_server.py:learn_more_markdown",
            "llava/serve/gradio_web_server.py:--moderate",
            "llava/serve/gradio_web_server.py:--embed",
        ),
        _PUBLIC_DEMO,
    ),
    **dict.fromkeys(
        (
            "llava/serve/controller.py",
            "llava/serve/model_worker.py",
            "llava/serve/sglang_worker.py",
            "llava/serve/register_worker.py",
            "llava/serve/test_message.py",
        ),
        _SERVING,
    ),
    "llava/utils.py:StreamToLogger": _LOGGING,
    "llava/utils.py:handler": _LOGGING,
    "llava/train/train.py:local_rank": _MODULE_STATE,
    "llava/train/train.py:IS_TOKENIZER_GREATER_THAN_0_14": _MODULE_STATE,
    "llava/eval/model_qa.py": _OWN_DRIVERS,
    "llava/eval/model_vqa_loader.py:CustomDataset": _OWN_DRIVERS,
    "llava/eval/model_vqa_loader.py:create_data_loader": _OWN_DRIVERS,
    "llava/eval/model_vqa_loader.py:collate_fn": _OWN_DRIVERS,
    **dict.fromkeys(
        (
            "llava/eval/model_vqa_mmbench.py",
            "llava/eval/model_vqa_science.py",
            "llava/eval/eval_science_qa*.py",
            "llava/eval/eval_textvqa.py",
            "llava/eval/m4c_evaluator.py",
            "scripts/convert_*",
            "scripts/v1_5/eval/*",
        ),
        _OTHER_BENCHMARKS,
    ),
    "llava/eval/eval_gpt_review*.py": _JUDGES,
    "llava/eval/qa_baseline_gpt35.py": _JUDGES,
    "llava/eval/summarize_gpt_review.py": _JUDGES,
    "llava/eval/generate_webpage_data_from_table.py": _DEMONSTRATION,
    "llava/eval/table/*": _DEMONSTRATION,
    "llava/eval/webpage/*": _DEMONSTRATION,
    "llava/serve/examples/*": _DEMONSTRATION,
    **dict.fromkeys(
        (
            "scripts/pretrain*.sh",
            "scripts/finetune*.sh",
            "scripts/sqa_eval_*.sh",
            "scripts/upload_pypi.sh",
        ),
        _OLD_SCRIPTS,
    ),
}
"""Pattern -> reason. A pattern is FILE or FILE:NAME with *; NAME is a name, Class.member or --flag."""

_FROM_CHECKPOINT = "Not given, it is what the checkpoint says, and only then LLaVA's default."
_V1_5 = "The value of LLaVA-v1.5's scripts."
_NAME_THE_MODEL = "There is no default model: it has to be named."
_NAME_THE_FILE = "There is no default file: it has to be named."
_ANY_DEVICE = "Not given, it is cuda where there is one, else cpu."
_THIS_MACHINE = "Reached from this machine only, unless another address is given."
_ONE_PROCESS = "One process answers, so fewer at the same time; the others wait."
_SEVERAL_FOLDERS = "It may be given more than once, so that links from one folder into another are followed."
_FUSED = "Not given, it is adamw_torch on CPUs and adamw_torch_fused on GPUs: the same steps in one kernel."
_NO_EFFECT = "Taken and without effect: rows are always tokenized when needed, and show whether they have an image."

CHANGED: Mapping[str, str] = {
    "llava/train/train.py:ModelArguments.model_name_or_path": _NAME_THE_MODEL,
    "*:--model-path": _NAME_THE_MODEL,
    "llava/eval/model_vqa*.py:--question-file": _NAME_THE_FILE,
    "llava/serve/cli.py:--device": _ANY_DEVICE,
    "llava/serve/gradio_web_server.py:build_demo": _FRONT_END,
    "llava/serve/gradio_web_server.py:--host": _THIS_MACHINE,
    "llava/serve/gradio_web_server.py:--concurrency-count": _ONE_PROCESS,
    "scripts/extract_mm_projector.py:--output": _NAME_THE_FILE,
    "llava/eval/model_vqa*.py:--image-folder": _SEVERAL_FOLDERS,
    "llava/eval/model_vqa*.py:--conv-mode": _OWN_TEMPLATE,
    "llava/eval/run_llava.py:--conv-mode": _OWN_TEMPLATE,
    "llava/serve/cli.py:--conv-mode": _OWN_TEMPLATE,
    "llava/train/train.py:TrainingArguments.optim": _FUSED,
    "llava/train/train.py:ModelArguments.version": _V1_5,
    "llava/train/train.py:ModelArguments.mm_use_im_patch_token": _V1_5,
    "llava/train/train.py:TrainingArguments.model_max_length": _V1_5,
    "llava/train/train.py:ModelArguments.mm_*": _FROM_CHECKPOINT,
    "llava/train/train.py:DataArguments.image_aspect_ratio": _FROM_CHECKPOINT,
    "llava/train/train.py:DataArguments.lazy_preprocess": _NO_EFFECT,
    "llava/train/train.py:DataArguments.is_multimodal": _NO_EFFECT,
}
"""The same for names that are there and differ. The first pattern that fits counts."""

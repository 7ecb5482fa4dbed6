"""Tiny random vision-language models of many families with their processors, built from configs, without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

SPECIAL = {
    "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
}  # fmt: skip
EXTRA = {
    "image_token": "<image>", "video_token": "<video>", "boi_token": "<boi>", "eoi_token": "<eoi>",
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<ctx>",
    "vision_bos_token": "<vs>", "vision_eos_token": "<ve>", "turn_token": "<turn>", "fake_image_token": "<fake>",
    "global_image_token": "<global-img>", "image_break_token": "<brk>", "image_end_token": "<end>",
    "end_of_utterance_token": "<eou>",
}  # fmt: skip
ROWS_AND_COLUMNS = [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
# A question after its image, an answer with the token that ends it, and a line break that nothing supervises.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% if m['role'] == 'assistant' %}<turn>{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=2048, initializer_range=0.3)  # fmt: skip


def tokenizer() -> Any:
    """256 letters (bytes) and the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL, extra_special_tokens=EXTRA)
    made.add_tokens(ROWS_AND_COLUMNS, special_tokens=True)
    made.image_token_id = made.convert_tokens_to_ids(EXTRA["image_token"])
    return made


def ids(tok: Any, *names: str) -> dict[str, int]:
    return {f"{name}_id": tok.convert_tokens_to_ids(EXTRA[name]) for name in names}


def template(image: str) -> str:
    return TEMPLATE.replace("IMAGE", image)


def clip_vision(**more: Any) -> dict[str, Any]:
    return dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                patch_size=14, initializer_range=0.3) | more  # fmt: skip


def llava() -> tuple[Any, Any]:
    tok = tokenizer()
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**clip_vision(projection_dim=24)),
        text_config=hf.LlamaConfig(vocab_size=len(tok), **TEXT), image_token_index=tok.image_token_id,
        vision_feature_layer=-1,
    )  # fmt: skip
    images = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = hf.LlavaProcessor(
        images, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    tok = tokenizer()
    grid = [[28, 56], [56, 28], [56, 56]]
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**clip_vision(projection_dim=24)),
        text_config=hf.LlamaConfig(vocab_size=len(tok), **TEXT), image_token_index=tok.image_token_id,
        image_grid_pinpoints=grid, vision_feature_layer=-1,
    )  # fmt: skip
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    processor = hf.LlavaNextProcessor(
        images, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    tok = tokenizer()
    grid = [[28, 56], [56, 28], [56, 56]]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**clip_vision()),
        text_config=hf.Qwen2Config(vocab_size=len(tok), **TEXT), image_token_index=tok.image_token_id,
        video_token_index=ids(tok, "video_token")["video_token_id"], image_grid_pinpoints=grid, vision_feature_layer=-1,
    )  # fmt: skip
    images = hf.LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = hf.LlavaOnevisionProcessor(
        images, tok, LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}), num_image_tokens=4,
        vision_feature_select_strategy="full", chat_template=template("<image>"),
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def qwen_images() -> Any:
    return hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024)


def qwen2_vl() -> tuple[Any, Any]:
    tok = tokenizer()
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = hf.Qwen2VLConfig(
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2),
        text_config=dict(vocab_size=len(tok), **text), **ids(tok, "image_token", "video_token"),
        vision_start_token_id=ids(tok, "vision_bos_token")["vision_bos_token_id"],
    )  # fmt: skip
    processor = hf.Qwen2VLProcessor(
        qwen_images(), tok, Qwen2VLVideoProcessor(patch_size=4), chat_template=template("<vs><image><ve>")
    )
    return hf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    tok = tokenizer()
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = hf.Qwen2_5_VLConfig(
        vision_config=dict(depth=2, hidden_size=32, out_hidden_size=32, num_heads=2, intermediate_size=32, patch_size=4,
                           fullatt_block_indexes=[1], window_size=16),
        text_config=dict(vocab_size=len(tok), **text), **ids(tok, "image_token", "video_token"),
        vision_start_token_id=ids(tok, "vision_bos_token")["vision_bos_token_id"],
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config), qwen_processor(tok)


def qwen_processor(tok: Any) -> Any:
    videos = Qwen2VLVideoProcessor(patch_size=4)
    return hf.Qwen2_5_VLProcessor(qwen_images(), tok, videos, chat_template=template("<vs><image><ve>"))


def qwen3_vl() -> tuple[Any, Any]:
    tok = tokenizer()
    text = TEXT | {"head_dim": 16, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}}  # fmt: skip
    config = hf.Qwen3VLConfig(
        vision_config=dict(depth=2, hidden_size=32, out_hidden_size=32, num_heads=2, intermediate_size=32, patch_size=4,
                           num_position_embeddings=64, deepstack_visual_indexes=[0]),
        text_config=dict(vocab_size=len(tok), **text), **ids(tok, "image_token", "video_token"),
        vision_start_token_id=ids(tok, "vision_bos_token")["vision_bos_token_id"],
        vision_end_token_id=ids(tok, "vision_eos_token")["vision_eos_token_id"],
    )  # fmt: skip
    return hf.Qwen3VLForConditionalGeneration(config), qwen3_processor(tok)


def qwen3_processor(tok: Any) -> Any:
    images = hf.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    videos = Qwen3VLVideoProcessor(patch_size=4)
    return hf.Qwen3VLProcessor(images, tok, videos, chat_template=template("<vs><image><ve>"))


def qwen3_5() -> tuple[Any, Any]:
    """A hybrid: one layer of linear attention, one of full attention."""
    tok = tokenizer()
    text = TEXT | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True,
        "partial_rotary_factor": 0.5}, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
    config = hf.Qwen3_5Config(
        vision_config=dict(depth=2, hidden_size=32, out_hidden_size=32, num_heads=2, intermediate_size=32, patch_size=4,
                           num_position_embeddings=64),
        text_config=dict(vocab_size=len(tok), **text), **ids(tok, "image_token", "video_token"),
        vision_start_token_id=ids(tok, "vision_bos_token")["vision_bos_token_id"],
        vision_end_token_id=ids(tok, "vision_eos_token")["vision_eos_token_id"],
    )  # fmt: skip
    return hf.Qwen3_5ForConditionalGeneration(config), qwen3_processor(tok)


def internvl() -> tuple[Any, Any]:
    tok = tokenizer()
    config = hf.InternVLConfig(
        vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                           image_size=[28, 28], patch_size=[7, 7]),
        text_config=hf.Qwen2Config(vocab_size=len(tok), **TEXT), downsample_ratio=0.5,
        image_token_id=tok.convert_tokens_to_ids(EXTRA["context_image_token"]),
    )  # fmt: skip
    images = hf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=3)
    processor = hf.InternVLProcessor(
        images, tok, InternVLVideoProcessor(size={"height": 28, "width": 28}), image_seq_length=4,
        chat_template=template("<ctx>"),
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    tok = tokenizer()
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = hf.Idefics3Processor(images, tok, image_seq_len=4, chat_template=template("<image>"))
    config = hf.Idefics3Config(  # the processor has added tokens
        vision_config=dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                           image_size=28, patch_size=7),
        text_config=hf.LlamaConfig(vocab_size=len(tok), pad_token_id=tok.pad_token_id, **TEXT), scale_factor=2,
        image_token_id=processor.image_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    tok = tokenizer()
    config = hf.Gemma3Config(
        vision_config=dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                           image_size=28, patch_size=7),
        text_config=dict(vocab_size=len(tok), head_dim=8, sliding_window=24, query_pre_attn_scalar=8,
                         layer_types=["sliding_attention", "full_attention"], **TEXT), mm_tokens_per_image=4,
        image_token_index=tok.image_token_id, boi_token_index=tok.convert_tokens_to_ids("<boi>"),
        eoi_token_index=tok.convert_tokens_to_ids("<eoi>"),
    )  # fmt: skip
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 28, "width": 28}), tok, image_seq_length=4,
        chat_template=template("<boi>"),
    )  # fmt: skip
    model = hf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero at first
    return model, processor


def mistral3() -> tuple[Any, Any]:
    tok = tokenizer()
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                             num_attention_heads=2, image_size=56, patch_size=7),
        text_config=hf.MistralConfig(vocab_size=len(tok), head_dim=8, sliding_window=None, **TEXT),
        image_token_index=tok.image_token_id, spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    images = hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    processor = hf.PixtralProcessor(
        images, tok, patch_size=7, spatial_merge_size=2, image_token="<image>", image_break_token="<brk>",
        image_end_token="<end>", chat_template=template("<image>"),
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config), processor


def paligemma(text: Callable[..., Any] = hf.GemmaConfig, **more: Any) -> tuple[Any, Any]:
    """No chat template: a prefix that sees itself in both directions, and a suffix."""
    tok = tokenizer()
    size = {"height": 28, "width": 28}
    processor = hf.PaliGemmaProcessor(hf.SiglipImageProcessor(size=size, image_seq_length=4), tok)
    config = hf.PaliGemmaConfig(  # the processor has added tokens
        vision_config=hf.SiglipVisionConfig(**clip_vision(projection_dim=32)),
        text_config=text(vocab_size=len(tok), head_dim=8, pad_token_id=tok.pad_token_id, **TEXT, **more),
        image_token_index=tok.image_token_id, projection_dim=32, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config), processor


def paligemma2() -> tuple[Any, Any]:
    """The same with windows of attention and bounded logits."""
    return paligemma(hf.Gemma2Config, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=12,
                     query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"])  # fmt: skip


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava, "llava_next": llava_next, "llava_onevision": llava_onevision, "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "qwen3_5": qwen3_5, "internvl": internvl, "idefics3": idefics3,
    "gemma3": gemma3, "mistral3": mistral3,
}  # fmt: skip
# Models without a chat template, which take a question as prefix and an answer as suffix.
SUFFIX_FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {"paligemma": paligemma, "paligemma2": paligemma2}


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """(random model in fp32 and evaluation mode, its processor)."""
    torch.manual_seed(seed)
    model, processor = (FAMILIES | SUFFIX_FAMILIES)[family]()
    return model.eval(), processor

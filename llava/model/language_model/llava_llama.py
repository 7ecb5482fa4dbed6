"""LLaMA with images: LlavaConfig, LlavaLlamaModel and LlavaLlamaForCausalLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.generation.utils import GenerateOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from dama.logps import (
    AnswerLogps,
    AnswerTokenLogps,
    answer_logps,
    chunk_for,
    float32_head,
    indexed_logps,
    indexed_token_logps,
)
from llava.model.attention import SHARED_PREFIX, no_mask
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel, rows_on_cpu, shown_images
from llava.model.splice import ForwardPlan


class LlavaConfig(LlamaConfig):
    """LLaMA's config with LLaVA's fields."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """LLaMA without its output layer, with vision tower and projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
    """LLaMA that reads images, as LLaVA-1.5 trains and saves it."""

    config_class = LlavaConfig
    # The tower has a home of its own (config.mm_vision_tower); old checkpoints repeat its weights.
    _keys_to_ignore_on_load_unexpected = [r"model\.vision_tower\."]
    float32_logits = True  # in a ForwardPlan's log-probs, on GPUs in half precision

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaLlamaModel:
        """Return the model without its output layer."""
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list[list[int]] | None = None,
        return_dict: bool | None = None,
        *,
        image_index: Tensor | None = None,
        images_encoded: bool = False,
        logp_chunk: int | None = None,
        tails: Tensor | None = None,
        plan: ForwardPlan | None = None,
        logits_to_keep: int | Tensor = 0,
        per_token: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple | AnswerLogps | AnswerTokenLogps:
        """LLaVA's forward; with `logp_chunk` the log-probs of the labelled positions instead of all logits.

        Args:
            input_ids, attention_mask, labels: [B, T], an image as IMAGE_TOKEN_INDEX.
            images: images in the order of their placeholders, see `prepare_inputs_labels_for_multimodal`.
            image_index: [M] which image each placeholder shows, where rows share images.
            images_encoded: `images` are the vision tower's features, computed before.
            logp_chunk: positions whose logits (vocabulary-sized) exist at one time.
            tails: [B, 2] token ids at the end of each row that are the chosen and the rejected answer: the row is a
                pair [prefix | chosen | rejected], see dama.shared_prefix.
            plan: what ids, labels, `image_index` and `tails` amount to, which then are not looked at. A data loader
                makes it (ForwardPlan.of_rows, of_groups); without one the host waits for the device here.
            logits_to_keep: positions at the end, or their indices, that get logits; 0 for all. `generate` asks for one.
            per_token: with a plan and `logp_chunk`, an AnswerTokenLogps.

        Returns:
            transformers' output, or with `logp_chunk` an AnswerLogps with one sum for each row; with `tails` 2B
            sums, those of the chosen answers first.
        """
        if plan is None and tails is not None:
            plan = self.plan_of_pairs(input_ids, attention_mask, labels, images, image_index, tails)  # type: ignore[arg-type]
        if plan is not None:
            return self._planned_forward(plan, images, image_sizes, images_encoded, logp_chunk, per_token)
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes,
                    image_index=image_index, images_encoded=images_encoded,
                )
            )  # fmt: skip
        sequence = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        if logp_chunk is not None:
            if labels is None:
                raise ValueError("logp_chunk: expected labels, which say whose log-probs are wanted, got none")
            hidden = self.model(**sequence, use_cache=False).last_hidden_state
            return answer_logps(hidden, labels, self.lm_head, chunk=chunk_for(self.lm_head, logp_chunk, labels))
        optional = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        kwargs |= {"past_key_values": past_key_values, "labels": labels, "use_cache": use_cache}
        kwargs["logits_to_keep"] = logits_to_keep
        return super().forward(**sequence, **kwargs)

    def plan_of_pairs(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, images: Tensor | list[Tensor],
        image_index: Tensor | None, tails: Tensor,
    ) -> ForwardPlan:  # fmt: skip
        """The plan of a batch of pairs that comes without one, on the ids' device."""
        rows = rows_on_cpu(input_ids, attention_mask, labels)
        lengths = [self.get_model().vision_tower.tokens_per_image] * len(images)
        shown = shown_images(rows[0], len(images), image_index)
        return ForwardPlan.of_groups(*rows, shown, lengths, tails.tolist()).to(input_ids.device)

    def _planned_forward(
        self,
        plan: ForwardPlan,
        images: Any,
        image_sizes: Any,
        images_encoded: bool,
        logp_chunk: int | None,
        per_token: bool = False,
    ) -> CausalLMOutputWithPast | tuple | AnswerLogps | AnswerTokenLogps:
        """Training's forward pass: log-probs of the answers, or without `logp_chunk` all logits and their loss."""
        features = self._image_features(images, image_sizes, images_encoded)
        embeds = plan.splice.embed(self.get_model().embed_tokens, features)
        sequence: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False}
        # In rows padded at the right no token sees padding, so causality is all that our attention has to heed.
        ours = self.config._attn_implementation == SHARED_PREFIX
        sequence["attention_mask"] = no_mask(embeds.device) if ours else plan.splice.mask
        if plan.pack is not None:
            sequence |= {"position_ids": plan.splice.position_ids, "pack": plan.pack}
        if logp_chunk is None:
            return super().forward(**sequence, labels=plan.splice.labels)
        hidden = self.model(**sequence).last_hidden_state
        chunk = chunk_for(self.lm_head, logp_chunk, plan.answers.targets)
        head = float32_head(self.lm_head) if self.float32_logits else self.lm_head
        return (indexed_token_logps if per_token else indexed_logps)(hidden, plan.answers, head, chunk)

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | Tensor:
        """New tokens [B, up to max_new_tokens], without the prompt; rows are padded at the left while generating."""
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        kwargs.pop("position_ids", None)
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = torch.ones_like(inputs, dtype=torch.bool)
        if images is None:
            embeds = self.get_model().embed_tokens(inputs)
        else:
            _, _, attention_mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, None, attention_mask, None, None, images, image_sizes, padding_side="left"
            )
        if kwargs.get("max_new_tokens") is not None:
            kwargs.setdefault("max_length", None)  # of the checkpoint's generation config, which it would only warn of
        return super().generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)

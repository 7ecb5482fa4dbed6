"""Data-aware preference training for users of TRL: its DPOTrainer with a beta per pair and cached reference log-probs.

    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from trl import DPOConfig
    from dama.trl import DamaDPOTrainer, dataset_of_pairs
    from dama.weighting import Strategy, WeightingConfig

    processor = AutoProcessor.from_pretrained("llava-hf", backend="pil")
    dataset = dataset_of_pairs("pairs.jsonl", "images", processor, hardness="runs/hardness", reference="runs/reference")
    model = LlavaForConditionalGeneration.from_pretrained("llava-hf")
    model.model.vision_tower.requires_grad_(False)  # TRL trains it otherwise
    trainer = DamaDPOTrainer(
        model,
        args=DPOConfig("runs/dama-trl", max_length=None, per_device_train_batch_size=4),
        train_dataset=dataset,
        processing_class=processor,
        weighting=WeightingConfig(strategy=Strategy.DATA),
    )
    trainer.train()

The two folders are written by `python -m dama hardness` and `python -m dama reference` for the same pairs; the model is
that of the reference, as `python -m llava.model.export --to hf` writes it. Its output layer has up to 64 rows more than
LLaVA's, which take some probability from every token; the check of the first step reports it where that matters.
Without the folder `reference` TRL keeps its reference model; without `hardness` only `Strategy.NONE`, `MODEL` and
`BETA_DPO` have what they need. For a dataset of your own, give `join_stages` rows with the pairs' ids.

beta is `args.beta` times what `weighting` says, in every `loss_type` of TRL but `aot` and `aot_unpaired`, which sort
pairs. `Strategy.DATA` looks at one pair at a time, so it works with several ranks and gradient accumulation. alpha_M
and beta-DPO need R of the whole optimizer step before its loss: one rank, no gradient accumulation, cached reference
log-probs, and `Selection.OFF`, because TRL's loss is the mean over all pairs of its batch. Evaluation uses plain beta.

Needs `pip install trl==1.16.0 datasets`. TRL's loss is wrapped, not copied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from dama.console import digest_of, write_json
from dama.errors import error_list
from dama.hardness.score import load_hardness
from dama.images import ImageFolder, load_image, resolve_image
from dama.losses import ViewLogps
from dama.pairs import PreferencePair, image_digests, pairs_fingerprint, read_pairs
from dama.stage import read_stage
from dama.train.data import validate_same_inputs
from dama.train.metrics import StepTable
from dama.train.reference import STAGE as REFERENCE
from dama.train.trainer import STATE_FILE, validate_reference
from dama.views import PAIR_VIEWS
from dama.weighting import Selection, Strategy, Variant, WeightingConfig, WeightingState, static_beta, weigh

SIDES = ("chosen", "rejected")
DELTA = "delta"
LOGPS = tuple(f"ref_{side}_logps" for side in SIDES)  # TRL's names
TOKENS = tuple(f"ref_{side}_tokens" for side in SIDES)
COLUMNS = ("id", DELTA, *LOGPS, *TOKENS)
SORTING = ("aot", "aot_unpaired")  # losses of TRL that sort pairs, so that a beta would meet another pair's log-probs


# --- Data ------------------------------------------------------------------------------------------------------------


def dataset_of_pairs(
    data: str | Path,
    image_folder: ImageFolder,
    processor: Any,
    *,
    hardness: str | Path | None = None,
    reference: str | Path | None = None,
) -> Dataset:
    """Preference pairs as TRL takes them, joined with the stages' folders.

    Args:
        data, image_folder: as for the stages. processor: of a LLaVA-1.5 model in llava-hf's layout.

    Raises:
        ValueError: a stage was made from other pairs or images, or lacks a pair.
    """
    pairs = read_pairs(data)
    rows = Dataset.from_list([row_of_pair(pair, image_folder, processor) for pair in pairs])
    made_from = {"pairs": pairs_fingerprint(pairs), "images": digest_of(image_digests(pairs, image_folder))}
    return join_stages(rows, hardness=hardness, reference=reference, made_from=made_from)


def row_of_pair(pair: PreferencePair, image_folder: ImageFolder, processor: Any) -> dict[str, Any]:
    """Prompt and answers as text, which TRL encodes apart.

    Answers begin without the space behind `ASSISTANT:`, because LLaMA's tokenizer puts one in front of every text. A
    context ends the prompt, and its answers have no end token.

    Raises:
        ValueError: the pair is not one question about one image.
    """
    if not pair.is_plain:
        raise ValueError(
            f"pair {pair.id}: expected one question about one image, got {len(pair.own_images)} image(s) and "
            f"{len(pair.prompt)} turn(s); train it by python -m dama train"
        )
    tokenizer = processor.tokenizer
    content = [{"type": "image"}, {"type": "text", "text": pair.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt, end = (f"{prompt} {pair.context}", "") if pair.context else (prompt, tokenizer.eos_token)
    return {
        "id": pair.id,
        "images": [str(resolve_image(image_folder, pair.image))],
        "prompt": with_bos(prompt, tokenizer),
        "chosen": pair.chosen + end,
        "rejected": pair.rejected + end,
    }


def with_bos(prompt: str, tokenizer: Any) -> str:
    """A prompt whose tokens without special ones, as TRL encodes, are those that the tokenizer gives with them.

    Raises:
        ValueError: spelling the BOS token does not give these tokens.
    """
    wanted = tokenizer(prompt).input_ids
    spellings = (prompt, f"{tokenizer.bos_token}{prompt}", f"{tokenizer.bos_token} {prompt}")
    for text in spellings:
        if tokenizer(text, add_special_tokens=False).input_ids == wanted:
            return text
    raise ValueError(f"tokenizer: expected a spelling of BOS that gives its tokens of {prompt[:40]!r}, found none")


def join_stages(
    dataset: Dataset,
    *,
    hardness: str | Path | None = None,
    reference: str | Path | None = None,
    made_from: dict[str, str] | None = None,
) -> Dataset:
    """A dataset with a column `id` of pair ids, and the stages' values in columns that DamaDPOTrainer reads.

    Args:
        made_from: fingerprints of the pairs, and of what else a stage must have been made from.

    Raises:
        ValueError: a stage was made from something else, or lacks a pair. StageError: it is unfinished or damaged.
    """
    columns: dict[str, dict[str, Any]] = {}
    if hardness is not None:
        loaded = load_hardness(hardness)
        validate_same_inputs("hardness", str(hardness), loaded.fingerprint, made_from or {})
        columns[DELTA] = loaded.delta
    if reference is not None:
        manifest, records = read_stage(reference, REFERENCE)
        validate_same_inputs(REFERENCE, str(reference), manifest["fingerprint"], made_from or {})
        for side, logps, tokens in zip(SIDES, LOGPS, TOKENS):
            columns[logps] = {record["id"]: record[f"{side}_logp"] for record in records}
            columns[tokens] = {record["id"]: record[f"{side}_tokens"] for record in records}
    for name, values in columns.items():
        if missing := [id_ for id_ in dataset["id"] if id_ not in values]:
            errors = [f"pair {id_}: no {name}" for id_ in missing]
            raise ValueError(error_list("stages", errors, "run the stage for these pairs, or leave them out"))
        dataset = dataset.add_column(name, [values[id_] for id_ in dataset["id"]])
    return dataset


@dataclass
class DamaCollator(DataCollatorForVisionPreference):
    """TRL's batch, with the columns of `join_stages` that its examples have: [N] each.

    Images that are paths are read as in the stages: without EXIF rotation, which `datasets` applies.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate N examples into 2 N rows, the chosen answers first.

        Raises:
            ValueError: naming pairs whose answers have another number of tokens than in the reference stage.
        """
        own = {name: [example[name] for example in examples] for name in COLUMNS if name in examples[0]}
        batch = super().torch_call([read_images(example) for example in examples])
        if TOKENS[0] in own:
            validate_tokens(own, batch["completion_mask"].sum(1).view(2, -1).tolist())
        for name in (DELTA, *LOGPS):
            if name in own:
                batch[name] = torch.tensor(own[name], dtype=torch.float32)
        return batch


def read_images(example: dict[str, Any]) -> dict[str, Any]:
    """An example with images in place of their paths."""
    images = example.get("images", [])
    if not any(isinstance(image, str) for image in images):
        return example
    return example | {"images": [load_image(image) if isinstance(image, str) else image for image in images]}


def validate_tokens(own: dict[str, list], counts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where answers' tokens, as TRL encodes them, are not as many as in the reference stage."""
    errors = [
        f"pair {id_}, {side} answer: {count} tokens, {expected} in the reference stage"
        for side, name, found in zip(SIDES, TOKENS, counts)
        for id_, count, expected in zip(own["id"], found, own[name])
        if count != expected
    ]
    if errors:
        remedy = "give DPOConfig max_length=None, and prompts and answers as `dataset_of_pairs` writes them"
        raise ValueError(error_list("answers of other tokens than their reference log-probs", errors, remedy))


# --- Training --------------------------------------------------------------------------------------------------------


class DamaDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer with a beta per pair, and reference log-probs from the data where they have them.

    Args:
        weighting: what sets beta; its own `beta` is replaced by `args.beta`.
        delta_bar: mean hardness (Eq. 7). Default: that of the training data.
        check_reference: stop at the first step where policy and cached reference are not the same model.
        args, kwargs: as for DPOTrainer.

    Raises:
        ValueError: listing what TRL's step does not allow with this weighting.
    """

    beta: Any  # a number; while a batch's loss is computed, a tensor [N]
    data_collator: Any

    def __init__(
        self,
        model: Any,
        *,
        args: DPOConfig,
        train_dataset: Dataset,
        weighting: WeightingConfig,
        delta_bar: float | None = None,
        check_reference: bool = True,
        ref_model: Any = None,
        **kwargs: Any,
    ) -> None:
        self.weighting = replace(weighting, beta=args.beta)
        self.weighting_state = WeightingState()
        self.check_reference = check_reference
        cached = LOGPS[0] in train_dataset.column_names
        errors = weighting_errors(self.weighting, args, train_dataset.column_names)
        if cached and ref_model is not None:
            errors.append("ref_model: given beside cached reference log-probs; leave one of the two out")
        if errors:
            raise ValueError(error_list("DamaDPOTrainer", errors, "see the documentation of dama.trl"))
        if cached:
            ref_model = placeholder_model()  # without a reference model TRL loads the policy a second time
        super().__init__(model, ref_model, args=args, train_dataset=train_dataset, **kwargs)
        if cached:
            self.precompute_ref_logps, self.ref_model = True, None
        if type(self.data_collator) is DataCollatorForVisionPreference:
            self.data_collator = DamaCollator(**vars(self.data_collator))
        if self.weighting.uses_delta and delta_bar is None:
            delta_bar = sum(train_dataset[DELTA]) / len(train_dataset)
        self.delta_bar = delta_bar or 0.0

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device; the columns are not cast to half precision, as transformers would under DeepSpeed."""
        own = {name: inputs[name].to(self.args.device) for name in (DELTA, *LOGPS) if name in inputs}
        rest = {name: value for name, value in inputs.items() if name not in own}
        return dict(super()._prepare_inputs(rest)) | own

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's loss with this batch's beta in place of `self.beta`.

        The batch's R is known after its forward pass and before TRL reads beta, so the forward pass sets it.
        """
        inputs = dict(inputs)
        delta = inputs.pop(DELTA, None)
        if not self.model.training:
            return super()._compute_loss(model, inputs, return_outputs)
        plain = self.beta

        def forward(**batch: Any) -> Any:
            outputs = model(**batch)
            if self.beta is plain:
                self.beta = self._beta(inputs, delta, outputs)
            return outputs

        try:
            return super()._compute_loss(forward, inputs, return_outputs)
        finally:
            self.beta = plain

    def _beta(self, inputs: dict[str, Any], delta: Tensor | None, outputs: Any) -> Tensor:
        """[N] beta of a batch, from hardness and the log-probs of its forward pass."""
        pairs = len(inputs["input_ids"]) // 2
        delta = torch.zeros(pairs) if delta is None else delta.cpu()
        table = table_of(inputs, delta, outputs.log_probs.detach()) if self.precompute_ref_logps else None
        if table is not None and self.check_reference and self.state.global_step == 0:
            validate_reference(table, half=outputs.log_probs.dtype != torch.float32 or self.args.bf16)
            self.check_reference = False
        if self.weighting.is_static or table is None:
            beta = static_beta(self.weighting, delta, self.delta_bar)
        else:
            weights, self.weighting_state = weigh(
                self.weighting, self.weighting_state, table.R, table.delta, self.delta_bar
            )
            beta = weights.beta
            self._metrics["train"]["dama/alpha_M"].append(weights.alpha_M)
            self._metrics["train"]["dama/R_bar"].append(self.weighting_state.R_bar)
        self._metrics["train"]["dama/beta"].append(beta.mean().item())
        return beta.to(outputs.log_probs)

    # R_bar is saved and resumed like the optimizer's state.

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse what transformers only warns of: to continue from a checkpoint of which no weights were loaded."""
        missing = load_result.missing_keys
        if missing and set(missing) - set(self.model._keys_to_ignore_on_save or ()):
            raise ValueError(
                f"checkpoint: expected all weights of the model, {len(missing)} are missing (first: {missing[0]}). "
                "transformers saves llava-hf models under other names than it resumes them from; train without "
                "interruption, or with a peft_config, whose adapters it resumes."
            )
        super()._issue_warnings_after_load(load_result)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_json(Path(output_dir) / STATE_FILE, self.weighting_state.as_dict() | {"delta_bar": self.delta_bar})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            saved = json.loads((Path(checkpoint) / STATE_FILE).read_text())
            self.delta_bar = saved.pop("delta_bar")
            self.weighting_state = WeightingState(**saved)


def table_of(inputs: dict[str, Any], delta: Tensor, log_probs: Tensor) -> StepTable:
    """The step's table of a batch of N pairs, from log_probs [2 N, T] of answer tokens, 0 elsewhere."""
    policy = log_probs.double().sum(1).view(2, -1).cpu()
    reference = torch.stack([inputs[name] for name in LOGPS]).double().cpu()
    tokens = inputs["completion_mask"].sum(1).view(2, -1).cpu()
    return StepTable(torch.arange(len(delta)), delta.double(), ViewLogps(PAIR_VIEWS, policy, reference, tokens))


def placeholder_model() -> LlamaForCausalLM:
    """The smallest reference model that TRL takes; it is dropped before the first step."""
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=1))  # fmt: skip


def weighting_errors(config: WeightingConfig, args: DPOConfig, columns: Sequence[str]) -> list[str]:
    """What TRL's step does not allow, one message each."""
    cached = LOGPS[0] in columns
    found = [
        (config.uses_delta and DELTA not in columns, f"strategy {config.strategy}: needs the column '{DELTA}'"),
        (config.selects is not Selection.OFF, f"selection {config.selects}: TRL's loss is the mean over all pairs of a "
         "batch; give Selection.OFF"),
        (bool(set(args.loss_type) & set(SORTING)) and config.strategy is not Strategy.NONE,
         f"loss_type {args.loss_type}: sorts pairs, so none can have a beta of its own"),
        (cached and args.ld_alpha is not None, f"ld_alpha {args.ld_alpha}: cached reference log-probs are plain sums"),
        (cached and args.sync_ref_model, "sync_ref_model: cached reference log-probs do not change"),
    ]  # fmt: skip
    if not config.is_static:
        accumulation = args.gradient_accumulation_steps
        found += [
            (config.variant is Variant.RELEASED, "variant released: expected paper"),
            (not cached, f"strategy {config.strategy}: needs R before the loss, so cached reference log-probs"),
            (accumulation > 1, f"gradient_accumulation_steps {accumulation}: strategy {config.strategy} needs R of the "
             "whole step before its loss, and TRL computes the losses of its parts one by one"),
            (args.world_size > 1, f"{args.world_size} ranks: strategy {config.strategy} needs R of the whole step, and "
             "TRL's loss has that of one rank"),
        ]  # fmt: skip
    return [message for holds, message in found if holds]

"""DAMA's trainer: preference optimisation whose decisions are made per optimiser step over all ranks.

The way of a step: log-probs of both answers -> R_i of all N pairs, gathered in the sampler's global order -> weights
and selection (dama.weighting) -> the mean loss over the K selected (dama.losses). Where a step has several
micro-batches, R is computed for all of them first, without gradient; then the selected pairs are spread anew, evenly
over the ranks and in as few micro-batches as hold them, and only they are trained on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from dama.console import write_json
from dama.logps import AnswerLogps
from dama.losses import preference_loss, reward_gap
from dama.weighting import Variant, WeightingState, Weights, static_beta, weigh
from llava.estimate.throughput import ModelSize, PairLength, peak_flops, step_flops
from llava.train.dpo_data import (
    DataCollatorForDPODataset,
    DPODataset,
    PreparedPair,
    answer_logps_of,
    common_length,
    shown_images,
)
from llava.train.dpo_figures import NO_PAIR, PAIR_LOG, PairLog, StepTable, preference_metrics, weighting_metrics
from llava.train.llava_trainer import LLaVATrainer, watched
from llava.train.steps import PICTURES_AT_ONCE, StepLoader, StepPlan, StepSampler, encode_pictures

POSITION = "position"  # of a micro-batch's pairs in their step
IN_THE_PLAN = ("input_ids", "attention_mask", "targets", "image_index", "tails")  # a batch's ForwardPlan has it all
# Nats per square root of tokens by which R may differ from 0 before the first step, in fp32 and in half precision. The
# latter has 0.03 to 0.04 nats of noise on each token; another model's log-probs differ by 0.1 and more on every token.
REFERENCE_DRIFT = {False: 1e-3, True: 0.2}
STATE_FILE = "dama_state.json"  # in every checkpoint: R_bar, the draw's step, delta_bar


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs (averages with --dpo_use_average) of B pairs under policy and reference, each [B]."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    tokens: Tensor  # answer tokens of both answers

    @property
    def R(self) -> Tensor:
        return reward_gap(self.policy_chosen, self.policy_rejected, self.ref_chosen, self.ref_rejected)


def peak_of_all(args: Any) -> float | None:
    """FLOP/s of all ranks together, where training is in half precision and the GPU is known."""
    peak = peak_flops(args.device) if args.bf16 or args.fp16 else None
    return peak and peak * args.world_size


class LLaVA15DPOTrainer(LLaVATrainer):
    """Trains on preference pairs with DPO, DAMA or beta-DPO, as `args.weighting()` says.

    Args:
        train_dataset, eval_dataset: DPODatasets. delta_bar: mean hardness of the training data (Eq. 7).
        reference_is_base: compute reference log-probs on the fly, from the base under the LoRA adapters.
        drawn: positions selected in each step, to replay a recorded run instead of drawing.
    """

    args: Any  # llava.train.arguments.TrainingArguments
    model: Any
    model_wrapped: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        args: Any,
        *,
        train_dataset: DPODataset,
        eval_dataset: DPODataset | None = None,
        delta_bar: float = 0.0,
        reference_is_base: bool = False,
        drawn: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=model,
            processing_class=tokenizer,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.config = args.weighting()
        self.delta_bar = delta_bar
        self.reference_is_base = reference_is_base
        self.drawn = drawn
        image_tokens = self.model.get_vision_tower().tokens_per_image
        self.collate = DataCollatorForDPODataset(tokenizer, train_dataset, args.shared_prefix, image_tokens)
        self.weighting_state = WeightingState()
        self._logged: dict[str, list[float]] = defaultdict(list)
        self._reference_checked = not args.check_reference
        self._weights: Weights | None = None  # of the whole step, where it was looked at ahead
        self._seen: list[Tensor] = []  # rows of the step's micro-batches so far
        self._pairs_in_loss = 1
        self._plan = StepPlan(0, 1, 1)
        self._pairs: list[PreparedPair] = []  # of the step, in global order
        self._pictures: dict[str, Tensor] = {}  # of the step, on this rank
        self.model_size = ModelSize.of(self.model)
        self.throughput.unit, self.throughput.peak = "pairs", peak_of_all(args)
        self.pair_log = PairLog(Path(args.output_dir) / PAIR_LOG) if args.pair_log and args.should_save else None

    # --- Data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> StepLoader:
        args = self.args
        self.sampler = StepSampler(
            len(self.train_dataset),
            args.per_device_train_batch_size,
            args.world_size,
            args.process_index,
            args.gradient_accumulation_steps,
            self.config.seed,
            shuffle=args.train_sampling_strategy != "sequential",
        )
        return StepLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_num_workers > 0,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, None]:
        """The micro-batches of one optimiser step, decided upon where the decision needs all of them."""
        group, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step % self.sampler.steps
        self._plan = self.sampler.plan(step)
        self._pairs = [self.train_dataset[i] for i in self.sampler.indices(step)]
        self._weights, self._seen, self._pictures = None, [], {}
        blocks = [list(self._plan.block(micro, self.args.process_index)) for micro in range(len(group))]
        if len(group) == 1 and not self._looks_ahead(1):
            return [group[0] | {POSITION: torch.tensor(blocks[0] or [NO_PAIR])}], None
        loaded = [
            dict(zip(shown_images(self._pairs_at(block)), batch["images"])) for block, batch in zip(blocks, group)
        ]
        self._learn_pictures({name: pixels for images in loaded for name, pixels in images.items()})
        group = [self._batch(block) for block in blocks]
        if self._looks_ahead(len(group)):
            self._weights = self._decide(self._look_ahead(group))
            group = self._only_selected(len(group))
        return group, None

    def _pairs_at(self, block: list[int]) -> list[PreparedPair]:
        """The pairs at these positions of the step; an empty block is filled with its first pair."""
        return [self._pairs[position] for position in block or [0]]

    def _batch(self, block: list[int]) -> dict[str, Tensor]:
        """A micro-batch of the pairs at these positions, their pictures from `_pictures`."""
        items = self._pairs_at(block)
        pictures = torch.stack([self._pictures[name] for name in shown_images(items)])
        kind = "features" if self._tower_is_frozen else "images"
        return self.collate.rows(items) | {kind: pictures, POSITION: torch.tensor(block or [NO_PAIR])}

    def _learn_pictures(self, pixels: dict[str, Tensor]) -> None:
        """Keeps pictures for this step: what the frozen tower makes of them, or their pixels where it is trained."""
        if self._tower_is_frozen:
            per_rank = self._plan.micro_batches * self.args.per_device_train_batch_size
            calls = -(-per_rank // PICTURES_AT_ONCE) if is_deepspeed_zero3_enabled() else None
            pixels = encode_pictures(self.model.get_vision_tower(), pixels, self.model.dtype, calls)
        self._pictures |= pixels

    @property
    def _tower_is_frozen(self) -> bool:
        return self.model.get_vision_tower().is_frozen

    def _looks_ahead(self, micro_batches: int) -> bool:
        """Whether R must be known before the first gradient: several micro-batches, or dropout in the gradient pass."""
        if self.config.variant is Variant.RELEASED or self.config.is_static:
            return False
        return micro_batches > 1 or (self.args.lora_enable and self.args.lora_dropout > 0)

    @torch.no_grad()
    def _look_ahead(self, group: list[dict[str, Tensor]]) -> StepTable:
        """Log-probs of all pairs of the step under the current policy, without dropout."""
        self.model_wrapped.eval()
        rows = []
        for batch in group:
            inputs = self._prepare_inputs(batch)
            rows.append(self._rows(inputs, self._logps(self.model_wrapped, inputs)))
        self.model_wrapped.train()
        table = self._gather(torch.cat(rows))
        self._check_reference(table)
        return table

    def _only_selected(self, micro_batches: int) -> list[dict[str, Tensor]]:
        """The selected pairs in as few micro-batches as hold them, spread evenly over ranks; the first ones stay empty.

        Any rank can train on any pair: it has them all, and reads the pictures that it does not have yet. A rank
        without a selected pair goes through the motions with one of weight zero, since the others wait for it.
        """
        assert self._weights is not None
        selected = self._weights.selected.nonzero().flatten().tolist()
        args = self.args
        plan = StepPlan.of(len(selected), args.world_size, args.per_device_train_batch_size)
        blocks = [[selected[i] for i in plan.block(m, args.process_index)] for m in range(plan.micro_batches)]
        wanted = shown_images([pair for block in blocks for pair in self._pairs_at(block)])
        unknown = [name for name in wanted if name not in self._pictures]
        if is_deepspeed_zero3_enabled():
            unknown = unknown or wanted[:1]  # every rank calls the tower
        if unknown:
            self._learn_pictures({name: self.train_dataset.pixels(name) for name in unknown})
        empty: list[dict[str, Tensor]] = [{} for _ in range(micro_batches - plan.micro_batches)]
        return empty + [self._batch(block) for block in blocks]

    # --- One step ------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model and the loss need of a batch, on the device, without waiting for the copies.

        Nothing is cast to bf16, as transformers would under DeepSpeed: log-probs are sums. Positions stay: the host
        looks decisions up by them.
        """
        moved = {name: self._on_device(value) for name, value in inputs.items() if name not in (*IN_THE_PLAN, POSITION)}
        return moved | {POSITION: inputs[POSITION]}

    def _on_device(self, value: Any) -> Any:
        """A tensor or a ForwardPlan on this rank's device, by a copy from pinned memory where there is one to make."""
        device = self.args.device
        if device.type == "cuda" and isinstance(value, Tensor) and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; nothing for a micro-batch that selection left empty on all ranks."""
        if not inputs:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def _forward(self, model: Any, inputs: dict[str, Any]) -> AnswerLogps:
        with watched(self.args.debug_sync):
            return answer_logps_of(model, inputs, self.args.logp_chunk)

    def _reference_logps(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """From the data, or under LoRA from the base model, its adapters switched off."""
        if not self.reference_is_base:
            return inputs["ref_chosen"], inputs["ref_rejected"]
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            chosen, rejected = self._forward(model, inputs).logps.chunk(2)
        return chosen, rejected

    def _logps(self, model: Any, inputs: dict[str, Tensor]) -> PairLogps:
        sums = self._forward(model, inputs)
        chosen, rejected = sums.logps.chunk(2)
        n_chosen, n_rejected = sums.tokens.chunk(2)
        ref_chosen, ref_rejected = (logps.to(chosen) for logps in self._reference_logps(model, inputs))
        if not self.args.dpo_use_average:
            return PairLogps(chosen, rejected, ref_chosen, ref_rejected, n_chosen + n_rejected)
        return PairLogps(
            chosen / n_chosen, rejected / n_rejected, ref_chosen / n_chosen, ref_rejected / n_rejected,
            torch.full_like(n_chosen, 2),
        )  # fmt: skip

    def _rows(self, inputs: dict[str, Tensor], logps: PairLogps, size: int | None = None) -> Tensor:
        """What this rank has to tell of a micro-batch: [size, fields of StepTable], filled up with empty rows."""
        values = inputs | vars(logps)
        columns = (self._on_device(values[name].detach()) for name in StepTable._fields)
        rows = torch.stack([column.double() for column in columns], dim=1)
        filled = rows.new_full((size or self.args.per_device_train_batch_size, len(StepTable._fields)), NO_PAIR)
        filled[: len(rows)] = rows
        return filled

    def _gather(self, rows: Tensor) -> StepTable:
        return StepTable.from_rows(self.accelerator.gather(rows.contiguous()).cpu())

    def _decide(self, table: StepTable) -> Weights:
        """Weighs the pairs, moves R_bar on, and notes the figures of the step."""
        delta = table.delta if self.config.uses_delta else None
        step = self.weighting_state.step
        drawn = self.drawn[step] if self.drawn is not None else None
        weights, self.weighting_state = weigh(
            self.config, self.weighting_state, table.R, delta, self.delta_bar, drawn=drawn
        )
        self._note(preference_metrics(table, self.config.beta) | weighting_metrics(weights, self.weighting_state.R_bar))
        pairs = [self._pairs[int(position)] for position in table.position]
        self._count_work(pairs, weights)
        if self.pair_log is not None:
            self.pair_log.append(step, [item.pair.id for item in pairs], table, weights)
        return weights

    def _count_rows(self, group: list[Any]) -> None:
        """Nothing: pairs are counted where they are decided upon."""

    def _count_work(self, pairs: list[PreparedPair], weights: Weights) -> None:
        lengths = [self._length(pair) for pair in pairs]
        flops = step_flops(
            self.model_size, lengths, weights.selected.tolist(), len(shown_images(pairs)), self.args.lora_enable
        )
        self.throughput.add(len(pairs), sum(length.tokens for length in lengths), flops)

    def _length(self, pair: PreparedPair) -> PairLength:
        shared = common_length(pair)
        chosen, rejected = (len(answer.input_ids) - shared for answer in (pair.chosen, pair.rejected))
        return PairLength(shared - 1 + self.model_size.patches, chosen, rejected)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss, scaled so that the trainer's averages give the mean over K."""
        logps = self._logps(model, inputs)
        beta, selected = self._decision(inputs, logps)
        losses = preference_loss(logps.R, beta.to(logps.R)) * selected
        if self.config.variant is Variant.RELEASED:
            loss = losses.sum() / selected.sum().clamp(min=1)
        else:
            parts = self.args.world_size * self.current_gradient_accumulation_steps
            loss = losses.sum() * parts / self._pairs_in_loss
        return (loss, {}) if return_outputs else loss

    def _decision(self, inputs: dict[str, Tensor], logps: PairLogps) -> tuple[Tensor, Tensor]:
        """(beta, selected), each [B], of this micro-batch's pairs; what only fills an empty place is not selected."""
        position = inputs[POSITION]
        rows = self._rows(inputs, logps)
        if self.config.is_static:
            # Beta is known without R; the whole step is looked at when its last micro-batch is there, for the figures.
            self._seen.append(rows)
            if len(self._seen) == self.current_gradient_accumulation_steps:
                table = self._gather(torch.cat(self._seen))
                self._check_reference(table)
                self._decide(table)
            self._pairs_in_loss = self._plan.pairs
            beta = static_beta(self.config, inputs["delta"], self.delta_bar)
            return beta, self._on_device(position != NO_PAIR)
        weights = self._weights
        if weights is None:
            table = self._gather(rows)
            self._check_reference(table)
            weights = self._decide(table)
            # A decision for this micro-batch alone: positions are counted within it.
            position = self._positions_within(table, position)
        self._pairs_in_loss = int(weights.selected.sum())
        index = position.clamp(min=0)
        selected = weights.selected[index] & (position != NO_PAIR)
        return self._on_device(weights.beta[index]), self._on_device(selected)

    @staticmethod
    def _positions_within(table: StepTable, position: Tensor) -> Tensor:
        order = {int(p): k for k, p in enumerate(table.position.tolist())}
        return torch.tensor([order.get(int(p), NO_PAIR) for p in position.tolist()])

    # --- The first step: do the reference log-probs belong to this model? ------------------------------------------

    def _check_reference(self, table: StepTable) -> None:
        """A fresh run starts with policy = reference: R_i is rounding noise, or the file is of another model."""
        if self._reference_checked or self.state.global_step > 0:
            return
        self._reference_checked = True
        # Rounding errors of tokens add up like a random walk.
        drift = (table.R / table.tokens.sqrt()).square().mean().sqrt().item()
        limit = REFERENCE_DRIFT[bool(self.args.bf16 or self.args.fp16)]
        if not drift <= limit:
            raise ValueError(
                f"reference log-probs: expected the first step's |R| below {limit:g} nats per square root of answer "
                f"tokens (root mean square of {len(table.R)} pairs) because training starts at the reference, got "
                f"{drift:.2g}. They are stale or belong to another model, template or image preparation. Run "
                "`python -m dama reference` for this --model_name_or_path, or pass --check_reference False if training "
                "is meant to start elsewhere."
            )

    # --- Checkpoints ---------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_json(Path(output_dir) / STATE_FILE, self.weighting_state.as_dict() | {"delta_bar": self.delta_bar})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_state(checkpoint)
        if self.pair_log is not None:
            self.pair_log.rewind(self.weighting_state.step)

    def _load_state(self, checkpoint: str) -> None:
        path = Path(checkpoint) / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"checkpoint '{checkpoint}': expected {STATE_FILE} with R_bar and the draw's step, found none. "
                "It is not a checkpoint of a DPO run of this trainer; resume from another one."
            )
        saved = json.loads(path.read_text())
        self.delta_bar = saved.pop("delta_bar")
        self.weighting_state = WeightingState(**saved)

    # --- Figures -------------------------------------------------------------------------------------------------

    def _note(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._logged[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the noted figures since the last training log."""
        if "loss" in logs:
            logs = logs | {name: sum(values) / len(values) for name, values in self._logged.items()}
            self._logged.clear()
        super().log(logs, start_time)

    # --- Held-out pairs ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Plain-beta DPO loss, reward accuracy and margin, and log-probs of both answers on held-out pairs."""
        dataset = eval_dataset or self.eval_dataset
        if dataset is None:
            raise ValueError("evaluation: expected held-out pairs, got none; pass --eval_pairs")
        args = self.args
        model = self.model_wrapped if self.is_in_train else self.model
        micro_batches = -(-len(dataset) // (args.world_size * args.per_device_eval_batch_size))
        plan = StepPlan(len(dataset), args.world_size, micro_batches)
        was_training = model.training
        model.eval()
        rows = []
        silent = args.disable_tqdm or not args.should_log
        for micro in tqdm(range(micro_batches), desc=metric_key_prefix, leave=False, disable=silent):
            block = plan.block(micro, args.process_index)
            batch = self.collate([dataset[i] for i in block] or [dataset[0]])
            batch[POSITION] = torch.tensor(list(block) or [NO_PAIR])
            inputs = self._prepare_inputs(batch)
            rows.append(self._rows(inputs, self._logps(model, inputs), args.per_device_eval_batch_size))
        model.train(was_training)
        table = self._gather(torch.cat(rows))
        loss = preference_loss(table.R, self.config.beta).mean().item()
        metrics = {"loss": loss} | preference_metrics(table, self.config.beta)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

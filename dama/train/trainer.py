"""The preference trainer: decisions are made per optimizer step over all ranks, whatever the hardware.

A step: log-probs of all views -> R_i of all N pairs, gathered in the sampler's global order -> beta and selection
(dama.weighting) -> the mean loss over the K selected (dama.losses). Where a step has several micro-batches, R is
computed for all of them first, without gradient; then the selected pairs are spread anew, evenly over the ranks and in
as few micro-batches as hold them, and only they are trained on.

Micro-batches carry `beta` and `loss_weight`, so that the loss is one line. Where they come without, because the
decision needs no other forward pass than theirs, `_decided` adds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from dama.console import write_json
from dama.logps import IGNORE_INDEX
from dama.losses import Loss, RunningMean, ViewLogps
from dama.token_weights import (
    SEGMENTS,
    TokenLogps,
    TokenTexts,
    TokenWeights,
    segment_weights,
    visual_differences,
    visual_weights,
)
from dama.train.base import BaseTrainer, watched
from dama.train.callbacks import PAIR_LOG, Decided, MetricMeans, Observer, PairLog, WorkCount
from dama.train.family import ImageRef, ModelFamily, PreparedPair, shown_images
from dama.train.metrics import NO_PAIR, StepTable, preference_metrics
from dama.train.rows import EncodedRow
from dama.train.steps import IMAGES_AT_ONCE, StepLoader, StepPlan, StepSampler
from dama.train.throughput import peak_flops
from dama.views import PAIR_VIEWS
from dama.weighting import Variant, WeightingState, Weights, static_beta, weigh

# Nats per square root of tokens by which R may differ from 0 before the first step, in fp32 and in half precision. The
# latter has 0.03 to 0.04 nats of noise on each token; another model's log-probs differ by 0.1 and more on every token.
REFERENCE_DRIFT = {False: 1e-3, True: 0.2}
STATE_FILE = "dama_state.json"  # in every checkpoint: R_bar, the draw's step, delta_bar, the loss's own state
# Of a micro-batch: what the trainer reads and the model does not.
OWN_COLUMNS = ("items", "position", "images", "encoded", "step", "rows_so_far")


@dataclass(frozen=True)
class Step:
    """One optimizer step: its pairs in the sampler's global order, and how they are spread over micro-batches."""

    pairs: tuple[PreparedPair, ...]
    plan: StepPlan
    rank: int

    def positions(self, micro: int) -> list[int]:
        """Of this rank's pairs of a micro-batch; may be empty."""
        return list(self.plan.block(micro, self.rank))

    def at(self, positions: Sequence[int]) -> list[PreparedPair]:
        """The pairs at these positions; an empty place is filled with the step's first pair, which does not count."""
        return [self.pairs[position] for position in positions or [0]]


@dataclass(frozen=True)
class StepImages:
    """The images of a step that this rank has: pixels, or what the frozen tower makes of them."""

    values: Mapping[ImageRef, Tensor]
    encoded: bool

    def columns(self, items: Sequence[PreparedPair]) -> dict[str, Any]:
        """`images` and `encoded` of a micro-batch of these pairs."""
        return {"images": [self.values[image] for image in shown_images(items)], "encoded": self.encoded}


@dataclass(frozen=True)
class Decision:
    """What the loss needs of a step's decision, for each of its N pairs.

    Attributes:
        beta: [N]. loss_weight: [N], 0 for pairs that are not selected; the losses' weighted sum over all micro-batches
            and ranks is, after the trainer's averages, the mean over the selected pairs.
    """

    beta: Tensor
    loss_weight: Tensor

    @staticmethod
    def of(weights: Weights, parts: int) -> Decision:
        """The mean over the K selected pairs, where the trainer divides by `parts` = ranks x micro-batches."""
        return Decision(weights.beta, weights.selected.double() * parts / weights.selected.sum())

    def columns(self, position: Tensor) -> dict[str, Tensor]:
        """`beta` and `loss_weight` of the pairs at these positions, [B]; weight 0 for a filled-up place."""
        index = position.clamp(min=0)
        return {"beta": self.beta[index], "loss_weight": self.loss_weight[index] * (position != NO_PAIR)}


@dataclass
class RowsSoFar:
    """Gathers what the micro-batches of one step report until the last one completes the step's table."""

    micro_batches: int
    rows: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> Tensor | None:
        """All rows of this rank once the last micro-batch is there; None before."""
        self.rows.append(rows)
        return torch.cat(self.rows) if len(self.rows) == self.micro_batches else None


class PairLoader:
    """The collate function of loader workers: reads the images of a micro-batch and collates its rows once."""

    def __init__(self, family: ModelFamily, dataset: Any) -> None:
        self.collate, self.dataset = family.collate, dataset  # not the family: its model does not go to workers

    def __call__(self, items: Sequence[PreparedPair]) -> dict[str, Any]:
        """The family's batch and `images`: pixels by ImageRef."""
        images = {image: self.dataset.pixels(image) for image in shown_images(items)}
        return self.collate(items) | {"images": images}


class PreferenceTrainer(BaseTrainer):
    """Trains a model family on preference pairs with any loss of dama.losses, weighted as `args.weighting()` says.

    Args:
        family: the model and its ways. train_dataset, eval_dataset: `PairDataset`s.
        delta_bar: mean hardness of the training data (Eq. 7).
        reference_is_base: compute reference log-probs on the fly, from the base under the LoRA adapters.
        drawn: positions selected in each step, to replay a recorded run instead of drawing.
    """

    model_wrapped: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        family: ModelFamily,
        tokenizer: Any,
        args: Any,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        delta_bar: float = 0.0,
        reference_is_base: bool = False,
        drawn: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=family.module,
            processing_class=tokenizer,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.family = family
        self.loss: Loss = args.preference_loss()
        self.token_weights: TokenWeights | None = args.token_weighting()
        self.texts = TokenTexts(partial(decoded, tokenizer))
        self.config = args.weighting()
        self.delta_bar = delta_bar
        self.reference_is_base = reference_is_base
        self.drawn = drawn
        self.weighting_state, self.loss_state = WeightingState(), RunningMean()
        self.throughput.unit, self.throughput.peak = "pairs", peak_of_all(args)
        self.metric_means = MetricMeans(self.config.beta)
        self.pair_log = PairLog(Path(args.output_dir) / PAIR_LOG) if args.pair_log and args.should_save else None
        work = WorkCount(family, self.throughput, frozen_weights=args.lora_enable)
        self.observers: list[Observer] = [self.metric_means, work, *([self.pair_log] if self.pair_log else [])]

    # --- Data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> StepLoader:
        """Loader whose items are this rank's micro-batches of whole optimizer steps."""
        args = self.args
        return StepLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=PairLoader(self.family, self.train_dataset),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_num_workers > 0,
        )

    @cached_property
    def sampler(self) -> StepSampler:
        """Sampler that deals every optimizer step's pairs out to ranks and micro-batches."""
        args = self.args
        return StepSampler(
            len(self.train_dataset),
            args.per_device_train_batch_size,
            args.world_size,
            args.process_index,
            args.gradient_accumulation_steps,
            self.config.seed,
            shuffle=args.train_sampling_strategy != "sequential",
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, None]:
        """The micro-batches of one optimizer step, decided on where the decision needs all of them."""
        loaded, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        number = self.state.global_step % self.sampler.steps
        pairs = tuple(self.train_dataset[i] for i in self.sampler.indices(number))
        step = Step(pairs, self.sampler.plan(number), self.args.process_index)
        blocks = [step.positions(micro) for micro in range(len(loaded))]
        looks_ahead = self._looks_ahead(len(loaded))
        images = StepImages({image: pixels for b in loaded for image, pixels in b["images"].items()}, encoded=False)
        if looks_ahead or len(loaded) > 1:  # an image is encoded once a step, however many micro-batches show it
            images = self._encoded(step, images.values)
        shared = {"step": step, "rows_so_far": RowsSoFar(len(loaded))}
        group = [self._micro_batch(step, block, images, batch) | shared for block, batch in zip(blocks, loaded)]
        if looks_ahead:
            return self._selected_batches(step, self._look_ahead(group), images, len(loaded)), None
        if self._is_decided_before:
            group = [batch | self._static_columns(batch, step, len(loaded)) for batch in group]
        return group, None

    def _looks_ahead(self, micro_batches: int) -> bool:
        """Whether R must be known before the first gradient: several micro-batches, or dropout in the gradient pass."""
        if self.config.variant is Variant.RELEASED or self._is_decided_before:
            return False
        return micro_batches > 1 or (self.args.lora_enable and self.args.lora_dropout > 0)

    @property
    def _is_decided_before(self) -> bool:
        """Whether beta and selection follow from the data alone."""
        return self.config.is_static and not self.loss.has_state

    def _encoded(self, step: Step, pixels: Mapping[ImageRef, Tensor]) -> StepImages:
        """What the frozen tower makes of images, or their pixels where it is trained."""
        if not self.family.encodes_ahead:
            return StepImages(pixels, encoded=False)
        per_rank = step.plan.micro_batches * self.args.per_device_train_batch_size * len(self._images_per_pair)
        calls = -(-per_rank // IMAGES_AT_ONCE) if is_deepspeed_zero3_enabled() else None
        return StepImages(self.family.encode_images(pixels, calls), encoded=True)

    @cached_property
    def _images_per_pair(self) -> set[bool]:
        return {view.corrupted for view in self.family.views}

    def _micro_batch(
        self, step: Step, block: list[int], images: StepImages, collated: dict[str, Any]
    ) -> dict[str, Any]:
        """A collated batch with its items, their positions in the step and their images."""
        items = step.at(block)
        own = {"items": items, "position": torch.tensor(block or [NO_PAIR])}
        return collated | own | images.columns(items)

    def _static_columns(self, batch: dict[str, Any], step: Step, micro_batches: int) -> dict[str, Tensor]:
        """Columns beta and loss_weight of a micro-batch whose decision follows from the data."""
        delta = torch.tensor([item.delta for item in batch["items"]], dtype=torch.float64)
        parts = self.args.world_size * micro_batches
        weight = (batch["position"] != NO_PAIR).double() * parts / step.plan.pairs
        return {"beta": static_beta(self.config, delta, self.delta_bar), "loss_weight": weight}

    @torch.no_grad()
    def _look_ahead(self, group: list[dict[str, Any]]) -> StepTable:
        """Log-probs of all pairs of the step under the current policy, without dropout."""
        self.model_wrapped.eval()
        rows = []
        for batch in group:
            inputs = self._prepare_inputs(batch)
            rows.append(self._rows(inputs, self._logps(self.model_wrapped, inputs)))
        self.model_wrapped.train()
        return self._gather(torch.cat(rows))

    def _selected_batches(
        self, step: Step, table: StepTable, images: StepImages, micro_batches: int
    ) -> list[dict[str, Any]]:
        """The selected pairs in as few micro-batches as hold them, spread evenly over ranks; the first ones stay empty.

        Any rank can train on any pair: it has them all, and reads the images that it does not have yet. A rank
        without a selected pair runs one pair with weight zero so that collectives match across ranks.
        """
        args, weights = self.args, self._decide(step, table)
        decision = Decision.of(weights, args.world_size * micro_batches)
        selected = weights.selected.nonzero().flatten().tolist()
        plan = StepPlan.of(len(selected), args.world_size, args.per_device_train_batch_size)
        blocks = [[selected[i] for i in plan.block(m, args.process_index)] for m in range(plan.micro_batches)]
        images = self._with_missing(step, [step.at(block) for block in blocks], images)
        batches: list[dict[str, Any]] = [{} for _ in range(micro_batches - plan.micro_batches)]
        for block in blocks:
            batch = self._micro_batch(step, block, images, self.family.collate(step.at(block)))
            batches.append(batch | decision.columns(batch["position"]))
        return batches

    def _with_missing(self, step: Step, blocks: Iterable[list[PreparedPair]], images: StepImages) -> StepImages:
        """The images and those of pairs that came from other ranks."""
        wanted = shown_images(item for block in blocks for item in block)
        unknown = [image for image in wanted if image not in images.values]
        if is_deepspeed_zero3_enabled():
            unknown = unknown or wanted[:1]  # every rank calls the tower
        if not unknown:
            return images
        found = self._encoded(step, {image: self.train_dataset.pixels(image) for image in unknown})
        return StepImages({**images.values, **found.values}, images.encoded)

    # --- One step ------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch and its images on the device, without waiting for the copies.

        Nothing is cast to bf16, as transformers would under DeepSpeed: log-probs are sums.
        """
        moved = {name: value if name in OWN_COLUMNS else self._on_device(value) for name, value in inputs.items()}
        return moved | {"images": [self._on_device(image) for image in inputs["images"]]}

    def _on_device(self, value: Any) -> Any:
        """A value with a method `to` on this rank's device, copied from pinned memory where a copy is needed."""
        device = self.args.device
        if device.type == "cuda" and isinstance(value, Tensor) and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; nothing for a micro-batch that selection left empty on all ranks."""
        if not inputs:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss: the weighted sum of its pairs' losses."""
        logps = self._logps(model, inputs)
        columns = self._decided(inputs, logps)
        losses = self.loss.shifted(self.loss_state.mean)(logps, columns["beta"].to(logps.policy))
        loss = (losses * columns["loss_weight"].to(losses)).sum()
        return (loss, {}) if return_outputs else loss

    def _logps(self, model: Any, inputs: dict[str, Any]) -> ViewLogps:
        """Log-probs of every view under policy and reference; averages with --dpo_use_average."""
        if self.token_weights is not None:
            logps = self._weighted_logps(self.token_weights, model, inputs)
        else:
            views = self.family.views
            sums = self._forward(model, inputs)
            policy, tokens = sums.logps.view(len(views), -1), sums.tokens.view(len(views), -1)
            logps = ViewLogps(views, policy, self._reference(model, inputs).to(policy), tokens)
        return logps.averaged() if self.args.dpo_use_average else logps

    def _forward(self, model: Any, inputs: dict[str, Any], **asked: Any) -> Any:
        with watched(self.args.debug_sync):
            images, encoded = inputs["images"], inputs["encoded"]
            return self.family.answer_logps(model, inputs, images, encoded, self.args.logp_chunk, **asked)

    def _weighted_logps(self, weighting: TokenWeights, model: Any, inputs: dict[str, Any]) -> ViewLogps:
        """Sums of weighted log-probs of the loss's views."""
        items, views = inputs["items"], self.family.views
        counts = tuple(tuple(item.rows[v].supervised for item in items) for v in range(len(views)))
        policy = self._forward(model, inputs, per_token=True).per_token
        logps = TokenLogps(views, policy, self._token_reference(model, inputs, counts).to(policy), counts)
        answers = self._segments(weighting, items) if weighting.name == SEGMENTS else visual_answers(logps)
        weights = torch.cat([answers[view.answer] for view in views])
        return logps.weighted(self._on_device(weights).to(policy), self.loss.views)

    def _segments(self, weighting: TokenWeights, items: Sequence[PreparedPair]) -> dict[str, Tensor]:
        """Weights of all pairs' tokens, one pair after the other, by answer."""
        texts = [[self.texts(answer_ids(row)) for row in (item.chosen, item.rejected)] for item in items]
        sides = zip(*(segment_weights(chosen, rejected, weighting.g) for chosen, rejected in texts))
        return {
            view.answer: torch.tensor([weight for weights in side for weight in weights])
            for view, side in zip(PAIR_VIEWS, sides)
        }

    def _token_reference(self, model: Any, inputs: dict[str, Any], counts: tuple[tuple[int, ...], ...]) -> Tensor:
        """[M] from the data, or under LoRA from the base model; zeros for views whose reference is not used."""
        if self.reference_is_base:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                return self._forward(model, inputs, per_token=True).per_token
        parts = [
            torch.zeros(count) if (known := token_reference_of(item, v)) is None else torch.from_numpy(known)
            for v, own in enumerate(counts)
            for count, item in zip(own, inputs["items"], strict=True)
        ]
        return self._on_device(torch.cat(parts))

    def _reference(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """[V, B] from the data, or under LoRA from the base model, its adapters switched off."""
        if not self.reference_is_base:
            values = torch.tensor([item.reference for item in inputs["items"]], dtype=torch.float64)
            return self._on_device(values.T)
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            return self._forward(model, inputs).logps.view(len(self.family.views), -1)

    def _rows(self, inputs: dict[str, Any], logps: ViewLogps, size: int | None = None) -> Tensor:
        """This rank's rows of a micro-batch for the step's table, as many on every rank."""
        delta = torch.tensor([item.delta for item in inputs["items"]], dtype=torch.float64)
        position, delta = self._on_device(inputs["position"]), self._on_device(delta)
        return StepTable.rows(position, delta, logps, size or self.args.per_device_train_batch_size)

    def _gather(self, rows: Tensor) -> StepTable:
        return StepTable.from_rows(self.accelerator.gather(rows.contiguous()).cpu(), self.loss.views)

    def _decided(self, inputs: dict[str, Any], logps: ViewLogps) -> dict[str, Tensor]:
        """`beta` and `loss_weight` of a micro-batch: its own, or those of a decision that needs its log-probs."""
        if "rows_so_far" not in inputs:
            return inputs
        rows, step = self._rows(inputs, logps), inputs["step"]
        if "beta" in inputs:  # the table is for the log alone, once the whole step is there
            whole = inputs["rows_so_far"].add(rows)
            if whole is not None:
                self._decide(step, self._gather(whole))
            return inputs
        table = self._gather(rows)
        weights = self._decide(step, table)
        position = positions_within(table, inputs["position"])
        if self.config.variant is Variant.RELEASED:  # the mean over this rank's own selected pairs
            own = weights.selected[position.clamp(min=0)] & (position != NO_PAIR)
            columns = Decision(weights.beta, weights.selected.double() / own.sum().clamp(min=1)).columns(position)
        else:
            columns = Decision.of(weights, self.args.world_size).columns(position)
        return {name: self._on_device(column) for name, column in columns.items()}

    def _decide(self, step: Step, table: StepTable) -> Weights:
        """Weigh the pairs of a table, advance R_bar and the loss's state, and tell the observers."""
        number = self.weighting_state.step
        if number == 0 and self.args.check_reference and self.loss.needs_reference:
            validate_reference(table, half=bool(self.args.bf16 or self.args.fp16))
        delta = table.delta if self.config.uses_delta else None
        drawn = self.drawn[number] if self.drawn is not None else None
        weights, self.weighting_state = weigh(
            self.config, self.weighting_state, table.R, delta, self.delta_bar, drawn=drawn
        )
        if self.loss.has_state:
            self.loss_state = self.loss_state.updated(table.logps, weights.beta)
        pairs = [step.pairs[int(position)] for position in table.position]
        decided = Decided(number, pairs, table, weights, self.weighting_state.R_bar)
        for observer in self.observers:
            observer.on_decision(decided)
        return weights

    def _count_rows(self, group: list[Any]) -> None:
        """Nothing: pairs are counted where they are decided on."""

    # --- Checkpoints ---------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state: dict[str, Any] = self.weighting_state.as_dict() | {"delta_bar": self.delta_bar}
            if self.loss.has_state:
                state |= {"loss": self.loss_state.as_dict()}
            write_json(Path(output_dir) / STATE_FILE, state)

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
        self.loss_state = RunningMean(**saved.pop("loss", {}))
        self.weighting_state = WeightingState(**saved)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the metrics since the last training log."""
        if "loss" in logs:
            logs = logs | self.metric_means.take()
        super().log(logs, start_time)

    # --- Held-out pairs ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss with plain beta, reward accuracy and margin, and log-probs of all views on held-out pairs."""
        dataset = eval_dataset or self.eval_dataset
        if dataset is None:
            raise ValueError("evaluation: expected held-out pairs, got none; pass --eval_pairs")
        args = self.args
        model = self.model_wrapped if self.is_in_train else self.model
        micro_batches = -(-len(dataset) // (args.world_size * args.per_device_eval_batch_size))
        step = Step(tuple(dataset), StepPlan(len(dataset), args.world_size, micro_batches), args.process_index)
        load = PairLoader(self.family, dataset)
        was_training = model.training
        model.eval()
        rows = []
        silent = args.disable_tqdm or not args.should_log
        for micro in tqdm(range(micro_batches), desc=metric_key_prefix, leave=False, disable=silent):
            block = step.positions(micro)
            batch = load(step.at(block))
            images = StepImages(batch["images"], encoded=False)
            inputs = self._prepare_inputs(self._micro_batch(step, block, images, batch))
            rows.append(self._rows(inputs, self._logps(model, inputs), args.per_device_eval_batch_size))
        model.train(was_training)
        table = self._gather(torch.cat(rows))
        beta = torch.full_like(table.R, self.config.beta)
        loss = self.loss.shifted(self.loss_state.mean)(table.logps, beta).mean().item()
        metrics = {"loss": loss} | preference_metrics(table, self.config.beta)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics


def positions_within(table: StepTable, position: Tensor) -> Tensor:
    """Positions of a step's pairs in a table of some of them; NO_PAIR where the table has none."""
    order = {int(p): k for k, p in enumerate(table.position.tolist())}
    return torch.tensor([order.get(int(p), NO_PAIR) for p in position.tolist()])


def visual_answers(logps: TokenLogps) -> dict[str, Tensor]:
    """Weights by what the image decides, of all pairs' tokens, by answer."""
    z = visual_differences(logps)
    return {view.answer: visual_weights(z[view.answer], view) for view in PAIR_VIEWS}


def answer_ids(row: EncodedRow) -> list[int]:
    """Token ids of a row's answer."""
    return row.labels[row.labels != IGNORE_INDEX].tolist()


def token_reference_of(item: PreparedPair, view: int) -> Any:
    """Reference log-probs of the answer tokens of a pair's view; None where the loss has no reference."""
    return item.reference_tokens[view] if item.reference_tokens else None


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, exactly as they spell it; `tokenizer` may be a processor that holds one."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def validate_reference(table: StepTable, half: bool) -> None:
    """Check that a fresh run starts at the reference: R_i is rounding noise, or the log-probs are another model's.

    Raises:
        ValueError: the root mean square of R per square root of answer tokens is above the limit.
    """
    # Rounding errors of tokens add up like a random walk.
    drift = (table.R / table.tokens.sqrt()).square().mean().sqrt().item()
    limit = REFERENCE_DRIFT[half]
    if not drift <= limit:
        raise ValueError(
            f"reference log-probs: expected the first step's |R| below {limit:g} nats per square root of answer "
            f"tokens (root mean square of {len(table.R)} pairs) because training starts at the reference, got "
            f"{drift:.2g}. They are stale or belong to another model, template or image preparation. Run "
            "`python -m dama reference` for this --model_name_or_path, or pass --check_reference False if training "
            "is meant to start elsewhere."
        )


def peak_of_all(args: Any) -> float | None:
    """FLOP/s of all ranks together, where training is in half precision and the GPU is known."""
    peak = peak_flops(args.device) if args.bf16 or args.fp16 else None
    return peak and peak * args.world_size

"""Trains TinyCOCO's CLIP with open_clip; writes it as an open_clip folder and its image tower as a CLIPVisionModel.

The image tower learns first from what the scenes know (which category covers which patch), then against the text tower.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dama.console import end_on_interrupt, log, write_atomic, write_json
from playground.tinycoco.captions import SPOKEN, article, one_word_edit, truthful_caption
from playground.tinycoco.scenes import SIZE, Scene, draw, sample_scene
from playground.tinycoco.tokenizer import corpus
from playground.tinycoco.vocabulary import CATEGORIES, COLOURS, SYNONYMS

ClipModel = Any  # open_clip.model.CLIP and its parts, imported where they are needed and untyped

PATCH, WIDTH, LAYERS, HEAD_WIDTH, MLP_RATIO, EMBEDDING = 16, 160, 4, 32, 3.0, 128
GRID = SIZE // PATCH
BACKGROUND = len(CATEGORIES)  # the label of a patch that no object covers
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PHRASES = ("{a} {name}", "{name}", "a photo of {a} {name}", "There is {a} {name}.", "the {name}")
SPECIALS = ("<pad>", "<unk>", "<start>", "<end>")

STEPS, BATCH, PICTURES = 5000, 64, 30_000
TOLD = 32  # of the batch, how many images come with texts once there is a text tower
SUPERVISED_SHARE = 0.6  # of the steps, without a text tower
LEARNING_RATE, BETAS, WEIGHT_DECAY, WARMUP = 2e-3, (0.9, 0.99), 0.05, 150


# ---- the model's configuration and tokenizer


@cache
def word_pieces() -> tuple[str, ...]:
    """The text tower's vocabulary: every word said in this world, and single characters to spell all others."""
    words = {word for line in corpus() for word in re.findall(r"\w+", line.lower())}
    words |= {word for forms in SYNONYMS.values() for form in forms for word in form.split()} | set(COLOURS)
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    spelling = [*characters, *(f"##{c}" for c in characters), *".,;:!?'\"-()"]
    return (*SPECIALS, *sorted(words - set(characters)), *spelling)


def model_config(vocabulary_size: int) -> dict[str, Any]:
    """open_clip's model_cfg; `hf_tokenizer_name` only says that the tokenizer lies in the checkpoint's own folder."""
    return {
        "embed_dim": EMBEDDING,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS,
                       "head_width": HEAD_WIDTH, "mlp_ratio": MLP_RATIO},
        "text_cfg": {"context_length": 77, "vocab_size": vocabulary_size, "width": 96, "heads": 3, "layers": 2,
                     "mlp_ratio": 3.0, "pool_type": "eos", "pad_id": 0, "eos_id": SPECIALS.index("<end>"),
                     "hf_tokenizer_name": "tinycoco"},
    }  # fmt: skip


def write_text_tokenizer(folder: Path) -> None:
    """A word-level tokenizer in the files that AutoTokenizer, and through it open_clip, reads from a folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = {piece: k for k, piece in enumerate(word_pieces())}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="<unk>", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(special, pieces[special]) for special in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>",
        model_max_length=77, padding_side="right",
    ).save_pretrained(str(folder))  # fmt: skip


# ---- what is learnt from


@dataclass(frozen=True)
class Pool:
    """Rendered scenes and labels: images [N, 3, SIZE, SIZE] uint8, patches [N, GRID * GRID] of 0..BACKGROUND."""

    scenes: list[Scene]
    pictures: Tensor
    patches: Tensor
    presence: Tensor  # [N, len(CATEGORIES)] of 0 or 1, float


def render(scenes: list[Scene]) -> Tensor:
    """[N, 3, SIZE, SIZE], uint8."""
    return torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def normalise(pictures: Tensor) -> Tensor:
    """CLIP's pixel values, float32, from uint8 images that have the right size already."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pictures.float() / 255 - mean) / std


def build_pool(count: int, split: str = "train") -> Pool:
    """Draw `count` scenes of a split with their patch labels and the categories present."""
    from tqdm import tqdm

    scenes = [sample_scene(index, split) for index in range(count)]
    chunks = []
    with tqdm(total=count, desc="drawing scenes", unit="scene") as bar:
        for start in range(0, count, 500):
            chunks.append(render(scenes[start : start + 500]))
            bar.update(len(chunks[-1]))
    patches = torch.tensor(np.stack([patch_labels(scene) for scene in scenes]))
    return Pool(scenes, torch.cat(chunks), patches, presence_of(scenes))


def presence_of(scenes: list[Scene]) -> Tensor:
    """[N, categories]: 1 where the category is drawn."""
    return torch.tensor([[float(c in scene.categories) for c in CATEGORIES] for scene in scenes])


def patch_labels(scene: Scene) -> np.ndarray:
    """[GRID * GRID] int64: the category that covers most of a patch, or BACKGROUND where none covers a fifth of it."""
    covered = np.zeros((GRID * GRID, BACKGROUND + 1))
    covered[:, BACKGROUND] = 0.2 * PATCH * PATCH
    edges = np.arange(GRID) * PATCH
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        wide = np.clip(np.minimum(edges + PATCH, right) - np.maximum(edges, left), 0, None)
        high = np.clip(np.minimum(edges + PATCH, bottom) - np.maximum(edges, top), 0, None)
        column = covered[:, CATEGORIES.index(thing.category)]
        np.maximum(column, np.outer(high, wide).ravel(), out=column)
    return covered.argmax(1)


def told(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A true text about a scene (a whole caption or one sentence of it) and the same with one object wrong."""
    text = truthful_caption(scene, rng)
    if rng.random() < 0.5:
        text = rng.choice(re.findall(r"[^.]+\.", text)).strip()
    return text, one_word_edit(text, scene, rng)


def phrases_for(rng: random.Random) -> list[str]:
    """One phrase for each category, in the order of CATEGORIES."""
    template = rng.choice(PHRASES)
    names = [rng.choice(SPOKEN.get(category, (category,))) for category in CATEGORIES]
    return [template.format(a=article(name), name=name) for name in names]


# ---- the forward passes: open_clip's own modules, run by a loop that is twice as fast on a CPU


def _attend(block: ClipModel, x: Tensor, mask: Tensor | None) -> Tensor:
    """Multi-head self-attention with the parameters of nn.MultiheadAttention. x [B, T, D] -> [B, T, D]."""
    rows, length, width = x.shape
    heads = width // HEAD_WIDTH
    qkv = F.linear(x, block.in_proj_weight, block.in_proj_bias).view(rows, length, 3, heads, HEAD_WIDTH)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * HEAD_WIDTH**-0.5
    mixed = (scores if mask is None else scores + mask).softmax(-1) @ v
    return F.linear(mixed.transpose(1, 2).reshape(rows, length, width), block.out_proj.weight, block.out_proj.bias)


def _through(blocks: ClipModel, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The hidden states after each residual block (quick_gelu inside)."""
    states = []
    for block in blocks:
        x = x + _attend(block.attn, block.ln_1(x), mask)
        inner = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(inner * torch.sigmoid(1.702 * inner))
        states.append(x)
    return states


def image_states(visual: ClipModel, pixels: Tensor) -> list[Tensor]:
    """Hidden states of the image tower after each layer, LAYERS tensors [B, 1 + GRID * GRID, WIDTH]."""
    rows = pixels.shape[0]
    cut = pixels.view(rows, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(rows, GRID * GRID, -1)
    patches = F.linear(cut, visual.conv1.weight.flatten(1))
    x = torch.cat([visual.class_embedding.to(patches.dtype).expand(rows, 1, -1), patches], 1)
    return _through(visual.transformer.resblocks, visual.ln_pre(x + visual.positional_embedding))


def embed_tokens(model: ClipModel, ids: Tensor) -> Tensor:
    """Unit text embeddings [B, EMBEDDING] of ids [B, T]; columns that are padding for all rows cost nothing."""
    end = model.text_eos_id
    ids = ids[:, : int((ids == end).int().argmax(1).max()) + 1]
    x = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
    causal = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
    x = model.ln_final(_through(model.transformer.resblocks, x, causal)[-1])
    pooled = x[torch.arange(len(ids)), (ids == end).int().argmax(1)]
    return F.normalize(pooled @ model.text_projection, dim=-1)


# ---- training


class Teacher(nn.Module):
    """What training needs besides the model and throws away: a patch classifier, a class table, a scale and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_head = nn.Linear(WIDTH, BACKGROUND + 1)
        self.table = nn.Parameter(torch.randn(BACKGROUND, EMBEDDING) * EMBEDDING**-0.5)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def logits(self, cosine: Tensor) -> Tensor:
        """Scaled and shifted cosines, for a sigmoid."""
        return self.scale.exp() * cosine + self.bias


def image_losses(
    model: ClipModel, teacher: Teacher, table: Tensor, pixels: Tensor, patches: Tensor, presence: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss against a table [categories, EMBEDDING] of unit class vectors, and the images' unit embeddings."""
    visual = model.visual
    states = image_states(visual, pixels)
    by_head = F.cross_entropy(teacher.patch_head(states[-2][:, 1:]).float().flatten(0, 1), patches.flatten())
    final = F.normalize((visual.ln_post(states[-1]) @ visual.proj).float(), dim=-1)
    shown = patches != BACKGROUND
    by_table = F.cross_entropy(teacher.scale.exp() * final[:, 1:][shown] @ table.T, patches[shown])
    pooled = final[:, 0]
    present = F.binary_cross_entropy_with_logits(teacher.logits(pooled @ table.T), presence, reduction="none")
    return by_head + 0.5 * by_table + present.sum(1).mean(), pooled


def text_losses(model: ClipModel, pooled: Tensor, true: Tensor, false: Tensor) -> Tensor:
    """InfoNCE of images and their true texts, the edited texts as further negatives, and true against edited.

    pooled, true, false: unit embeddings [B, EMBEDDING].
    """
    scale = model.logit_scale.exp().clamp(max=100)
    targets = torch.arange(len(pooled))
    to_text = F.cross_entropy(scale * pooled @ torch.cat([true, false]).T, targets)
    to_image = F.cross_entropy(scale * true @ pooled.T, targets)
    margin = scale * ((pooled * true).sum(1) - (pooled * false).sum(1))
    return 0.25 * (to_text + to_image) + F.softplus(-margin).mean()


def batches(pool: Pool, steps: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(step, indices [BATCH]): the pool in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(pool.scenes), generator=generator)
        yield step, order[:BATCH]
        order = order[BATCH:]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(WARMUP, steps // 10)
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: ClipModel, teacher: Teacher) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and scales."""
    parameters = [*model.parameters(), *teacher.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)


def new_model(config: dict[str, Any]) -> ClipModel:
    """A randomly initialized open_clip model; `config` is copied, since open_clip changes it."""
    from open_clip.model import CLIP

    return CLIP(**deepcopy(config))


def train(folder: Path, pool: Pool, steps: int = STEPS, seed: int = 0) -> ClipModel:
    """The trained model, float32; its tokenizer is read from `folder`. On one machine a seed determines the model."""
    from open_clip.tokenizer import HFTokenizer
    from tqdm import tqdm

    torch.manual_seed(seed)
    tokenize = HFTokenizer(str(folder), context_length=77)
    model, teacher, rng = new_model(model_config(len(word_pieces()))), Teacher(), random.Random(seed)
    optimizer = make_optimizer(model, teacher)
    progress = tqdm(batches(pool, steps, seed), total=steps, desc="training CLIP", unit="step")
    for step, chosen in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = _step_loss(model, teacher, tokenize, pool, chosen, rng, with_text=step >= SUPERVISED_SHARE * steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def _step_loss(
    model: ClipModel, teacher: Teacher, tokenize: Any, pool: Pool, chosen: Tensor, rng: random.Random, with_text: bool
) -> Tensor:
    pixels = normalise(pool.pictures[chosen])
    if not with_text:
        table = F.normalize(teacher.table, dim=-1)
        return image_losses(model, teacher, table, pixels, pool.patches[chosen], pool.presence[chosen])[0]
    true, false = zip(*(told(pool.scenes[k], rng) for k in chosen[:TOLD].tolist()))
    texts = embed_tokens(model, tokenize([*phrases_for(rng), *true, *false])).float()
    table, true_texts, false_texts = texts.split([BACKGROUND, len(true), len(false)])
    loss, pooled = image_losses(model, teacher, table, pixels, pool.patches[chosen], pool.presence[chosen])
    return loss + text_losses(model, pooled[:TOLD], true_texts, false_texts)


# ---- writing


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write float16 safetensors atomically."""
    from safetensors.torch import save

    halves = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(halves, metadata={"format": "pt"}))


def save_clip(model: ClipModel, folder: Path) -> None:
    """The open_clip folder (its tokenizer is there already), loadable as `local-dir:FOLDER`."""
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model_config(len(word_pieces())), "preprocess_cfg": preprocess}
    write_json(folder / "open_clip_config.json", config)
    save_tensors(folder / "open_clip_model.safetensors", model.state_dict())


def tower_tensors(visual: ClipModel) -> dict[str, Tensor]:
    """The image tower under the hub's names for CLIPVisionModel, which has no place for the projection to text."""
    state = visual.state_dict()
    top = {"class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
           "positional_embedding": "embeddings.position_embedding.weight"}  # fmt: skip
    norms = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    renamed = {new: state[old] for old, new in top.items()}
    for kind in ("weight", "bias"):
        renamed |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in norms.items()}
        for layer in range(LAYERS):
            old_layer, new_layer = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            renamed |= {f"{new_layer}.{new}.{kind}": state[f"{old_layer}.{old}.{kind}"] for old, new in parts.items()}
            thirds = state[f"{old_layer}.attn.in_proj_{kind}"].chunk(3)
            renamed |= {f"{new_layer}.self_attn.{x}_proj.{kind}": third for x, third in zip("qkv", thirds)}
    return {f"vision_model.{name}": tensor for name, tensor in renamed.items()}


def save_tower(model: ClipModel, folder: Path) -> None:
    """The image tower as a CLIPVisionModel folder with OpenAI's style of preprocessor_config.json."""
    write_json(folder / "config.json", {
        "architectures": ["CLIPVisionModel"], "attention_dropout": 0.0, "hidden_act": "quick_gelu",
        "hidden_size": WIDTH, "image_size": SIZE, "initializer_factor": 1.0, "initializer_range": 0.02,
        "intermediate_size": int(WIDTH * MLP_RATIO), "layer_norm_eps": 1e-05, "model_type": "clip_vision_model",
        "num_attention_heads": WIDTH // HEAD_WIDTH, "num_channels": 3, "num_hidden_layers": LAYERS,
        "patch_size": PATCH, "projection_dim": EMBEDDING, "torch_dtype": "float16",
    })  # fmt: skip
    write_json(folder / "preprocessor_config.json", {
        "crop_size": SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD, "resample": 3,
        "size": SIZE,
    })  # fmt: skip
    save_tensors(folder / "model.safetensors", tower_tensors(model.visual))


# ---- checks on what was written


def load_clip(folder: Path) -> tuple[ClipModel, Any]:
    """(model, tokenizer) as any user of open_clip loads them from a folder, float32."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}", precision="fp32").eval()
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def conversion_difference(clip_folder: Path, tower_folder: Path, scenes: list[Scene]) -> float:
    """The largest difference of any hidden state between open_clip's image tower and the CLIPVisionModel."""
    from transformers import CLIPVisionModel

    visual = load_clip(clip_folder)[0].visual
    tower = CLIPVisionModel.from_pretrained(str(tower_folder), dtype=torch.float32, attn_implementation="sdpa").eval()
    pixels = normalise(render(scenes))
    states: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _, __, out: states.append(out)) for b in visual.transformer.resblocks]
    visual(pixels)
    for hook in hooks:
        hook.remove()
    theirs = tower(pixels, output_hidden_states=True).hidden_states[1:]
    return max(float((a - b).abs().max()) for a, b in zip(states, theirs))


@torch.no_grad()
def similarities(folder: Path, scenes: list[Scene], texts: list[str]) -> Tensor:
    """Cosines [scenes, texts] by open_clip's own encode_image and encode_text."""
    model, tokenize = load_clip(folder)
    text = model.encode_text(tokenize(texts), normalize=True)
    images = [
        model.encode_image(normalise(render(scenes[k : k + 100])), normalize=True) for k in range(0, len(scenes), 100)
    ]
    return torch.cat(images) @ text.T


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """The chance that a positive scores above a negative (ties count half), from the sum of the positives' ranks."""
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]
    positives, negatives = float(labels.sum()), float((1 - labels).sum())
    above = float(ranks[labels > 0].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def presence_auc(folder: Path, scenes: list[Scene]) -> float:
    """Of 'a dog' and its like for all categories: how often one that is drawn scores above one that is not."""
    phrases = [f"{article(category)} {category}" for category in CATEGORIES]
    return area_under_curve(similarities(folder, scenes, phrases).flatten(), presence_of(scenes).flatten())


def caption_accuracies(folder: Path, scenes: list[Scene], seed: int = 0) -> tuple[float, float]:
    """Shares of scenes whose own caption is the best of all, and whose own caption beats its one-word edit."""
    rng = random.Random(seed)
    captions = [truthful_caption(scene, rng) for scene in scenes]
    edits = [one_word_edit(caption, scene, rng) for caption, scene in zip(captions, scenes)]
    scores = similarities(folder, scenes, captions + edits)
    own, edited = scores[:, : len(scenes)], scores[:, len(scenes) :]
    retrieved = (own.argmax(1) == torch.arange(len(scenes))).float().mean()
    return float(retrieved), float((own.diagonal() > edited.diagonal()).float().mean())


def build(
    clip_folder: Path, tower_folder: Path, steps: int = STEPS, pictures: int = PICTURES, seed: int = 0
) -> dict[str, float]:
    """Trains, writes both folders from the same weights rounded once to float16, and returns what was measured."""
    write_text_tokenizer(clip_folder)
    model = train(clip_folder, build_pool(pictures), steps, seed)
    save_clip(model, clip_folder)
    save_tower(model, tower_folder)
    return measure(clip_folder, tower_folder)


def measure(clip_folder: Path, tower_folder: Path) -> dict[str, float]:
    """The figures of a written pair of folders on 500 scenes that were never trained on."""
    scenes = [sample_scene(index, "validation") for index in range(500)]
    retrieval, edits = caption_accuracies(clip_folder, scenes)
    return {
        "presence AUC": presence_auc(clip_folder, scenes),
        "caption above its one-word edit": edits,
        "own caption best of 500": retrieval,
        "conversion difference": conversion_difference(clip_folder, tower_folder, scenes[:32]),
    }


def main() -> None:
    """Train, write both towers and log the metrics of the held-out scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for clip/ and vision_tower/")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} pictures each (default {STEPS})")
    parser.add_argument("--pictures", type=int, default=PICTURES, help=f"distinct pictures (default {PICTURES})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    args = parser.parse_args()
    figures = build(args.out / "clip", args.out / "vision_tower", args.steps, args.pictures, args.seed)
    log(json.dumps({name: round(value, 6) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    end_on_interrupt()
    main()

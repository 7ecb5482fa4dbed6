"""Images and prompts on their way to the model: pixels, patches, token ids with image places, stop words."""

from __future__ import annotations

import ast
import base64
import math
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from dama.images import open_image, validate_size
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

Size = tuple[int, int]  # width, height in pixels, as in PIL
Item = TypeVar("Item")

# ------------------------------------------------------------------------------------------------------------- images


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """The image in base64 text. Raises ImageError for one too large or too narrow, see `dama.images.exceeded_limit`."""
    opened = open_image(BytesIO(base64.b64decode(image)))
    validate_size(opened)
    return opened


def expand2square(pil_img: Image.Image, background_color: Any) -> Image.Image:
    """The image in the middle of a square of that color, or itself when it is square.

    Raises:
        ImageError: the square would be too large, see `dama.images.exceeded_limit`.
    """
    validate_size(pil_img)
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: Any) -> Any:
    """The pixel values of RGB images, as `model_cfg.image_aspect_ratio` says.

    "pad" fills up to a square of the processor's mean color, "anyres" cuts into patches beside the whole image
    (`model_cfg.image_grid_pinpoints`), anything else leaves it to the processor, which crops the middle.

    Returns:
        float [N, 3, H, W] ("anyres": [N, patches, 3, H, W], or a list of N where their numbers of patches differ).

    Raises:
        ImageError: an image is too large or too narrow, see `dama.images.exceeded_limit`.
    """
    for number, image in enumerate(images, start=1):
        validate_size(image, f"image {number} of {len(images)}")
    mode = getattr(model_cfg, "image_aspect_ratio", None)
    if mode == "anyres":
        pinpoints = model_cfg.image_grid_pinpoints
        pixels = [process_anyres_image(image, image_processor, pinpoints) for image in images]
        return torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels
    if mode == "pad":
        background = tuple(int(mean * 255) for mean in image_processor.image_mean)
        images = [expand2square(image, background) for image in images]
    return pixel_values(images, image_processor)


def pixel_values(images: Sequence[Image.Image], image_processor: Any) -> torch.Tensor:
    """Float [N, 3, H, W] by the image processor alone."""
    return image_processor.preprocess(list(images), return_tensors="pt")["pixel_values"]


# ------------------------------------------------------------------------------------------------------------- anyres


def parse_pinpoints(grid_pinpoints: str | Sequence[Sequence[int]]) -> list[Size]:
    """The resolutions of a config field, which is a list or its text."""
    points = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
    return [(width, height) for width, height in points]


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps most of the image's pixels and, among equals, wastes fewest of its own."""
    width, height = original_size

    def kept_and_wasted(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(possible_resolutions, key=kept_and_wasted)


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """The image scaled to fit the resolution, in the middle of a black canvas of that size."""
    width, height = image.size
    target_width, target_height = target_resolution
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        fitted = (target_width, min(math.ceil(height * scale_w), target_height))
    else:
        fitted = (min(math.ceil(width * scale_h), target_width), target_height)
    canvas = Image.new("RGB", target_resolution, (0, 0, 0))
    canvas.paste(image.resize(fitted), ((target_width - fitted[0]) // 2, (target_height - fitted[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Squares of `patch_size` pixels, row by row; what hangs over the edge is black."""
    width, height = image.size
    corners = [(x, y) for y in range(0, height, patch_size) for x in range(0, width, patch_size)]
    return [image.crop((x, y, x + patch_size, y + patch_size)) for x, y in corners]


def get_anyres_image_grid_shape(
    image_size: Size, grid_pinpoints: str | Sequence[Sequence[int]], patch_size: int
) -> tuple[int, int]:
    """Patches across and down that an image of this size is cut into."""
    width, height = select_best_resolution(image_size, parse_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: str | Sequence[Sequence[int]]
) -> torch.Tensor:
    """Float [1 + patches, 3, H, W]: the whole image squeezed to a square, then its patches at the best resolution."""
    resolution = select_best_resolution(image.size, parse_pinpoints(grid_pinpoints))
    patches = divide_to_patches(resize_and_pad_image(image, resolution), processor.crop_size["height"])
    side = processor.size["shortest_edge"]
    return pixel_values([image.resize((side, side)), *patches], processor)


# -------------------------------------------------------------------------------------------------------------- tokens


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> Any:
    """The ids of a prompt, each "<image>" one `image_token_index`.

    The texts between images are tokenized each on its own, and a BOS is kept at the very start only.

    Returns:
        a list of ids, or a LongTensor [T] for return_tensors="pt".

    Raises:
        ValueError: another kind of tensor is asked for.
    """
    chunks = tokenizer(prompt.split(DEFAULT_IMAGE_TOKEN)).input_ids
    ids = join_chunks(chunks, image_token_index, count_bos(chunks, tokenizer.bos_token_id))
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"Unsupported tensor type: {return_tensors}")


# A noncharacter, which no text for interchange has. `literal` puts it into the spelling of a special token, and its own
# tokens are taken out of the ids.
BREAK = "\ufdd0"


def literal(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a user or of a data file for a prompt, so that "</s>" in it stays text instead of ending the answer.

    Every spelling of a special token gets a BREAK, which `tokenize_with_offsets` and `encode_prompt` take out of the
    ids. "<image>" is left to the callers.
    """
    spellings = sorted(filter(lambda token: len(token) > 1, special_spellings(tokenizer)), key=len, reverse=True)
    if not any(spelling in text for spelling in spellings):
        return text
    # A lookahead, so that spellings that overlap are all broken.
    starts = {m.start() for m in re.finditer(f"(?={'|'.join(map(re.escape, spellings))})", text)}
    return "".join(character + BREAK if i in starts else character for i, character in enumerate(text))


def special_spellings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """What the tokenizer reads as special tokens, "<image>" aside."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {DEFAULT_IMAGE_TOKEN}


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The ids [T] of `tokenizer_image_token` for a prompt whose foreign parts went through `literal`."""
    if BREAK not in prompt:
        return tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
    return torch.tensor(tokenize_with_offsets(prompt, tokenizer, has_image=True)[0], dtype=torch.long)


def tokenize_with_offsets(
    prompt: str, tokenizer: PreTrainedTokenizerBase, has_image: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of `encode_prompt` (of plain text without `has_image`) and, for each, its characters (from, to)."""
    chunks = prompt.split(DEFAULT_IMAGE_TOKEN) if has_image else [prompt]
    encoded = tokenizer(chunks, return_offsets_mapping=True, verbose=False)
    n_bos = count_bos(encoded.input_ids, tokenizer.bos_token_id)
    places: list[tuple[int, int]] = []
    begin = 0
    for index, (chunk, offsets) in enumerate(zip(chunks, encoded.offset_mapping)):
        if index:
            places.append((begin - len(DEFAULT_IMAGE_TOKEN), begin))
        places.extend((begin + start, begin + stop) for start, stop in offsets[n_bos if index else 0 :])
        begin += len(chunk) + len(DEFAULT_IMAGE_TOKEN)
    ids = join_chunks(encoded.input_ids, IMAGE_TOKEN_INDEX, n_bos)
    breaks = set(_breaks(prompt, tokenizer)) if BREAK in prompt else set()
    kept = [(token, place) for token, place in zip(ids, places) if place not in breaks]
    return [token for token, _ in kept], [place for _, place in kept]


def _breaks(prompt: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """The characters (from, to) of each BREAK that `literal` made; one that a text brought along is not among them."""
    for spelling in special_spellings(tokenizer):
        for match in re.finditer(re.escape(spelling[0] + BREAK), prompt):
            rest = prompt[match.end() : match.end() + 2 * len(spelling)].replace(BREAK, "")
            if rest.startswith(spelling[1:]):
                yield match.end() - 1, match.end()


def count_bos(chunks: Sequence[Sequence[int]], bos_token_id: int | None) -> int:
    """1 where the tokenizer put a BOS before every chunk, else 0."""
    return int(all(chunk and chunk[0] == bos_token_id for chunk in chunks))


def join_chunks(chunks: Sequence[Sequence[Item]], image_item: Item, n_bos: int) -> list[Item]:
    """The chunks (of ids, or of anything that goes with them) with an image's item between them and one BOS in all."""
    joined = list(chunks[0])
    for chunk in chunks[1:]:
        joined.append(image_item)
        joined.extend(chunk[n_bos:])
    return joined


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path, after its parent's name where it is a checkpoint ("llava_checkpoint-100")."""
    *parents, name = model_path.strip("/").split("/")
    return f"{parents[-1]}_{name}" if parents and name.startswith("checkpoint-") else name


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops generation once every row's new tokens end with, or their last few contain as text, one of the keywords.

    Args:
        input_ids: the prompt, [B, T]; its length is not looked at.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor) -> None:
        self.keywords = list(keywords)
        self.keyword_ids = [self._ids_without_bos(keyword, tokenizer) for keyword in keywords]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]

    @staticmethod
    def _ids_without_bos(keyword: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        ids = tokenizer(keyword).input_ids
        return ids[1:] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else ids

    def call_for_batch(self, output_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> bool:
        """Whether a batch of one, [1, T], has come to a keyword."""
        row = output_ids[0].tolist()
        if any(row[-len(ids) :] == ids for ids in self.keyword_ids):
            return True
        # Counted from the prompt's length as in LLaVA, so that rows without the prompt give the same verdicts.
        tail = row[-min(len(row) - self.start_len, self.max_keyword_len) :]
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)

    def __call__(self, output_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> bool:
        """Whether every row of the batch has come to a keyword."""
        return all(self.call_for_batch(row[None], scores) for row in output_ids)

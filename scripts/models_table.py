"""Write the table of docs/models.md: how each family of tests/models is read, and whether as rows apart are.

python -m scripts.models_table           # writes docs/models.md's table
python -m scripts.models_table --check   # exit code 1 where it is out of date
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from dama.console import log, write_atomic
from dama.losses import Loss
from dama.models.family import HubFamily
from dama.pairs import PreferencePair
from dama.train.data import ImageChoice, PairDataset
from dama.train.family import PreparedPair, shown_images
from tests.models.tiny_hub import FAMILIES, SUFFIX_FAMILIES, build

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m scripts.models_table -->\n", "<!-- end of table -->"
HEAD = ("model class", "read by", "because", "image tokens of 40 x 30", "log-probs against rows apart")
SIZES = ((40, 30), (30, 44), (56, 56))


def main() -> int:
    """Rewrite the table in docs/models.md; with --check, write nothing and return 1 where it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where the table is out of date"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    with tempfile.TemporaryDirectory() as folder:
        rows = [row_of(name, write_images(Path(folder))) for name in (*FAMILIES, *SUFFIX_FAMILIES)]
    new = before + BEGIN + table(rows) + END + after
    if args.check:
        return int(new != text)
    write_atomic(PAGE, new)
    log(f"{PAGE.name}: {len(rows)} families")
    return 0


def write_images(folder: Path) -> Path:
    """Three images of random pixels."""
    for number, (width, height) in enumerate(SIZES):
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    return folder


def row_of(name: str, folder: Path) -> tuple[str, ...]:
    """The table's row of a family."""
    packed, rows = (family_of(name, folder, shared) for shared in (True, False))
    pairs = [
        PreferencePair(str(i), f"{i}.png", "What?", "A cat and a dog." * (i + 1), "No.") for i in range(len(SIZES))
    ]
    one, other = (logps_of(family, pairs, folder) for family in (packed, rows))
    apart = float(((one - other) / other).abs().max())
    tokens = packed.encode([pairs[0]], [ImageChoice().images(pairs[0])])[0][0].input_ids
    count = int((tokens == packed.model.config.image_token_id).sum())
    decided = packed.decided
    return (
        type(packed.model).__name__,
        str(decided.way),
        decided.reason,
        str(count),
        "equal to 1e-6" if apart < 1e-6 else f"{apart:.0e} apart",
    )


def family_of(name: str, folder: Path, shared_prefix: bool) -> HubFamily:
    """Build a tiny random model of a family with its processor."""
    model, processor = build(name)
    views = Loss.parse(["dpo"]).views
    args = SimpleNamespace(views=lambda: views, shared_prefix=shared_prefix, model_max_length=4096)
    return HubFamily(model, processor, args, image_folder=[str(folder)])


@torch.no_grad()
def logps_of(family: HubFamily, pairs: list[PreferencePair], folder: Path) -> Any:
    """[2B] log-probs, in the family's way."""
    images = [ImageChoice().images(pair) for pair in pairs]
    items = [PreparedPair(*row) for row in zip(pairs, family.encode(pairs, images), images, strict=True)]
    dataset = PairDataset(items, [str(folder)], family.prepare_image)
    pixels = [dataset.pixels(image) for image in shown_images(items)]
    return family.answer_logps(family.module, family.collate(items), pixels, False, 1024).logps


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as a Markdown table below the header."""
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())

"""Finished cells in archives: whoever doubts a figure of the page computes it again from them, without a training."""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from dama.console import log, write_atomic
from playground.tinycoco.study.grid import Cell

WORLD = ("hardness", "held_out_hardness", "reference", "held_out_pairs.json", "cells/sft.json")
"""Beside the cells: what took long, and what differs in its last bits between processors."""
WORLD_ARCHIVE = "world.tar.xz"


def archive_of(seed: int) -> str:
    """Name of the archive of a seed's cells."""
    return f"seed_{seed}.tar.xz"


def pack(declared: Sequence[Cell], finished: Collection[Cell], folder: Path, out: Path) -> None:
    """Write out/world.tar.xz and out/seed_N.tar.xz of every seed all of whose declared cells are finished."""
    write_atomic(out / WORLD_ARCHIVE, packed(folder, WORLD))
    for seed in sorted({cell.seed for cell in declared}):
        cells = [cell for cell in declared if cell.seed == seed]
        if all(cell in finished for cell in cells):
            write_atomic(out / archive_of(seed), packed(folder, sorted(f"cells/{cell.name}.json" for cell in cells)))
            log(f"study: {len(cells)} cells in {out / archive_of(seed)}")


def packed(folder: Path, names: Iterable[str]) -> bytes:
    """A tar.xz of these files and folders, always the same bytes for the same contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            for path in sorted((folder / name).iterdir()) if (folder / name).is_dir() else [folder / name]:
                content = path.read_bytes()
                member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def unpack(source: Path, folder: Path) -> None:
    """Put all archives' files into a study's folder that has none of its own yet.

    Raises:
        FileNotFoundError: `source` holds no archive. FileExistsError: `folder` holds cells or what they were made from.
    """
    archives = sorted(source.glob("*.tar.xz"))
    if not archives:
        raise FileNotFoundError(f"--unpack {source}: expected a folder with archives (*.tar.xz), found none")
    if there := [name for name in (*WORLD, "cells") if (folder / name).exists()]:
        raise FileExistsError(
            f"--unpack: expected a folder without cells, found {', '.join(there)} in {folder}; give another --out, or "
            "leave --unpack out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in archives:
        with tarfile.open(path, mode="r:xz") as archive:
            archive.extractall(folder, filter="data")
    log(f"study: {len(archives)} archives of {source} are in {folder}")

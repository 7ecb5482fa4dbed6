"""Finished cells in archives: whoever doubts a figure of the page computes it again from them, without a training."""

from __future__ import annotations

import io
import lzma
import shutil
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

    Where an archive cannot be unpacked, the folder is as it was.

    Raises:
        FileNotFoundError: `source` holds no archive. FileExistsError: `folder` holds cells or what they were made from.
        ValueError: of `extract`.
    """
    archives = sorted(source.glob("*.tar.xz"))
    if not archives:
        raise FileNotFoundError(f"--unpack {source}: expected a folder with archives (*.tar.xz), found none")
    if there := [name for name in (*WORLD, "cells") if (folder / name).exists()]:
        raise FileExistsError(
            f"--unpack: expected a folder without cells, found {', '.join(there)} in {folder}; give another --out, or "
            "leave --unpack out"
        )
    new = folder / "unpacking"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        for path in archives:
            extract(path, new)
        for path in new.iterdir():
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    log(f"study: {len(archives)} archives of {source} are in {folder}")


def extract(path: Path, folder: Path) -> None:
    """Put an archive's files into a folder.

    Raises:
        ValueError: the archive is damaged or holds something that no study writes, or there is no room.
    """
    try:
        with tarfile.open(path, mode="r:xz") as archive:
            archive.extractall(folder, filter=only_own)
    except (lzma.LZMAError, EOFError, tarfile.TarError, OSError) as error:
        raise ValueError(f"--unpack {path}: expected an archive of the study, got {error}") from error


def only_own(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """A filter of tarfile: what `pack` puts into an archive."""
    if not member.isreg() or Path(member.name).parts[0] not in {Path(name).parts[0] for name in WORLD}:
        raise tarfile.FilterError(f"{member.name}, which no study writes")
    return tarfile.data_filter(member, folder)

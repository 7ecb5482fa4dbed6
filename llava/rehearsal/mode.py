"""Inside a process on the null device: the numbers that a program needs, and every wait of the host for the device."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llava.rehearsal.formulas import on_cpu

aten = torch.ops.aten

# The size of these results depends on the values: the host waits for them, and they are computed before allocating.
DATA_DEPENDENT = {
    aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten.bincount.default,
    aten.repeat_interleave.Tensor, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# Operators that change what a tensor refers to, or ask about it; none has numbers to compute.
METADATA = ("set_", "detach", "detach_", "resize_", "record_stream", "_pin_memory", "is_pinned", "_reshape_alias")

COUNTERS = {"launches": "launches", "gemms": "gemms", "syncs": "syncs", "copies to host": "to_host",
            "bytes to host": "to_host_bytes", "copies from host": "from_host",
            "bytes from host": "from_host_bytes"}  # fmt: skip


class NullMode(TorchDispatchMode):
    """Computes on the CPU what the null device's kernels leave out, and records where the host waits.

    CUDA's own code runs first: it checks arguments, allocates and launches. Then the same operator runs on CPU tensors
    over the same memory. cuDNN is off inside, as are, with `everything`, the fused attention kernels that have no CPU
    counterpart. Random numbers are the CPU generator's, whatever generator an operator is given.

    Args:
        limit: compute operators whose floating-point inputs have at most this many elements in all. Integers are
            always computed, since shapes and control flow depend on them; larger floats keep arbitrary values.
        everything: compute every operator; for tiny models, whose losses are then real.

    Attributes:
        syncs: how often the host waited, by "what  file:line function"; where that is a library's line, the line of
            this repository that led there follows.

    Raises:
        RuntimeError: the process was not started by `python -m llava.rehearsal`.
    """

    def __init__(self, limit: int = 1 << 16, *, everything: bool = False) -> None:
        super().__init__()
        counts()
        self.limit = limit
        self.everything = everything
        self.syncs: Counter[str] = Counter()
        self._settings: list[ExitStack] = []

    def __enter__(self) -> NullMode:
        self._settings.append(settings(self.everything))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._settings.pop().close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        if not any(t.is_cuda for t in inputs) and not on_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():
            return self.decomposed(func, args, kwargs)
        for what in waits(func, args, kwargs):
            self.syncs[f"{what}  {where()}"] += 1
        if func.namespace == "c10d":
            return func(*flat_collective(func, args), **kwargs)
        if is_metadata(func) or func is aten._local_scalar_dense.default:
            return func(*args, **kwargs)
        if func in DATA_DEPENDENT:
            return self.data_dependent(func, args, kwargs)
        if func in INDEXING:
            args = (args[0], without_masks(args[1]), *args[2:])
        result = func(*args, **kwargs)
        if self.computes(func, inputs, result):
            fill(result, compute(func, args, kwargs))
        return result

    def decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator made of others, each of which comes to this mode. Elsewhere autograd takes them apart before."""
        super().__enter__()
        try:
            return func.decompose(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def computes(self, func: Any, inputs: list[Tensor], result: Any) -> bool:
        """Whether an operator really runs, on the CPU."""
        if func.overloadpacket in ALLOCATIONS:
            return False
        return self.everything or (floats(inputs) <= self.limit and floats(tensors_in(result)) <= 4 * self.limit)

    def data_dependent(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator whose result's shape depends on values."""
        inputs = tensors_in((args, kwargs))
        if not self.everything and floats(inputs) > self.limit:
            raise RuntimeError(
                f"{func} on the null device: expected at most {self.limit} floating-point elements, whose values are "
                f"computed, got {floats(inputs)}; raise NullMode's limit, or pass everything=True"
            )
        device = next(t.device for t in inputs if t.is_cuda)
        return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, compute(func, args, kwargs))


def counts() -> dict[str, int]:
    """What the process asked of the device so far: launches, gemms, syncs, and copies with their bytes.

    Raises:
        RuntimeError: the process was not started by `python -m llava.rehearsal`.
    """
    loaded = ctypes.CDLL(None)
    try:
        return {name: ctypes.c_ulong.in_dll(loaded, f"nullcuda_{symbol}").value for name, symbol in COUNTERS.items()}
    except ValueError:
        raise RuntimeError(
            "no null device in this process: expected a start by python -m llava.rehearsal SCRIPT, or with "
            "llava.rehearsal.launch.environment()"
        ) from None


# --- Settings of torch -----------------------------------------------------------------------------------------------


def settings(everything: bool) -> ExitStack:
    """What is switched off on the null device, until the stack is closed."""
    stack = ExitStack()
    stack.enter_context(torch.backends.cudnn.flags(enabled=False))
    cuda = torch.backends.cuda
    switches = [(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp)]
    if everything:
        switches += [
            (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
            (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        ]
    for is_enabled, enable in switches:
        stack.callback(enable, is_enabled())
        enable(False)
    return stack


# --- Computing on the CPU --------------------------------------------------------------------------------------------


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator's result on the CPU; what it changes in place changes in the device's memory."""
    args, kwargs = tree_map(host_value, (args, kwargs))
    if on_cuda(kwargs.get("device")):
        kwargs["device"] = "cpu"
    kwargs.pop("pin_memory", None)
    return on_cpu(func, args, kwargs)


def host_value(value: Any) -> Any:
    """A CPU tensor for a CUDA tensor, the CPU's default generator for any."""
    if isinstance(value, torch.Generator):
        return None
    return alias(value) if isinstance(value, Tensor) else value


def alias(t: Tensor) -> Tensor:
    """A CPU tensor on the memory of a tensor of the null device; a CPU tensor itself."""
    if not t.is_cuda:
        return t
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype, device="cpu").set_(raw, t.storage_offset(), t.shape, t.stride())


def fill(result: Any, computed: Any) -> None:
    """Write the CPU's numbers into what CUDA's code allocated, in its data type."""
    for n, (to, numbers) in enumerate(zip(tensors_in(result), tensors_in(computed))):
        if to.shape != numbers.shape:
            if n:
                continue  # a buffer for the backward formula, such as the mask that only one of the two has
            raise RuntimeError(f"the null device allocated {tuple(to.shape)}, the CPU computed {tuple(numbers.shape)}")
        target = alias(to)
        if target.numel() and target.data_ptr() != numbers.data_ptr():
            target.copy_(numbers)


def without_masks(indices: Any) -> list[Tensor | None]:
    """Return the indices of an indexing operator, each mask replaced by the positions that it selects.

    CUDA's code would count them with a kernel.
    """
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and is_mask(index):
            found += [positions.to(index.device) for positions in alias(index).nonzero(as_tuple=True)]
        else:
            found.append(index)
    return found


def flat_collective(func: Any, args: Any) -> Any:
    """Arguments of a collective; the fake process group demands the shapes of one flat tensor, which NCCL does not."""
    if any(name in func._schema.name for name in ("_allgather_base_", "_reduce_scatter_base_")):
        return (args[0].view(-1), args[1].reshape(-1), *args[2:])
    return args


def is_metadata(func: Any) -> bool:
    """Whether an operator reads no values."""
    return func.is_view or func._schema.name.removeprefix("aten::") in METADATA


def is_mask(index: Tensor) -> bool:
    """Whether an index is a mask."""
    return index.dtype in (torch.bool, torch.uint8)


def on_cuda(device: Any) -> bool:
    """Whether a device is a CUDA device."""
    return device is not None and torch.device(device).type == "cuda"


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors of a nested structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def floats(tensors: list[Tensor]) -> int:
    """Elements of the floating-point tensors on the device."""
    return sum(t.numel() for t in tensors if t.is_cuda and t.is_floating_point())


# --- Waits of the host -----------------------------------------------------------------------------------------------


def waits(func: Any, args: Any, kwargs: Any) -> Iterator[str]:
    """Why the host waits for the device in this operator."""
    name = str(func).removeprefix("aten.")
    if func is aten._local_scalar_dense.default:
        yield "item"
    elif func in DATA_DEPENDENT and kwargs.get("output_size") is None:
        yield name
    elif func in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(is_mask(index) for index in indices):
            yield "mask as index"
        if args[0].is_cuda and any(not index.is_cuda for index in indices):
            yield "index on the host"
    elif func is aten._to_copy.default:
        yield from copy_waits(args[0], on_cuda(kwargs.get("device", args[0].device)), kwargs.get("non_blocking"))
    elif func is aten.copy_.default:
        yield from copy_waits(args[1], args[0].is_cuda, args[2] if len(args) > 2 else kwargs.get("non_blocking"))


def copy_waits(source: Tensor, to_cuda: bool, non_blocking: bool | None) -> Iterator[str]:
    """A copy is asynchronous only if asked for, and from the host only if the memory is page-locked."""
    if source.is_cuda and not to_cuda and not non_blocking:
        yield "copy to host"
    if not source.is_cuda and to_cuda and source.dim() and not (non_blocking and source.is_pinned()):
        yield "copy from pageable memory" if non_blocking else "copy from host"


# --- Where in the source ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
STANDARD_LIBRARY = str(Path(os.__file__).parent)
HERE = str(Path(__file__).parent)
# Parts of torch whose lines say something; the others pass a call on.
SPEAKING = ("torch/nn/modules/", "torch/nn/utils/", "torch/optim/", "torch/amp/", "torch/utils/checkpoint")


def where() -> str:
    """Return "file:line function" of the nearest line of interest, " <- " and the nearest of the program itself."""
    frames = list(outward(sys._getframe(1)))
    telling = next((frame for frame in frames if is_telling(frame)), None)
    own = next((frame for frame in frames if is_own(frame)), None)
    if telling is None:
        return site(frames[0]) if frames else "autograd's own thread"
    return site(telling) if own in (None, telling) else f"{site(telling)} <- {site(own)}"


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame's callers, without those of this package."""
    while frame is not None:
        if str(Path(frame.f_code.co_filename).parent) != HERE:
            yield frame
        frame = frame.f_back


def library_name(frame: FrameType) -> str | None:
    """Path inside site-packages; None outside."""
    _, found, path = frame.f_code.co_filename.rpartition("-packages/")
    return path if found else None


def is_own(frame: FrameType) -> bool:
    """Whether a frame is of the program itself."""
    file = frame.f_code.co_filename
    return library_name(frame) is None and not file.startswith((STANDARD_LIBRARY, "<"))


def is_telling(frame: FrameType) -> bool:
    """Whether a frame names the place of a wait to its reader."""
    name = library_name(frame)
    if name is None:
        return is_own(frame)
    return not name.startswith("torch/") or name.startswith(SPEAKING)


def site(frame: FrameType) -> str:
    """Return "file:line function" of a frame."""
    file = library_name(frame)
    if file is None:
        path = Path(frame.f_code.co_filename)
        file = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"

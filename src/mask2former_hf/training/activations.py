"""Which blocks of a network are computed again in the backward pass, so that a step fits into a budget of memory.

One forward pass with a batch of the run's size, whose tensors are counted instead of kept, tells what each block keeps
for its gradient and how long it takes. Then blocks are chosen in the order of bytes freed per second of computing them
again, until the step fits.
"""

import time
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model.backbone import batch_norms
from .freezing import stage_modules
from .lora import ENCODER

MADE_HERE = "made_to_compute_again"  # marks the classes that `compute_again` makes


class Block(NamedTuple):
    """What a part of the network keeps, as measured; tensors are numbers of `Measured.sizes`."""

    name: str
    inputs: frozenset[int]  # kept if the block is computed again
    saved: frozenset[int]  # kept otherwise
    begins: int  # how many tensors had been seen before it
    seconds: float


class Measured(NamedTuple):
    """What a forward pass keeps.

    Args:
        sizes: bytes of every tensor, in the order in which they were seen.
        kept: by what is not in a block.
        blocks: in the order in which they run.
    """

    sizes: list[int]
    kept: frozenset[int]
    blocks: list[Block]

    def bytes_of(self, tensors: Iterable[int]) -> int:
        return sum(self.sizes[number] for number in tensors)

    def peak(self, again: frozenset[str]) -> int:
        """Most bytes kept at a time, if the blocks of these names are computed again.

        At the end of the forward pass, or when the backward pass has come to a block that is computed again: what was
        kept after it is gone then, and all that it keeps is there.
        """
        held = {block.name: block.inputs if block.name in again else block.saved for block in self.blocks}
        everything = self.kept.union(*held.values())
        peak = self.bytes_of(everything)
        for block in self.blocks:
            if block.name in again:
                before = {number for number in everything if number < block.begins}
                peak = max(peak, self.bytes_of(before | block.inputs | block.saved))
        return peak


class Choice(NamedTuple):
    again: list[str]  # names of the blocks
    peak: int  # bytes
    seconds: float  # of computing them again, in one step


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """What can be computed again, by name: the innermost of transformers' layers that can, and of a backbone without
    such layers the blocks of its stages."""
    layers = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, GradientCheckpointingLayer) and not hasattr(part, MADE_HERE)
    }
    found = {name: part for name, part in layers.items() if not any(other.startswith(f"{name}.") for other in layers)}
    of_backbone = next(name for name, _ in model.named_modules() if name.endswith(ENCODER.rstrip(".")))
    if not any(name.startswith(f"{of_backbone}.") for name in found):
        for name, stage in stage_modules(model.get_submodule(of_backbone)).items():
            found |= {f"{of_backbone}.{name}{inner}": block for inner, block in blocks_of_stage(stage).items()}
    return found


def blocks_of_stage(stage: nn.Module) -> dict[str, nn.Module]:
    """The parts of the largest list in a stage, or the stage itself, by the rest of their names."""
    lists = {
        f".{name}" if name else "": part
        for name, part in stage.named_modules()
        if type(part) in (nn.ModuleList, nn.Sequential)
    }
    if not lists:
        return {"": stage}
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return {f"{name}.{index}": block for index, block in enumerate(lists[name])}


class Watch:
    """Counts what autograd would keep, and lets it go."""

    def __init__(self, model: nn.Module, blocks: dict[str, nn.Module]):
        self.sizes, self.seen = [], {}  # by address: number and a weak reference, for addresses are used again
        self.owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.kept, self.open, self.blocks, self.model, self.parts = set(), [], [], model, blocks

    def number(self, tensor: Tensor) -> int | None:
        """Of the tensor's memory; None for a parameter's."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self.owned:
            return None
        number, alive = self.seen.get(address, (0, None))
        if alive is None or alive.expired():
            number = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.seen[address] = (number, StorageWeakRef(storage))
        return number

    def pack(self, tensor: Tensor):
        number = self.number(tensor)
        if number is not None:
            (self.open[-1]["saved"] if self.open else self.kept).add(number)

    def enter(self, name: str, module, args, kwargs):
        inputs = {self.number(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)} - {None}
        self.open.append({"begins": len(self.sizes), "inputs": inputs, "saved": set(), "start": self.clock()})

    def leave(self, name: str, module, args, output):
        one = self.open.pop()
        seconds = self.clock() - one["start"]
        self.blocks.append(Block(name, frozenset(one["inputs"]), frozenset(one["saved"]), one["begins"], seconds))

    def clock(self) -> float:
        if next(self.model.parameters()).device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def watching(self):
        hooks = []
        for name, part in self.parts.items():
            hooks.append(part.register_forward_pre_hook(partial(self.enter, name), with_kwargs=True))
            hooks.append(part.register_forward_hook(partial(self.leave, name)))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, _never):
                yield self
        finally:
            for hook in hooks:
                hook.remove()


def _never(packed):
    raise RuntimeError("this forward pass was measured, and its tensors were not kept: there is no backward pass")


def measure(model: nn.Module, batch: dict, autocast: torch.dtype | None = None) -> Measured:
    """What a training step with this batch keeps for its backward pass; the model stays as it is.

    Args:
        model: in the mode and with the weights frozen as in training, on its device.
        batch: its arguments, labels included.
        autocast: half precision of the step.
    """
    blocks = blocks_of(model)
    watch = Watch(model, blocks)
    device = next(model.parameters()).device.type
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices), statistics_kept(model), watch.watching():
            with torch.autocast(device, autocast, enabled=autocast is not None):
                model(**batch)
    finally:
        model.train(training)
    return Measured(watch.sizes, frozenset(watch.kept), watch.blocks)


def choose(measured: Measured, budget: float) -> Choice:
    """The blocks to compute again so that at most `budget` bytes are kept at a time: those that free most bytes per
    second first, and in the end none that is not needed.

    Raises:
        ValueError: with the least that can be kept.
    """
    again, blocks = set(), {block.name: block for block in measured.blocks}
    most = measured.peak(frozenset())
    frees = {name: most - measured.bytes_of(kept_with(measured, name)) for name in blocks}
    order = sorted((name for name in blocks if frees[name] > 0), key=lambda name: -frees[name] / blocks[name].seconds)
    for name in order:
        if measured.peak(frozenset(again)) <= budget:
            break
        again.add(name)
    peak = measured.peak(frozenset(again))
    if peak > budget:
        raise BudgetTooSmall(peak)
    for name in sorted(again, key=lambda name: -blocks[name].seconds):
        if measured.peak(frozenset(again - {name})) <= budget:
            again.remove(name)
    peak, seconds = measured.peak(frozenset(again)), sum(blocks[name].seconds for name in again)
    return Choice([name for name in blocks if name in again], peak, seconds)


def kept_with(measured: Measured, name: str) -> frozenset[int]:
    """What is kept at the end of the forward pass if one block is computed again."""
    return measured.kept.union(*(one.inputs if one.name == name else one.saved for one in measured.blocks))


class BudgetTooSmall(ValueError):
    """Args: least: bytes that are kept even if all blocks are computed again."""

    def __init__(self, least: int):
        super().__init__(f"at least {least} bytes are kept")
        self.least = least


def compute_again(model: nn.Module, names: Iterable[str]):
    """Let the blocks of these names, and no others, keep in training their inputs alone, from now on."""
    names = set(names)
    for name, block in blocks_of(model).items():
        if name in names and not isinstance(block, GradientCheckpointingLayer):
            block.__class__ = _checkpointing(type(block))  # the same parameters and names
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = name in names
        options = {"context_fn": partial(_contexts, block)} if batch_norms(block) else {}
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **options)


@cache
def _checkpointing(kind: type) -> type:
    """transformers' layer wraps the forward of every class that inherits from it."""
    return type(
        kind.__name__,
        (kind, GradientCheckpointingLayer),
        {
            "__module__": kind.__module__,
            "__reduce_ex__": lambda block, protocol: (_empty_block, (kind,), vars(block)),  # no module has this class
            MADE_HERE: True,
        },
    )


def _empty_block(kind: type) -> nn.Module:
    """What a pickle of a block begins with."""
    made = _checkpointing(kind)
    return made.__new__(made)


def _contexts(block: nn.Module):
    return nullcontext(), statistics_kept(block)


@contextmanager
def statistics_kept(module: nn.Module):
    """Within the block batch norms leave their statistics alone: a second pass is not a second batch."""
    norms = [norm for norm in batch_norms(module) if norm.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)

"""Target: `read_checkpoint` on damaged and malicious files.

A file loads or gives a CheckpointError. Another exception, a crash, more memory than MOST_MEMORY, a file that takes
longer than MOST_SECONDS, and whatever Python's audit events show that is not reading are findings.
"""

import codecs
import io
import pickle
import pickletools
import random
import resource
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from mask2former_hf.conversion.checkpoint_files import read_checkpoint
from mask2former_hf.conversion.names import CheckpointError

MOST_MEMORY = 150 * 2**20  # above that of all files before; the files have a few kB
MOST_SECONDS = 10
FORBIDDEN_EVENTS = ("exec", "compile", "os.", "subprocess.", "socket.", "ctypes.", "pickle.", "marshal.", "shutil.")
NUMBERS = (0, 1, 2, 3, 255, 2**15, 2**24 + 1, 2**31 - 1, -1, -(2**31), 2**40, 2**63, 10**12, 2**200)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint ran')",)


def state() -> OrderedDict:
    """One tensor of each kind that checkpoints have; views and shared memory among them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator)
    return OrderedDict(
        weight=weight, view=weight[1:, ::2], bias=torch.nn.Parameter(torch.ones(3)), half=weight.half(),
        empty=weight[:0], brain=weight.bfloat16(), mask=weight > 0, count=torch.tensor(7), index=weight.long().t(),
    )  # fmt: skip


def seeds() -> dict[str, bytes]:
    """Sound files by name, of every format."""
    tensors, files = state(), {}
    arrays = {name: x.detach().numpy() for name, x in tensors.items() if x.dtype != torch.bfloat16}
    arrays |= {"columns": np.asfortranarray(arrays["weight"]), "other_order": arrays["weight"].astype(">f4")}
    for protocol in (2, 4, 5):
        content = {"model": arrays, "__author__": "fuzz", "matching_heuristics": True, "numbers": [1.5, (2, None)]}
        files[f"protocol{protocol}.pkl"] = pickle.dumps(content, protocol)
    files["tensors.pkl"] = pickle.dumps({"model": tensors}, 4)
    for name, zipped in (("zip.pth", True), ("legacy.pth", False)):
        file = io.BytesIO()
        torch.save({"model": tensors, "iteration": 5}, file, _use_new_zipfile_serialization=zipped)
        files[name] = file.getvalue()
    files["code.pkl"] = pickle.dumps({"model": {"x": Payload()}})
    return files


def mutated(data: bytes, choose: random.Random) -> bytes:
    """Some bytes changed; or some operations of a pickle, inside an archive with its lengths in order again."""
    if data.startswith(b"PK") and choose.random() < 0.8:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        name = choose.choice([next(iter(records)), *records])
        records[name] = mutated(records[name], choose)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, record)
        return file.getvalue()
    for _ in range(choose.choice((1, 1, 2, 4))):
        data = (_other_operation if choose.random() < 0.6 else _other_bytes)(data, choose)
    return data


def _other_bytes(data: bytes, choose: random.Random) -> bytes:
    start = choose.randrange(len(data) + 1)
    end = min(len(data), start + choose.choice((0, 1, 1, 4, 30)))
    new = choose.choice((
        b"", choose.randbytes(end - start), choose.randbytes(3), data[start:end] * 2, data[:start][-20:],
        struct.pack("<q", choose.choice(NUMBERS) % 2**63), struct.pack("<I", choose.choice(NUMBERS) % 2**32),
    ))  # fmt: skip
    return data[:start] + new + data[end:] if choose.random() < 0.95 else data[:start]


def _other_operation(data: bytes, choose: random.Random) -> bytes:
    positions = []
    try:
        for operation, argument, position in pickletools.genops(io.BytesIO(data)):
            positions.append((operation, argument, position))
    except ValueError:  # up to the damage
        pass
    if len(positions) < 2:
        return _other_bytes(data, choose)
    index = choose.randrange(len(positions) - 1)
    (operation, argument, start), end = positions[index], positions[index + 1][2]
    other = choose.randrange(len(positions) - 1)
    copied = data[positions[other][2] : positions[other + 1][2]]
    number = choose.choice(NUMBERS)
    if isinstance(argument, int) and choose.random() < 0.5:
        new = pickle.dumps(argument + choose.choice((-1, 1)) if choose.random() < 0.5 else number, 2)[2:-1]
    elif "PUT" in operation.name or "GET" in operation.name:
        new = (b"r" if "PUT" in operation.name else b"j") + struct.pack("<I", number % 2**32)
    else:
        code = choose.choice(pickletools.opcodes).code.encode("latin1")
        new = choose.choice(
            (b"", copied, data[start:end] + copied, data[start:end] * 2, code, b"(ccollections\nOrderedDict\n")
        )
    return data[:start] + new + data[end:]


class Watch:
    """Reads files, and notes what Python does meanwhile."""

    def __init__(self):
        self.reading, self.events = None, []
        for name in ("cp437", "raw_unicode_escape"):  # imported on first use, the one import that reading causes
            codecs.lookup(name)
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple):
        if self.reading is None:
            return
        elsewhere = event == "open" and str(arguments[0]) != self.reading
        if elsewhere or event.startswith(FORBIDDEN_EVENTS):
            self.events.append(f"{event}{arguments!r:.200}")

    def problem(self, path: Path) -> tuple[str | None, bool]:
        """What is wrong with how a file was read, if anything, and whether it loaded."""
        before, start, loaded = _peak_memory(), time.process_time(), False
        self.reading, self.events = str(path), []
        try:
            read_checkpoint(path)
            loaded = True
        except CheckpointError as error:
            if isinstance(error.__cause__, MemoryError) or "\n" in str(error).replace(str(path), ""):
                return f"{error!r} after {error.__cause__!r}", loaded
        except BaseException as error:
            return f"{type(error).__name__}: {error}", loaded
        finally:
            self.reading = None
        if self.events:
            return f"events: {self.events}", loaded
        if (grown := _peak_memory() - before) > MOST_MEMORY:
            return f"took {grown >> 20} MiB", loaded
        if (seconds := time.process_time() - start) > MOST_SECONDS:
            return f"took {seconds:.0f} s", loaded
        return None, loaded


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(seed: int, count: int | None, until: float, folder: Path) -> str:
    """Read mutated files, `count` of them or up to the time `until`; the last one stays in `folder`.

    Raises:
        AssertionError: with the file's name and what is wrong.
    """
    choose, sound, watch, loads, tried = random.Random(seed), seeds(), Watch(), 0, 0
    for name, data in sound.items():
        (folder / name).write_bytes(data)
        problem, loaded = watch.problem(folder / name)
        assert problem is None and loaded == (name != "code.pkl"), (name, problem)
    while tried != count and time.monotonic() < until:
        name = choose.choice(list(sound))
        path = folder / f"case{Path(name).suffix}"
        path.write_bytes(mutated(sound[name], choose))
        problem, loaded = watch.problem(path)
        tried, loads = tried + 1, loads + loaded
        assert problem is None, f"{path}, mutation {tried} of seed {seed} ({name}): {problem}"
    return f"checkpoints: {tried} mutated files, {loads} loaded, {tried - loads} refused, none did anything else"

"""Target: the C++ kernels, by themselves under sanitizers, and behind Python's checks with tensors that do not fit.

The sanitizers report a byte outside the tensors and undefined arithmetic. In Python, every call gives what the formula
gives or a ValueError; another exception, a crash and another result are findings.
"""

import random
import shutil
import subprocess
import time
from pathlib import Path

import torch

import mask2former_hf
from mask2former_hf import kernels
from mask2former_hf.kernels import cpu, operators, use_kernel
from mask2former_hf.model.deformable_attention import multi_scale_deformable_attention

COMPILER = shutil.which("g++")
FOLDER = Path(mask2former_hf.__file__).parent / "kernels"
FLAGS = (
    "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -O0 -g -std=c++17 -pthread -Wno-psabi"
)
# Two threads also for the driver's small problems; one version of each function instead of one per kind of processor.
SOURCES = {"SOURCE": "msda_cpu", "NORM_SOURCE": "group_norm_cpu", "WINDOW_SOURCE": "window_attention_cpu"}
DEFINITIONS = ["-DMSDA_NO_CLONES", "-DMSDA_THREADS_ALWAYS"]
DEFINITIONS += [f'-D{name}="{FOLDER}/{source}.cpp"' for name, source in SOURCES.items()]


def build(folder: Path) -> Path | None:
    """The driver's program; None if the compiler has no sanitizers.

    Raises:
        AssertionError: if it does not compile.
    """
    program = folder / "kernel_driver"
    driver = Path(__file__).with_name("kernel_driver.cpp")
    command = [COMPILER, *FLAGS.split(), *DEFINITIONS, str(driver), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and "asan" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def run_driver(program: Path, seed: int, count: int, seconds: float) -> int:
    """Random problems that the sanitizers saw."""
    command = [program, *map(str, (seed, count, seconds))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300)
    assert done.returncode == 0, f"{command}: {done.stderr[-5000:]}"
    return int(done.stdout)


def problem(choose: random.Random) -> tuple[list, list[torch.Tensor]]:
    """Shapes; value, reference points, offsets, logits; usually one or two of them fit no longer."""
    L, P, B, Q, h, D = (choose.randint(1, most) for most in (3, 4, 2, 6, 3, 9))
    shapes = [(choose.randint(1, 6), choose.randint(1, 6)) for _ in range(L)]
    sizes = [[B, sum(H * W for H, W in shapes), h, D], [Q, 2], [B, Q, h, L, P, 2], [B, Q, h, L * P]]
    for _ in range(choose.choice((0, 1, 1, 2))):
        size = choose.choice(sizes)
        change = choose.randrange(5)
        if change == 0:
            shapes[choose.randrange(L)] = (choose.choice((-1, 0, 1, 3, 2**33)), choose.choice((-2, 1, 5)))
        elif change == 1 and size:
            size.pop()
        elif change == 2:
            size.append(choose.randint(1, 3))
        elif size:
            size[choose.randrange(len(size))] = choose.choice((0, 1, 2, 3, 40))
    dtypes = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
    tensors = [(torch.randn(size) * 2).to(choose.choice(dtypes[:1] * 20 + dtypes)) for size in sizes]
    if choose.random() < 0.1:
        index = choose.randrange(4)
        tensors[index] = tensors[index].to("meta")
    strange = tensors[choose.randrange(4)]
    if strange.is_floating_point() and strange.numel() and strange.device.type == "cpu":
        strange.view(-1)[choose.randrange(strange.numel())] = choose.choice((float("nan"), float("inf"), 1e38, -1e38))
    return shapes, tensors


def attend(shapes, value, points, offsets, logits, standard: bool):
    """Either form by the chosen kernel, with gradients, or None."""
    value = value.detach().requires_grad_(value.is_floating_point())
    if standard:
        output = operators.standard(value, [side for shape in shapes for side in shape], offsets, logits)
    else:
        output = kernels.deformable_attention(value, shapes, points, offsets, logits)
    return output if output is None else (output.detach(), torch.autograd.grad(output.sum(), value)[0])


def formula(shapes, value, points, offsets, logits, standard: bool) -> torch.Tensor:
    B, Q, h, L, P, _ = offsets.shape
    value, points, offsets, logits = (x.float() for x in (value, points, offsets, logits))
    weights, locations = logits.view(B, Q, h, L, P), offsets
    if not standard:
        weights = logits.softmax(-1).view(B, Q, h, L, P)
        locations = points.view(1, Q, 1, 1, 1, 2) + offsets / torch.tensor([(W, H) for H, W in shapes]).view(L, 1, 2)
    return multi_scale_deformable_attention(value, shapes, locations, weights)


def check(seed: int) -> bool:
    """Whether the problem of this number was accepted."""
    choose = random.Random(seed)
    standard, threads = choose.random() < 0.4, choose.choice((1, 2, 3))
    shapes, tensors = problem(choose)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    if any(x.device.type == "meta" for x in tensors[:1]):
        return False
    try:
        with use_kernel("cpp" if tensors[0].dtype in cpu.DTYPES else "auto"):
            found = attend(shapes, *tensors, standard)
    except ValueError:
        return False
    except RuntimeError as error:
        assert "there is no kernel" in str(error), error
        return False
    if found is None:
        return False
    used = [x.float() for x in (tensors[:1] + tensors[2:] if standard else tensors)]
    if all(x.abs().nan_to_num(nan=1e9).max() < 1e9 for x in used if x.numel()):
        exact = formula(shapes, *tensors, standard)
        tolerance = 0.03 if found[0].dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(found[0].float(), exact, rtol=tolerance, atol=tolerance)
    return True


def run(seed: int, count: int | None, until: float, folder: Path) -> str:
    """`count` problems for the sanitizers and as many in Python, or half of the time until `until` each.

    Raises:
        AssertionError: with what is needed to repeat the case.
    """
    said = "no g++ with sanitizers"
    start = time.monotonic()
    if COMPILER and (program := build(folder)):
        done = run_driver(program, seed, -1 if count is None else count, (until - start) / 2)
        said = f"{done} problems under the sanitizers"
    tried = accepted = 0
    if cpu.why_not(torch.device("cpu"), torch.float32) is None:
        while tried != count and time.monotonic() < until:
            case = seed * 10**7 + tried
            (folder / "kernel_case").write_text(f"kernel.check({case})")
            try:
                accepted += check(case)
            except Exception as error:
                raise AssertionError(f"kernel.check({case}): {error!r}") from error
            tried += 1
    return f"kernel: {said}; in Python {tried} problems, {accepted} equal to the formula, {tried - accepted} refused"

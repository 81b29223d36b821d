"""Tensors that do not belong together, in all implementations; what else a call must survive."""

import subprocess
import sys

import pytest
import torch
from deformable_problems import flat, formula, problem

from mask2former_hf import kernels
from mask2former_hf.kernels import cpu, operators, triton_gpu, use_kernel
from mask2former_hf.model.deformable_attention import multi_scale_deformable_attention

MISSING = cpu.why_not(torch.device("cpu"), torch.float32)
needs_cpp = pytest.mark.skipif(MISSING is not None, reason=f"no compiled kernel: {MISSING}")


def by_name(name):
    def attend(value, shapes, points, offsets, logits):
        with use_kernel(name):
            return kernels.deformable_attention(value, shapes, points, offsets, logits)

    return attend


IMPLEMENTATIONS = [
    pytest.param(by_name("reference"), id="reference"),
    pytest.param(by_name("cpp"), id="cpp", marks=needs_cpp),
    # Needs neither Triton nor a GPU: the check comes before both.
    pytest.param(lambda value, shapes, points, *x: triton_gpu.forward(value, shapes, *x, points), id="triton"),
]
CHANGES = {
    "more queries in the offsets than in the logits": (
        lambda x: x | {"logits": x["logits"][:, :5]},
        "logits.*13, 4, 12",
    ),
    "more queries in the logits than in the offsets": (lambda x: x | {"offsets": x["offsets"][:, :5]}, "logits"),
    "logits of one number": (lambda x: x | {"logits": torch.zeros(1)}, r"logits or weights: \(1,\)"),
    "no reference points": (lambda x: x | {"points": torch.zeros(0, 2)}, "reference_points"),
    "too few reference points": (lambda x: x | {"points": x["points"][:12]}, r"reference_points: \(12, 2\)"),
    "reference points of three numbers": (lambda x: x | {"points": torch.zeros(13, 3)}, "reference_points"),
    "one image of values, two of offsets": (lambda x: x | {"value": x["value"][:1]}, "offsets"),
    "two images of values, one of logits": (lambda x: x | {"logits": x["logits"][:1]}, "logits"),
    "fewer heads in value": (lambda x: x | {"value": x["value"][:, :, :2]}, "offsets"),
    "fewer heads in the logits": (lambda x: x | {"logits": x["logits"][:, :, :2]}, "logits"),
    "fewer points": (lambda x: x | {"offsets": x["offsets"][..., :2, :]}, "logits"),
    "one level too few": (lambda x: x | {"shapes": x["shapes"][:2]}, "number of cells"),
    "no level": (lambda x: x | {"shapes": [], "value": x["value"][:, :0]}, "0 levels"),
    "a level without a side": (lambda x: x | {"shapes": [(3, 4), (0, 5), (129, 1)]}, "from 1 to"),
    "two negative sides": (lambda x: x | {"shapes": [(-3, -4), (6, 5), (9, 11)]}, "from 1 to"),
    "sides whose product overflows": (lambda x: x | {"shapes": [(2**33, 2**33), (6, 5), (9, 11)]}, "from 1 to"),
    "no channel": (lambda x: x | {"value": x["value"][..., :0]}, "0 channels"),
    "no point": (lambda x: x | {"offsets": x["offsets"][..., :0, :], "logits": x["logits"][..., :0]}, "0 points"),
    "value without heads": (lambda x: x | {"value": x["value"].flatten(2)}, "must be"),
    "offsets of whole numbers": (lambda x: x | {"offsets": x["offsets"].long()}, "floating point"),
    "complex logits": (lambda x: x | {"logits": x["logits"].cfloat()}, "floating point"),
    "sparse logits": (lambda x: x | {"logits": x["logits"].to_sparse()}, "to_dense"),
    "offsets without memory": (lambda x: x | {"offsets": x["offsets"].to("meta")}, "cpu and meta"),
    "reference points without memory": (lambda x: x | {"points": x["points"].to("meta")}, "cpu and meta"),
}


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_belong_together_are_refused(change, message, attend):
    names = ("shapes", "value", "points", "offsets", "logits")
    inputs = change(dict(zip(names, problem(), strict=True)))
    with pytest.raises(ValueError, match=message):
        attend(*(inputs[name] for name in ("value", "shapes", "points", "offsets", "logits")))


@needs_cpp
def test_the_standard_form_and_gradients_are_checked_as_well():
    shapes, value, points, offsets, logits = problem()
    locations, weights = torch.rand(2, 13, 4, 3, 4, 2), torch.rand(2, 13, 4, 3, 4)
    for padding in (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(value.shape[:2], dtype=torch.int64)):
        with pytest.raises(ValueError, match="padding"):
            operators.standard(value, flat(shapes), locations, weights, padding)
    with pytest.raises(ValueError, match="logits or weights"):
        operators.standard(value, flat(shapes), locations, weights[:, :5])
    with pytest.raises(ValueError, match="output's gradient"):
        operators.fused_backward(torch.ones(2, 5, 32), value, flat(shapes), points, offsets, logits)
    with pytest.raises(ValueError, match="attention_weights"):
        multi_scale_deformable_attention(value, shapes, locations, weights[..., :1])


@needs_cpp
def test_the_default_device_of_the_process_does_not_matter():
    shapes, value, points, offsets, logits = problem()
    expected = kernels.deformable_attention(value.requires_grad_(), shapes, points, offsets, logits)
    (gradient,) = torch.autograd.grad(expected.sum(), value)
    with torch.device("meta"):
        output = kernels.deformable_attention(value, shapes, points, offsets, logits)
        assert torch.equal(output, expected) and torch.equal(torch.autograd.grad(output.sum(), value)[0], gradient)


def test_tensors_without_memory_give_the_shape():
    shapes, *tensors = problem()
    value, points, offsets, logits = (x.to("meta") for x in tensors)
    assert (
        kernels.deformable_attention(value, shapes, points, offsets, logits) is None
    )  # so the model runs the formula
    output = operators.fused(value, flat(shapes), points, offsets, logits)
    assert output.device.type == "meta" and output.shape == (2, 13, 32)
    with pytest.raises(RuntimeError, match="'cpp' was asked for, but it runs on CPUs, not on meta"):
        by_name("cpp")(value, shapes, points, offsets, logits)


@needs_cpp
@pytest.mark.parametrize("inside", [(0, -1), (1, 1)])
def test_gradients_of_samples_that_are_not_finite_are_zero_and_of_logits_not_a_number_only_their_head_s(inside):
    shapes, value, points, offsets, logits = problem(Q=3)
    logits[0, 0, 0, 5], logits[1, 1, 1, 0] = float("nan"), float("inf")
    output = cpu.forward(value, shapes, offsets, logits, points).unflatten(2, (4, -1))
    exact = formula(shapes, *(x.double() for x in (value, points, offsets, logits))).unflatten(2, (4, -1))
    torch.testing.assert_close(output.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)


THREADS = """
import resource, sys, torch
from mask2former_hf.kernels import cpu
shapes = [(60, 60), (30, 30)]
offsets, logits, points = torch.randn(1, 4500, 8, 2, 4, 2), torch.randn(1, 4500, 8, 8), torch.rand(4500, 2)
inputs = torch.randn(1, 4500, 8, 32), shapes, offsets, logits, points
incoming = torch.randn(1, 4500, 256)
torch.set_num_threads(1)
cpu.library().msda_use_pool(None)  # threads of our own, as in a fork; OpenMP would end the process
expected = cpu.forward(*inputs), *cpu.backward(incoming, *inputs)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
torch.get_num_threads = lambda: 64  # of our kernel; PyTorch's own threads (OpenMP) would end it, too
resource.setrlimit(resource.RLIMIT_AS, (used + 640 * 2**20,) * 2)  # two threads, and 128 MiB for the tensors
found = cpu.forward(*inputs), *cpu.backward(incoming, *inputs)
print(all(torch.equal(a, b) for a, b in zip(found, expected)))
"""


@needs_cpp
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_where_no_more_threads_can_be_started_the_ones_at_hand_do_the_work():
    # Stacks far larger than the tensors: whatever the machine, what the last thread leaves is enough for those.
    command = ["sh", "-c", 'ulimit -Ss 262144 && exec "$@"', "sh", sys.executable, "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr[-2000:]

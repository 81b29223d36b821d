"""The Triton kernel against the formula in float64.

On a machine with a GPU the tests run there. Without one they run in Triton's interpreter, which must be chosen before
Triton is imported: the first test starts this file again in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch
from deformable_problems import flat, formula, problem
from helpers import GOLDEN, needs_golden
from safetensors.torch import load_file
from triton_runs import (
    DEVICE,
    GPU,
    INTERPRETED,
    compiled_ahead,
    in_the_first_process,
    needs_kernel,
    passed_in_the_interpreter,
)

from mask2former_hf import kernels
from mask2former_hf.kernels import cpu, operators, select, triton_gpu, use_kernel
from mask2former_hf.model.deformable_attention import multi_scale_deformable_attention

needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@in_the_first_process
def test_everything_below_holds_in_tritons_interpreter():
    assert passed_in_the_interpreter(__file__) > 20


def to_device(tensors, dtype=torch.float32):
    """Value, the first one, in `dtype`; the others as they are."""
    return [x.to(DEVICE, dtype if i == 0 else x.dtype).detach() for i, x in enumerate(tensors)]


def check(ours_function, exact_function, tensors, dtype, trained, tolerance=None):
    """Values and gradients of tensors[i] for i in `trained`, against float64."""
    tolerance = tolerance or TOLERANCE[dtype]
    ours_inputs = to_device(tensors, dtype)
    exact_inputs = [x.double() for x in ours_inputs]
    for index in trained:
        ours_inputs[index].requires_grad_(), exact_inputs[index].requires_grad_()
    with use_kernel("triton"):
        ours = ours_function(*ours_inputs)
    exact = exact_function(*exact_inputs)
    assert ours.dtype == dtype and ours.shape == exact.shape
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    incoming = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    found = torch.autograd.grad(ours, [ours_inputs[index] for index in trained], incoming)
    expected = torch.autograd.grad(exact, [exact_inputs[index] for index in trained], incoming.double())
    for index, a, b in zip(trained, found, expected, strict=True):
        assert a.dtype == ours_inputs[index].dtype
        torch.testing.assert_close(a.double(), b, rtol=10 * tolerance, atol=10 * tolerance)


CASES = [
    # D, L, P, B, Q, h, spread, dtype, deterministic
    pytest.param(8, 3, 4, 2, 18, 1, 4.0, torch.float32, False, id="three levels"),
    pytest.param(5, 4, 3, 1, 7, 3, 4.0, torch.float32, False, id="everything odd"),
    pytest.param(5, 3, 1, 2, 7, 3, 4.0, torch.float32, True, id="everything odd, deterministic"),
    pytest.param(16, 1, 1, 1, 3, 1, 2.0, torch.float32, False, id="one level and point"),
    pytest.param(4, 2, 2, 1, 4, 2, 100.0, torch.float32, False, id="far outside"),
    pytest.param(4, 2, 2, 1, 4, 2, 100.0, torch.float32, True, id="far outside, deterministic"),
    pytest.param(100, 2, 2, 1, 5, 1, 3.0, torch.float32, False, id="wide head"),
    pytest.param(128, 1, 2, 1, 5, 1, 3.0, torch.float16, False, id="widest head in float16"),
    pytest.param(24, 3, 2, 2, 9, 1, 3.0, torch.bfloat16, False, id="bfloat16"),
    pytest.param(24, 2, 2, 1, 9, 2, 3.0, torch.bfloat16, True, id="bfloat16, deterministic"),
]


@pytest.fixture
def deterministic_mode():
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@needs_kernel
@pytest.mark.parametrize("D, L, P, B, Q, h, spread, dtype, deterministic", CASES)
def test_fused_form_equals_the_formula(D, L, P, B, Q, h, spread, dtype, deterministic, deterministic_mode):
    # Only a warning, because grid_sample's backward pass, of the formula, has no fixed order on a GPU.
    deterministic_mode(deterministic, warn_only=True)
    shapes, *tensors = problem(D, L, P, B, Q, h, spread)
    check(
        lambda *x: kernels.deformable_attention(x[0], shapes, *x[1:]),
        lambda *x: formula(shapes, *x),
        tensors,
        dtype,
        trained=(0, 2, 3),
    )


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_standard_form_with_padding_equals_the_formula_with_values_set_to_zero(dtype):
    shapes, value, *_ = problem(D=12, L=2, h=2)
    generator = torch.Generator().manual_seed(2)
    locations = torch.rand(2, 9, 2, 2, 1, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(2, 9, 2, 2, 1, generator=generator)
    padding = (torch.rand(value.shape[:2], generator=generator) < 0.4).to(DEVICE)
    check(
        lambda *x: operators.standard(x[0], flat(shapes), *x[1:], padding),
        lambda v, *x: multi_scale_deformable_attention(v.masked_fill(padding[..., None, None], 0), shapes, *x),
        (value, locations, weights),
        dtype,
        trained=(0, 1, 2),
    )


@needs_kernel
def test_a_map_of_one_pixel():
    value, points = torch.randn(1, 1, 1, 4), torch.full((1, 2), 0.5)
    offsets, logits = torch.tensor([0.3, -0.2]).view(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1)
    arguments = to_device((value, points, offsets, logits))
    with use_kernel("triton"):
        output = kernels.deformable_attention(arguments[0], [(1, 1)], *arguments[1:])
    torch.testing.assert_close(output.cpu(), 0.7 * 0.8 * value.view(1, 1, 4))


@needs_kernel
@needs_golden
@pytest.mark.parametrize("case", range(6))
def test_golden_operator_in_float32(case):
    tensors = load_file(GOLDEN / "msda_op" / "msda.safetensors")
    own = {key.split(".", 1)[1]: value.to(DEVICE) for key, value in tensors.items() if key.startswith(f"{case}.")}
    h = own["value"].shape[2]
    for name in ("output", "grad_output"):
        own[name] = own[name].unflatten(2, (h, -1))
    if INTERPRETED:  # images and heads do not mix: two heads of one image take a tenth of the time
        own = {key: x if key == "spatial_shapes" else x[:1, :, :2] for key, x in own.items()}
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [own[name].float().requires_grad_() for name in names]
    with use_kernel("triton"):
        output = operators.standard(inputs[0], own["spatial_shapes"].flatten().tolist(), *inputs[1:])
    torch.testing.assert_close(output.double(), own["output"].flatten(2), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output, inputs, own["grad_output"].flatten(2).float())
    for name, gradient in zip(names, gradients, strict=True):
        # A sample that lies on a cell's edge to 1e-5 takes its slope from one side or the other.
        wrong = ~torch.isclose(gradient.double(), own[f"grad_{name}"], rtol=1e-3, atol=1e-4)
        assert wrong.float().mean() <= (0.02 if name == "sampling_locations" else 0), name


@needs_kernel
def test_layout_does_not_matter():
    shapes, value, points, offsets, logits = problem(Q=7, h=2, L=2, P=2)
    twisted = [
        value.transpose(1, 3).contiguous().transpose(1, 3),
        points.flip(1).flip(1).t().contiguous().t(),
        offsets.transpose(2, 4).contiguous().transpose(2, 4),
        logits.repeat_interleave(2, dim=1)[:, ::2],
    ]
    assert not any(x.is_contiguous() for x in twisted)
    check(
        lambda *x: kernels.deformable_attention(x[0], shapes, *x[1:]),
        lambda *x: formula(shapes, *x),
        twisted,
        torch.float32,
        trained=(0, 2, 3),
    )


@needs_kernel
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("B, Q", [(0, 5), (2, 0)], ids=["no image", "no query"])
def test_nothing_to_do(B, Q, deterministic, deterministic_mode):
    deterministic_mode(deterministic)
    shapes, *tensors = problem(B=B, Q=Q)
    value, points, offsets, logits = to_device(tensors)
    with use_kernel("triton"):
        output = kernels.deformable_attention(value.requires_grad_(), shapes, points, offsets, logits)
    assert output.shape == (B, Q, 32)
    (gradient,) = torch.autograd.grad(output.sum(), value)
    assert gradient.shape == value.shape and (gradient == 0).all()


@needs_kernel
def test_samples_that_are_not_finite_count_as_zero_and_logits_that_are_no_number_are_not_hidden():
    shapes, value, points, offsets, logits = problem(Q=5, L=2, P=2)
    offsets[0, 0], offsets[0, 1], offsets[0, 2] = 1e30, float("inf"), float("nan")
    logits[1, 2, 3, 1] = float("nan")
    value, points, offsets, logits = to_device((value, points, offsets, logits))
    with use_kernel("triton"):
        output = kernels.deformable_attention(value, shapes, points, offsets, logits).unflatten(2, (4, -1))
    assert (output[0, :3] == 0).all() and output[0].isfinite().all()
    assert output[1, 2, 3].isnan().all() and output.isnan().sum() == output.shape[-1]
    gradients = triton_gpu.backward(
        torch.ones_like(output[:1].flatten(2)), value[:1], shapes, offsets[:1], logits[:1], points
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@needs_kernel
def test_numbers_of_64_bits_give_the_same(monkeypatch, deterministic_mode):
    deterministic_mode(True)
    shapes, *tensors = problem(Q=5, L=2, P=1, h=2)
    value, points, offsets, logits = to_device(tensors)
    results = []
    for limit in (2**31, 0):
        monkeypatch.setattr(triton_gpu, "WIDE_FROM", limit)
        output = triton_gpu.forward(value, shapes, offsets, logits, points)
        results.append((output, *triton_gpu.backward(output, value, shapes, offsets, logits, points)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_kernel
def test_the_deterministic_gradient_does_not_depend_on_how_queries_are_divided(monkeypatch, deterministic_mode):
    deterministic_mode(True)
    shapes, *tensors = problem(Q=17, L=1, P=3, h=1, B=1)
    value, points, offsets, logits = to_device(tensors)
    incoming, results = torch.ones(1, 17, 8, device=DEVICE), []
    for rows in (2, 16):
        monkeypatch.setattr(triton_gpu, "UNTUNED", triton_gpu.UNTUNED | {"ROWS": rows})
        results.append(triton_gpu.backward(incoming, value, shapes, offsets, logits, points)[0])
    assert torch.equal(*results)


@needs_kernel
def test_the_backward_pass_uses_the_forwards_kernel_after_the_context_was_left(monkeypatch):
    shapes, *tensors = problem(Q=3, L=1, P=1, h=1)
    value, points, offsets, logits = to_device(tensors)
    calls, original = [], triton_gpu.backward
    monkeypatch.setattr(triton_gpu, "backward", lambda *x, **y: calls.append(1) or original(*x, **y))
    with use_kernel("triton"):
        output = kernels.deformable_attention(value.requires_grad_(), shapes, points, offsets, logits)
    with use_kernel("reference"):
        output.sum().backward()
    assert calls == [1] and value.grad is not None


@needs_kernel
def test_torch_library_accepts_the_operators():
    shapes, *tensors = problem(Q=3, L=2, P=1, h=2, B=1)
    value, points, offsets, logits = to_device(tensors)
    inputs = [x.requires_grad_() for x in (value, offsets, logits)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with use_kernel("triton"):
        torch.library.opcheck(operators.fused, (value, flat(shapes), points, *inputs[1:]), test_utils=tests)


@needs_kernel
def test_shapes_that_do_not_fit_are_refused():
    shapes, *tensors = problem()
    value, *others = to_device(tensors)
    with use_kernel("triton"), pytest.raises(ValueError, match="another number of cells than value"):
        kernels.deformable_attention(value[:, 1:], shapes, *others)


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_the_interpreter_is_never_chosen_automatically(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)
    missing = cpu.why_not(DEVICE, torch.float32)
    assert select(DEVICE, torch.float32) == ("cpp" if missing is None else None)
    assert select(DEVICE, torch.float16) is None
    with use_kernel("triton"):
        assert select(DEVICE, torch.float16) == "triton"


@pytest.mark.skipif(INTERPRETED, reason="about a process without the interpreter")
def test_a_cpu_and_float64_are_refused_with_the_reason():
    with use_kernel("triton"):
        with pytest.raises(RuntimeError, match="'triton' was asked for, but it runs on GPUs, not on cpu"):
            select(torch.device("cpu"), torch.float32)
        with pytest.raises(RuntimeError, match="float32, float16 and bfloat16, not torch.float64"):
            select(torch.device("cuda"), torch.float64)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_importing_the_kernels_imports_neither_triton_nor_the_compiler():
    code = "import sys, mask2former_hf.kernels; print([x for x in ('triton', 'torch._dynamo') if x in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel", "sum_records"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(name):
    from mask2former_hf.kernels import msda_triton

    constants = {"D": 24, "L": 3, "P": 2, "BLOCK_D": 32, "COLUMNS": 8, "FUSED": True, "PADDED": True, "WIDE": True}
    constants |= {"DETERMINISTIC": False, "ROWS": 4, "WARPS": 2, "VECTORS": 1, "COUNT": 24, "BLOCK_R": 16}
    types = {"value": "*bf16", "output": "*bf16", "output_gradient": "*bf16", "padding": "*u8", "levels": "*i32"}
    types |= {"rows": "*i32", "order": "*i64", "bounds": "*i64"} | dict.fromkeys(("Q", "S", "h", "bucket"), "i32")
    assert compiled_ahead(getattr(msda_triton, name), constants, types)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_image_on_the_gpu(dtype):
    shapes = [(32, 42), (64, 84), (128, 168)]
    Q = S = sum(H * W for H, W in shapes)
    generator = torch.Generator().manual_seed(0)
    tensors = (
        torch.randn(1, S, 8, 32, generator=generator),
        torch.rand(Q, 2, generator=generator),
        torch.randn(1, Q, 8, 3, 4, 2, generator=generator) * 3,
        torch.randn(1, Q, 8, 12, generator=generator),
    )
    check(
        lambda *x: kernels.deformable_attention(x[0], shapes, *x[1:]),
        lambda *x: formula(shapes, *x),
        tensors,
        dtype,
        trained=(0, 3),
    )


@needs_gpu
def test_deterministic_gradients_are_equal_bit_by_bit_on_the_gpu(deterministic_mode):
    deterministic_mode(True)
    shapes, *tensors = problem(D=32, Q=3000, h=8, B=2)
    value, points, offsets, logits = to_device(tensors)
    incoming = torch.randn(2, 3000, 256, device=DEVICE)
    first, second = (triton_gpu.backward(incoming, value, shapes, offsets, logits, points) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
def test_autocast_on_the_gpu_converts_value_alone():
    shapes, *tensors = problem(D=32)
    value, points, offsets, logits = to_device(tensors)
    with torch.autocast("cuda", torch.float16):
        output = kernels.deformable_attention(value, shapes, points, offsets, logits)
    assert torch.equal(output, kernels.deformable_attention(value.half(), shapes, points, offsets, logits))

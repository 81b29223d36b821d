"""The compiled kernel against the formula in float64, and how kernels are chosen."""

import multiprocessing
import threading

import pytest
import torch
from deformable_problems import flat, formula, problem
from helpers import GOLDEN, needs_golden, tiny_model
from processes import python
from safetensors.torch import load_file

from mask2former_hf import kernels
from mask2former_hf.kernels import choosing, cpu, kernel_report, operators, use_kernel
from mask2former_hf.model.deformable_attention import multi_scale_deformable_attention

MISSING = cpu.why_not(torch.device("cpu"), torch.float32)
needs_cpp = pytest.mark.skipif(MISSING is not None, reason=f"no compiled kernel: {MISSING}")


@needs_cpp
@pytest.mark.parametrize("D", [3, 8, 16, 24, 32, 40, 64])
@pytest.mark.parametrize("L, P", [(1, 1), (3, 4), (4, 2)])
def test_values_and_gradients_equal_the_formula_in_float64(D, L, P):
    shapes, *inputs = problem(D, L, P)
    value, points, offsets, logits = (x.double() for x in inputs)
    exact_inputs = [value.requires_grad_(), offsets.requires_grad_(), logits.requires_grad_()]
    exact = formula(shapes, value, points, offsets, logits)
    value, points, offsets, logits = inputs
    ours_inputs = [value.requires_grad_(), offsets.requires_grad_(), logits.requires_grad_()]
    ours = kernels.deformable_attention(value, shapes, points, offsets, logits)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    incoming = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(exact, exact_inputs, incoming.double())
    for a, b in zip(torch.autograd.grad(ours, ours_inputs, incoming), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@needs_cpp
@needs_golden
@pytest.mark.parametrize("case", range(6))
def test_golden_operator_in_float32(case):
    tensors = load_file(GOLDEN / "msda_op" / "msda.safetensors")
    own = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{case}.")}
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [own[name].float().requires_grad_() for name in names]
    shapes = own["spatial_shapes"].flatten().tolist()
    output = operators.standard(inputs[0], shapes, *inputs[1:])
    torch.testing.assert_close(output.double(), own["output"], rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output, inputs, own["grad_output"].float())
    for name, gradient in zip(names, gradients, strict=True):
        # A sample that lies on a cell's edge to 1e-5 takes its slope from one side or the other.
        expected = own[f"grad_{name}"]
        wrong = ~torch.isclose(gradient.double(), expected, rtol=1e-3, atol=1e-4)
        assert wrong.float().mean() <= (0.02 if name == "sampling_locations" else 0), name


@needs_cpp
def test_samples_that_are_far_away_or_not_finite_count_as_zero():
    shapes, value, points, offsets, logits = problem()
    offsets[0, 0] = 1e30
    offsets[0, 1] = float("inf")
    offsets[0, 2] = float("nan")
    output = kernels.deformable_attention(value, shapes, points, offsets, logits)
    assert (output[0, :3] == 0).all() and output.isfinite().all()
    for gradient in cpu.backward(torch.ones_like(output), value, shapes, offsets, logits, points):
        assert gradient.isfinite().all()


@needs_cpp
def test_a_logit_that_is_not_a_number_is_not_hidden():
    shapes, value, points, offsets, logits = problem()
    logits[1, 2, 3, 4] = float("nan")
    output = kernels.deformable_attention(value, shapes, points, offsets, logits).unflatten(2, (4, -1))
    assert output[1, 2, 3].isnan().all() and output.isnan().sum() == output.shape[-1]


@needs_cpp
def test_padding_equals_values_set_to_zero():
    shapes, value, points, offsets, logits = problem()
    B, Q, h, L, P, _ = offsets.shape
    padding = torch.rand(value.shape[:2]) < 0.4
    locations, weights = torch.rand(B, Q, h, L, P, 2), logits.softmax(-1).view(B, Q, h, L, P)
    value.requires_grad_()
    padded = operators.standard(value, flat(shapes), locations, weights, padding)
    zeroed = value.masked_fill(padding[..., None, None], 0)
    expected = multi_scale_deformable_attention(zeroed, shapes, locations, weights)
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-5)
    a, b = (torch.autograd.grad(x.sum(), value)[0] for x in (padded, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_cpp
def test_bfloat16_is_accumulated_in_float32():
    shapes, value, points, offsets, logits = problem(D=32)
    half = kernels.deformable_attention(value.bfloat16(), shapes, points, offsets, logits)
    exact = kernels.deformable_attention(value.bfloat16().float(), shapes, points, offsets, logits)
    assert half.dtype == torch.bfloat16 and torch.equal(half, exact.bfloat16())


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_and_logits_in_bfloat16_are_read_as_they_are(dtype):
    shapes, value, points, offsets, logits = problem(D=32)
    value, half = value.to(dtype), [offsets.bfloat16(), logits.bfloat16()]
    wide, incoming = [x.float() for x in half], torch.randn(2, 13, 128)
    found, exact = (kernels.deformable_attention(value, shapes, points, *x) for x in (half, wide))
    assert found.dtype == dtype and torch.equal(found, exact)
    found, exact = (cpu.backward(incoming, value, shapes, *x, points) for x in (half, wide))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, exact, strict=True))
    assert [x.dtype for x in found] == [dtype, torch.bfloat16, torch.bfloat16]


@needs_cpp
def test_autocast_converts_value_alone():
    shapes, value, points, offsets, logits = problem(D=32)
    inputs = [x.requires_grad_() for x in (value, offsets, logits)]
    with torch.autocast("cpu", torch.bfloat16):
        output = kernels.deformable_attention(value, shapes, points, offsets, logits)
        locations, weights = torch.rand(2, 13, 4, 3, 4, 2), torch.rand(2, 13, 4, 3, 4)
        standard = operators.standard(value, flat(shapes), locations, weights)
    expected = kernels.deformable_attention(value.bfloat16(), shapes, points, offsets, logits)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    assert torch.equal(standard, operators.standard(value.bfloat16(), flat(shapes), locations, weights))
    incoming = torch.randn(output.shape).bfloat16()
    ours, theirs = (torch.autograd.grad(x, inputs, incoming) for x in (output, expected))
    assert [x.dtype for x in ours] == 3 * [torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@needs_cpp
def test_autocast_runs_the_formula_where_its_dtype_has_no_kernel():
    shapes, value, points, offsets, logits = problem()
    with torch.autocast("cpu", torch.float16):
        assert kernels.deformable_attention(value, shapes, points, offsets, logits) is None
        with pytest.raises(
            RuntimeError, match="got torch.float16 on cpu, for which there is no kernel .*cpp: it comp"
        ):
            operators.fused(value, flat(shapes), points, offsets, logits)
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
        assert kernels.deformable_attention(value.double(), shapes, points, offsets, logits) is None


@needs_cpp
def test_autocast_inside_a_compiled_graph():
    shapes, value, points, offsets, logits = problem()

    def attend(value, points, offsets, logits):
        with torch.autocast("cpu", torch.bfloat16):
            return kernels.deformable_attention(value, shapes, points, offsets, logits)

    inputs = (value.requires_grad_(), points, offsets, logits)
    expected = attend(*inputs)
    output = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    a, b = (torch.autograd.grad(x.float().square().sum(), value)[0] for x in (output, expected))
    assert torch.equal(a, b)


@needs_cpp
def test_the_model_under_autocast_runs_the_kernel(monkeypatch):
    model, pixels, dtypes, original = tiny_model(), torch.randn(1, 3, 64, 96), [], cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda value, *x, **y: dtypes.append(value.dtype) or original(value, *x, **y))
    with torch.no_grad():
        exact = model(pixels)
        dtypes.clear()
        with torch.autocast("cpu", torch.bfloat16):
            half = model(pixels)
    assert dtypes == 2 * [torch.bfloat16]
    difference = (half.class_queries_logits - exact.class_queries_logits).abs().mean()
    assert difference < 0.1 * exact.class_queries_logits.abs().mean()


@needs_cpp
def test_the_backward_pass_uses_the_forwards_kernel_after_the_context_was_left(monkeypatch):
    shapes, value, points, offsets, logits = problem()
    with use_kernel("cpp"):
        output = kernels.deformable_attention(value.requires_grad_(), shapes, points, offsets, logits)
    monkeypatch.setitem(choosing.KERNELS, "triton", lambda device, dtype: None)
    monkeypatch.setitem(choosing.IMPLEMENTATIONS, "triton", None)
    with use_kernel("triton"):
        output.sum().backward()
    assert value.grad is not None


@needs_cpp
def test_torch_library_accepts_the_operators():
    shapes, value, points, offsets, logits = problem(Q=5)
    inputs = [x.requires_grad_() for x in (value, offsets, logits)]
    torch.library.opcheck(operators.fused, (inputs[0], flat(shapes), points, *inputs[1:]))
    locations, weights = torch.rand(2, 5, 4, 3, 4, 2), torch.rand(2, 5, 4, 3, 4)
    torch.library.opcheck(operators.standard, (value.detach(), flat(shapes), locations, weights, None))


@needs_cpp
def test_one_node_in_compiled_and_exported_graphs():
    shapes, value, points, offsets, logits = problem()
    graphs = []

    def backend(module, _):
        graphs.append([node.name for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    compiled = torch.compile(
        lambda *x: kernels.deformable_attention(x[0], shapes, *x[1:]), fullgraph=True, backend=backend
    )
    inputs = (value, points, offsets, logits)
    torch.testing.assert_close(compiled(*inputs), kernels.deformable_attention(value, shapes, *inputs[1:]))
    assert len(graphs) == 1 and len(graphs[0]) == 1

    class Module(torch.nn.Module):
        def forward(self, value, points, offsets, logits):
            return kernels.deformable_attention(value, shapes, points, offsets, logits)

    program = torch.export.export(Module(), inputs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["mask2former_hf.deformable_attention.default"]


def _in_child(queue, arguments):
    queue.put(kernels.deformable_attention(*arguments).sum().item())


@needs_cpp
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_the_kernel_works_in_a_forked_child_after_use_in_the_parent():
    shapes, value, points, offsets, logits = problem(Q=5000)  # for several threads
    arguments = (value, shapes, points, offsets, logits)
    expected = kernels.deformable_attention(*arguments).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, arguments))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0


@needs_cpp
def test_four_python_threads_at_once_get_their_own_results():
    problems = [problem(seed=seed, Q=200) for seed in range(4)]
    arguments = [(value, shapes, *rest) for shapes, value, *rest in problems]
    expected = [kernels.deformable_attention(*x) for x in arguments]
    wrong = []

    def work(index):
        for _ in range(10):
            if not torch.equal(kernels.deformable_attention(*arguments[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_cpp
def test_the_gradient_does_not_depend_on_the_number_of_threads():
    shapes, value, points, offsets, logits = problem(Q=300)
    incoming, threads = torch.randn(2, 300, 32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(cpu.backward(incoming, value, shapes, offsets, logits, points))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_cpp
@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_the_model_gives_the_same_with_and_without_the_kernel(backbone):
    model, pixels = tiny_model(backbone), torch.randn(2, 3, 75, 101)
    with torch.no_grad():
        with use_kernel("cpp"):
            fast = model(pixels)
        with use_kernel("reference"):
            plain = model(pixels)
    torch.testing.assert_close(fast.class_queries_logits, plain.class_queries_logits, rtol=1e-3, atol=1e-4)


def test_shapes_that_do_not_fit_are_refused():
    if MISSING:
        pytest.skip(MISSING)
    shapes, value, points, offsets, logits = problem()
    with pytest.raises(ValueError, match="another number of cells than value"):
        kernels.deformable_attention(value[:, 1:], shapes, points, offsets, logits)


def test_reference_and_unsupported_dtypes_run_the_formula():
    shapes, value, points, offsets, logits = problem()
    with use_kernel("reference"):
        assert kernels.deformable_attention(value, shapes, points, offsets, logits) is None
    assert kernels.deformable_attention(value.double(), shapes, points, offsets, logits) is None


def test_a_kernel_asked_for_by_name_that_cannot_run_says_why(monkeypatch):
    shapes, value, points, offsets, logits = problem()
    with use_kernel("cpp"), pytest.raises(RuntimeError, match="'cpp' was asked for, but .*not torch.float64"):
        if MISSING:
            raise RuntimeError("kernel 'cpp' was asked for, but not torch.float64")
        kernels.deformable_attention(value.double(), shapes, points, offsets, logits)
    monkeypatch.setattr(cpu, "library", lambda: "it was not built")
    with use_kernel("cpp"), pytest.raises(RuntimeError, match="it was not built"):
        kernels.deformable_attention(value, shapes, points, offsets, logits)
    with pytest.raises(ValueError, match="use_kernel: 'fast' is not a kernel; choose one of auto, reference, cpp"):
        with use_kernel("fast"):
            pass


def test_the_environment_chooses_for_a_process():
    code = "import torch; from mask2former_hf.kernels import select; print(select(torch.device('cpu'), torch.float32))"
    done = python("-c", code, **{kernels.ENVIRONMENT_VARIABLE: "reference"})
    assert done.stdout.strip() == "None", done.stderr
    done = python("-c", code, **{kernels.ENVIRONMENT_VARIABLE: "fast"})
    assert "MASK2FORMER_HF_KERNEL: 'fast' is not a kernel" in done.stderr


def test_the_report_names_a_kernel_for_every_dtype():
    rows = {row["dtype"]: row for row in kernel_report() if row["device"] == "cpu"}
    assert rows["float64"]["kernel"] == "reference" and "not torch.float64" in rows["float64"]["not"]
    assert rows["float32"]["kernel"] == ("reference" if MISSING else "cpp")

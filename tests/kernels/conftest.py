import pytest

from mask2former_hf.kernels import cpu


@pytest.fixture(params=["AVX-512", "AMX"] if cpu.has_tiles() else ["AVX-512"])
def units(request):
    """What multiplies bfloat16: on a CPU with AMX the test runs with it and without."""
    if not cpu.has_tiles():
        yield
        return
    cpu.use_tiles(request.param == "AMX")
    yield
    cpu.use_tiles(True)

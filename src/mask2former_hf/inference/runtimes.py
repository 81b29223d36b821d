"""A graph in ONNX Runtime or in OpenVINO, behind one interface: the shapes of its ends, and `run`."""

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock

import numpy as np

OPENVINO_MODEL = "model.xml"  # which an export for OpenVINO has beside `model.onnx`
KEPT = 4  # networks compiled for one shape

logger = logging.getLogger(__name__)


class OnnxGraph:
    """A graph in ONNX Runtime.

    Args:
        path: of the graph.
        device: "cpu", or "cuda" with onnxruntime-gpu; None for the CPU.
        threads: None for the runtime's own choice.

    Attributes:
        inputs, outputs: name → shape, whose free lengths are no numbers; inputs include those with a default.

    Raises:
        ImportError: without the runtime, with the line that installs it.
        ValueError: for a file that it cannot load, and devices that are not there.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, device: str | None = None, threads: int | None = None):
        runtime, providers = _required(self.name), _providers(device)
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings are about the shapes of intermediate tensors
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's classes have no common name
            raise _unreadable(path, self.name, error) from error
        inputs = [*self.session.get_inputs(), *self.session.get_overridable_initializers()]
        self.inputs = {value.name: value.shape for value in inputs}
        self.outputs = {value.name: value.shape for value in self.session.get_outputs()}

    def run(self, names: Iterable[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names."""
        try:
            return self.session.run(list(names), dict(feed))
        except Exception as error:  # onnxruntime's classes have no common name
            _refuse_without_memory(self.name, error)
            raise


class OpenVinoGraph:
    """A graph in OpenVINO, on the CPU: `model.xml`, or an ONNX file. As `OnnxGraph`, but every input must be fed.

    It is compiled for each shape of pixels that comes, in 2 s: chains of products and sums are fused then, and sums of
    weighted rows are compiled for one shape alone. Of 8 bits it is compiled for all shapes: in OpenVINO 2026.4.1 a
    network of these for one shape gives other logits from its second run on, by up to 0.9 of a tiny model's.

    Attributes:
        kept: number of networks of one shape, the latest, each with weights of its own.
    """

    name = "openvino"

    def __init__(self, path: Path, device: str | None = None, threads: int | None = None):
        if _kind(device) != "cpu":
            raise ValueError(f"device={str(device)!r}: an export runs in OpenVINO on the CPU; use 'cpu'")
        self.core = _required(self.name).Core()
        try:
            self.network = self.core.read_model(path)
        except Exception as error:  # a RuntimeError, whatever is wrong
            raise _unreadable(path, self.name, error) from error
        self.inputs, self.outputs = _shapes(self.network.inputs), _shapes(self.network.outputs)
        # float32 as the file has it: on processors with bfloat16 the CPU plugin takes that by itself.
        self.options = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self.has_8_bits = any(op.get_type_name() == "FakeQuantize" for op in self.network.get_ops())
        self.kept = KEPT
        self._for_all, self._compiled = None, {}  # the latter by shape, the latest last
        self._alone = Lock()  # a compiled network runs one request at a time, with all threads that it has

    def run(self, names: Iterable[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names."""
        try:
            with self._alone:
                outputs = self.network_for(feed.get("pixel_values"))(dict(feed))
                return [outputs[name] for name in names]
        except RuntimeError as error:
            _refuse_without_memory(self.name, error)
            raise

    def network_for(self, pixels: np.ndarray | None = None):
        """What runs pixels; without pixels the network for all shapes."""
        if pixels is not None and not self.has_8_bits:
            return self.compiled(pixels.shape)
        if self._for_all is None:
            self._for_all = self.core.compile_model(self.network, "CPU", self.options)
        return self._for_all

    def compiled(self, shape: tuple[int, ...]):
        """The network for pixels of a shape."""
        compiled = self._compiled.pop(shape, None)
        if compiled is None:
            if len(self._compiled) == self.kept:
                del self._compiled[next(iter(self._compiled))]
            network = self.network.clone()
            network.reshape({"pixel_values": shape})
            compiled = self.core.compile_model(network, "CPU", self.options)
        self._compiled[shape] = compiled
        return compiled


RUNTIMES = {runtime.name: runtime for runtime in (OnnxGraph, OpenVinoGraph)}


def runtime_of(folder: Path, device: str | None) -> str:
    """OpenVINO for an export for it, on the CPU and where it is installed; else ONNX Runtime."""
    if not (folder / OPENVINO_MODEL).is_file() or _kind(device) != "cpu":
        return OnnxGraph.name
    if _installed(OpenVinoGraph.name) or not _installed(OnnxGraph.name):
        return OpenVinoGraph.name
    _say_once(f"{folder}: openvino is not installed; its model.onnx runs in onnxruntime")
    return OnnxGraph.name


_say_once = cache(logger.warning)


def runs_on_cuda(folder: Path) -> bool:
    """Whether the export's runtime here runs graphs on NVIDIA's GPUs."""
    if runtime_of(folder, None) != OnnxGraph.name or not _installed(OnnxGraph.name):
        return False
    return "CUDAExecutionProvider" in import_module(OnnxGraph.name).get_available_providers()


def _installed(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def _required(name: str):
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"an exported folder needs {name}: pip install {name} ({error})") from error


def _kind(device: str | None) -> str:
    """Of "cuda:1" "cuda"."""
    return str(device or "cpu").split(":")[0]


def _providers(device: str | None) -> list:
    kind = _kind(device)
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    available = _required(OnnxGraph.name).get_available_providers()
    if name not in available:
        raise ValueError(f"device={str(device)!r}: onnxruntime has {', '.join(available)} here; use 'cpu'")
    if kind == "cpu":
        return [name]
    number = str(device).partition(":")[2] or "0"
    return [(name, {"device_id": int(number)}), "CPUExecutionProvider"]


def _shapes(ports) -> dict[str, list]:
    """OpenVINO's ports by each of their names; None for a free length."""
    return {
        name: [side.get_length() if side.is_static else None for side in port.get_partial_shape()]
        for port in ports
        for name in port.get_names()
    }


def _unreadable(path: Path, runtime: str, error: Exception) -> ValueError:
    lines = [line for line in str(error).splitlines() if line]
    # OpenVINO says first where in its source it stopped, and at which condition.
    words = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]
    return ValueError(f"{path}: {runtime} cannot load it ({(words or lines or [''])[0]})")


def _refuse_without_memory(runtime: str, error: Exception):
    if "alloc" in str(error):
        raise MemoryError(f"{runtime} has not enough memory ({str(error).splitlines()[0]}).") from error

"""A network on a GPU that replays what it has run before: one call instead of hundreds of launches.

A ResNet-50 at 1024 x 1024 in bfloat16 keeps an H200 busy for 8 ms, eight images for 24 ms; the host takes 20 to 40 ms
to launch either.
"""

from collections import Counter, OrderedDict

import torch
from torch import Tensor
from transformers.utils import logging

from ..kernels import for_a_graph
from ..kernels.choosing import chosen_name
from ..model.canvas import canvas_of, image_sizes_of

logger = logging.get_logger(__name__)

RUNS_BEFORE = 2  # batches of a shape that run as usual, which also lets kernels be compiled and tuned
GRAPHS = 4  # shapes whose graphs are kept; they share their memory
PIXELS = 2**23  # of a batch; the device is slower than the host on larger ones


class Replay:
    """Runs a network in evaluation mode whose parts stay what they are; its weights may change or move.

    Args:
        model: on another device than a GPU everything runs as usual.
    """

    def __init__(self, model):
        self._model = model
        self._parameters = list(model.parameters())
        self._failed = False
        self._forget()

    def _forget(self):
        self._addresses = self._current_addresses()
        self._runs = Counter()
        self._graphs: OrderedDict[tuple, tuple] = OrderedDict()
        self._pool = None

    def _current_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor):
        """The model's outputs; those of a replay are overwritten by the next, so use them before.

        Args:
            pixel_values: (B, C, H, W) on the model's device.
            pixel_mask: (B, H, W) on the host.
        """
        large = pixel_values[:, 0].numel() > PIXELS
        if self._failed or large or pixel_values.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
            return self._model(pixel_values, pixel_mask=pixel_mask)
        if self._addresses != self._current_addresses():
            self._forget()
        sizes, shape, kind = image_sizes_of(pixel_mask), pixel_values.shape, _kind(pixel_values)
        self._runs[kind] += 1
        usual = self._runs[kind] <= RUNS_BEFORE or any(canvas_of(size) != shape[-2:] for size in sizes)
        if usual or (kind not in self._graphs and not _room_for_a_graph(pixel_values.device)):
            return self._model(pixel_values, pixel_mask=pixel_mask)
        try:
            outputs = self._replay(pixel_values)
        except RuntimeError as error:  # parts that look at the device, which a graph cannot
            logger.warning(f"{type(self._model).__name__} is not replayed: {str(error).splitlines()[0]}")
            self._failed = True
            return self._model(pixel_values, pixel_mask=pixel_mask)
        outputs.image_sizes = torch.tensor(sizes)
        return outputs

    def _replay(self, pixel_values: Tensor):
        """Of pixels that are content up to their edges."""
        kind = _kind(pixel_values)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(pixel_values)
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(kind)
        graph, pixels, outputs = self._graphs[kind]
        pixels.copy_(pixel_values)
        graph.replay()
        return outputs

    def _capture(self, pixel_values: Tensor) -> tuple:
        with torch.cuda.device(pixel_values.device):
            pixels, stream, graph = pixel_values.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), for_a_graph():
                # Libraries allocate the work space of this stream, and kernels of a graph are compiled, outside of it.
                self._model(pixels)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                outputs = self._model(pixels)
            self._pool = graph.pool()
        return graph, pixels, outputs


def _kind(pixel_values: Tensor) -> tuple:
    """What has a graph of its own: a shape, and what was asked of kernels and products."""
    return (*pixel_values.shape, chosen_name(), torch.backends.cuda.matmul.allow_tf32)


def _room_for_a_graph(device: torch.device) -> bool:
    """Whether what the device has free is as much as the runs so far took: a graph keeps memory of its own."""
    return torch.cuda.mem_get_info(device)[0] > torch.cuda.memory_reserved(device)

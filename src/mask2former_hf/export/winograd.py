"""Wide 3 x 3 convolutions of an OpenVINO network as products of tiles, with a quarter of the multiplications.

Of a tile of 6 x 6 pixels 4 x 4 results are made by 36 products over channels instead of 144 (Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", CVPR 2016), which OpenVINO's CPU plugin has not for itself. The pixel
decoder's convolution of its largest map takes 139 ms as a convolution, at the machine's peak, and 66 ms so (640 x 640,
2 threads): products 39, sums before and after 19, moving pixels 8. Alone in a graph, with reorderings around it, it
takes 144 ms, so 82, with tiles along one axis alone (half of the multiplications) 98, with 2 x 2 results 135.

Letters: B batch, C channels, D channels of the result, (H, W) a map.
"""

import numpy as np

from .errors import require

TILE = 4  # results along an axis
POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)  # and infinity. With 1 and 2 for 2/3 and 3/2 errors are 4 times as large.
# Channels of which it is worth its while: for fewer pixels are moved for longer than multiplications take, and of more
# there are few pixels in ResNets, and 36 weights for 9: ResNet-50's last stage would gain 20 ms and 57 MB.
WIDE = range(256, 512)


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of results (4, 6), tiles (6, 6) and kernels (6, 3) along one axis.

    They multiply polynomials by their values at points, as Toom and Cook do, transposed.
    """
    points = np.array(POINTS)
    n = len(points) + 1
    results, tiles, kernels = np.zeros((TILE, n)), np.zeros((n, n)), np.zeros((n, n - TILE + 1))
    results[:, :-1] = points ** np.arange(TILE)[:, None]
    for index, point in enumerate(points):
        others = np.delete(points, index)
        kernels[index] = point ** np.arange(kernels.shape[1]) / np.prod(point - others)
        tiles[index, :-1] = np.poly(others)[::-1]
    tiles[-1] = np.poly(points)[::-1]
    results[-1, -1] = kernels[-1, -1] = 1
    return results, tiles, kernels


def replace_wide_convolutions(network):
    """Change an `openvino.Model` in place: its float32 convolutions of `WIDE` channels, with stride and padding 1."""
    openvino = require("openvino", "openvino")
    for node in network.get_ordered_ops():
        if node.get_type_name() == "Convolution" and _suits(node):
            tiled = _tiled(openvino.opset13, node.input_value(0), node.input_value(1).get_node().data)
            tiled.set_friendly_name(node.get_friendly_name())
            openvino.utils.replace_node(node, tiled)


def _suits(node) -> bool:
    weight, attributes = node.input_value(1), node.get_attributes()
    if weight.get_node().get_type_name() != "Constant" or weight.get_element_type().to_string() != "f32":
        return False
    D, C, *sides = weight.get_shape()
    ones = (attributes[name] for name in ("strides", "dilations", "pads_begin", "pads_end"))
    return sides == [3, 3] and D in WIDE and C in WIDE and all(list(pair) == [1, 1] for pair in ones)


def _tiled(ops, x, weight: np.ndarray):
    """A node of (B, D, H, W) for x of (B, C, H, W) and a kernel of (D, C, 3, 3)."""
    results, tiles, kernels = transforms()
    D, C = weight.shape[:2]
    shape = ops.shape_of(x)
    B, H, W = (ops.gather(shape, _integers(ops, axis), ops.constant(0)) for axis in (0, 2, 3))
    rows, columns = ((side + (TILE - 1)) / TILE for side in (H, W))  # of tiles; integers, and so is their quotient
    pixels = _pixels_of_tiles(ops, x, (B, C, H, W), (rows, columns), len(tiles))  # (36, B * rows * columns * C)
    pixels = ops.matmul(_floats(ops, np.kron(tiles, tiles)), pixels, False, False)
    pixels = ops.reshape(pixels, _integers(ops, len(tiles) ** 2, -1, C), False)
    weight = np.einsum("ai,bj,ocij->abco", kernels, kernels, weight.astype(np.float64), optimize=True)
    products = ops.matmul(pixels, _floats(ops, weight.reshape(-1, C, D)), False, False)
    products = ops.reshape(products, _integers(ops, len(tiles) ** 2, -1), False)
    y = ops.matmul(_floats(ops, np.kron(results, results)), products, False, False)  # (16, B * rows * columns * D)
    y = _reshaped(ops, y, TILE, TILE, B, rows, columns, D)
    y = ops.transpose(y, _integers(ops, 2, 3, 0, 4, 1, 5))
    y = _reshaped(ops, y, B, rows * TILE, columns * TILE, D)
    y = ops.slice(y, _integers(ops, 0, 0), ops.concat([H, W], 0), _integers(ops, 1, 1), _integers(ops, 1, 2))
    return ops.transpose(y, _integers(ops, 0, 3, 1, 2))


def _pixels_of_tiles(ops, x, shape: tuple, grid: tuple, n: int):
    """(n * n, B * rows * columns * C): one pixel of all tiles, which overlap, after the other.

    With three axes or six OpenVINO has one layout to choose; with four it reorders what needs none, for 20 ms.
    """
    (B, C, H, W), (rows, columns) = shape, grid
    x = _reshaped(ops, ops.transpose(x, _integers(ops, 0, 2, 3, 1)), B, H, W * C)
    below, right = (TILE * (count + 1) - side - 1 for count, side in zip(grid, (H, W), strict=True))
    end = ops.concat([_integers(ops, 0), below, right * C], 0)
    x = ops.pad(x, _integers(ops, 0, 1, C), end, "constant", _floats(ops, np.zeros(())))
    x = _reshaped(ops, x, B, rows + 1, TILE, columns + 1, TILE, C)
    pixels = []
    for row, column in np.ndindex(n, n):
        (above, y), (left, z) = divmod(row, TILE), divmod(column, TILE)
        stop = ops.concat([rows + above, _integers(ops, y + 1), columns + left, _integers(ops, z + 1)], 0)
        start, ones, axes = (_integers(ops, *values) for values in ((above, y, left, z), (1, 1, 1, 1), (1, 2, 3, 4)))
        pixels.append(ops.slice(x, start, stop, ones, axes))
    return ops.reshape(ops.concat(pixels, 0), _integers(ops, n * n, -1), False)


def _reshaped(ops, x, *sides):
    """Of numbers and nodes of one number."""
    sides = [_integers(ops, side) if isinstance(side, int) else side for side in sides]
    return ops.reshape(x, ops.concat(sides, 0), False)


def _integers(ops, *values: int):
    return ops.constant(np.array(values, np.int64))


def _floats(ops, array: np.ndarray):
    return ops.constant(array.astype(np.float32))

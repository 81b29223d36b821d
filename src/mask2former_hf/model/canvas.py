"""placeholder until colleague's file"""


def crop_to_canvas(maps, canvas_size, stride):
    rows, columns = (-(-side // stride) for side in canvas_size)
    return maps[..., :rows, :columns]

"""`predict` over many images: shards, stops of every kind, several processes, and every way to name images."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import sure_checkpoint, tiny_model
from PIL import Image
from processes import python, two_pythons

from mask2former_hf import Segmenter
from mask2former_hf.cli.main import main
from mask2former_hf.data.file_lock import FileLock
from mask2former_hf.inference import many_images
from mask2former_hf.inference.workers import write_result

SIZES = ((60, 90), (90, 60), (70, 70))
COUNT, BROKEN = 12, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = sure_checkpoint(tmp_path_factory, task="panoptic", stuff_label_ids=[3, 4], num_queries=20)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images of three sizes; the fifth is damaged."""
    folder, rng = tmp_path_factory.mktemp("work") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(COUNT):
        pixels = rng.integers(0, 255, (*SIZES[number % 3], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / f"{BROKEN:02}.png").write_bytes(b"no picture")
    return folder


FLAGS = ["--threshold", "0.1", "--num-shards", "4", "--batch-size", "2", "--format", "coco", "labelme", "parquet"]


def predict(*arguments):
    return main(["predict", *map(str, arguments)])


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(checkpoint, photos, one_thread):
    """What a run of one process leaves."""
    output = photos.parent / "whole"
    assert predict(photos, "--model", checkpoint, "--output", output, *FLAGS) == 2
    return contents(output)


@pytest.fixture(scope="module")
def one_thread():
    """As launchers give each of several processes: another number changes last digits."""
    import torch

    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def test_a_shard_is_what_a_small_run_leaves_and_shards_have_all_images_once(whole):
    shards = sorted({name.split("/")[1] for name in whole if name.startswith("shards/")})
    assert shards == [f"0000{k}-of-00004" for k in range(4)]
    ids = []
    for shard in shards:
        panoptic = json.loads(whole[f"shards/{shard}/panoptic.json"])
        ids += [image["id"] for image in panoptic["images"]]
        for annotation in panoptic["annotations"]:
            assert f"shards/{shard}/panoptic/{annotation['file_name']}" in whole
            assert f"shards/{shard}/overlays/{annotation['file_name']}" in whole
    assert ids == [number + 1 for number in range(COUNT) if number != BROKEN]


def test_batches_of_mixed_sizes_give_what_each_image_gives_alone(whole, checkpoint, photos):
    segmenter = Segmenter(checkpoint, device="cpu")
    for name in ("00", "01", "02"):
        result = segmenter(photos / f"{name}.png", threshold=0.1)
        picture = np.asarray(Image.open(io.BytesIO(whole[f"shards/00000-of-00004/panoptic/{name}.png"]))).astype(int)
        assert result.segments and (picture[..., 0] == result.map).mean() > 0.999


def test_an_unreadable_image_is_listed_and_the_list_can_be_predicted(whole, photos, checkpoint, tmp_path, capsys):
    assert whole["unreadable.txt"].decode().splitlines() == [str(photos / f"{BROKEN:02}.png")]
    summary = json.loads(whole["shards/00001-of-00004/summary.json"])
    assert summary["images"] == 2 and "not a readable image" in summary["unreadable"][0]["problem"]
    (tmp_path / "again.txt").write_bytes(whole["unreadable.txt"])
    assert predict(tmp_path / "again.txt", "--model", checkpoint, "--output", tmp_path / "out") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mask2former-hf predict:")]
    assert len(lines) == 1 and f"{BROKEN:02}.png: not a readable image" in lines[0]


def test_labelme_s_paths_lead_to_the_images_from_shards_too(whole, photos):
    name = "shards/00002-of-00004/labelme/07.json"
    image = json.loads(whole[name])["imagePath"]
    assert (photos.parent / "whole" / name).parent.joinpath(image).resolve() == photos / "07.png"


@pytest.fixture
def output(photos, request):
    """Beside the images, as that of `whole`: labelme's files lead from one to the other."""
    return photos.parent / request.node.name


def test_two_processes_with_workers_write_the_same_bytes_as_one(whole, checkpoint, photos, output):
    arguments = [photos, "--model", checkpoint, "--output", output, *FLAGS, "--num-workers", "1"]
    processes = two_pythons("-m", "mask2former_hf", "predict", *arguments)
    for done in processes:  # the last one says how it went, or both, if they end at once
        assert done.returncode == (2 if "not readable: 1" in done.stdout else 0), done.stderr[-3000:]
    assert any(done.returncode for done in processes)
    assert contents(output) == whole


def test_a_scheduler_s_processes_do_their_shards_and_the_last_says_how_it_went(
    whole, checkpoint, photos, output, capsys, one_thread
):
    arguments = [photos, "--model", checkpoint, "--output", output, *FLAGS]
    assert predict(*arguments, "--shard", 1, 3) == 0
    assert "2 of 4 shards are complete" in capsys.readouterr().out
    assert predict(*arguments, "--shard", 0, 2, 3) == 2
    assert "11 of 12 images" in capsys.readouterr().out
    assert contents(output) == whole


KILLED = """
import os, sys
from mask2former_hf.cli.main import main
from mask2former_hf.inference import many_images
from mask2former_hf.inference.photos import WAITING, in_batches
write, calls = many_images.write_result, []

def write_or_die(*arguments):
    calls.append(arguments)
    if len(calls) == 5:
        os.kill(os.getpid(), 9)
    return write(*arguments)

many_images.write_result = write_or_die
sys.exit(main(sys.argv[1:]))
"""


def check_rerun(arguments, output, whole):
    """That of four shards the first is there, and that a rerun adds the others and leaves it alone."""
    done = output / "shards" / "00000-of-00004"
    assert [path for path in done.parent.iterdir() if not path.name.startswith(".")] == [done]
    before = (done / "panoptic.json").stat()
    assert predict(*arguments) == 2
    assert contents(output) == whole
    after = (done / "panoptic.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_run_that_is_killed_loses_one_shard_and_a_rerun_completes_it(whole, checkpoint, photos, output, one_thread):
    arguments = [photos, "--model", checkpoint, "--output", output, *FLAGS]
    stopped = python("-c", KILLED, "predict", *arguments)
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr[-2000:]
    assert (output / "shards" / ".00001-of-00004" / "overlays").is_dir()
    check_rerun(arguments, output, whole)


def test_ctrl_c_keeps_complete_shards_and_no_half_written_file(
    whole, checkpoint, photos, output, one_thread, monkeypatch, capsys
):
    arguments, written = [photos, "--model", checkpoint, "--output", output, *FLAGS], []

    def interrupted(*parts):
        written.append(parts)
        if len(written) == 5:
            raise KeyboardInterrupt
        return write_result(*parts)

    with monkeypatch.context() as patch:
        patch.setattr(many_images, "write_result", interrupted)
        assert predict(*arguments) == 130
    assert "1 of 4 shards are complete; the same command does the others" in capsys.readouterr().err
    assert [path.name for path in (output / "shards").iterdir()] == ["00000-of-00004"]
    check_rerun(arguments, output, whole)


def test_a_shard_that_another_process_is_at_is_left_to_it(checkpoint, photos, tmp_path, capsys):
    images = [photos / f"{number:02}.png" for number in range(3)]
    arguments = [*images, "--model", checkpoint, "--output", tmp_path / "out", "--num-shards", 3]
    assert predict(*arguments, "--shard", 2) == 0
    lock = tmp_path / "out" / "shards" / ".00000-of-00003.lock"
    holder = f"from mask2former_hf.data.file_lock import FileLock\nimport sys\nlock = FileLock({str(lock)!r})"
    holder += "\nlock.take()\nprint('taken', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "taken\n"
        assert predict(*arguments) == 0
        assert "2 of 3 shards are complete" in capsys.readouterr().out
        process.stdin.close()
    assert predict(*arguments) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    FileLock(lock).check()


def test_a_small_run_that_was_killed_while_it_was_published_is_completed(checkpoint, photos, tmp_path, one_thread):
    """A folder with one shard has its results directly in it: they are moved one after the other."""
    arguments = [photos / "00.png", "--model", checkpoint, "--threshold", "0.1", "--output"]
    assert predict(*arguments, tmp_path / "one") == 0
    expected = contents(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    staging = tmp_path / "two" / ".00000-of-00001"
    staging.mkdir()
    for name in ("panoptic.json", "summary.json"):
        (tmp_path / "two" / name).rename(staging / name)
    assert predict(*arguments, tmp_path / "two") == 0
    assert contents(tmp_path / "two") == expected and not staging.exists()
    (tmp_path / "two" / "summary.json").unlink()
    shutil.copytree(tmp_path / "one", staging)  # what --overwrite is to replace, too
    assert predict(*arguments, tmp_path / "two", "--overwrite", "--no-overlays") == 0
    assert not (tmp_path / "two" / "overlays").exists() and not staging.exists()


@pytest.mark.parametrize(
    "change, named",
    [
        (["--threshold", "0.3"], "threshold was 0.1 and is 0.3"),
        (["--num-shards", "2"], "num_shards was 4 and is 2"),
        (["--task", "semantic"], 'task was "panoptic" and is "semantic"'),
        (["--format", "coco"], "format was"),
        (["--no-overlays"], "no_overlays was false and is true"),
        (["--stuff", "3"], "stuff_label_ids was [3, 4] and is [3]"),
    ],
)
def test_a_rerun_by_other_rules_is_refused(change, named, whole, checkpoint, photos, capsys):
    given = [flag for flag in FLAGS if "--task" not in change or flag not in ("--threshold", "0.1")]
    output = photos.parent / "whole"
    assert predict(photos, "--model", checkpoint, "--output", output, *given, *change) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "has results of another run" in line and named in line and "name another folder" in line
    assert contents(output) == whole


def test_a_rerun_with_another_model_or_other_images_is_refused(whole, checkpoint, photos, tmp_path, capsys):
    output = photos.parent / "whole"
    model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4], num_queries=20)
    model.save_pretrained(tmp_path / "other")
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path / "other")
    assert predict(photos, "--model", tmp_path / "other", "--output", output, *FLAGS) == 2
    assert "weights_sha256 was" in capsys.readouterr().err
    images = sorted(photos.iterdir())[::-1]
    assert predict(*images, "--model", checkpoint, "--output", output, *FLAGS) == 2
    assert "images_sha256 was" in capsys.readouterr().err
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert predict(photos, "--model", tmp_path / "copy", "--output", output, *FLAGS) == 2
    assert "11 of 12 images" in capsys.readouterr().out, "the same weights from another place are the same model"


def test_a_json_s_images_keep_their_ids_and_lists_and_patterns_name_files(checkpoint, photos, tmp_path, capsys):
    entries = [{"id": 70, "file_name": "photos/03.png"}, {"id": 7, "file_name": "photos/00.png"}]
    (photos.parent / "wanted.json").write_text(json.dumps({"images": entries}))
    given = ["--model", checkpoint, "--threshold", "0.1", "--no-overlays", "--task", "instance", "--output"]
    assert predict(photos.parent / "wanted.json", *given, tmp_path / "json") == 0
    found = json.loads((tmp_path / "json" / "instances.json").read_text())
    named = [(entry["image_id"], entry["file_name"]) for entry in found]
    assert list(dict.fromkeys(named)) == [(70, "photos/03.png"), (7, "photos/00.png")]
    assert not (tmp_path / "json" / "overlays").exists()
    (tmp_path / "list.txt").write_text("photos/03.png\n\nphotos/none.png\n")
    assert predict(tmp_path / "list.txt", "--root", photos.parent, *given, tmp_path / "list") == 2
    assert "none.png: no such file" in capsys.readouterr().err
    assert predict(f"{photos}/0[03].png", *given, tmp_path / "pattern") == 0
    codes = []
    for folder in ("list", "pattern", "json"):
        found = json.loads((tmp_path / folder / "instances.json").read_text())
        codes.append([entry["segmentation"] for entry in found if Path(entry["file_name"]).name == "03.png"])
    assert codes[0] and codes[0] == codes[1] == codes[2]


def test_a_broken_file_beside_an_image_costs_the_run_that_image_alone(checkpoint, photos, tmp_path, capsys):
    pytest.importorskip("shapely")
    for name in ("00.png", "01.png"):
        shutil.copy(photos / name, tmp_path / name)
    (tmp_path / "00.pgw").write_text("north")
    given = ["--model", checkpoint, "--threshold", "0.1", "--output", tmp_path / "out", "--format", "geojson"]
    assert predict(tmp_path / "00.png", tmp_path / "01.png", *given) == 2
    said = capsys.readouterr()
    assert "1 of 2 images" in said.out and "00.pgw: not a world file" in said.err
    assert [path.name for path in (tmp_path / "out" / "geojson").glob("*.geojson")] == ["01.geojson"]
    assert (tmp_path / "out" / "unreadable.txt").read_text() == f"{tmp_path / '00.png'}\n"


def test_a_data_set_s_images_have_the_numbers_of_their_rows(checkpoint, photos, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    names = [str(photos / f"{number:02}.png") for number in (0, BROKEN, 3)]
    rows = datasets.Dataset.from_dict({"image": [Path(name).read_bytes() for name in names]})
    rows = rows.map(lambda row: {"image": {"bytes": row["image"], "path": None}}).cast_column(
        "image", datasets.Image()
    )
    datasets.DatasetDict({"test": rows, "train": rows}).save_to_disk(tmp_path / "data")
    given = [tmp_path / "data", "--model", checkpoint, "--threshold", "0.1", "--output", tmp_path / "out"]
    assert predict(*given) == 2
    assert "--split None: the data set" in capsys.readouterr().err.splitlines()[-1]
    assert predict(*given, "--split", "test") == 2
    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert [image["id"] for image in content["images"]] == [0, 2]
    assert predict(*given[:-1], tmp_path / "other", "--split", "test", "--format", "labelme") == 2
    said = capsys.readouterr().err
    assert "--format labelme: names the file of each image, which data sets have not" in said
    assert "00000001.png: the bytes of an image: not a readable image" in said
    assert (tmp_path / "out" / "overlays" / "00000002.png").is_file()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-shards", "99"], "--num-shards 99: a shard has one image at least; give at most 12"),
        (["--num-shards", "4", "--shard", "4"], "--shard 4: the shards are 0 to 3"),
        (["--num-workers", "-1"], "--num-workers -1: must be 0"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--split", "train"], "--split 'train': is for data sets"),
        (["--root", "x"], "--root 'x': is for lists and jsons"),
        (["--overwrite", "--shard", "0"], "--overwrite: one of several processes"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(flags, message, checkpoint, photos, tmp_path, capsys):
    assert predict(photos, "--model", checkpoint, "--output", tmp_path / "out", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "a.txt: the list is empty"),
        ("a.json", "{", "a.json: not a json file"),
        ("a.json", '{"images": []}', "a.json: images is empty"),
        ("a.json", '{"images": [{"id": 1}]}', "images[0] has no file_name"),
        ("a.json", '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', "1 ids are of several"),
        ("none/*.jpg", None, "none/*.jpg: no file fits this pattern"),
        ("hf://datasets/no/such", None, "hf://datasets/no/such: no data set that can be read"),
    ],
)
def test_what_names_no_images_is_one_line(name, content, message, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert predict(name, "--model", checkpoint, "--output", "out") == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not Path("out").exists()


def test_workers_end_with_a_process_that_is_killed(checkpoint, photos, tmp_path):
    script = "import os, sys, time\nfrom mask2former_hf.inference.workers import Workers\n"
    script += "if __name__ == '__main__':\n    workers = Workers(1)\n"
    script += "    print(workers.submit(os.getpid).result(), flush=True)\n    time.sleep(60)\n"
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], env=environment(), stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while (is_there := _runs(worker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_there


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")  # one that nobody has waited for is there and does not run
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"

"""Finding files: by the end of their path, in one folder and never outside it, whatever lies in that folder."""

import os
import unicodedata
from pathlib import Path

import pytest

from mask2former_hf.data.paths import files_by_name, locate


@pytest.fixture
def folder(tmp_path):
    """A function that makes empty files below `images` and returns that folder."""

    def make(*names):
        for name in names:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "images"

    return make


@pytest.mark.parametrize(
    "name, file",
    [
        ("cat/0.jpg", "cat/0.jpg"),
        ("0.jpg", "cat/0.jpg"),
        ("images/cat/0.jpg", "cat/0.jpg"),
        ("./cat//0.jpg", "cat/0.jpg"),
        ("cat\\0.jpg", "cat/0.jpg"),
        ("C:\\Users\\me\\images\\cat\\0.jpg", "cat/0.jpg"),
        ("/data/other/images/cat/0.jpg", "cat/0.jpg"),
        ("../images/cat/0.jpg", "cat/0.jpg"),
        ("dog/../cat/0.jpg", "cat/0.jpg"),
        ("cat/0.JPG", "cat/0.jpg"),
        ("cat/a%20b.jpg", "cat/a b.jpg"),
        ("cat/a b.jpg", "cat/a b.jpg"),
        (unicodedata.normalize("NFD", "cat/ä.jpg"), unicodedata.normalize("NFC", "cat/ä.jpg")),
        ("cat/100%.jpg", "cat/100%.jpg"),
        ("", None),
        ("..", None),
        ("dog/0.jpg", None),
        ("at/0.jpg", None),
        ("cat/\0.jpg", None),
        ("/etc/passwd", None),
        ("../secret.jpg", None),
    ],
)
def test_a_file_is_found_by_the_end_of_its_path_and_only_inside(folder, name, file):
    images = folder("cat/0.jpg", "cat/a b.jpg", unicodedata.normalize("NFC", "cat/ä.jpg"), "cat/100%.jpg")
    (images.parent / "secret.jpg").touch()
    if file is not None:
        assert locate(images, "images", [name], Path("a.json")) == [file]
        return
    with pytest.raises(FileNotFoundError, match="1 of 1 images that a.json names are not there"):
        locate(images, "images", [name], Path("a.json"))


def test_a_name_that_leaves_the_folder_is_refused_with_the_reason_though_the_file_exists(folder):
    images = folder("0.jpg")
    (images.parent / "secret.jpg").touch()
    for name in ("../secret.jpg", str(images.parent / "secret.jpg"), "0.jpg/../../secret.jpg"):
        with pytest.raises(FileNotFoundError, match="it points out of the folder"):
            locate(images, "images", [name], Path("a.json"))


def test_the_longest_end_decides_and_equal_ends_are_an_error_that_shows_the_candidates(folder):
    images = folder("0.jpg", "cat/0.jpg", "dog/1.jpg", "cow/1.jpg")
    assert locate(images, "images", ["images/cat/0.jpg", "images/0.jpg"], Path("a.json")) == ["cat/0.jpg", "0.jpg"]
    with pytest.raises(FileNotFoundError, match=r"1.jpg \(cow/1.jpg or dog/1.jpg\?\)"):
        locate(images, "images", ["1.jpg"], Path("a.json"))


def test_several_entries_may_name_one_file_but_two_files_are_never_one(folder):
    images = folder("cat/0.jpg")
    assert locate(images, "images", ["0.jpg", "0.jpg"], Path("a.json")) == ["cat/0.jpg"] * 2
    assert locate(images, "images", ["0.jpg", ".\\0.jpg"], Path("a.json")) == ["cat/0.jpg"] * 2
    with pytest.raises(FileNotFoundError, match=r"old/cat/0.jpg \(cat/0.jpg is the file of another entry\)"):
        locate(images, "images", ["cat/0.jpg", "old/cat/0.jpg"], Path("a.json"))


def test_links_in_loops_are_walked_once(folder):
    images = folder("a/0.jpg", "b/1.jpg")
    (images / "a" / "loop").symlink_to(images)
    (images / "b" / "other").symlink_to(images / "a")
    (images / "b" / "self").symlink_to(images / "b")
    outside = images.parent / "more"
    outside.mkdir()
    (outside / "2.jpg").touch()
    (images / "a" / "more").symlink_to(outside)  # a linked folder is part of the data
    assert list(files_by_name(images, "images", (".jpg",)).values()) == ["a/0.jpg", "a/more/2.jpg", "b/1.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipes_are_no_images(folder):
    images = folder("0.jpg")
    os.mkfifo(images / "1.jpg")
    assert list(files_by_name(images, "images", (".jpg",))) == ["0"]
    with pytest.raises(FileNotFoundError, match="1 of 1 images"):
        locate(images, "images", ["1.jpg"], Path("a.json"))


def test_names_of_images_and_maps_are_equal_in_either_unicode_form(folder):
    composed, decomposed = (unicodedata.normalize(form, "über") for form in ("NFC", "NFD"))
    images = folder(f"{decomposed}.jpg")
    assert list(files_by_name(images, "images", (".jpg",))) == [composed]

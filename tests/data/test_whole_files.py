"""Files that are written whole: what happens to a link, a pipe and the file of before."""

import os
import stat
import threading

import pytest

from mask2former_hf.data.whole_files import written_whole


def test_after_an_error_a_file_is_as_it_was_and_alone(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(file) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one_to_the_new_content(tmp_path):
    file, link = tmp_path / "there" / "a.json", tmp_path / "link.json"
    file.parent.mkdir()
    file.write_text("old")
    link.symlink_to(file)
    with written_whole(link) as part:
        part.write_text("new")
    assert link.is_symlink() and file.read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_gets_the_content_and_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with written_whole(pipe) as part:
        part.write_text("new")
        assert part == pipe  # before the reader, who would wait for ever otherwise, is waited for
    reader.join(10)
    assert read == ["new"] and stat.S_ISFIFO(pipe.stat().st_mode)

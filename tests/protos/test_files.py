"""Files are whole or absent, and nothing but a file is ever replaced by one."""

import os

import pytest

from protos.files import remove_unfinished, write_atomically


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for content in (b"made", b"written"):
        write_atomically(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == content


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    """As root, `--output /dev/stdout` would leave a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no file"):
        write_atomically(tmp_path / "pipe", b"content")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_links_that_lead_to_themselves_are_an_error_of_the_disk_s(tmp_path):
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(OSError, match=r"one|other"):
        write_atomically(tmp_path / "one" / "file", b"content")


def test_what_was_left_unfinished_beside_what_a_link_leads_to_goes(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    scratch = tmp_path / "there" / ".file.abcdefgh"
    scratch.touch()
    remove_unfinished(tmp_path / "link")
    assert not scratch.exists()


def test_what_was_left_unfinished_goes_whatever_the_name(tmp_path):
    scratch = tmp_path / ".run[1].onnx.abcdefgh"
    scratch.touch()
    remove_unfinished(tmp_path / "run[1].onnx")
    assert not scratch.exists()

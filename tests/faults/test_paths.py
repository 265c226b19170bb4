"""F30: the one place that keeps paths below a folder."""

import pytest

from peer_scaling.errors import UserError
from peer_scaling.paths import NAME, closed_folder, inside


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0b", "../a", "x" * 256, "é" * 128]
)
def test_what_is_no_plain_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="is not the name of a file or folder"):
        inside(tmp_path, name)


def test_links_may_stay_and_may_not_leave(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a" / "b").mkdir(parents=True)
    outside.mkdir()
    (root / "near").symlink_to("a")
    (root / "a" / "b" / "up").symlink_to("..")
    assert inside(root, "near", "b") == root / "near" / "b"
    assert closed_folder(root, "a") == root / "a"
    assert closed_folder(root, "nothing", "there") == root / "nothing" / "there"
    for link in (root / "far", root / "a" / "b" / "far"):
        link.symlink_to(outside)
        with pytest.raises(UserError, match="far: a link that leads out of"):
            closed_folder(root) if link.parent == root else closed_folder(root, "a")
    with pytest.raises(UserError, match="far: a link that leads out of"):
        inside(root, "far", "file")


def test_what_wandb_left_is_not_looked_into_and_no_way_out(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    left = root / "run" / "wandb" / "offline-run-20260102_030405-dense-d8_l2-1e9-s0-0123abcd"
    (left / "logs").mkdir(parents=True)
    outside.mkdir()
    (left / "logs" / "debug-core.log").symlink_to(outside / "core.log")
    assert closed_folder(root, "run") == root / "run"
    (left.parent / "offline-run-20270102_030405-x").symlink_to(outside)
    with pytest.raises(UserError, match="-x: a link that leads out of"):
        closed_folder(root, "run")
    elsewhere = root / "other" / left.name
    elsewhere.mkdir(parents=True)
    (elsewhere / "far").symlink_to(outside)
    with pytest.raises(UserError, match="far: a link that leads out of"):
        closed_folder(root, "other")


def test_the_root_itself_may_be_a_link(tmp_path):
    (tmp_path / "scratch" / "own").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("scratch")
    assert closed_folder(tmp_path / "runs", "own") == tmp_path / "runs" / "own"


def test_a_link_to_itself_ends(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert inside(tmp_path, "loop") == tmp_path / "loop"
    assert closed_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["a", "2024", "größe", "lr=0.1", "a b", "v1.2", "x" * 60])
def test_names(name):
    assert NAME.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["", " a", "-a", ".a", "a/b", "a;b", "a\n", "a$b", "a`b", "a%b", "x" * 61]
)
def test_what_is_no_name(name):
    assert not NAME.fullmatch(name)

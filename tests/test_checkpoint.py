"""A checkpoint is there as a whole, or not at all, and says so when it was damaged since."""

import errno
import os
import resource
from pathlib import Path
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import tiny
import torch

from genfw.train import checkpoint
from genfw.train.checkpoint import AtomicIO, CheckpointError, check, newest, read, same, write
from genfw.train.errors import ConfigError, Stopped
from genfw.train.files import replace_text
from genfw.train.keeper import Keeper
from genfw.train.signals import Signals

HELD = {"weights": torch.arange(3000.0), "step": 7}


@pytest.fixture
def file(tmp_path):
    write(HELD, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


def test_what_is_written_is_read_by_torch_too(file):
    for found in (read(file), torch.load(file, weights_only=True)):
        assert torch.equal(found["weights"], HELD["weights"]) and found["step"] == 7
    assert os.listdir(file.parent) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut short"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: path.write_bytes(b"<html>not found</html>" * 9), "cut short"),
        (lambda path: flip(path, 0.5), "checksum"),
        (lambda path: flip(path, 0.01), "checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[100:]), "checksum"),
        (Path.unlink, "no checkpoint"),
    ],
)
def test_damage_is_found_and_the_one_before_is_used(tmp_path, damage, said):
    files = AtomicIO()
    for step in (1, 2):
        files.save_checkpoint({"step": step}, tmp_path / "last.ckpt")
    assert newest(tmp_path) == tmp_path / "last.ckpt"
    damage(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "last.ckpt")
    heard = []
    found = newest(tmp_path, heard.append)
    assert read(found)["step"] == 1
    assert len(heard) == 1 and said in heard[0] and "going on from previous.ckpt" in heard[0]
    damage(tmp_path / "previous.ckpt")
    with pytest.raises(CheckpointError, match=f"(?s){said}.*{said}"):
        newest(tmp_path)


def test_torch_alone_would_load_a_flipped_bit(file):
    """Why there is a checksum: if torch learns to look, it may go."""
    flip(file)
    found = torch.load(file, weights_only=True)
    assert not torch.equal(found["weights"], HELD["weights"])


class Payload:
    def __reduce__(self):
        return os.mkdir, ("PWNED",)


def test_nothing_but_plain_types(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({"weights": Payload()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="holds what a checkpoint must not"):
        read(tmp_path / "last.ckpt")
    assert not Path("PWNED").exists()


def test_a_full_disk_leaves_what_was_there(file):
    """A limit on the size of files, which stops a write in its midst as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as caught:
            write(HELD, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    check(file)
    assert os.listdir(file.parent) == ["last.ckpt"]


def test_what_is_moved_to_its_place_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut after the move finds all of it: first the file is synced, then moved, then its
    name is synced too."""
    done, sync, replace = [], os.fsync, Path.replace

    def synced(handle):
        size = os.fstat(handle).st_size
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name, size))
        sync(handle)

    def moved(path, target):
        done.append(("move", path.name, path.stat().st_size))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved)
    for act, name in ((lambda path: write(HELD, path), "last.ckpt"), (text, "results.json")):
        done.clear()
        act(tmp_path / name)
        size = (tmp_path / name).stat().st_size
        assert done[:2] == [("sync", f"{name}.tmp", size), ("move", f"{name}.tmp", size)]
    done.clear()
    write(HELD, tmp_path / "last.ckpt", tmp_path / "previous.ckpt")
    names = [name for act, name, _ in done if act == "sync"]
    assert names == ["last.ckpt.tmp", tmp_path.name, tmp_path.name]
    moves = [name for act, name, _ in done if act == "move"]
    assert moves == ["previous.ckpt.tmp", "last.ckpt.tmp"] and done[-1][:2] == (
        "sync",
        tmp_path.name,
    )


def text(path):
    replace_text(path, "whole")


def test_a_file_under_two_names_is_replaced_under_one(file):
    best = file.with_name("best.ckpt")
    same(file, best)
    assert best.stat().st_ino == file.stat().st_ino  # no space of its own
    write({"step": 8}, file)
    assert read(best)["step"] == 7 and read(file)["step"] == 8


def test_without_links_it_is_a_copy(file, monkeypatch):
    monkeypatch.setattr(checkpoint.os, "link", _refuse)
    same(file, file.with_name("best.ckpt"))
    assert read(file.with_name("best.ckpt"))["step"] == 7


def _refuse(*_):
    raise OSError(errno.EPERM, "no links here")


# ---- when it is written


class Disk(AtomicIO):
    """Full at these saves."""

    def __init__(self, full=()):
        super().__init__()
        self.saves, self.full = 0, full

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.saves += 1
        super().save_checkpoint(checkpoint, path)
        if self.saves in self.full:
            self.failed = OSError(errno.ENOSPC, "No space left on device")


def trained(folder, steps=4, files=None, begin=None, **settings):
    files = AtomicIO() if files is None else files
    with Signals() as signals:
        keeper = Keeper(folder, files, signals, begin, **settings)
        trainer = tiny.trainer(
            folder,
            steps,
            callbacks=[signals, keeper],
            plugins=[files],
            enable_checkpointing=True,
            val_check_interval=2,
            check_val_every_n_epoch=None,
        )
        trainer.fit(tiny.module(), tiny.Images(), ckpt_path=begin)
    return keeper


def test_three_files(tmp_path):
    keeper = trained(tmp_path, steps=5)
    assert set(os.listdir(tmp_path)) == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert read(tmp_path / "last.ckpt")["global_step"] == 5  # the end, without a validation
    assert read(tmp_path / "previous.ckpt")["global_step"] == 4
    assert read(keeper.path)["global_step"] in (2, 4)
    assert keeper.path.name == "best.ckpt"


def test_further_saves(tmp_path):
    trained(tmp_path, steps=4, every=3)
    assert read(tmp_path / "previous.ckpt")["global_step"] == 3


@pytest.mark.parametrize(("steps", "left"), [(4, 0), (5, 1)])
def test_the_last_weights_are_validated_once(tmp_path, steps, left):
    """In training, where the last step is one of those; afterwards where it is not."""
    keeper, trainer = trained(tmp_path, steps), Mock(spec=L.Trainer, global_step=steps)
    keeper.look_at_the_last(trainer, tiny.module(), tiny.Images())
    assert trainer.validate.call_count == left


def test_a_failed_save_is_said_and_the_run_goes_on(tmp_path, capsys):
    trained(tmp_path, steps=6, files=Disk(full=(2,)))
    said = capsys.readouterr().out
    assert "step 4 could not be saved" in said and "step 2 is kept" in said
    assert read(tmp_path / "last.ckpt")["global_step"] == 6


def test_too_many_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(Stopped, match=r"step 6 could not.*step 2 is kept; 2 in a row") as caught:
        trained(tmp_path, steps=8, files=Disk(full=(2, 3)), failures=2)
    assert caught.value.exit_code == 1


def test_unsaved_last_weights_are_an_error(tmp_path):
    with pytest.raises(Stopped, match=r"of step 4 could not be saved.*step 2 are"):
        trained(tmp_path, steps=4, files=Disk(full=(2,)))


@pytest.mark.parametrize("limit", [None, 0])
def test_a_folder_that_takes_nothing_is_found_before_the_first_step(tmp_path, limit):
    """A file in its place; one that can be made, but takes not a byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is None:
        (tmp_path / "checkpoints").write_text("a file")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ConfigError, match=r"checkpoints cannot be written to .*/checkpoints: "):
            trained(tmp_path / "checkpoints", steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / "last.ckpt.tmp").write_bytes(b"half")
    trained(tmp_path)
    assert not (tmp_path / "last.ckpt.tmp").exists()


def test_a_damaged_file_is_not_kept_as_the_previous_one(tmp_path):
    trained(tmp_path, steps=4)
    flip(tmp_path / "last.ckpt")
    begin = newest(tmp_path)
    assert begin.name == "previous.ckpt"
    trained(tmp_path, steps=6, begin=begin)
    for name, step in (("previous", 4), ("last", 6)):
        assert read(tmp_path / f"{name}.ckpt")["global_step"] == step
    assert (tmp_path / "last.ckpt.damaged").exists()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"failures": 0}])
def test_arguments_out_of_range(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected an integer of at least 1, got 0"):
        Keeper(tmp_path, AtomicIO(), Signals(), **wrong)


def test_a_file_from_before_checksums_is_told_apart(tmp_path):
    torch.save({"step": 1}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="has no checksum; a genfw older than checksums"):
        read(tmp_path / "last.ckpt")

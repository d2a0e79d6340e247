"""Checkpoints and logs on the disk: whole or as before, what is removed, what is refused."""

import io
import json
import pickle
import resource

import pytest
import torch

from m2f_hf.training.checkpoints import (
    Log,
    WriteFailure,
    find_checkpoint,
    hidden_folder,
    load_checkpoint,
    read_log,
    save_checkpoint,
    tidy,
)
from m2f_hf.training.trainer import is_before


class Part:
    """Something with a state."""

    def __init__(self, value: float, size: int = 1) -> None:
        self.value, self.size = value, size

    def state_dict(self) -> dict:
        return {"value": torch.full((self.size,), self.value)}

    def load_state_dict(self, state: dict) -> None:
        self.value = float(state["value"][0])


def test_a_full_disk_loses_only_the_checkpoint_being_written(tmp_path):
    save_checkpoint(tmp_path, 1, {"part": Part(1.0)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(WriteFailure, match="checkpoint of step 2 could not be written"):
            save_checkpoint(tmp_path, 2, {"part": Part(2.0, size=100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0000001"]
    part = Part(0.0)
    load_checkpoint(find_checkpoint(tmp_path), {"part": part})
    assert part.value == 1.0
    save_checkpoint(tmp_path, 3, {"part": Part(3.0, size=100_000)})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0000003"]


def test_only_checkpoints_of_this_package_are_found_and_removed(tmp_path):
    """`transformers` writes such names, too, and people keep others next to them."""
    foreign = ["checkpoint-500", "checkpoint-best", "checkpoint-0000500"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("hours of work")
    (tmp_path / "checkpoint-500" / "state.pt").write_text("another program's")
    assert find_checkpoint(tmp_path) is None
    for step in (4, 5):
        save_checkpoint(tmp_path, step, {"part": Part(1.0)})
    assert find_checkpoint(tmp_path).name == "checkpoint-0000005"
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "checkpoint-0000005"}
    with pytest.raises(WriteFailure, match="checkpoint-0000500 could not be written: another program's"):
        save_checkpoint(tmp_path, 500, {"part": Part(1.0)})
    assert all((tmp_path / name / "model.safetensors").exists() for name in foreign)
    assert find_checkpoint(tmp_path).name == "checkpoint-0000005"


class Evil:
    def __reduce__(self):
        return print, ("run",)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


DAMAGES = {
    "cut in half": lambda good: good[: len(good) // 2],
    "cut at the end": lambda good: good[:-100],
    "zeros": lambda good: bytes(len(good)),
    "empty": lambda good: b"",
    "a web page": lambda good: b"<html>",
    "a pickle": lambda good: pickle.dumps({"a": 1}),
    "one bit": lambda good: good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :],
    "code": lambda good: saved({"model": Evil()}),
    "a list": lambda good: saved([1]),
    "another model": lambda good: saved({"model": torch.nn.Linear(2, 2).state_dict()}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_its_name(damage, tmp_path, capsys):
    model = torch.nn.Linear(300, 300)
    file = save_checkpoint(tmp_path, 4, {"model": model}) / "state.pt"
    before = model.weight.detach().clone()
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint-0000004.*start another run"):
        load_checkpoint(file.parent, {"model": model})
    assert torch.equal(model.weight, before) and capsys.readouterr().out == ""


def test_what_a_kill_left_half_done_is_put_right(tmp_path):
    """Killed between giving the old folder another name and giving the new one its own; other folders stay."""
    own = [hidden_folder(tmp_path / "best", "old"), hidden_folder(tmp_path / "best", "tmp")]
    own.append(hidden_folder(tmp_path / "checkpoint-0000002", "tmp"))
    kept = ["checkpoint-0000001", ".best.old", ".notes.tmp"]  # of other programs
    for path in (*own, *map(tmp_path.joinpath, kept)):
        path.mkdir()
        (path / "file").write_text(path.name)
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"best", *kept}
    assert (tmp_path / "best" / "file").read_text() == own[0].name


def test_a_log_keeps_what_it_is_told_to_and_loses_a_line_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "pq_all": 0.1}, {"step": 3, "loss": 0.2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    Log(path, lambda row: is_before(row, 2)).write({"step": 3, "loss": 0.3})
    assert read_log(path) == [*rows[:2], {"step": 3, "loss": 0.3}]

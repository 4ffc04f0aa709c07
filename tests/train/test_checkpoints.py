"""A checkpoint is whole with every worker's seal; a list of checkpoints that was cut is made anew from those there."""

import json
import shutil
from pathlib import Path

import pytest

from delia.store.directories import upload_directory
from delia.store.tables import exists, join, read_bytes, write_bytes
from delia.train.checkpoints import find_damage, read_sealed_step, seal_checkpoint
from delia.train.snapshot import SNAPSHOT, mend_snapshot

TORN = b'{"checkpoint_results": ['


@pytest.fixture
def make_sealed(tmp_path, monkeypatch):
    """Return a function that lays down what each of some workers saves and seals, merged as storage merges it."""

    def make(name: str, step: int, *, num_workers: int = 2, saved_by: tuple[int, ...] = (0, 1)) -> Path:
        directory = tmp_path / name
        for rank in saved_by:
            own = tmp_path / "own" / f"{name}-{rank}"
            own.mkdir(parents=True)
            (own / f"__{rank}_0.distcp").write_bytes(bytes(range(100 + rank)))
            if rank == 0:
                (own / ".metadata").write_bytes(b"metadata")
            with monkeypatch.context() as patch:
                patch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
                patch.setattr("torch.distributed.get_world_size", lambda: num_workers)
                seal_checkpoint(own, step)
            shutil.copytree(own, directory, dirs_exist_ok=True)
        return directory

    return make


# ---- seals


def test_a_checkpoint_of_two_workers_with_both_seals_is_whole(make_sealed):
    directory = make_sealed("two", 6)
    assert find_damage(directory) == ""
    assert read_sealed_step(str(directory)) == (6, "")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_was_cut_is_seen_though_its_seal_is_lost(make_sealed, rank):
    directory = make_sealed("two", 6)
    shard = directory / f"__{rank}_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert find_damage(directory) == f"{shard.name} was cut or changed"
    (directory / f"seal-{rank}.json").unlink()
    assert find_damage(directory) == f"seal-{rank}.json is missing"


@pytest.mark.parametrize(
    ("saved_by", "missing"), [((0,), "seal-1.json"), ((1,), "progress.json")], ids=["first", "second"]
)
def test_a_checkpoint_that_one_of_two_workers_has_sealed_is_not_yet_whole(make_sealed, saved_by, missing):
    directory = make_sealed("two", 6, saved_by=saved_by)
    assert find_damage(directory) == f"{missing} is missing"
    assert read_sealed_step(str(directory)) == (0, f"{missing} is missing")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_number_of_workers_that_was_changed_is_seen(make_sealed, num_workers):
    directory = make_sealed("two", 6)
    (directory / "progress.json").write_text(json.dumps({"step": 6, "num_workers": num_workers}))
    (directory / "seal-1.json").unlink()
    assert find_damage(directory) == "progress.json was cut or changed"


@pytest.mark.parametrize("text", ['{"step": 6, "num_w', "{}", "[]"])
def test_a_note_of_the_workers_that_is_not_one_is_damage(make_sealed, text):
    directory = make_sealed("two", 6)
    (directory / "progress.json").write_text(text)
    assert find_damage(directory) == "progress.json is not whole"


# ---- the list


@pytest.fixture(params=["path", "s3"])
def address(request, tmp_path):
    """The directory of a run, on a disk or in an object store."""
    if request.param == "path":
        return str(tmp_path / "storage" / "run")
    request.getfixturevalue("object_store").create_bucket(Bucket="bucket")
    return f"s3://bucket/{tmp_path.name}/run"


def test_a_list_that_was_cut_is_made_anew_by_step_and_what_is_not_sealed_comes_first(
    make_sealed, address, caplog
):
    """By step, not by name: a name is the clock of a node, which another's may be behind."""
    steps = {"checkpoint_4": 6, "checkpoint_2": 9, "checkpoint_3": 12}
    for name, step in steps.items():
        upload_directory(make_sealed(name, step), join(address, name))
    upload_directory(make_sealed("checkpoint_5", 15, saved_by=(0,)), join(address, "checkpoint_5"))
    write_bytes(join(address, SNAPSHOT), TORN)

    mend_snapshot(address)
    listed = json.loads(read_bytes(join(address, SNAPSHOT)))
    expected = [{"checkpoint_dir_name": "checkpoint_5", "metrics": {"step": 0}}]
    expected += [{"checkpoint_dir_name": name, "metrics": {"step": step}} for name, step in steps.items()]
    assert listed["checkpoint_results"] == expected
    assert listed["latest_checkpoint_result"] == expected[-1]
    assert listed["checkpoint_report_indices"] == [0, 1, 2, 3]
    assert listed["current_report_index"] == 4
    assert "it is made anew, its last checkpoint is of step 12" in caplog.text


def test_a_whole_list_is_left_as_it_is_and_none_is_made_where_none_was(make_sealed, tmp_path):
    make_sealed("checkpoint_1", 6)
    mend_snapshot(str(tmp_path))
    assert not (tmp_path / SNAPSHOT).exists(), "what nobody committed is listed"
    (tmp_path / SNAPSHOT).write_text('{"checkpoint_results": []}')
    mend_snapshot(str(tmp_path))
    assert (tmp_path / SNAPSHOT).read_text() == '{"checkpoint_results": []}'


def test_a_list_that_was_cut_with_no_checkpoint_beside_it_is_removed(address, caplog):
    write_bytes(join(address, SNAPSHOT), TORN)
    mend_snapshot(address)
    assert not exists(join(address, SNAPSHOT))
    assert "training starts anew" in caplog.text

"""A pool in a bucket: the one that a disk has, resumed alike, and a chunk that was cut is refused alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from delia.errors import StoreError
from delia.flow.workspace import Workspace
from delia.store.pools import Pool

BUCKET = "pools"


@pytest.fixture
def client(object_store: Any) -> Any:
    """A client of a bucket that counts the versions of an object."""
    object_store.create_bucket(Bucket=BUCKET)
    object_store.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    return object_store


@pytest.fixture
def remote(client: Any, space: Workspace) -> Workspace:
    """The workspace `space` in the bucket, whose content outlives its server."""
    return dataclasses.replace(space, output_dir=f"s3://{BUCKET}{space.output_dir}")


def list_objects(client: Any, space: Workspace, folder: str) -> dict[str, tuple[str, str]]:
    """Return what lies in a folder of a workspace: key -> version and ETag of its content."""
    prefix = space.address(folder, "").removeprefix(f"s3://{BUCKET}/")
    versions = client.list_object_versions(Bucket=BUCKET, Prefix=prefix).get("Versions", ())
    return {
        item["Key"]: (item["VersionId"], item["ETag"])
        for item in versions
        if item["IsLatest"] and not item["Key"].endswith("/")
    }


def remove(client: Any, keys: list[str]) -> None:
    client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": key} for key in keys]})


@pytest.fixture
def whole(space: Workspace, local_stage: Callable[..., Any], build: Callable[..., Pool]) -> Pool:
    """The pool on this machine's disk."""
    local_stage()
    return build(space)


def test_a_bucket_holds_the_pool_that_a_disk_does_and_what_was_rejected(
    whole, space, remote, client, local_stage, build, read_back
):
    stage = local_stage()
    pool = build(remote)
    num_answered = len(stage.answered)

    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert pool.manifest.counts == whole.manifest.counts
    rejections = read_back(remote)
    assert len(rejections) > 0
    assert rejections == read_back(space)
    assert {key.rpartition("/")[2] for key in list_objects(client, remote, "pools")} == {
        "manifest.json",
        "rejected.parquet",
        "rows.parquet",
    }
    assert build(remote) == pool
    assert len(stage.answered) == num_answered


def test_a_restart_that_finds_half_of_the_chunks_in_a_bucket_makes_the_same_pool_and_leaves_them(
    whole, remote, client, local_stage, build, read_back
):
    first = local_stage()
    build(remote)
    rejections = read_back(remote)
    chunks = list(list_objects(client, remote, "candidates"))
    remove(client, [*chunks[::2], *list_objects(client, remote, "pools")])
    kept = list_objects(client, remote, "candidates")
    second = local_stage(order_seed=1)
    pool = build(remote)

    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert read_back(remote) == rejections
    assert len(kept) >= 2
    assert kept.items() <= list_objects(client, remote, "candidates").items()
    assert 0 < len(second.answered) < len(first.answered)


@pytest.mark.parametrize("num_bytes", [0, 2000])
def test_a_chunk_that_was_cut_in_a_bucket_is_named_and_made_again_once_it_is_removed(
    whole, remote, client, local_stage, build, num_bytes
):
    local_stage()
    build(remote)
    remove(client, list(list_objects(client, remote, "pools")))
    cut = list(list_objects(client, remote, "candidates"))[2]
    data = client.get_object(Bucket=BUCKET, Key=cut)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=cut, Body=data[:num_bytes])
    with pytest.raises(StoreError, match=f"'s3://{BUCKET}/{cut}' is not .*; remove it and run its job again"):
        build(remote)
    assert list_objects(client, remote, "pools") == {}
    remove(client, [cut])

    assert build(remote).rows == whole.rows

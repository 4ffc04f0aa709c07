"""Datasets of the hub: the real client against a server that speaks as the hub does, as far as it is asked."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delia.errors import TaskFileError
from delia.store.tasks import TaskConfig, read_import, read_task
from delia.synthesize.pipeline import batch_imported

COMMIT = "1" * 40
NAME = "org/name"


def write_shard(folder: Path, name: str, *prompts: str) -> None:
    rows = [{"prompt": text, "completion": f"about {text}"} for text in prompts]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


class Hub(ThreadingHTTPServer):
    """Serves a folder as one dataset repository with one commit."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []

    def describe(self, path: str) -> dict[str, object]:
        place = self.folder / path
        is_file = place.is_file()
        kind, size = ("file", place.stat().st_size) if is_file else ("directory", 0)
        return {"type": kind, "oid": "0" * 40, "size": size, "path": path}


class Answer(BaseHTTPRequestHandler):
    """One request to the hub."""

    server: Hub

    def log_message(self, *arguments: object) -> None:
        self.server.asked.append(self.path)

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        there = [path for path in paths if (self.server.folder / path).exists()]
        self.send(json.dumps([self.server.describe(path) for path in there]).encode())

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        kind, _, rest = path.removeprefix(f"/api/datasets/{NAME}/").partition(f"/{COMMIT}")
        if path == f"/api/datasets/{NAME}/revision/{COMMIT}":
            self.send(json.dumps({"_id": "0", "id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif kind == "tree" and (folder := self.server.folder / rest.strip("/")).is_dir():
            inside = sorted(str(item.relative_to(self.server.folder)) for item in folder.iterdir())
            self.send(json.dumps([self.server.describe(item) for item in inside]).encode())
        elif (file := self.server.folder / path.partition(f"/resolve/{COMMIT}/")[2]).is_file():
            self.send_file(file.read_bytes())
        else:
            self.send(b"{}", 404)

    def send_file(self, data: bytes) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            self.send(data, ETag='"0"', X_Repo_Commit=COMMIT)
            return
        start, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        part = data[start : end + 1]
        self.send(part, 206, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(data)}")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub on this machine, to which the client is pointed."""
    from huggingface_hub import HfFileSystem, constants

    server = Hub(tmp_path / "repository")
    server.folder.mkdir()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    yield server
    server.shutdown()  # a second time is none
    server.server_close()
    HfFileSystem.clear_instance_cache()


def read(path: str = "", **settings):
    return read_task(TaskConfig(path=f"hf://datasets/{NAME}@{COMMIT}{path}", **settings))


def test_shards_of_splits_are_read_by_name_at_a_commit(hub):
    write_shard(hub.folder, "data/train-00000-of-00002.parquet", "the fox", "the owl")
    write_shard(hub.folder, "data/train-00001-of-00002-0a1b.parquet", "the cat")
    write_shard(hub.folder, "data/validation-00000-of-00001.parquet", "the dog")
    write_shard(hub.folder, "data/unsupervised-00000-of-00001.parquet", "the bee")
    (hub.folder / "README.md").write_text("about it")

    task = read(licence="MIT")
    prompts = {split: [row.prompt[-1].content for row in rows] for split, rows in task.rows_by_split.items()}
    assert prompts == {"train": ["the fox", "the owl", "the cat"], "dev": ["the dog"], "test": []}
    assert task.name == "name"
    assert all(COMMIT in path for path in hub.asked if "/datasets/" in path)


def test_a_dataset_of_one_split_is_split_here_as_a_file_is(hub, tmp_path):
    prompts = [f"number {number}" for number in range(200)]
    write_shard(hub.folder, "train.parquet", *prompts)
    write_shard(tmp_path, "train.parquet", *prompts)
    task = read()
    assert task.rows_by_split["dev"]
    assert task.rows_by_split == read_task(TaskConfig(path=str(tmp_path / "train.parquet"))).rows_by_split


def test_one_file_of_a_dataset_is_read_alone(hub):
    write_shard(hub.folder, "more/special.parquet", "the fox")
    assert len(read("/more/special.parquet", dev_fraction=0.0, test_fraction=0.0).rows_by_split["train"]) == 1


def test_its_rows_are_a_source_of_a_pool(hub):
    write_shard(hub.folder, "data/train-00000-of-00001.parquet", "the fox", "the owl", "the cat")
    config = TaskConfig(path=f"hf://datasets/{NAME}@{COMMIT}", licence="MIT")
    batches = list(batch_imported("file", read_import(config), size=2))
    assert [len(batch.candidates) for batch in batches] == [2, 1]


@pytest.mark.parametrize("path", ["org/name", "org/name@main", "org/name/a@b", f"org/name@{COMMIT[1:]}"])
def test_a_commit_must_be_named(path):
    with pytest.raises(TaskFileError, match="named with its commit, since a branch may change under a job"):
        read_task(TaskConfig(path=f"hf://datasets/{path}"))


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "data/train-00000-of-00001.parquet"),
        ("data/train.parquet", "data/train-00000-of-00001.parquet"),
        ("data/train-00000-of-00002.parquet",),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00003.parquet"),
        ("data/validation.parquet", "data/dev.parquet", "data/train.parquet"),
    ],
)
def test_a_split_in_two_forms_or_with_a_shard_missing_is_refused(hub, names):
    for number, name in enumerate(names):
        write_shard(hub.folder, name, f"number {number}")
    with pytest.raises(TaskFileError, match="are not each shard of one form once"):
        read()


def test_what_the_hub_lacks_is_said_with_the_address(hub):
    (hub.folder / "data").mkdir()
    (hub.folder / "data" / "rows.csv").write_text("a,b")
    with pytest.raises(
        TaskFileError, match=r"hf://datasets/org/name@1+: no form of a task; .*found \['data'\]"
    ):
        read()
    with pytest.raises(TaskFileError, match=r"gone@1+: can't be read: "):
        read_task(TaskConfig(path=f"hf://datasets/org/gone@{COMMIT}"))


def test_a_hub_that_is_not_reached_is_said_so(hub):
    write_shard(hub.folder, "data/train-00000-of-00001.parquet", "the fox")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(TaskFileError, match=r"the hub can't be read: .*HF_ENDPOINT"):
        read()

"""--push-to-hub, against a hub of our own on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dualoptim import InputError, UnlearnArgs
from dualoptim.reporting import hub

ROOT = Path(__file__).resolve().parents[2]


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload needs, which remembers repositories, files, requests and tokens."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.fails: dict[str, int] = {}  # part of a path -> status
        self.role = "write"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub.requests.append((self.command, path))
        for part, status in hub.fails.items():
            if part in path:
                return self.answer({"error": f"refused with {status}"}, status)
        if path.startswith("/storage/"):
            hub.objects[path.removeprefix("/storage/")] = body
            return self.answer({})
        hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "orgs": [{"name": "Ours"}], "auth": {"accessToken": {"role": hub.role}}})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            there = name in hub.private
            private = wanted.get("private", wanted.get("visibility") == "private")
            hub.private.setdefault(name, private)
            return self.answer({"url": f"{hub.url}/{name}"}, 409 if there else 200)
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path.endswith("/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/storage/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        _, _, _, owner, name, *rest = [*path.split("/"), ""]
        repository = f"{owner}/{name}"
        if rest[:1] == ["preupload"]:
            kinds = {True: "lfs", False: "regular"}
            named = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": kinds[n.endswith(".safetensors")], "shouldIgnore": False} for n in named]
            return self.answer({"files": files})
        if rest[:1] == ["commit"]:
            files = hub.files.setdefault(repository, {})
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            commit = {"commitUrl": f"{hub.url}/{repository}/commit/1", "commitOid": "1" * 40, "success": True}
            return self.answer({**commit, "hookOutput": ""})
        if self.command == "GET" and path.startswith("/api/models/") and repository in hub.private:
            known = {"id": repository, "private": hub.private[repository], "tags": [], "siblings": [], "sha": "1" * 40}
            return self.answer(known)
        return self.answer({"error": f"no such page: {path}"}, 404)

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, *_):
        pass


@pytest.fixture
def own_hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def train(server, tiny, folder, *flags, token="hf_test"):
    """train_unlearn.py in a process of its own, for which our server is the hub."""
    common = f"--model {tiny} --data demo --learning-rates 1e-4 --max-steps 1 --output-dir {folder}"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token}
    return subprocess.run(
        [sys.executable, str(ROOT / "train_unlearn.py"), *common.split(), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def test_a_run_ends_in_a_private_repository(own_hub, tiny, tmp_path):
    done = train(own_hub, tiny, tmp_path / "out", "--eval-rows", "2", "--max-new-tokens", "4", "--push-to-hub", "me/forgot")
    assert done.returncode == 0, done.stderr
    assert own_hub.private == {"me/forgot": True}
    model = tmp_path / "out" / "ME+GD_lr0.0001" / "task1" / "model"
    assert own_hub.files == {"me/forgot": {path.name: path.read_bytes() for path in model.iterdir()}}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "prompt.json"} <= set(own_hub.files["me/forgot"])
    card = own_hub.files["me/forgot"]["README.md"].decode()
    assert "| model utility" in card  # it was evaluated first
    assert str(tmp_path) not in card
    (weights,) = own_hub.objects
    assert weights == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert own_hub.tokens == {"Bearer hf_test"}
    assert f"uploaded to {own_hub.url}/me/forgot (private)" in done.stdout


def test_several_results_get_a_repository_each_public_if_asked(own_hub, tiny, tmp_path):
    flags = "--no-eval --task-list 1 2 --forget-losses GA+GD --push-to-hub me/forgot --hub-public".split()
    done = train(own_hub, tiny, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert own_hub.private == {"me/forgot-GA-GD-lr0.0001-task1": False, "me/forgot-GA-GD-lr0.0001-task2": False}
    for task in (1, 2):
        weights = (tmp_path / "out" / "GA+GD_lr0.0001" / f"task{task}" / "model" / "model.safetensors").read_bytes()
        assert own_hub.files[f"me/forgot-GA-GD-lr0.0001-task{task}"]["model.safetensors"] == weights


@pytest.mark.parametrize(
    ("fails", "says"),
    [({"/api/repos/create": 401}, "401"), ({"/commit/": 500}, "500"), ({"/storage/": 403}, "403")],
    ids=["401", "500", "storage"],
)
def test_an_upload_that_fails_keeps_the_run_and_says_so_in_one_line(fails, says, own_hub, tiny, tmp_path):
    own_hub.fails = fails
    done = train(own_hub, tiny, tmp_path / "out", "--no-eval", "--push-to-hub", "me/forgot")
    assert done.returncode == 0, done.stderr
    model = tmp_path / "out" / "ME+GD_lr0.0001" / "task1" / "model"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("--push-to-hub")]
    assert line.startswith("--push-to-hub me/forgot: upload failed (")
    assert says in line
    assert line.endswith(f"the model is in {model}, and `hf upload --private me/forgot {model}` sends it")
    assert "Traceback" not in done.stderr
    assert (model / "model.safetensors").is_file()
    assert (tmp_path / "out" / "results.csv").is_file()
    assert not own_hub.files


@pytest.fixture
def asked(own_hub, monkeypatch):
    """Our server is the hub of this process, where somebody is logged in."""
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: "hf_test")
    own = hub.huggingface_hub.HfApi(endpoint=own_hub.url, token="hf_test")
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda: own)
    return own_hub


def test_nothing_goes_to_a_public_repository_that_was_not_asked_for(asked, tiny):
    asked.private["me/forgot"] = False
    assert "me/forgot: it exists and is public; nothing was uploaded" in hub.push(tiny, "me/forgot", public=False)
    assert not asked.files
    assert not asked.objects


@pytest.mark.parametrize(
    ("name", "hub_has", "says"),
    [
        ("me/forgot", {"fails": {"whoami": 401}}, r"says no \(.*401.*\); run `hf auth login`, or drop the flag: "),
        ("me/forgot", {"fails": {"whoami": 503}}, r"says no \(.*503.*\); mend the connection, or drop the flag: "),
        ("me/forgot", {"role": "read"}, "the token of me may only read; give HF_TOKEN one that may write$"),
        ("you/forgot", {}, "me is logged in, and may write to me, Ours; give me/forgot$"),
        ("me/forgot", {"private": {"me/forgot": False}}, "it exists and is public; give --hub-public or another name$"),
        ("forgot", {"private": {"me/forgot": False}}, "it exists and is public; give --hub-public or another name$"),
    ],
)
def test_a_hub_that_would_not_take_a_model_is_told_of_before_a_run_begins(name, hub_has, says, asked, tiny, monkeypatch):
    for attribute, value in hub_has.items():
        setattr(asked, attribute, value)
    with pytest.raises(InputError, match=f"^--push-to-hub {name}: .*{says}") as error:
        hub.check_push(UnlearnArgs(model=str(tiny), push_to_hub=name))
    assert "\n" not in str(error.value)
    assert not any("create" in path for _, path in asked.requests)


@pytest.mark.parametrize("name", ["me/new", "new", "ours/new", "me/mine", "mine", "gpt2"])
def test_a_hub_that_would_take_a_model_is_asked_and_nothing_is_made_there(name, asked, tiny):
    asked.private = {"me/mine": True, "gpt2/": False}  # the second is how the server reads a path without an owner
    hub.check_push(UnlearnArgs(model=str(tiny), push_to_hub=name))
    assert {method for method, _ in asked.requests} == {"GET"}


def test_a_hub_out_of_reach_is_told_of_before_a_run_begins(asked, tiny):
    asked.shutdown()
    asked.server_close()
    with pytest.raises(InputError, match=r"says no \(.*[Rr]efused.*\); mend the connection, or drop the flag"):
        hub.check_push(UnlearnArgs(model=str(tiny), push_to_hub="me/forgot"))


def test_without_a_token_nothing_is_begun(own_hub, tiny, tmp_path):
    done = train(own_hub, tiny, tmp_path / "out", "--push-to-hub", "me/forgot", token="")
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line == "error: --push-to-hub me/forgot: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN"
    assert not (tmp_path / "out").exists()
    assert not own_hub.requests


def test_offline_is_refused_at_once(tiny, tmp_path):
    args = UnlearnArgs(model=str(tiny), data="demo", push_to_hub="me/forgot", output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, which forbids uploads; unset it"):
        hub.check_push(args)


def test_names_that_grow_too_long_are_refused(tiny):
    name = "me/" + "a" * 80
    assert hub.repositories(UnlearnArgs(model=str(tiny), push_to_hub=name)) == {("ME+GD", 1e-5, "forget05", 1): name}
    with pytest.raises(InputError, match="give a shorter or other name"):
        hub.check_push(UnlearnArgs(model=str(tiny), push_to_hub=name, task_list=(1, 2)))

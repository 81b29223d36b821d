"""A Hub on the loopback: what huggingface_hub needs to publish and fetch models, in memory, in a thread.

Only the calls that huggingface_hub 2.4 makes for models, without its chunk store (`HF_HUB_DISABLE_XET=1`).
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class Repository:
    """Commits are whole trees, {path: bytes}; a branch is a name of one."""

    def __init__(self, private: bool):
        self.private = private
        self.trees, self.messages, self.branches = {}, {}, {}
        self.branches["main"] = self.commit({}, "initial commit")

    def commit(self, tree, message):
        sha = hashlib.sha1(f"{len(self.trees)}{message}{sorted(tree)}".encode()).hexdigest()
        self.trees[sha], self.messages[sha] = tree, message
        return sha

    def resolve(self, revision):
        sha = self.branches.get(revision, revision)
        return sha if sha in self.trees else None

    def files(self, revision="main"):
        return self.trees[self.branches[revision]]


class HubEndpoint:
    """`with HubEndpoint() as hub:` serves `hub.url`; `hub.repositories` is what was published.

    Attributes:
        lose_uploads: of so many large files the connection breaks in the middle.
        requests: "METHOD path" of everything asked, in order.
    """

    def __init__(self):
        self.repositories, self.large_files, self.requests = {}, {}, []
        self.lose_uploads = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def environment(self, folder, token=TOKEN):
        """Environment variables of a process that uses this Hub, with its caches in `folder`."""
        fields = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return fields | ({"HF_TOKEN": token} if token else {})

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: HubEndpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer("POST", body)

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_PUT(self):
        self.hub.requests.append(f"PUT {self.path}")
        length = int(self.headers["Content-Length"])
        if self.hub.lose_uploads:
            self.hub.lose_uploads -= 1
            self.rfile.read(length // 2)
            self.connection.close()
            self.close_connection = True
            return
        self.hub.large_files[self.path.rsplit("/", 1)[1]] = self.rfile.read(length)
        self.send(200)

    def answer(self, method, body=b""):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        for pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                return action(self, body, *match.groups())
        self.fail(404, "EntryNotFound", f"the test endpoint does not know {path}")

    def send(self, status, content=b"", headers=None):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {})
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status, code, message):
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def signed_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name):
        """The repository, or None after an answer; a private one does not exist for strangers."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.signed_in):
            self.fail(404 if self.signed_in else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def whoami(self, body):
        if not self.signed_in:
            return self.fail(401, "", "Invalid user token")
        return self.send(200, {"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        if not self.signed_in:
            return self.fail(401, "", "Invalid username or password.")
        fields = json.loads(body)
        name = f"{fields.get('organization') or 'tester'}/{fields['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this model repo", **url})
        private = fields.get("private") or fields.get("visibility") == "private"  # by version of huggingface_hub
        self.hub.repositories[name] = Repository(bool(private))
        return self.send(200, url)

    def branch(self, body, name, branch):
        repository = self.repository(name)
        if repository is None:
            return
        if branch in repository.branches:
            return self.fail(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.send(200, {})

    def validate(self, body):
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, body, name, revision):
        if self.repository(name) is None:
            return
        files = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith((".safetensors", ".bin", ".pt")) else "regular",
                "shouldIgnore": False,
            }
            for entry in json.loads(body)["files"]
        ]
        self.send(200, {"files": files})

    def batch(self, body, name):
        objects = [
            {
                **entry,
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}},
            }
            for entry in json.loads(body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def commit(self, body, name, revision):
        repository = self.repository(name)
        if repository is None:
            return
        if not self.signed_in:
            return self.fail(403, "", "You need write access")
        if revision not in repository.branches:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        tree, message = dict(repository.files(revision)), ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                tree[value["path"]] = self.hub.large_files[value["oid"]]
            elif entry["key"] == "deletedFile":
                tree.pop(value["path"], None)
        sha = repository.branches[revision] = repository.commit(tree, message)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def at_revision(self, name, revision):
        repository = self.repository(name)
        if repository is None:
            return None, None
        sha = repository.resolve(revision)
        if sha is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None, None
        return sha, repository

    def information(self, body, name, revision="main"):
        sha, repository = self.at_revision(name, revision)
        if sha is None:
            return
        siblings = [{"rfilename": path} for path in repository.trees[sha]]
        card = repository.trees[sha].get("README.md", b"").decode()
        found = {key: re.search(rf"^{key}: (.+)$", card, re.MULTILINE) for key in ("pipeline_tag", "library_name")}
        fields = {"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings}
        self.send(200, fields | {"tags": []} | {key: match[1] for key, match in found.items() if match})

    def tree(self, body, name, revision, folder=""):
        sha, repository = self.at_revision(name, revision)
        if sha is None:
            return
        files = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in repository.trees[sha].items()
            if path.startswith(folder)
        ]
        self.send(200, files)

    def file(self, body, name, revision, path):
        sha, repository = self.at_revision(name, revision)
        if sha is None:
            return
        content = repository.trees[sha].get(path)
        if content is None:
            return self.fail(404, "EntryNotFound", f"no file {path}")
        etag = hashlib.sha256(content).hexdigest()
        self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "none"})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    (rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"/api/models/{NAME}/tree/([^/]+)/(.+)", Handler.tree),
    (rf"/api/models/{NAME}/revision/(.+)", Handler.information),
    (rf"/api/models/{NAME}", Handler.information),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.file),
]

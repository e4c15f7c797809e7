"""Local servers for the tests: files with faults on demand, and a stand-in for the Hub."""

import contextlib
import gzip
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40


class FileServer(ThreadingHTTPServer):
    """Serves a folder, with byte ranges.

    `fault(path, begin, end)` is asked before each GET of a file; it returns what goes wrong:
    None, an HTTP status, the bytes that the file has instead, or a name: "drop", "short", "stall",
    "garbage", "long", "cut", "loop"; of replies with the whole file "no-range", "chunked", "gzip";
    of others "page", "error"; of parts "elsewhere", "no-total", "untold", "gzip-part". `cached` is
    what a cache on the way takes the file to be, until a request does without it.
    """

    daemon_threads = True

    def __init__(self, folder: Path, fault=lambda path, begin, end: None):
        self.folder, self.fault = folder, fault
        self.faults, self.requests, self.lock = 0, [], threading.Lock()
        self.cached: bytes | None = None
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients hang up on faults

    def find(self, path: str) -> Path | None:
        """The file of a URL's path."""
        file = self.folder / path.lstrip("/")
        return file if file.is_file() else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.requests.append((self.command, self.path))
        api = server.api(self, path) if isinstance(server, HubServer) else None
        if api is not None:
            return self.reply(*api)
        file = server.find(path)
        if file is None:
            return self.reply(404, b"not found", {"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT}
        begin, last = 0, len(body) - 1
        span = self.headers.get("Range", "").removeprefix("bytes=")
        if span:
            first, end = span.split("-")
            begin, last = int(first), int(end or last)
        with server.lock:
            fault = server.fault(path, begin, min(last + 1, len(body)))
            server.faults += fault is not None
        if isinstance(fault, int):
            return self.reply(fault, b"fault")
        if fault == "page":
            return self.reply(200, b"<html>login</html>", {"Content-Type": "text/html; charset=x"})
        if fault == "error":
            return self.reply(200, b'{"error": "busy"}\n', {"Content-Type": "application/json"})
        if fault == "loop":
            return self.reply(302, b"", {"Location": self.path})
        if isinstance(fault, bytes):
            body = fault
        elif server.cached is not None and self.headers.get("Cache-Control") != "no-cache":
            body = server.cached
        if fault in ("gzip", "gzip-part"):
            body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        end, total = min(last + 1, len(body)), "*" if fault == "no-total" else len(body)
        if fault in ("no-range", "chunked", "gzip") or not span:
            status, part = 200, body
        elif begin >= len(body):
            return self.reply(416, b"", {"Content-Range": f"bytes */{total}"})
        else:
            status, part = 206, body[begin:end]
            first = begin + (fault == "elsewhere")
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{total}"
        if fault == "untold":
            headers.pop("Content-Range", None)
        if fault == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        if fault == "cut":  # as if the file ended at a line's end
            part = part[: part.rfind(b"\n", 0, len(part) // 2) + 1]
        if fault == "short":  # an honest reply, but of less than was asked for
            part = part[: len(part) // 2]
        if fault == "garbage":
            part = (b"<html>an error page\n" * (len(part) // 19 + 1))[: len(part)]
        if fault == "drop":
            headers["Content-Length"] = str(len(part))
            part = part[: len(part) // 2]
        if fault == "long":  # a wrong length
            headers["Content-Length"] = str(len(part) + 100)
        if fault == "stall":
            time.sleep(server.stall)
        self.reply(status, part, headers)
        if fault in ("drop", "long"):
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def reply(self, status: int, body: bytes, headers: dict | None = None):
        headers = {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **(headers or {})}
        if "Transfer-Encoding" in headers:
            del headers["Content-Length"]
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class HubServer(FileServer):
    """A Hub with the data sets FOLDER/ORG/NAME; `gated` ones ask for a token."""

    gated: tuple[str, ...] = ()

    def find(self, path: str) -> Path | None:
        parts = path.strip("/").split("/")  # datasets/ORG/NAME/resolve/COMMIT/FILE
        if parts[0] != "datasets" or "resolve" not in parts:
            return None
        at = parts.index("resolve")
        return super().find("/".join(parts[1:at] + parts[at + 2 :]))

    def api(self, handler: Handler, path: str) -> tuple | None:
        """Status, body and headers of a request to the API."""
        parts = path.strip("/").split("/")
        if parts[0] == "datasets" and "/".join(parts[1:3]) in self.gated:
            return 403, b"{}", {"X-Error-Code": "GatedRepo"}
        if parts[:2] != ["api", "datasets"]:
            return None
        name, rest = "/".join(parts[2:4]), parts[4:]
        root = self.folder / name
        if not root.is_dir():
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if name in self.gated and not handler.headers.get("Authorization"):
            return 403, b"{}", {"X-Error-Code": "GatedRepo"}
        files = sorted(p for p in root.rglob("*") if p.is_file())
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": p.relative_to(root).as_posix()} for p in files]
            facts = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False}
            return self.as_json({**facts, "tags": [], "downloads": 0, "gated": False})
        if rest[0] == "paths-info":
            return self.as_json(self.entries(root, handler))
        if rest[0] == "tree":
            folder = root / "/".join(rest[2:])
            if not folder.is_dir():
                return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
            recursive = "recursive=true" in handler.path.lower()
            paths = sorted(folder.rglob("*") if recursive else folder.iterdir())
            return self.as_json([self.entry(root, p) for p in paths])
        return 404, b"{}", {"X-Error-Code": "EntryNotFound"}

    def entries(self, root: Path, handler: Handler) -> list[dict]:
        text = handler.rfile.read(int(handler.headers["Content-Length"])).decode()
        if text.startswith("{"):
            wanted = json.loads(text)["paths"]
        else:
            wanted = [unquote(p.removeprefix("paths=")) for p in text.split("&") if "paths=" in p]
        return [self.entry(root, root / path) for path in wanted if (root / path).exists()]

    def entry(self, root: Path, path: Path) -> dict:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        oid = hashlib.sha1(str(path).encode()).hexdigest()
        return {"type": kind, "path": path.relative_to(root).as_posix(), "size": size, "oid": oid}

    def as_json(self, value) -> tuple:
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


@contextlib.contextmanager
def serve(server: FileServer):
    """Run a server in a thread."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the container of Inference Endpoints: its import, its one request at a time, its HTTP 400.

    python -P tests/environments/soak/container.py FOLDER --host 127.0.0.1 --port 5000 --public 127.0.0.5

POST / takes JSON or an image/* body and answers JSON; GET /health answers when the model is loaded. Only FOLDER is
imported from, as in the container.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image


def import_handler(folder: Path) -> object:
    """Import handler.py from the folder, which comes first on sys.path."""
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = module
    spec.loader.exec_module(module)
    return module


def read_body(data: bytes, kind: str) -> object:
    """Deserialise a body as the container does.

    Raises:
        ValueError: if it is not JSON.
    """
    if kind.startswith("image/"):
        return {"inputs": Image.open(io.BytesIO(data))}
    try:
        return json.loads(data)
    except ValueError:
        raise ValueError("The body is not JSON.") from None


def make_service(handler: object) -> type[BaseHTTPRequestHandler]:
    """The HTTP side; connections are kept open, and each has a thread."""
    one_at_a_time = threading.Semaphore(1)

    class Service(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments: object) -> None:
            pass

        def reply(self, status: int, answer: object) -> None:
            data = json.dumps(answer, allow_nan=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(200, {"status": "ok"})

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                body = read_body(data, self.headers["Content-Type"])
                with one_at_a_time:
                    answer = handler(body)
            except ValueError as error:
                self.reply(400, {"error": str(error)})
            else:
                self.reply(200, answer)

    return Service


def main() -> None:
    """Load the model, then serve until interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--public", default="", help="a loopback address to take for a public one")
    options = parser.parse_args()
    public = [options.public] if options.public else []
    handler = import_handler(options.folder).EndpointHandler(str(options.folder), public_loopback=public)
    with contextlib.suppress(KeyboardInterrupt):
        ThreadingHTTPServer((options.host, options.port), make_service(handler)).serve_forever()


if __name__ == "__main__":
    main()

"""A real S3 server on this machine (moto's), and faults between it and its clients."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pytest

SECRET = "PlantedSecretAccessKey7531"
KEY_ID = "AKIAPLANTEDKEYID"


class Server:
    """`url` is that of an empty bucket. `fault` may answer a request in the place of the server.

    fault(method, path, body) returns "" to let a request through, or one of: error (500), reset (the connection),
    truncated or damaged (the body of the answer), slow (0.1 s).
    """

    def __init__(self, app: Any, port: int, bucket: str) -> None:
        self.app, self.bucket, self.url = app, bucket, f"s3://{bucket}"
        self.address = f"http://127.0.0.1:{port}"
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.requests: list[str] = []
        self.faults = 0

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"])
        self.requests.append(f"{method} {path}")
        kind = self.fault(method, path)
        self.faults += bool(kind)
        if kind == "error":
            start("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if kind == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if kind == "forbidden":  # the answer of AWS holds the key
            body = f"<Error><AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId></Error>".encode()
            start("403 Forbidden", [("Content-Length", str(len(body)))])
            return [body]
        if kind == "slow":
            time.sleep(0.1)
        if kind in ("truncated", "damaged"):
            body = b"".join(self.app(environ, start))
            return [body[: len(body) // 2] if kind == "truncated" else bytes(one ^ 1 for one in body)]
        return self.app(environ, start)

    @cached_property
    def client(self) -> Any:
        """A client of another library, which no fault meets when `fault` is not set."""
        import boto3

        return boto3.client("s3")

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Every object below a prefix, as the server holds it, by its name below the prefix."""
        return {name.removeprefix(prefix): key.value for name, key in self._keys(prefix)}

    def clear(self, prefix: str) -> None:
        """Delete every object below a prefix."""
        for name, _ in self._keys(prefix):
            self.client.delete_object(Bucket=self.bucket, Key=name)

    def _keys(self, prefix: str) -> list[tuple[str, Any]]:
        from moto.s3.models import s3_backends

        keys = s3_backends["123456789012"]["aws"].buckets[self.bucket].keys
        return [(name, key) for name, key in list(keys.items()) if name.startswith(prefix)]

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=name, Body=data)


@contextmanager
def s3_server() -> Iterator[Server]:
    """Run a server, with the environment that leads clients to it. The servers of a process share their buckets."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

    holder: list[Server] = []
    web = make_server("127.0.0.1", 0, lambda *call: holder[0](*call), threaded=True, request_handler=Quiet)
    holder.append(Server(DomainDispatcherApplication(create_backend_app), web.port, f"bucket-{web.port}"))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    place = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    place |= {"AWS_ENDPOINT_URL": holder[0].address, "AWS_ALLOW_HTTP": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        holder[0].client.create_bucket(Bucket=holder[0].bucket)
        try:
            yield holder[0]
        finally:
            web.shutdown()
            web.server_close()

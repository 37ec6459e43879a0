"""Addresses that are none, and servers whose certificate a private authority has signed."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_gkd.config.servers import parse_servers
from megatron_gkd.errors import ConfigError, RolloutError
from megatron_gkd.rollout.client import ServerClient
from megatron_gkd.rollout.engines import server_urls

NONE = ["http://127.0.0.1:99999", "http://[::1", "http://a:b", "http://a:0", "http://]", "http://a:-1", "http://[x]:1"]


@pytest.mark.parametrize("url", NONE)
def test_what_is_no_address_is_one_line(url: str) -> None:
    with pytest.raises(RolloutError, match="is not the URL of a server"):
        ServerClient(url, timeout_s=1)
    if url != "http://[x]:1":
        with pytest.raises(ConfigError, match="--teacher_model_server is http:"):
            parse_servers(url)
    if url != "http://a:0":
        with pytest.raises(ConfigError, match="--vllm_server_host http:"):
            server_urls(url, 8000)


def test_a_bad_address_with_a_password_is_not_shown() -> None:
    for make in (
        lambda: ServerClient("http://me:sesame@host:99999", timeout_s=1),
        lambda: ServerClient("http://me:sesame@host:80", timeout_s=1),
        lambda: server_urls("http://me:sesame@host:99999", 8000),
        lambda: parse_servers("http://me:sesame@host:99999"),
    ):
        with pytest.raises((RolloutError, ConfigError)) as error:
            make()
        assert "sesame" not in str(error.value)


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'"well"')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def private(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server's URL, and the file of the authority that signed its certificate (itself)."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    certificate, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://localhost:{server.server_address[1]}", certificate
    server.shutdown()
    server.server_close()


def ask(url: str) -> object:
    client = ServerClient(url, timeout_s=30, retry_s=0)
    try:
        return client.get("/health", "say whether it is well")
    finally:
        client.close()


def test_a_private_authority(private: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url, authority = private
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    with pytest.raises(RolloutError, match=r"CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
        ask(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    assert ask(url) == "well"
    with pytest.raises(RolloutError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(url.replace("localhost", "127.0.0.1"))  # another name than the certificate's
    for bad in (tmp_path / "none", tmp_path / "key.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(bad))
        with pytest.raises(ConfigError, match="the certificates in SSL_CERT_FILE or SSL_CERT_DIR"):
            ask(url)

"""What is asked for on the command line, and what is refused before any worker starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.engine.options import CertificateError, EngineOptions, engine_options
from tests.support.running import run_command
from tests.support.wire import certificate

PASSPHRASE = b"a passphrase"


def write_key(path: Path, *, passphrase: bytes | None = None) -> Path:
    """A new key, which belongs to no certificate."""
    hidden: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        hidden = serialization.BestAvailableEncryption(passphrase)
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(encoding, form, hidden))
    return path


def test_without_a_certificate_there_is_no_tls():
    assert engine_options("ours", None, None) == EngineOptions()
    assert EngineOptions().arguments() == ["--engine", "ours"]


def test_a_certificate_and_its_key_reach_the_worker_wherever_it_runs(monkeypatch):
    certfile, keyfile = certificate()
    monkeypatch.chdir(certfile.parent)
    options = engine_options("stock", Path(certfile.name), Path(keyfile.name))
    assert options.tls
    wanted = ["--engine", "stock", "--certfile", str(certfile), "--keyfile", str(keyfile)]
    assert options.arguments() == wanted


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (lambda folder: (certificate()[0], None), "both, or none"),
        (lambda folder: (None, certificate()[1]), "both, or none"),
        (lambda folder: (folder / "none", certificate()[1]), "none cannot be read: No such file"),
        (lambda folder: (certificate()[0], folder), "cannot be read: Is a directory"),
        (lambda folder: (certificate()[0], write_key(folder / "other")), "is not the key of"),
        (
            lambda folder: (certificate()[0], write_key(folder / "key", passphrase=PASSPHRASE)),
            "PEM, no passphrase",
        ),
        (lambda folder: certificate()[::-1], "are not a certificate and its key"),
    ],
    ids=["no key", "no certificate", "missing", "folder", "another's", "passphrase", "swapped"],
)
def test_files_that_are_no_certificate_and_its_key_are_named(
    tmp_path: Path, files: Callable[[Path], tuple[Path | None, Path | None]], words: str
):
    with pytest.raises(CertificateError, match=words):
        engine_options("ours", *files(tmp_path))


@pytest.mark.parametrize("command", ["serve", "dev"])
def test_a_wrong_certificate_is_said_before_anything_starts(command: str, tmp_path: Path):
    files = ["--certfile", str(certificate()[0]), "--keyfile", str(write_key(tmp_path / "other"))]
    options = ["--data-dir", str(tmp_path / "data")] if command == "dev" else []
    done = run_command(command, *files, *options)
    assert done.returncode == 2
    assert done.stderr.startswith("sottovoce: ") and "is not the key of" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()

"""What a worker speaks with: whose HTTP, and under which certificate. One value from the command
line through the supervisor to the worker.
"""

import ssl
from pathlib import Path
from typing import Literal

import msgspec

EngineName = Literal["ours", "stock"]
"""Whose HTTP/1.1 on plain connections. TLS and HTTP/2 are Hypercorn's either way."""


class CertificateError(Exception):
    """Why there can be no TLS, for a person; it names files and repeats nothing of them."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    engine: EngineName = "ours"
    certfile: Path | None = None
    """PEM: the certificate and what leads from it to the authority."""
    keyfile: Path | None = None
    """PEM, without a passphrase. Both files or none."""

    @property
    def tls(self) -> bool:
        return self.certfile is not None

    def arguments(self) -> list[str]:
        """The worker's."""
        arguments = ["--engine", self.engine]
        if self.certfile is not None and self.keyfile is not None:
            arguments += ["--certfile", str(self.certfile), "--keyfile", str(self.keyfile)]
        return arguments


def engine_options(
    engine: EngineName, certfile: Path | None, keyfile: Path | None
) -> EngineOptions:
    """What was asked for, and that it can be: workers would only say so one by one.

    Raises:
        CertificateError: one file without the other, or no certificate and its key in them.
    """
    if certfile is None and keyfile is None:
        return EngineOptions(engine=engine)
    if certfile is None or keyfile is None:
        raise CertificateError("--certfile and --keyfile: both, or none")
    certfile, keyfile = certfile.resolve(), keyfile.resolve()
    for file in (certfile, keyfile):
        try:
            file.read_bytes()
        except OSError as error:
            raise CertificateError(f"{file} cannot be read: {error.strerror}") from None
    try:
        # An empty passphrase: OpenSSL would ask the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise CertificateError(f"{keyfile} is not the key of {certfile}") from None
        raise CertificateError(
            f"{certfile} and {keyfile} are not a certificate and its key: PEM, no passphrase"
        ) from None
    return EngineOptions(engine=engine, certfile=certfile, keyfile=keyfile)

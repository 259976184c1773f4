"""TLS from PEM files: what servers show and ask for, what channels show and trust, and files that are replaced."""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import grpc
import structlog

from alto_common.configuration import ServiceSettings

Part: TypeAlias = Literal["certificate", "key", "roots"]

CERTIFICATE_CURE = "give a PEM file with the certificate first and those that lead to its root after it"
KEY_CURE = "give the PEM file of the certificate's private key, not encrypted"
ROOTS_CURE = "give a PEM file with the certificates of the authorities that the services' own are signed by"

log = structlog.get_logger("alto.tls")


class TlsError(Exception):
    """PEM files that cannot be used: `part` says which of them, `cure` what helps."""

    def __init__(self, part: Part, message: str, cure: str) -> None:
        super().__init__(message)
        self.part = part
        self.cure = cure


@dataclass(frozen=True)
class TlsContent:
    """What lies in TLS files: the key belongs to the first certificate."""

    certificate: bytes
    key: bytes = field(repr=False)
    roots: bytes | None


@dataclass(frozen=True)
class TlsFiles:
    """A certificate (with its chain), its key, and the roots that sign the certificates of peers; all PEM.

    A server with roots takes callers only that show a certificate signed by them. A channel shows its certificate to
    servers that ask for one, and verifies theirs by the roots; without, by the public authorities that gRPC knows.
    """

    certificate: Path
    key: Path
    roots: Path | None = None

    def without_roots(self) -> TlsFiles:
        """Return the same for a server that asks its callers for no certificate."""
        return replace(self, roots=None)

    def read(self) -> TlsContent:
        """Return what lies in the files, once it is known to fit together. Raises TlsError."""
        before = self.stamps()
        content = TlsContent(
            certificate=_read("certificate", self.certificate, CERTIFICATE_CURE),
            key=_read("key", self.key, KEY_CURE),
            roots=None if self.roots is None else _read("roots", self.roots, ROOTS_CURE),
        )
        _check_certificates("certificate", self.certificate, CERTIFICATE_CURE)
        if self.roots is not None:
            _check_certificates("roots", self.roots, ROOTS_CURE)
        self._check_pair()
        if self.stamps() != before:
            raise TlsError("certificate", "its files were replaced while they were read", "try again")
        return content

    def stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return what tells whether the files have been replaced; None for one that is not there."""
        return tuple(_stamp(path) for path in (self.certificate, self.key, self.roots) if path is not None)

    def _check_pair(self) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                message = f"{self.key} is not the key of the certificate in {self.certificate}"
                raise TlsError("key", message, "give the two that were made together") from error
            raise TlsError("key", f"{self.key} holds no private key in PEM", KEY_CURE) from error
        except (OSError, ValueError) as error:
            raise TlsError("key", f"{self.key}: {error}", KEY_CURE) from error


class CurrentTls:
    """The newest content of TLS files that could be used. Threads may share it: gRPC asks from its own.

    Raises TlsError when the files cannot be used to begin with. Files that cannot be used later are logged, once.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamps = files.stamps()
        self._content = files.read()

    def newest(self) -> TlsContent:
        """Return the content; files that have been replaced are read."""
        with self._lock:
            stamps = self._files.stamps()
            if stamps != self._stamps:
                self._stamps = stamps
                self._take_over()
            return self._content

    def _take_over(self) -> None:
        try:
            self._content = self._files.read()
        except TlsError as error:
            log.warning(
                "TLS files were replaced and cannot be used; those before are kept",
                error=str(error),
                cure=error.cure,
                certificate=str(self._files.certificate),
            )
        else:
            log.info("TLS files were replaced and are used from now on", certificate=str(self._files.certificate))


def tls_files(
    settings: ServiceSettings, name: str, certificate: Path | None, key: Path | None, roots: Path | None = None
) -> TlsFiles | None:
    """Return the files of the settings `name`_certificate, `name`_key, `name`_roots, known to be sound, None without.

    Raises SettingsError that names the variable at fault.
    """
    if certificate is None or key is None:
        return None
    files = TlsFiles(certificate, key, roots)
    try:
        files.read()
    except TlsError as error:
        with settings.needed(f"{name}_{error.part}", error.cure):
            raise
    return files


def service_tls(settings: ServiceSettings) -> TlsFiles | None:
    """Return the service's own files, None when it has none and speaks plaintext. Raises SettingsError."""
    return tls_files(settings, "tls", settings.tls_certificate, settings.tls_key, settings.tls_roots)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return what a server listens with; each new connection gets what lies in the files then. Raises TlsError."""
    current = CurrentTls(files)
    shown = current.newest()

    def replaced() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        newest = current.newest()
        if newest is shown:
            return None
        shown = newest
        return _configuration(newest)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        replaced,  # type: ignore[arg-type]  # None says that nothing was replaced
        require_client_authentication=files.roots is not None,
    )


def channel_credentials(content: TlsContent) -> grpc.ChannelCredentials:
    """Return what a channel connects with."""
    return grpc.ssl_channel_credentials(content.roots, content.key, content.certificate)


def _configuration(content: TlsContent) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(content.key, content.certificate)], content.roots)


def _read(part: Part, path: Path, cure: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(part, f"{path}: {error.strerror}", cure) from error


def _check_certificates(part: Part, path: Path, cure: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # an SSLError is one
        raise TlsError(part, f"{path} holds no certificate in PEM", cure) from error


def _no_password() -> str:
    """Keep OpenSSL from asking at a terminal for an encrypted key's."""
    raise ValueError("it is encrypted")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns

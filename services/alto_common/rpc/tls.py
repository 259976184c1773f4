"""TLS from PEM files: what servers show and ask for, what channels show and trust, and files that are replaced."""

from __future__ import annotations

import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import grpc
import structlog

from alto_common.configuration import ServiceSettings

Part: TypeAlias = Literal["certificate", "key", "roots"]
Stamp: TypeAlias = tuple[int, ...]

CERTIFICATE_CURE = "give a PEM file with the certificate first and those that lead to its root after it"
KEY_CURE = "give the PEM file of the certificate's private key, not encrypted"
# What gRPC's TLS takes: others pass its start and fail every handshake.
LEAST_RSA_BITS = 2048
CURVES = ("secp256r1", "secp384r1")
KIND_CURE = f"make one of RSA with {LEAST_RSA_BITS} bits or more, or of ECDSA over P-256 or P-384"
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

    def stamps(self) -> tuple[Stamp | None, ...]:
        """Return what tells whether the files have been replaced; None for one that is not there."""
        return tuple(_stamp(path) for path in (self.certificate, self.key, self.roots) if path is not None)

    def _check_pair(self) -> None:
        _check_kind(self.key)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                message = f"{self.key} is not the key of the first certificate in {self.certificate}"
                raise TlsError(
                    "key", message, "give the two that were made together, that certificate first"
                ) from error
            raise TlsError("key", f"{self.key} cannot be used ({error.reason})", KEY_CURE) from error
        except (OSError, ValueError) as error:
            raise TlsError("key", f"{self.key}: {error}", KEY_CURE) from error


class CurrentTls:
    """The newest content of TLS files that could be used. Threads may share it: gRPC asks from its own.

    Raises TlsError when the files cannot be used to begin with. Files that cannot be used later are read again each
    time, until they can be; what is wrong with them is logged when it changes.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamps = files.stamps()
        self._content = files.read()
        self._fault = ""

    def newest(self) -> TlsContent:
        """Return the content; files that have been replaced are read."""
        with self._lock:
            stamps = self._files.stamps()
            if stamps != self._stamps:
                self._take_over(stamps)
            return self._content

    def _take_over(self, stamps: tuple[Stamp | None, ...]) -> None:
        try:
            self._content = self._files.read()
        except TlsError as error:
            if str(error) != self._fault:
                log.warning(
                    "TLS files were replaced and cannot be used; those before are kept",
                    error=str(error),
                    cure=error.cure,
                    certificate=str(self._files.certificate),
                )
            self._fault = str(error)
        else:
            self._stamps, self._fault = stamps, ""
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
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with suppress(OSError):  # an SSLError is one
        context.load_verify_locations(path)
    if context.cert_store_stats()["x509"] == 0:
        raise TlsError(part, f"{path} holds no certificate in PEM", cure)


def _check_kind(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except TypeError as error:
        raise TlsError("key", f"{path} is encrypted", KEY_CURE) from error
    except OSError as error:
        raise TlsError("key", f"{path}: {error.strerror}", KEY_CURE) from error
    except Exception as error:  # of many kinds, for what is no key
        raise TlsError("key", f"{path} holds no private key in PEM", KEY_CURE) from error
    if isinstance(key, rsa.RSAPrivateKey):
        fits = key.key_size >= LEAST_RSA_BITS
    else:
        fits = isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES
    if not fits:
        raise TlsError("key", f"{path} is a key of a kind that gRPC does not take", KIND_CURE)


def _no_password() -> str:
    """Keep OpenSSL from asking at a terminal for an encrypted key's."""
    raise ValueError("it is encrypted")


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # The change of its rights, too, that lets it be read.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

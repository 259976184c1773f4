"""Authorities of a test's own, and the PEM files of whom they sign for."""

import trustme
from alto_common.rpc.tls import TlsFiles


class Authority:
    """One that signs; `roots` is the file that others verify its certificates by."""

    def __init__(self, folder):
        self._folder = folder
        folder.mkdir(parents=True)
        self._authority = trustme.CA()
        self.roots = folder / "roots.pem"
        self._authority.cert_pem.write_to_path(self.roots)

    def issue(self, name, *hosts, roots=None, not_after=None):
        """Write `name`.pem and `name`.key for these hosts, in place of those there, and return the files."""
        issued = self._authority.issue_cert(*(hosts or ("127.0.0.1", "localhost")), not_after=not_after)
        files = TlsFiles(self._folder / f"{name}.pem", self._folder / f"{name}.key", roots)
        files.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(files.key)
        return files


def as_settings(files, prefix="", name="TLS"):
    """The variables that give a service these files."""
    values = {"CERTIFICATE": files.certificate, "KEY": files.key, "ROOTS": files.roots}
    return {f"{prefix}{name}_{part}": str(path) for part, path in values.items() if path is not None}

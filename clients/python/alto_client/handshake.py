"""What it means that no TLS connection came about. gRPC tells the cases apart by the words of its details alone."""

from __future__ import annotations

ROOTS_CURE = (
    "if a private authority signed it, give that authority's certificate: root_certificates, or with the command "
    "--root-certificates FILE or ALTO_ROOT_CERTIFICATES"
)
# Of a certificate that is checked, and what there is to do.
_DATES = ("expired", "not yet valid")


def handshake_fault(details: str, address: str) -> str | None:
    """Return what to tell of a handshake that every attempt will fail; None for any other failure."""
    if "WRONG_VERSION_NUMBER" in details:
        return f"{address} does not speak TLS: name it without https://, and without root certificates"
    if "Failed to create security handshaker" in details:
        return f"the certificate for {address} cannot be used: give PEM, a chain and the key of its first certificate"
    if "Hostname Verification Check failed" in details:
        return f"{address} shows a certificate for other names: name it as its certificate does"
    _, found, rest = details.partition("CERTIFICATE_VERIFY_FAILED")
    if not found:
        return None
    why = rest.strip(": ").removesuffix(": OK") or "it cannot be verified"
    cure = "who runs the server must renew it" if any(word in why for word in _DATES) else ROOTS_CURE
    return f"{address} shows a certificate that is not trusted here ({why}): {cure}"


def closed_at_once(details: str) -> bool:
    """Return whether a connection broke as one that a TLS server closes: in plaintext, or without a certificate."""
    return "Socket closed" in details or "Connection reset" in details

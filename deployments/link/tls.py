"""Encryption of the link."""

import os
import ssl


def tls_context(purpose: ssl.Purpose) -> ssl.SSLContext | None:
    """A context with Ray's own certificates if `RAY_USE_TLS` is set, else None: no encryption.

    Both ends must have a certificate that Ray's authority has signed.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    context = ssl.create_default_context(purpose, cafile=os.environ["RAY_TLS_CA_CERT"])
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    context.check_hostname = False  # Nodes are known by their addresses: the certificates name no host.
    context.verify_mode = ssl.CERT_REQUIRED
    return context

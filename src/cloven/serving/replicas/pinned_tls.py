"""Mutual TLS between the endpoint and its replicas: each side makes a key when it starts, and knows the other's certificate.

    front    key, certificate ──── certificate ───►  replica    key, certificate
             ◄──── certificate ────

Only certificates pass through Ray; private keys never leave the process that made them. Nobody else is trusted: no authority, no names.

Guarantee: whoever has neither key neither reads nor answers a request, assuming that Ray hands over the certificates as they are (who
controls Ray runs code in the zone anyway).
"""

from __future__ import annotations

import datetime
import secrets
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_VALID = datetime.timedelta(days=3650)  # it lives as long as its process
_SKEW = datetime.timedelta(days=1)  # between the clocks of the zone's machines


class Identity:
    """A key pair of this process.

    `certificate` is public, in PEM form.
    """

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"cloven-{secrets.token_hex(8)}")])
        now = datetime.datetime.now(datetime.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + _VALID)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        self.certificate = built.public_bytes(serialization.Encoding.PEM).decode()
        self._password = secrets.token_bytes(32).hex().encode()
        encrypted = serialization.BestAvailableEncryption(self._password)
        self._key = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)

    def __repr__(self) -> str:
        return "Identity(<secret>)"

    def context(self, peer: str, server: bool) -> ssl.SSLContext:
        """TLS 1.3 with the one peer that has this certificate.

        Args:
            peer: its certificate, in PEM form.
            server: whether this side accepts the connection.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the certificate itself is known
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=peer)
        with tempfile.TemporaryDirectory(
            prefix="cloven-"
        ) as folder:  # OpenSSL reads files: the key in it is encrypted, the password is not there
            path = Path(folder) / "identity.pem"
            path.write_bytes(self.certificate.encode() + self._key)
            context.load_cert_chain(path, password=self._password)
        return context

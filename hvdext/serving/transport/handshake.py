"""Both sides of a new connection prove that they know the job's token, without sending it.

    listener                                   caller
    challenge(nonce a)            ->
                                  <-           hello(nonce b, HMAC(token, "caller" a), who it is)
    welcome(HMAC(token, "listener" b))  ->

Each nonce is random, so that what was overheard proves nothing later.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Any

from hvdext.serving.transport.frames import Frame

PROTOCOL = 1  # of the frames' contents; both sides must have the same
MAX_HEADER = 1 << 14  # bytes, before the other side has proved anything


class Stranger(Exception):
    """The other side does not know the token, or does not speak this protocol."""


class Refused(Exception):
    """The listener knows the caller and does not want it; the message says why."""


def challenge() -> dict[str, Any]:
    """The listener's first frame."""
    return {"kind": "challenge", "protocol": PROTOCOL, "nonce": secrets.token_hex(16)}


def hello(token: str, challenge: Frame | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's answer to the challenge.

    Raises:
        Stranger: if the listener is no part of hvdext, or another version of it.
    """
    asked = _header(challenge, "challenge")
    if asked.get("protocol") != PROTOCOL:
        raise Stranger(
            f"the ranks must have the same hvdext: protocol {PROTOCOL} here, {asked.get('protocol')!r} there."
        )
    return {
        "kind": "hello",
        "nonce": secrets.token_hex(16),
        "proof": _proof(token, "caller", asked.get("nonce")),
        "facts": dict(facts),
    }


def check_hello(token: str, challenge: Mapping[str, Any], hello: Frame | None) -> dict[str, Any]:
    """Who is calling.

    Raises:
        Stranger: if the caller does not know the token.
    """
    answer = _header(hello, "hello")
    _check(answer, _proof(token, "caller", challenge["nonce"]))
    facts = answer.get("facts")
    if not isinstance(facts, dict):
        raise Stranger("the caller does not say who it is.")
    return facts


def welcome(token: str, hello: Frame | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The listener's answer to a caller that it wants."""
    nonce = _header(hello, "hello").get("nonce")
    return {"kind": "welcome", "proof": _proof(token, "listener", nonce), "facts": dict(facts)}


def refusal(reason: str) -> dict[str, Any]:
    """The listener's answer to a caller that it does not want."""
    return {"kind": "refusal", "reason": reason}


def check_welcome(token: str, hello: Mapping[str, Any], welcome: Frame | None) -> dict[str, Any]:
    """What the listener says about itself.

    Raises:
        Refused: if it does not want this caller.
        Stranger: if it does not know the token.
    """
    if welcome is not None and welcome.kind == "refusal":
        raise Refused(str(welcome.header.get("reason")))
    answer = _header(welcome, "welcome")
    _check(answer, _proof(token, "listener", hello["nonce"]))
    return answer["facts"]


def _header(frame: Frame | None, kind: str) -> dict[str, Any]:
    if frame is None:
        raise Stranger(f"the other side has ended the connection without a {kind}: it has another token?")
    if frame.kind != kind:
        raise Stranger(f"expected a {kind}. Received: {frame.kind!r}.")
    return frame.header


def _proof(token: str, side: str, nonce: Any) -> str:
    return hmac.new(token.encode(), f"{side} {nonce}".encode(), hashlib.sha256).hexdigest()


def _check(answer: Mapping[str, Any], proof: str) -> None:
    given = answer.get("proof")
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), proof.encode()):
        raise Stranger("the other side does not know the token.")

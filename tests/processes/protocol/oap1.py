"""Frames, records and sessions of OAP/1, as overlay-daemon/PROTOCOL.md has them."""

import json
import socket
import ssl
import struct
from collections import deque
from typing import NamedTuple

from blake3 import blake3

REQ, RESP, EVENT, START, END, ACK_REQ, COMP, APP_E2E = (1 << bit for bit in range(8))
CONTROL, PUBLISH_SUBSCRIBE = 0, 1
HEADER = struct.Struct(">IHHHH16sHQ")
MAX_FRAME = MAX_MESSAGE = 1 << 20
CHUNK = 65_536
MESSAGE, BEGIN, PIECE, GAP = range(4)
MESSAGE_ID = b"rustyonions.io overlay message id v1"
# Frames that one side may be behind with: more is the other side's fault.
MAX_WAITING = 4_096
# How long silence may last before the conversation has failed.
SILENCE_SECONDS = 20


class Frame(NamedTuple):
    flags: int
    corr_id: int
    payload: bytes = b""
    app_proto_id: int = PUBLISH_SUBSCRIBE
    tenant: bytes = bytes(16)
    cap: bytes = b""
    code: int = 0

    def encode(self):
        length = HEADER.size + len(self.cap) + len(self.payload)
        head = HEADER.pack(
            length, 1, self.flags, self.code, self.app_proto_id, self.tenant,
            len(self.cap), self.corr_id,
        )
        return head + self.cap + self.payload

    def refusal(self):
        """The error object of a refusal, its members checked against the code."""
        said = json.loads(self.payload)
        assert self.flags & ~END == RESP and self.code >= 400, self
        assert said["code"] == WORDS[self.code], said
        assert said["retryable"] == (self.code in (429, 503)), said
        assert said["corr_id"] == str(self.corr_id), said
        assert ("retry_after_ms" in said) == said["retryable"], said
        return said


WORDS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    413: "payload_too_large",
    429: "quota_exhausted",
    500: "internal",
    503: "unavailable",
}


class Envelope(NamedTuple):
    attributes: int
    topic: bytes
    origin: bytes
    incarnation: int
    sequence: int
    time_ms: int
    size: int
    hash: bytes

    def message_id(self, tenant):
        parts = (
            MESSAGE_ID, tenant, bytes([self.attributes]), self.topic, self.origin,
            struct.pack(">Q", self.incarnation), struct.pack(">Q", self.sequence),
            struct.pack(">Q", self.time_ms), self.hash,
        )
        return blake3(b"".join(struct.pack(">I", len(part)) + part for part in parts))


def envelope(data):
    """The envelope at the head of `data`, and what stands behind it."""
    topic_end = 2 + data[1]
    (origin_length,) = struct.unpack_from(">H", data, topic_end)
    origin_end = topic_end + 2 + origin_length
    numbers = struct.Struct(">QQQI32s")
    incarnation, sequence, time_ms, size, digest = numbers.unpack_from(data, origin_end)
    return (
        Envelope(
            data[0], data[2:topic_end], data[topic_end + 2 : origin_end],
            incarnation, sequence, time_ms, size, digest,
        ),
        data[origin_end + numbers.size :],
    )


def publish_records(payload):
    """The records by which a publisher hands in `payload`."""
    if len(payload) <= CHUNK:
        return [bytes([MESSAGE]) + payload]
    digest = blake3(payload)
    records = [struct.pack(">BI32s", BEGIN, len(payload), digest)]
    for index, at in enumerate(range(0, len(payload), CHUNK)):
        records.append(struct.pack(">B32sI", PIECE, digest, index) + payload[at : at + CHUNK])
    return records


class Closed(Exception):
    """The daemon closed the session."""


class Session:
    """One session: sends frames, and sorts what comes by stream."""

    def __init__(self, stream):
        self.stream = stream
        self.stream.settimeout(SILENCE_SECONDS)
        self.received = bytearray()
        self.waiting = deque()
        self.next_corr_id = 1

    def take_corr_id(self):
        taken = self.next_corr_id
        self.next_corr_id += 2
        return taken

    def send(self, *frames):
        self.stream.sendall(b"".join(frame.encode() for frame in frames))

    def read(self, length):
        while len(self.received) < length:
            more = self.stream.recv(CHUNK)
            if not more:
                raise Closed
            self.received += more
        taken = bytes(self.received[:length])
        del self.received[:length]
        return taken

    def receive(self):
        head = self.read(HEADER.size)
        length, version, flags, code, proto, tenant, cap_length, corr_id = HEADER.unpack(head)
        assert version == 1 and HEADER.size <= length <= MAX_FRAME and cap_length == 0, head
        return Frame(flags, corr_id, self.read(length - HEADER.size), proto, tenant, b"", code)

    def next_where(self, wanted):
        """The oldest frame that is `wanted`; the others wait for whoever asks for them."""
        for at, frame in enumerate(self.waiting):
            if wanted(frame):
                del self.waiting[at]
                return frame
        while not wanted(frame := self.receive()):
            self.waiting.append(frame)
            assert len(self.waiting) <= MAX_WAITING, "frames that nobody asked for"
        return frame

    def answer(self, corr_id):
        return self.next_where(lambda it: it.flags & RESP and it.corr_id == corr_id)

    def event(self, corr_id):
        return self.next_where(lambda it: it.flags & EVENT and it.corr_id == corr_id)

    def hello(self):
        asked = json.dumps({"ua": "python-client/1"}).encode()
        self.send(Frame(REQ, self.take_corr_id(), asked, CONTROL))
        answer = self.answer(1)
        if answer.code != 200:
            raise Closed(answer.refusal()["message"])
        assert answer.flags == RESP and answer.app_proto_id == CONTROL, answer
        return json.loads(answer.payload)

    def start(self, token, tenant, purpose):
        """Opens a stream for `purpose`; its number, and the daemon's answer."""
        corr_id = self.take_corr_id()
        what = json.dumps(purpose).encode()
        self.send(Frame(REQ | START, corr_id, what, PUBLISH_SUBSCRIBE, tenant, token))
        return corr_id, self.answer(corr_id)

    def close(self):
        """Says that nothing follows, and reads what the daemon sent last."""
        if isinstance(self.stream, ssl.SSLSocket):
            self.stream = self.stream.unwrap()
        self.stream.close()


def connect(host, port, context, daemon):
    """A TLS connection to the daemon of that SPIFFE id, and to no other."""
    plain = socket.create_connection((host, port), timeout=SILENCE_SECONDS)
    stream = context.wrap_socket(plain)
    names = stream.getpeercert().get("subjectAltName", ())
    identities = [name for kind, name in names if kind == "URI"]
    assert [at.split("/pod/")[0] for at in identities] == [daemon], identities
    assert stream.version() == "TLSv1.3", stream.version()
    assert stream.selected_alpn_protocol() == "ron/oap1", stream.selected_alpn_protocol()
    return stream


def tls(authorities, certificate, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_verify_locations(authorities)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["ron/oap1"])
    return context

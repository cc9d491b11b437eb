"""Picture files as cameras, editors and scanners write them, of which decoders think differently.

Each is the picture `BASE`, stored in an unusual way; `ODD` tells what is to be seen of it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, features

from tests.data.helpers import encoded, picture

BASE = picture(90, 60)
GRAY = BASE.convert("L")
_GRAY16 = np.asarray(GRAY).astype(np.uint16) * 257


@dataclass(frozen=True)
class Odd:
    """A file and what is to be seen of it.

    Attributes:
        data: the file.
        orientation: by which the stored picture is turned, as EXIF numbers it.
        seen: the stored picture; None where it has other colours, and only the decoders' agreement counts.
        pillow_opens: Pillow alone opens and decodes it.
    """

    data: bytes
    orientation: int = 1
    seen: Image.Image | None = field(default_factory=lambda: BASE)
    pillow_opens: bool = True

    def upright(self) -> Image.Image | None:
        """What is to be seen."""
        if self.seen is None:
            return None
        turn = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            6: Image.Transpose.ROTATE_270,
            8: Image.Transpose.ROTATE_90,
        }.get(self.orientation)
        seen = self.seen.convert("RGB")
        return seen if turn is None else seen.transpose(turn)


def segment(marker: int, content: bytes) -> bytes:
    """A JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg(*segments: bytes, image: Image.Image = BASE, **options: Any) -> bytes:
    """A JPEG file with segments right behind its start."""
    data = encoded(image, "JPEG", **{"quality": 95, "subsampling": 0, **options})
    return data[:2] + b"".join(segments) + data[2:]


def before_scan(data: bytes, *segments: bytes) -> bytes:
    """Segments behind the tables, just before the pixels."""
    at = data.index(b"\xff\xda")
    return data[:at] + b"".join(segments) + data[at:]


def without_segment(data: bytes, marker: int) -> bytes:
    """Without the first segment of a kind."""
    at = data.index(bytes([0xFF, marker]))
    (length,) = struct.unpack_from(">H", data, at + 2)
    return data[:at] + data[at + 2 + length :]


def with_components(data: bytes, ids: bytes) -> bytes:
    """A JPEG file whose colour components are called otherwise, in the frame and in the scans."""
    frame = data.index(b"\xff\xc0")
    scan = data.index(b"\xff\xda")
    changed = bytearray(data)
    for number, name in enumerate(ids):
        changed[frame + 10 + 3 * number] = name
        changed[scan + 5 + 2 * number] = name
    return bytes(changed)


def patched(data: bytes, find: bytes, offset: int, value: bytes) -> bytes:
    """Other bytes at an offset from a mark."""
    at = data.index(find) + offset
    return data[:at] + value + data[at + len(value) :]


def tiff_block(kind: int, value: bytes, *, tag: int = 0x0112, count: int = 1, order: str = "<") -> bytes:
    """A TIFF header and a directory with one entry, as it stands in EXIF data; `value` in at most 4 bytes."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    entry = struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
    return head + struct.pack(order + "H", 1) + entry + struct.pack(order + "I", 0)


def exif(orientation: int, **options: Any) -> bytes:
    """The segment of JPEG with the orientation, as cameras write it."""
    order = options.get("order", "<")
    return segment(0xE1, b"Exif\0\0" + tiff_block(3, struct.pack(order + "H", orientation), **options))


def typed(kind: int, value: bytes, count: int = 1) -> bytes:
    """The same with another type of value; what is longer than 4 bytes follows the directory."""
    block = tiff_block(kind, struct.pack("<I", 26) if len(value) > 4 else value, count=count)
    return segment(0xE1, b"Exif\0\0" + block + (value if len(value) > 4 else b""))


def xmp(orientation: int, *, element: bool = False, history: str = "") -> bytes:
    """An XMP packet, which editors write."""
    inner = f"<tiff:Orientation>{orientation}</tiff:Orientation>" if element else ""
    attribute = "" if element else f'tiff:Orientation="{orientation}"'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {attribute}>{inner}</rdf:Description>'
        f"{history}</rdf:RDF></x:xmpmeta>"
    ).encode()


def xmp_segment(packet: bytes) -> bytes:
    """An XMP packet as a segment of JPEG."""
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """A PNG chunk."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(*chunks: bytes, image: Image.Image = BASE, behind: bool = False, **options: Any) -> bytes:
    """A PNG file with chunks before its pixels, or behind them."""
    data = encoded(image, "PNG", **options)
    at = data.index(b"IEND" if behind else b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


def raw_png(depth: int, colour: int, rows: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG file of BASE's size from the bytes of its rows [60, bytes]."""
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 90, 60, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def itxt(keyword: bytes, text: bytes, *, packed: bool = False) -> bytes:
    """An international text of PNG."""
    return chunk(b"iTXt", keyword + (b"\0\1\0\0\0" + zlib.compress(text) if packed else b"\0\0\0\0\0" + text))


def ztxt(keyword: bytes, text: bytes) -> bytes:
    """A compressed text of PNG."""
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text))


def raw_profile(orientation: int) -> bytes:
    """EXIF data as ImageMagick writes it into a text of PNG."""
    block = b"Exif\0\0" + tiff_block(3, struct.pack("<H", orientation))
    return b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"


def _jpegs() -> dict[str, Odd]:
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\1")
    cmyk = jpeg(image=BASE.convert("CMYK"))
    rgb = jpeg(keep_rgb=True)
    plain = jpeg()
    no_jfif = without_segment(plain, 0xE0)
    six = struct.pack("<H", 6)
    thumbnail = b"II*\0" + struct.pack("<IHIHHIHHI", 8, 0, 14, 1, 0x0112, 3, 1, 6, 0)
    return {
        "orientation in XMP": Odd(jpeg(xmp_segment(xmp(6))), 6),
        "orientation in an XMP element": Odd(jpeg(xmp_segment(xmp(8, element=True))), 8),
        "XMP against EXIF": Odd(jpeg(xmp_segment(xmp(6)), exif(8)), 8),
        "EXIF against XMP": Odd(jpeg(exif(8), xmp_segment(xmp(6))), 8),
        "upright EXIF, turned XMP": Odd(jpeg(exif(1), xmp_segment(xmp(6)))),
        "EXIF of something else, turned XMP": Odd(jpeg(exif(7, tag=0x0128), xmp_segment(xmp(6))), 6),
        "EXIF behind XMP without orientation": Odd(jpeg(xmp_segment(b"<x:xmpmeta/>"), exif(6)), 6),
        "EXIF behind JFIF": Odd(plain[:20] + exif(6) + plain[20:], 6),
        "EXIF behind a comment": Odd(jpeg(segment(0xFE, b"hello"), exif(3)), 3),
        "EXIF behind the tables": Odd(before_scan(plain, exif(6)), 6),
        "big-endian EXIF": Odd(jpeg(exif(6, order=">")), 6),
        "two EXIF segments": Odd(jpeg(exif(6), exif(3)), 6),
        "two EXIF segments, the first of something else": Odd(jpeg(exif(7, tag=0x0128), exif(6))),
        "BYTE orientation": Odd(jpeg(typed(1, b"\6"))),
        "ASCII orientation": Odd(jpeg(typed(2, b"6\0", count=2))),
        "LONG orientation": Odd(jpeg(typed(4, struct.pack("<I", 6))), 6),
        "RATIONAL orientation": Odd(jpeg(typed(5, struct.pack("<II", 6, 1)))),
        "UNDEFINED orientation": Odd(jpeg(typed(7, b"\6"))),
        "SSHORT orientation": Odd(jpeg(typed(8, six)), 6),
        "FLOAT orientation": Odd(jpeg(typed(11, struct.pack("<f", 6)))),
        "DOUBLE orientation": Odd(jpeg(typed(12, struct.pack("<d", 6)))),
        "two orientations in one entry": Odd(jpeg(typed(3, six + six, count=2)), 6),
        "orientation 0": Odd(jpeg(exif(0))),
        "orientation 9": Odd(jpeg(exif(9))),
        "orientation of the thumbnail": Odd(jpeg(segment(0xE1, b"Exif\0\0" + thumbnail))),
        "EXIF with another head": Odd(jpeg(segment(0xE1, b"Exif\0\xff" + tiff_block(3, six)))),
        "EXIF cut short": Odd(jpeg(segment(0xE1, b"Exif\0\0" + tiff_block(3, six)[:15]))),
        "long comments": Odd(jpeg(*[segment(0xFE, b"x" * 65533)] * 40, exif(6)), 6),
        "many segments": Odd(jpeg(*[segment(0xE0 + i % 12 + 3, b"some" * 40) for i in range(300)])),
        "bytes behind the end": Odd(plain + b"\0" * 1000),
        "two pictures": Odd(encoded(BASE, "MPO", save_all=True, append_images=[GRAY], quality=95)),
        "CMYK with Adobe's marker": Odd(cmyk),
        "CMYK without Adobe's marker": Odd(without_segment(cmyk, 0xEE)),
        "YCCK": Odd(patched(cmyk, b"Adobe", 11, b"\2"), seen=None),
        "RGB": Odd(rgb),
        "RGB without Adobe's marker": Odd(without_segment(rgb, 0xEE)),
        "YCbCr with Adobe's marker": Odd(jpeg(adobe)),
        "YCbCr with Adobe's marker alone": Odd(no_jfif[:2] + adobe + no_jfif[2:]),
        "YCbCr without any marker": Odd(no_jfif),
        "YCbCr, Adobe's marker says RGB": Odd(jpeg(patched(adobe, b"Adobe", 11, b"\0"))),
        "components from 0": Odd(with_components(no_jfif, b"\0\1\2")),
        "components with letters": Odd(with_components(no_jfif, b"RGB"), seen=None),
        "gray, sampled as 2 x 2": Odd(patched(jpeg(image=GRAY), b"\xff\xc0", 11, b"\x22"), seen=None),
        "progressive": Odd(jpeg(exif(6), progressive=True), 6),
        "4:2:0": Odd(jpeg(subsampling=2)),
    }  # fmt: skip


def _pngs() -> dict[str, Odd]:
    pixels = np.asarray(BASE)
    deep = np.stack([pixels, np.zeros_like(pixels) + 200], -1).reshape(60, -1)
    opaque = np.dstack([pixels, np.full((60, 90), 255, np.uint8)])
    gray_alpha = np.dstack([_GRAY16, _GRAY16]).astype(">u2").reshape(60, -1).view(np.uint8)
    nibbles = np.asarray(GRAY)[:, ::2] & 0xF0 | np.asarray(GRAY)[:, 1::2] >> 4
    frames: dict[str, Any] = {"save_all": True, "append_images": [BASE.rotate(180), GRAY.convert("RGB")]}
    palette = BASE.quantize(200)
    few = BASE.quantize(9)
    faint = BASE.copy()
    faint.putalpha(Image.linear_gradient("L").resize(BASE.size))
    turned = b"XML:com.adobe.xmp"
    bomb = ztxt(b"workflow", b"{step} " * 450_000)
    history = "<history>" + "step " * 600_000 + "</history>"
    profile = b"profile\0\0" + zlib.compress(bytes(3 << 20))
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "an editor")
    return {
        "PNG, eXIf": Odd(png(chunk(b"eXIf", tiff_block(3, b"\6\0"))), 6),
        "PNG, eXIf behind the pixels": Odd(png(chunk(b"eXIf", tiff_block(3, b"\6\0")), behind=True), 6),
        "PNG, BYTE orientation": Odd(png(chunk(b"eXIf", tiff_block(1, b"\6")))),
        "PNG, XMP": Odd(png(itxt(turned, xmp(8))), 8),
        "PNG, XMP behind the pixels": Odd(png(itxt(turned, xmp(8)), behind=True), 8),
        "PNG, compressed XMP": Odd(png(itxt(turned, xmp(6), packed=True)), 6),
        "PNG, EXIF in a text": Odd(png(chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile(6))), 6),
        "PNG, EXIF in a compressed text": Odd(png(ztxt(b"Raw profile type exif", raw_profile(3))), 3),
        "PNG, a long text": Odd(png(bomb), pillow_opens=False),
        "PNG, a long text behind the pixels": Odd(png(bomb, behind=True), pillow_opens=False),
        "PNG, a long international text": Odd(png(itxt(b"x", b"y" * 3_000_000, packed=True)), pillow_opens=False),
        "PNG, a long text as it is": Odd(png(chunk(b"tEXt", b"x\0" + b"y" * 3_000_000))),
        "PNG, many long texts": Odd(png(*[ztxt(b"x", bytes(1_000_000))] * 80), pillow_opens=False),
        "PNG, long XMP": Odd(png(itxt(turned, xmp(6, history=history), packed=True)), 6, pillow_opens=False),
        "PNG, XMP behind a long text": Odd(png(bomb, itxt(turned, xmp(6))), 6, pillow_opens=False),
        "PNG, a long colour profile": Odd(png(chunk(b"iCCP", profile)), pillow_opens=False),
        "PNG, a damaged text": Odd(png(chunk(b"tEXt", b"x\0y", checksum=1)), pillow_opens=False),
        "PNG, a short text": Odd(png(pnginfo=text)),
        "PNG, gamma": Odd(png(chunk(b"gAMA", struct.pack(">I", 100_000)))),
        "PNG, chromaticities": Odd(png(chunk(b"cHRM", struct.pack(">8I", *range(10_000, 90_000, 10_000))))),
        "PNG, 16 bits, gray": Odd(encoded(Image.fromarray(_GRAY16), "PNG"), seen=GRAY),
        "PNG, 16 bits, colour": Odd(raw_png(16, 2, deep)),
        "PNG, 16 bits, gray and alpha": Odd(raw_png(16, 4, gray_alpha), seen=GRAY),
        "PNG, 2 bits": Odd(encoded(GRAY.quantize(4), "PNG", bits=2), seen=None),
        "PNG, gray of 4 bits": Odd(raw_png(4, 0, nibbles), seen=None),
        "PNG, 1 bit": Odd(encoded(BASE.convert("1"), "PNG"), seen=BASE.convert("1")),
        "PNG, gray and alpha": Odd(encoded(faint.convert("LA"), "PNG"), seen=GRAY),
        "PNG, alpha": Odd(encoded(faint, "PNG")),
        "PNG, opaque": Odd(encoded(Image.fromarray(opaque), "PNG")),
        "PNG, a transparent colour": Odd(png(transparency=(0, 0, 0))),
        "PNG, a transparent gray": Odd(png(image=GRAY, transparency=100), seen=GRAY),
        "PNG, a transparent palette": Odd(encoded(palette, "PNG", transparency=bytes(range(200))), seen=palette),
        "PNG, a transparent palette entry": Odd(encoded(palette, "PNG", transparency=3), seen=palette),
        "PNG, palette": Odd(encoded(palette, "PNG"), seen=palette),
        "PNG, palette of 4 bits": Odd(encoded(few, "PNG"), seen=few),
        "PNG, animated": Odd(encoded(BASE, "PNG", **frames)),
        "PNG, animated behind a first picture": Odd(encoded(BASE, "PNG", default_image=True, **frames)),
    }  # fmt: skip


def _others() -> dict[str, Odd]:
    clear = BASE.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(BASE.size).point(lambda value: max(0, value - 100)))
    turned = Image.Exif()
    turned[0x0112] = 6
    lossless: dict[str, Any] = {"lossless": True, "exact": True}
    frames: dict[str, Any] = {"save_all": True, "append_images": [BASE.rotate(180)]}
    ramp = np.asarray(GRAY).astype(np.float32)
    big_endian = Image.frombytes("I;16B", (90, 60), _GRAY16.astype(">u2").tobytes())
    ten_bits = np.asarray(GRAY).astype(np.uint16) * 4
    found = {
        "WebP, EXIF": Odd(encoded(BASE, "WEBP", **lossless, exif=turned.tobytes()), 6),
        "WebP, XMP": Odd(encoded(BASE, "WEBP", **lossless, xmp=xmp(8)), 8),
        "WebP, alpha": Odd(encoded(clear, "WEBP", **lossless)),
        "WebP, animated": Odd(encoded(BASE, "WEBP", **lossless, **frames)),
        "GIF, animated": Odd(encoded(BASE.quantize(), "GIF", **frames), seen=BASE.quantize()),
        "GIF, a transparent entry": Odd(encoded(BASE.quantize(), "GIF", transparency=3), seen=None),
        "BMP": Odd(encoded(BASE, "BMP")),
        "TIFF, turned": Odd(encoded(BASE, "TIFF", tiffinfo={0x0112: 6}), 6),
        "TIFF, CMYK": Odd(encoded(BASE.convert("CMYK"), "TIFF")),
        "TIFF, 16 bits": Odd(encoded(Image.fromarray(_GRAY16), "TIFF"), seen=GRAY),
        "TIFF, 16 bits, big-endian": Odd(encoded(big_endian, "TIFF"), seen=GRAY),
        "TIFF, float to 1": Odd(encoded(Image.fromarray(ramp / 255), "TIFF"), seen=GRAY),
        "TIFF, float to 255": Odd(encoded(Image.fromarray(ramp), "TIFF"), seen=GRAY),
        "TIFF, float to 65535": Odd(encoded(Image.fromarray(ramp * 257), "TIFF"), seen=GRAY),
        "TIFF, 32 bits": Odd(encoded(Image.fromarray(_GRAY16.astype(np.int32)), "TIFF"), seen=GRAY),
        "TIFF, float below 0": Odd(encoded(Image.fromarray(ramp - 100), "TIFF"), seen=None),
        "PGM, 10 bits": Odd(b"P5 90 60 1020\n" + ten_bits.astype(">u2").tobytes(), seen=GRAY),
        "PGM, 16 bits": Odd(b"P5 90 60 65535\n" + _GRAY16.astype(">u2").tobytes(), seen=GRAY),
        "PFM": Odd(b"Pf\n90 60\n-1.0\n" + (ramp / 255)[::-1].astype("<f4").tobytes(), seen=GRAY),
        "PBM": Odd(encoded(BASE.convert("1"), "PPM"), seen=BASE.convert("1")),
    }  # fmt: skip
    if features.check("avif"):
        found["AVIF"] = Odd(encoded(BASE, "AVIF", quality=100))
        found["AVIF, EXIF"] = Odd(encoded(BASE, "AVIF", quality=100, exif=turned.tobytes()), 6)
    return found


ODD: dict[str, Odd] = {**_jpegs(), **_pngs(), **_others()}

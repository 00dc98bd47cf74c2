"""The corpus of hostile files: each breaks one rule of docs/format.md, and is otherwise sound and signed.

    python tests/hostile/generate.py        # writes tests/hostile/corpus anew

`cases.json` tells of each file a phrase that the error must have.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.craft import (
    ADD,
    BITS,
    CHUNK,
    FACTORS,
    FOLDED,
    ITEM_BYTES,
    LOSSLESS,
    LOW_RANK,
    MASKED,
    MULTIPLY,
    PALETTE,
    SET,
    Bits,
    Draft,
    Levels,
    Numbers,
    Row,
    adapters,
    block,
    compact,
    edges,
    exact_facts,
    facts,
    framed,
    header_of,
    kinds,
    lossless,
    lossless_facts,
    mask,
    masked,
    merge_facts,
    merged,
    name_table,
    numbers_of,
    packed,
    palette_of,
    plain,
    planes,
    planes1,
    recovering,
    scaled,
    shape_table,
    stream,
    text,
    trained,
    varint,
)

CORPUS = Path(__file__).parent / "corpus"
Case = tuple[str, str, bytes]
SMALL = "0b01839f63c7f1"
"""The stream of the first test vector of coding 3: 11 non-zeros among 6 x 5 entries."""


def cases() -> Iterator[Case]:
    """(name, phrase, file)."""
    yield from not_experts()
    yield from headers()
    yield from checksums()
    yield from header_json()
    yield from facts_json()
    yield from tables()
    yield from changes()
    yield from training()
    yield from indices(2)
    yield from planes_cases()
    yield from indices(1)
    yield from rice_planes()
    yield from small_streams()
    yield from lossless_streams()
    yield from merging()
    yield from merged_adapters()
    yield from too_large()


def not_experts() -> Iterator[Case]:
    yield "empty", "is empty", b""
    yield "a_few_bytes", "does not begin with a header", b"\x10\0\0\0"
    yield "text", "does not begin with a header", b"Dear reader, this is no expert.\n"
    yield "pickle_2", "is a pickle", pickle.dumps({"weight": [1.0, 2.0], "bias": [0.5]}, protocol=2)
    yield "pickle_4", "is a pickle", pickle.dumps({"weight": [1.0, 2.0], "bias": [0.5]}, protocol=4)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.dumps({"weight": [1.0]}, protocol=2))
    yield "zip", "is a pickle", archive.getvalue()
    header = {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    yield "checkpoint", "not an expert", framed(compact({"__metadata__": {"format": "pt"}, **header}), bytes(8))[:-32]
    yield "checkpoint_without_metadata", "not an expert", framed(compact(header), bytes(8))[:-32]


def headers() -> Iterator[Case]:
    file = kinds().file()
    length = struct.unpack("<Q", file[:8])[0]
    origin = 8 + length
    for name, at in {"length": 9, "header": length // 2, "exact": origin + 9, "table": origin + 100, "checksum": len(file) - 1}.items():
        yield f"cut_in_{name}", "cut short", file[:at]
    yield "cut_streams", "cut short", file[: len(file) - 40]
    file = plain().file()
    length = struct.unpack("<Q", file[:8])[0]
    yield "appended", "something appended", file + b"\0"
    lies = [
        ("0", 0, "is not JSON"),
        ("too_small", length - 8, "is not JSON"),
        ("too_large", length + 8, "is not JSON"),
        ("beyond_the_file", len(file), "cut short"),
        ("100_mb", 100 << 20, "states a header of 104857600 bytes"),
        ("max", (1 << 64) - 1, "states a header of"),
    ]
    for name, stated, phrase in lies:
        yield f"header_length_{name}", phrase, struct.pack("<Q", stated) + file[8:]
    yield "header_begins_with_a_space", "does not begin with a header", struct.pack("<Q", length) + b" " + file[9:]


def checksums() -> Iterator[Case]:
    file = plain().file()
    for name, at in {"streams": len(file) - 33, "header": file.index(b"craft"), "checksum": len(file) - 1}.items():
        yield f"bit_flipped_in_{name}", "checksum does not match", file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :]

    def without(header: dict[str, Any]) -> None:
        header["other"] = header.pop("sterna.sha256")

    yield "checksum_missing", "does not end with the tensor 'sterna.sha256'", plain().but(header=without).file()

    def as_words(header: dict[str, Any]) -> None:
        header["sterna.sha256"] |= {"dtype": "I64", "shape": [4]}

    yield "checksum_as_words", "does not end with the tensor 'sterna.sha256'", plain().but(header=as_words).file()
    draft = plain()
    tensors = [("sterna.sha256", "U8", [32], bytes(32)), *draft.tensors]
    header = header_of(draft.metadata, tensors)
    header["sterna.sha256"] = {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}
    moved = framed(compact(header), b"".join(data for _, _, _, data in tensors))[:-32]
    yield "checksum_first", "does not end with the tensor 'sterna.sha256'", moved


def header_json() -> Iterator[Case]:
    draft = plain()
    body = b"".join(data for _, _, _, data in draft.tensors)
    sound = compact(header_of(draft.metadata, draft.tensors))

    def case(name: str, phrase: str, old: str, new: str | bytes) -> Case:
        assert sound.count(old) == 1, (name, old)
        before, after = sound.split(old)
        return name, phrase, framed(before.encode() + (new.encode() if isinstance(new, str) else new) + after.encode(), body)

    table = '"sterna.table":{"dtype":"U8"'
    yield case("header_not_json", "the header is not JSON", table, '"sterna.table":{dtype:"U8"')
    yield case("header_not_utf8", "the header is not JSON", '"sterna.table"', b'"sterna.t\xffble"')
    yield "header_utf16", "the header is not JSON", framed(sound.encode("utf-16-le"), body)
    yield case("header_half_surrogate", "the header is not JSON", '"sterna.table"', '"\\ud800"')
    yield case("header_nan", "holds NaN", table, table + ',"shape":[NaN]')
    yield case("header_tensor_twice", "the header repeats a key", table, '"sterna.table":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' + table)
    yield case("header_dtype_twice", "the header repeats a key", table, table + ',"dtype":"U8"')
    yield case("header_metadata_twice", "the header repeats a key", table, '"__metadata__":{"sterna":"{}"},' + table)
    yield case("header_metadata_key_twice", "the header repeats a key", '{"sterna":"', '{"sterna":"{}","sterna":"')
    yield case("header_key_twice_by_escape", "the header repeats a key", table, table + ',"d\\u0074ype":"U8"')
    yield case("metadata_two_keys", "the one key 'sterna'", '{"sterna":"', '{"format":"pt","sterna":"')
    yield "metadata_empty", "the one key 'sterna'", draft.but(header=lambda h: h | {"__metadata__": {}}).file()
    yield "metadata_list", "the one key 'sterna'", draft.but(header=lambda h: h | {"__metadata__": []}).file()
    yield "metadata_object", "the one key 'sterna'", draft.but(header=lambda h: h | {"__metadata__": {"sterna": facts()}}).file()
    yield case("header_deep", "the header", table, '"deep":' + "[" * 200 + "]" * 200 + "," + table)
    yield case("header_very_deep", "the header", table, '"deep":' + "[" * 1100 + "]" * 1100 + "," + table)
    yield case("header_unclosed", "the header is not JSON", table, '"deep":' + "[" * 1100 + table)

    def entry(name: str, phrase: str, **fields: Any) -> Case:
        def change(header: dict[str, Any]) -> None:
            header["sterna.table"] |= fields

        return name, phrase, draft.but(header=change).file()

    size = len(draft.table)
    counts = "not lists of at most 8 counts"
    yield entry("dtype_unknown", "has dtype 'F8_E5M2'", dtype="F8_E5M2")
    yield entry("dtype_number", "has dtype a int", dtype=8)
    yield entry("dtype_long", "has dtype 'UUU", dtype="U" * 300)
    yield entry("dtype_wider", "does not fill its bytes", dtype="I32")
    yield entry("table_dtype", "lacks the U8 tensors", dtype="I8")
    yield entry("table_two_dimensions", "lacks the U8 tensors", shape=[size, 1])
    yield entry("entry_extra_field", "is not a tensor", strides=[1])
    yield entry("shape_too_large", "does not fill its bytes", shape=[size + 1])
    yield entry("shape_too_small", "does not fill its bytes", shape=[size - 1])
    yield entry("shape_negative", counts, shape=[-size])
    yield entry("shape_fraction", counts, shape=[float(size)])
    yield entry("shape_bool", counts, shape=[True])
    yield entry("shape_text", counts, shape=str(size))
    yield entry("shape_9_dimensions", counts, shape=[size] + [1] * 8)
    yield entry("shape_2_60", counts, shape=[1 << 60])
    yield entry("shape_product_2_60", "more than 2^48 entries", shape=[1 << 20] * 3)
    yield entry("shape_empty_but_huge", "more than 2^48 entries", shape=[0, 1 << 40, 1 << 40])
    yield entry("shape_huge_number", counts, shape=[10**400])
    yield case("shape_number_too_long", "the header is not JSON", f'"shape":[{size}]', '"shape":[1' + "0" * 4500 + "]")
    yield entry("offsets_reversed", "does not fill its bytes", data_offsets=[size, 0])
    yield entry("offsets_three", "does not fill its bytes", data_offsets=[0, size, size])
    yield entry("offsets_negative", counts, data_offsets=[-size, 0])
    yield entry("offsets_beyond_the_file", "leave a hole or overlap", data_offsets=[1 << 40, (1 << 40) + size])

    def shift(at: int, by: int) -> Draft:
        def change(header: dict[str, Any]) -> None:
            for name in list(header)[at:]:
                header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]

        return draft.but(header=change)

    yield "hole", "leave a hole or overlap", shift(2, 8).file()
    yield "overlap", "leave a hole or overlap", shift(2, -1).file()
    yield "first_hole", "leave a hole or overlap", shift(1, 8).file()
    yield case("no_table", "lacks the U8 tensors", '"sterna.table"', '"some.table"')
    yield case("no_streams", "lacks the U8 tensors", '"sterna.streams"', '"some.streams"')


def facts_json() -> Iterator[Case]:
    def raw(name: str, phrase: str, metadata: str) -> Case:
        return f"facts_{name}", phrase, plain().but(facts=metadata).file()

    def case(name: str, phrase: str, **changes: Any) -> Case:
        return f"facts_{name}", phrase, plain().but(facts=facts(**changes)).file()

    def base(case_name: str, phrase: str, **changes: Any) -> Case:
        whole = facts()["base"] | changes
        return f"facts_base_{case_name}", phrase, plain().but(facts=facts(base={k: v for k, v in whole.items() if v is not None})).file()

    sound = json.dumps(facts(metadata={"by": "me"}), sort_keys=True, separators=(",", ":"))
    yield raw("empty", "the expert's metadata is not JSON", "")
    yield raw("not_json", "the expert's metadata is not JSON", sound[:-1])
    yield raw("list", "is a JSON list", "[]")
    yield raw("twice", "the expert's metadata repeats a key", sound.replace('"alpha":', '"alpha":1.0,"alpha":'))
    yield raw("base_twice", "the expert's metadata repeats a key", sound.replace('"name":', '"name":"other","name":'))
    yield raw("user_twice", "the expert's metadata repeats a key", sound.replace('"by":', '"by":"other","by":'))
    yield raw("half_surrogate", "the expert's metadata is not JSON", sound.replace('"me"', '"\\udc00"'))
    for constant in ("NaN", "Infinity", "-Infinity"):
        yield raw(f"scale_{constant}", f"holds {constant}", sound.replace('"scale":0.5', f'"scale":{constant}'))
    yield raw("scale_overflows", "scale is inf", sound.replace('"scale":0.5', '"scale":1e999'))
    yield raw("user_overflows", "metadata is 'its value'; expected plain JSON", sound.replace('"me"', "1e999"))
    yield raw("deep", "at most 8 deep", sound.replace('"me"', "[" * 9 + "]" * 9))
    yield raw("very_deep", "the expert's metadata", sound.replace('"me"', "[" * 1100 + "]" * 1100))
    yield case("tokens_deep", "at most 8 deep", tokens=[{"content": [[[[[[[[[["x"]]]]]]]]]]}])
    yield case("scale_negative", "scale is -0.5", scale=-0.5)
    yield case("scale_beyond_float32", "scale is 1e+39", scale=1e39)
    yield case("scale_huge", "the expert's metadata", scale=10**400)
    yield case("scale_text", "scale is a str", scale="0.5")
    yield case("density_0", "density is 0.0", density=0)
    yield case("density_2", "density is 2.0", density=2)
    yield case("density_negative", "density is -0.1", density=-0.1)
    yield case("density_true", "density is a bool", density=True)
    yield case("alpha_0", "alpha is 0.0", alpha=0.0)
    yield case("alpha_million", "alpha is 1000000.0", alpha=1e6)
    yield case("alpha_list", "alpha is a list", alpha=[4.0])
    yield case("format_2", "use a newer Sterna", format=2)
    yield case("format_huge", "use a newer Sterna", format=10**300)
    yield case("format_0", "format is 0", format=0)
    yield case("format_missing", "format is None", format=None)
    yield case("format_text", "format is '1'", format="1")
    yield case("format_list", "format is list", format=[[[[1]]]])
    yield case("format_true", "format is True", format=True)
    yield case("unknown_field", "unknown field 'hook'", hook="os.system")
    yield case("no_method", "lacks the field 'method'", method=None)
    yield case("no_writer", "lacks the field 'writer'", writer=None)
    yield case("no_base", "base is a NoneType", base=None)
    yield case("method_unknown", "method is 'magic'", method="magic")
    yield case("source_unknown", "source is 'dora'", source="dora")
    yield case("scope_unknown", "scope is 'row'", scope="row")
    yield case("parameters_negative", "parameters is -1", parameters=-1)
    yield case("parameters_huge", "parameters is 1000", parameters=10**400)
    yield case("parameters_fraction", "parameters is a float", parameters=1.0)
    yield case("writer_newline", "writer is 'a\\nb'", writer="a\nb")
    yield case("writer_escape", "writer is 'a\\x1b[2J'", writer="a\x1b[2J")
    yield case("writer_long", "writer is 'www", writer="w" * 4097)
    yield case("architecture_code", "architecture is", architecture="__import__('os').system")
    yield case("prefixes_one", "prefixes are not two", prefixes=["bert."])
    yield case("prefixes_numbers", "prefixes is a int", prefixes=[1, 2])
    yield case("dropped_text", "dropped is a str", dropped="pooler")
    yield case("dropped_escape", "dropped is 'a\\x07'", dropped=["a\x07"])
    yield case("config_auto_map", "config is 'auto_map'", config={"auto_map": {"AutoModel": "evil.Model"}})
    yield case("config_trust", "config is 'trust_remote_code'", config={"trust_remote_code": True})
    yield case("config_private", "config is '_name_or_path'", config={"_name_or_path": "/etc"})
    yield case("config_list", "config is a list", config=["auto_map"])
    yield case("tokens_texts", "tokens is a str", tokens=["<x>"])
    yield base("name_up", "base.name is '../../x'", name="../../x")
    yield base("name_absolute", "base.name is '/etc/passwd'", name="/etc/passwd")
    yield base("name_backslash", "base.name is 'a\\\\b'", name="a\\b")
    yield base("name_escape", "base.name is", name="a\x1b]0;title\x07")
    yield base("name_missing", "base lacks the field 'name'", name=None)
    yield base("name_number", "name is a int", name=1)
    yield base("fingerprint_short", "base.fingerprint is", fingerprint="ab" * 31)
    yield base("fingerprint_upper", "base.fingerprint is", fingerprint="AB" * 32)
    yield base("parameters_2_53", "base.parameters is 9007199254740992", parameters=1 << 53)
    yield base("revision_newline", "base.revision is", revision="a\nb")
    yield base("unknown_field", "unknown field 'path'", path="/")


def tables() -> Iterator[Case]:
    draft = plain()
    names, shapes = name_table(draft.names), shape_table(draft.shapes)

    def named(name: str, phrase: str, table: bytes, shorts: bytes | None = None) -> Case:
        return f"names_{name}", phrase, draft.but(names=table, shorts=bytes(27) if shorts is None else shorts).file()

    def shaped(name: str, phrase: str, table: bytes) -> Case:
        return f"shapes_{name}", phrase, draft.but(shapes=table).file()

    nothing = [("sterna.table", "U8", [0], b""), ("sterna.streams", "U8", [0], b"")]
    yield "table_empty", "the table ends early", framed(compact(header_of(draft.metadata, nothing)), b"")
    yield named("many_parts", "number of name parts is", varint(1 << 40) + names[1:])
    yield named("more_parts_than_bytes", "number of name parts is", varint(5000) + names[1:])
    yield named("parts_twice", "name parts are not distinct", varint(2) + text("a") * 2 + varint(1, 0, 1, 0), bytes(9))
    yield named("part_long", "name part length is 2000", varint(1) + varint(2000))
    yield named("part_not_utf8", "name part is not UTF-8", varint(1) + text(b"\xff\xfe") + varint(1, 0, 1, 0), bytes(9))
    yield named("part_escape_unused", "name part 'a\\x1b[31m' is not printable", varint(1) + text("a\x1b[31m") + varint(0), b"")
    yield named("part_bidi", "is not printable", varint(1) + text("a\u202eb") + varint(1, 0, 1, 0), bytes(9))
    yield named("many", "number of names is", varint(1) + text("a") + varint(1 << 30))
    yield named("more_than_bytes", "number of names is", varint(1) + text("a") + varint(3000, 0, 1, 0))
    yield named("part_out_of_range", "name part is 3", varint(1) + text("a") + varint(1, 0, 1, 3), bytes(9))
    yield named("shared_too_many", "shared name parts is 2", varint(1) + text("a") + varint(2, 0, 1, 0, 2, 1, 0), bytes(18))
    yield named("65_parts", "is longer than 1024 bytes or 64 parts", varint(1) + text("a") + varint(2, 0, 64, *[0] * 64, 64, 1, 0), bytes(18))
    yield named("new_parts_65", "new name parts is 65", varint(1) + text("a") + varint(1, 0, 65, *[0] * 65), bytes(9))
    yield named("long", "is longer than 1024 bytes", varint(1) + text("a" * 600) + varint(1, 0, 2, 0, 0), bytes(9))
    yield named("unsorted", "names are not sorted at 'a'", varint(2) + text("b") + text("a") + varint(2, 0, 1, 0, 0, 1, 1), bytes(18))
    yield named("same", "names are not sorted at 'a'", varint(1) + text("a") + varint(2, 0, 1, 0, 1, 0), bytes(18))
    yield named("empty", "is not printable text", varint(1) + text("") + varint(1, 0, 1, 0), bytes(9))
    yield named("path", "is a path", varint(1) + text("../../x") + varint(1, 0, 1, 0), bytes(9))
    yield named("path_in_parts", "is a path", varint(2) + text("") + text("/x") + varint(1, 0, 3, 0, 0, 1), bytes(9))
    yield named("varint_too_long", "number of name parts is longer than 8 bytes", b"\x80" * 8 + b"\x01" + names[1:])
    yield "shorts_cut", "table", draft.but(shorts=bytes(20)).file()
    yield shaped("many", "number of shapes is", varint(1 << 20) + shapes[1:])
    yield shaped("9_dimensions", "number of dimensions is 9", shape_table([(1,) * 9, (12,)]))
    yield shaped("dimension_2_55", "dimension is", shape_table([(1 << 55,), (12,)]))
    yield shaped("product_2_60", "more than 2^48 entries", shape_table([(1 << 20, 1 << 20, 1 << 20), (12,)]))
    yield shaped("empty_but_huge", "more than 2^48 entries", shape_table([(0, 1 << 40, 1 << 40), (12,)]))
    yield "rows_many", "number of changes is", draft.but(row_count=1 << 30).file()
    yield "rows_more", "the table ends early", draft.but(row_count=3, table_tail=b"\0").file()
    yield "rows_fewer", "belong to nothing", draft.but(row_count=1).file()
    yield "table_tail", "1 bytes of the table and 0 bytes of the streams belong to nothing", draft.but(table_tail=b"\0").file()
    yield "streams_tail", "0 bytes of the table and 3 bytes of the streams belong to nothing", draft.but(streams_tail=b"abc").file()
    yield "unlisted_tensor", "does not tell of: 'spare'", draft.but(exact=[("spare", "U8", [3], b"abc")]).file()
    yield "unlisted_tensor_escape", "does not tell of: 'a\\nb'", draft.but(exact=[("a\nb", "U8", [3], b"abc")]).file()


def changes() -> Iterator[Case]:
    draft = plain()
    small = Levels(1, stream(12, {3: 1}))
    first = Row(ADD, 1, levels=[small])

    def rows(name: str, phrase: str, *listed: Row, **pieces: Any) -> Case:
        return f"row_{name}", phrase, draft.but(rows=list(listed), **pieces).file()

    def ternary(name: str, phrase: str, levels: Levels, **pieces: Any) -> Case:
        return rows(name, phrase, Row(ADD, 1, levels=[levels]), **pieces)

    tensorwise = {"facts": scaled().facts}
    yield rows("kind_unknown", "kind of change is 9", Row(9, 1, levels=[small]))
    yield rows("kind_huge", "kind of change is 127", Row(127, 1, levels=[small]))
    yield rows("name_out_of_range", "name is 4", Row(ADD, 4, levels=[small]))
    yield rows("name_path", "is a path", Row(ADD, 0, "../../x", levels=[small]))
    yield rows("name_empty", "is not printable text", Row(ADD, 0, "", levels=[small]))
    yield rows("name_escape", "is not printable", Row(ADD, 0, "a\x1b[2J", levels=[small]))
    yield rows("name_not_utf8", "is not UTF-8", Row(ADD, 0, b"\xc3\x28", levels=[small]))
    yield rows("name_long", "name length is", Row(ADD, 0, "a" * 1025, levels=[small]))
    yield rows("unsorted", "not in order of their names at 'a.0.w'", Row(ADD, 2, levels=[small]), first)
    yield rows("twice", "not in order of their names at 'a.0.w'", first, first)
    yield ternary("coding_unknown", "uses coding 7", Levels(1, small.stream, coding=7))
    yield ternary("coding_huge", "coding is 300", Levels(1, small.stream, coding=300))
    yield ternary("shape_out_of_range", "shape number is 2", Levels(2, small.stream))
    yield ternary("no_shapes", "shape number is 1", small, shapes=[])
    yield ternary("length_beyond", "stream length is", Levels(1, small.stream, length=1000))
    yield ternary("length_short", "block index is not well-formed", Levels(1, small.stream, length=2))
    yield ternary("length_0", "block index is not well-formed", Levels(1, small.stream, length=0))
    yield ternary("scale_nan", "scale is nan", Levels(1, small.stream, scale=struct.pack("<f", float("nan"))), **tensorwise)
    yield ternary("scale_inf", "scale is inf", Levels(1, small.stream, scale=struct.pack("<f", float("inf"))), **tensorwise)
    yield ternary("scale_negative", "scale is -1.0", Levels(1, small.stream, scale=struct.pack("<f", -1.0)), **tensorwise)
    yield ternary("scale_cut", "the table ends early", Levels(1, small.stream, scale=b"\0"), **tensorwise)

    def factors(name: str, phrase: str, a: tuple[int, ...], b: tuple[int, ...], scaling: float = 1.0, flags: int = 0) -> Case:
        def levels(shape: int, of: tuple[int, ...]) -> Levels:
            entries = 1
            for n in of:
                entries *= n
            return Levels(shape, stream(entries, {0: 1} if entries else {}, log2=20) if entries <= 1 << 27 else b"")

        row = Row(FACTORS, 1, fields=varint(flags) + text("a.0") + struct.pack("<d", scaling), levels=[levels(0, a), levels(1, b)])
        return f"factors_{name}", phrase, draft.but(rows=[row], shapes=[a, b]).file()

    shapes = "expected [r, in] and [out, r]"
    yield factors("ranks_differ", shapes, (2, 7), (5, 3))
    yield factors("one_dimension", shapes, (2,), (5, 2))
    yield factors("scalar", shapes, (2, 7), ())
    yield factors("rank_0", shapes, (0, 1 << 40), (1 << 40, 0))
    yield factors("empty", shapes, (1, 1 << 27), (0, 1))
    yield factors("trailing", shapes, (2, 7), (5, 2, 3))
    yield factors("product_2_54", "more than 2^48 entries", (1, 1 << 27), (1 << 27, 1))
    yield factors("flags", "flags is 32", (2, 7), (5, 2), flags=32)
    yield factors("rank_scales_missing", "exact tensor 'a.0.w.ranks' that the file lacks", (2, 7), (5, 2), flags=16)
    yield rows("key_of_no_row", "which has none such", Row(FACTORS, 1, fields=varint(4) + struct.pack("<d", 1.0), levels=[small, small]))
    yield rows("scaling_of_no_row", "which has none", Row(FACTORS, 1, fields=varint(8) + text("a.0"), levels=[small, small]))
    yield factors("scaling_nan", "scaling is nan", (2, 7), (5, 2), float("nan"))
    yield factors("scaling_inf", "scaling is -inf", (2, 7), (5, 2), float("-inf"))
    yield factors("scaling_overflows", "values that float32 cannot hold", (2, 7), (5, 2), 1e300)

    def multiply(number: int, fields: bytes) -> Row:
        return Row(MULTIPLY, number, fields=fields, levels=[small])

    key, bias = text("a.0"), text("a.b")
    yield rows("axis_8", "axis is 8", multiply(1, varint(8, 0) + key))
    yield rows("biased_8", "flags is 8", multiply(1, varint(0, 8) + key))
    yield rows("key_of_another_module", "which has none such", multiply(1, varint(0, 0) + text("x")), multiply(2, varint(0, 2)))
    yield rows("key_of_multiply_of_no_row", "which has none such", multiply(1, varint(0, 2)))
    yield rows("key_path", "is a path", multiply(1, varint(0, 0) + text("../x")))
    yield rows("bias_path", "is a path", multiply(1, varint(0, 1) + key + text("/x")))
    yield rows("bias_twice", "biases are changed twice", multiply(1, varint(0, 1) + key + bias), multiply(2, varint(0, 1) + key + bias))
    yield rows("bias_and_row", "biases are changed twice", multiply(1, varint(0, 1) + key + text("a.1.b")), Row(ADD, 2, levels=[small]))

    head = ("head", "F32", [2], bytes(8))
    yield rows("role_unknown", "role is 6", Row(SET, 0, "head", varint(6, 0)), exact=[head])
    yield rows("first_row_of_head", "flags is 4", Row(SET, 0, "head", varint(0, 4)), exact=[head])
    yield rows("first_row_huge", "first row is", Row(SET, 0, "head", varint(2, 1 << 50)), exact=[head])
    yield rows("exact_missing", "exact tensor 'head' that the file lacks", Row(SET, 0, "head", varint(0, 0)))
    yield rows("exact_is_table", "exact tensor 'sterna.table' that the file lacks", Row(SET, 0, "sterna.table", varint(0, 0)))
    yield rows("exact_path", "is a path", Row(SET, 0, "../../x", varint(0, 0)), exact=[("../../x", "F32", [2], bytes(8))])
    yield rows("exact_bool", "neither 0 nor 1", Row(SET, 0, "head", varint(0, 0)), exact=[("head", "BOOL", [3], bytes([0, 1, 2]))])
    yield rows("set_twice", "exact tensor 'head' that the file lacks", *[Row(SET, 0, "head", varint(0, 0))] * 2, exact=[head])


def training() -> Iterator[Case]:
    """The rows and facts of PaFi and HiWi."""
    draft, ternary = trained(), masked()
    tuned, fold, values, head = draft.rows
    own = {"tuned": "layer.0.bias", "fold": "layer.0.weight.", "values": "sterna.values", "head": "score.weight"}
    chosen = [2, 4, 9]

    def case(name: str, phrase: str, rows: dict[str, Row], exact: dict[str, tuple[str, list[int]] | None] | None = None, **pieces: Any) -> Case:
        """A file of those rows and the exact tensors that belong to them, some replaced by zeros of another kind, or left out."""
        tensors = {tensor[0]: tensor for tensor in draft.exact if tensor[0].startswith(tuple(own[row] for row in rows))}
        for listed, instead in (exact or {}).items():
            tensors.pop(listed, None)
            if instead is not None:
                tensors[listed] = (listed, *instead, bytes(ITEM_BYTES[instead[0]] * math.prod(instead[1])))
        told = exact_facts() if "values" in rows else exact_facts(mask=None)
        return name, phrase, draft.but(**({"facts": told} | pieces), rows=list(rows.values()), exact=list(tensors.values())).file()

    def masks(name: str, phrase: str, fields: bytes, values: tuple[str, list[int]] | None = ("F16", [6]), row: tuple[int, str] = (3, "")) -> Case:
        return case(f"masked_{name}", phrase, {"values": Row(MASKED, *row, fields=fields)}, {"sterna.values": values})

    yield masks("order_3", "order is 3", mask(3, 6, chosen, 10))
    yield masks("count_2_50", "count is", mask(0, 1 << 50, chosen, 10))
    yield masks("count_2_40", "expected 1099511627776 (1 or more)", mask(0, 1 << 40, chosen, 10))
    yield masks("count_0", "expected 0 (1 or more)", mask(0, 0, chosen, 10), ("F16", [0]))
    yield masks("count_of_values", "expected 7 (1 or more)", mask(0, 7, chosen, 10))
    yield masks("values_2_axes", "has torch.float16 values of shape (2, 3)", mask(0, 6, chosen, 10), ("F16", [2, 3]))
    yield masks("values_double", "has torch.float64 values", mask(0, 6, chosen, 10), ("F64", [6]))
    yield masks("values_missing", "'sterna.values' that the file lacks", mask(0, 6, chosen, 10), None)
    yield masks("seed_2_53", "seed is 9007199254740992", mask(0, 6, chosen, 10, seed=1 << 53))
    yield masks("seed_differs", "in the facts", mask(0, 6, chosen, 10, seed=1))
    yield masks("order_differs", "in the facts", mask(1, 6, chosen, 10))
    yield masks("names_none", "mask begins with None", mask(0, 6, [], 10))
    yield masks("names_begin_elsewhere", "mask begins with 'layer.0.bias'", mask(0, 6, [0, 2], 10))
    yield masks("names_beyond", "mask names tensors beyond the last", mask(0, 6, [2, 12], 10))
    yield masks("names_cut", "the table ends early", varint(0, 6, 0) + b"\4")
    yield masks("form_2", "form is 2", mask(0, 6, chosen, 10, form=2))
    yield masks("without_base", "not a tensor of the base", mask(0, 6, chosen, 10), row=(0, "layer.1.bias"))
    over = {"values": Row(MASKED, 1, fields=mask(0, 6, [0, 1], 10)), "fold": fold}
    yield case("masked_over_a_folded", "mask lies over a tensor", over)
    yield case("masked_needs_its_base", "difference to the base", {"values": values})
    seed = (1 << 53) - 1
    levels = ternary.rows[0].levels
    more = Row(MASKED, 1, fields=mask(2, 71, range(3), 3, seed=seed, form=1), levels=levels)
    yield "masked_count_of_levels", "has levels of shape (70,); expected 71", ternary.but(rows=[more]).file()
    twice = [Row(MASKED, i + 1, fields=mask(2, 70, [i], 3, seed=seed, form=1), levels=levels) for i in range(2)]
    yield "masked_twice", "masks are more than one", ternary.but(rows=twice).file()
    yield "masked_levels_need_their_base", "difference to the base", ternary.file()

    def folds(name: str, phrase: str, flags: int = 5, scale: float = 0.5, number: int = 2, **exact: tuple[str, list[int]] | None) -> Case:
        row = Row(FOLDED, number, "layer.0.weight", varint(flags) + struct.pack("<d", scale))
        return case(f"folded_{name}", phrase, {"fold": row}, {f"layer.0.weight.{part}": of for part, of in exact.items()})

    shapes = "expected [n, r] and [r, n]"
    yield folds("flags_3", "an activation of that number is not known", flags=3)
    yield folds("flags_8", "flags is 8", flags=8)
    yield folds("scale_nan", "scale is nan", scale=float("nan"))
    yield folds("ranks_differ", shapes, D=("F32", [3, 3]))
    yield folds("three_axes", shapes, D=("F32", [3, 2, 1]))
    yield folds("empty", shapes, D=("F32", [3, 0]), U=("F32", [0, 3]))
    yield folds("integers", shapes, D=("I32", [3, 2]))
    yield folds("missing", "'layer.0.weight.U' that the file lacks", U=None)
    yield folds("without_base", "not a tensor of the base", number=0)
    yield case("folded_needs_its_base", "difference to the base", {"fold": fold})

    def heads(name: str, phrase: str, fields: bytes = varint(0, 1), **exact: tuple[str, list[int]] | None) -> Case:
        named = {"score.weight" + {"value": "", "scales": ".scales"}[part]: of for part, of in exact.items()}
        return case(f"head_{name}", phrase, {"head": Row(SET, 0, "score.weight", fields)}, named)

    yield heads("flag_4", "flags is 4", varint(0, 4))
    yield heads("scales_of_a_buffer", "flags is 1", varint(1, 1))
    yield heads("scales_missing", "'score.weight.scales' that the file lacks", scales=None)
    yield heads("scales_unasked", "does not tell of: 'score.weight.scales'", varint(0, 0))
    yield heads("scales_3", "2 finite float32 numbers", scales=("F32", [3]))
    yield heads("scales_half", "2 finite float32 numbers", scales=("F16", [2]))
    yield heads("of_words", "expected an int8 head", value=("I32", [2, 3]))
    yield heads("scalar", "expected an int8 head", value=("I8", []))
    nan = ("score.weight.scales", "F32", [2], struct.pack("<2f", 1.0, float("nan")))
    exact = [nan, next(tensor for tensor in draft.exact if tensor[0] == "score.weight")]
    yield "head_scales_nan", "2 finite float32 numbers", draft.but(rows=[head], exact=exact, facts=exact_facts(mask=None)).file()
    new = {"tuned": Row(SET, 0, "new", varint(5, 0))}
    yield case("tuned_without_base", "not a tensor of the base", new, {"layer.0.bias": None, "new": ("F32", [3])})
    yield case("tuned_needs_its_base", "difference to the base", {"tuned": tuned})

    def told(name: str, phrase: str, **fields: Any) -> Case:
        sound = {"rule": 1, "order": "smallest"} | fields
        return facts_of(f"mask_{name}", phrase, mask={key: value for key, value in sound.items() if value is not None})

    def facts_of(name: str, phrase: str, **fields: Any) -> Case:
        return case(f"facts_{name}", phrase, {"values": values}, facts=exact_facts(**fields))

    yield told("rule_2", "mask.rule is 2", rule=2)
    yield told("rule_missing", "mask lacks the field 'rule'", rule=None)
    yield told("rule_text", "rule is a str", rule="import os")
    yield told("order_unknown", "mask.order is 'median'", order="median")
    yield told("density_0", "mask.density is 0", density=0)
    yield told("seed_negative", "mask.seed is -1", seed=-1)
    yield told("unknown_field", "unknown field 'code'", code="x")
    yield facts_of("mask_missing", "in the facts", mask=None)
    yield "facts_mask_of_none", "in the facts", plain().but(facts=facts(mask={"rule": 1, "order": "random"})).file()
    yield "facts_exact_levels", "method is 'exact', but it has levels", ternary.but(facts=exact_facts(mask=ternary.facts["mask"])).file()
    yield facts_of("exact_density", "density is 0.5", density=0.5)
    yield facts_of("exact_scale", "scale is 0.5", scale=0.5)
    yield facts_of("tuning_code", "tuning is", tuning={"a": {"trust_remote_code": True}})
    yield facts_of("tuning_text", "tuning is a str", tuning="hiwi")


def of_stream(name: str, phrase: str, raw: bytes, entries: int = 12, coding: int = 2) -> Case:
    """A file with one added tensor of that stream, and a sound one after it whose bytes a reader could stray into."""
    sound = stream(12, dict.fromkeys(range(12), 1), coding=coding)
    rows = [Row(ADD, 1, levels=[Levels(0, raw, coding)]), Row(ADD, 2, levels=[Levels(1, sound, coding)])]
    named = f"stream_{name}" if coding == 2 else f"rice_{name}"
    return named, phrase, plain().but(shapes=[(entries,), (12,)], rows=rows).file()


MALFORMED, DAMAGED = "block index is not well-formed", "does not decode within its bounds"


def indices(coding: int) -> Iterator[Case]:
    def case(name: str, raw: bytes, entries: int = 12) -> Case:
        return of_stream(name, MALFORMED, raw, entries, coding)

    index, payload = block([1, 5, 9], [0, 1, 0], 2, coding)
    yield case("empty", b"")
    yield case("of_no_entries", b"\x0c", 0)
    yield case("log2_21", bytes([21]) + index + payload)
    yield case("log2_255", bytes([255]) + index + payload)
    yield case("index_cut", bytes([12]) + index[:1])
    yield case("payload_cut", bytes([12]) + index + payload[:-1])
    yield case("payload_long", bytes([12]) + index + payload + b"\0")
    more, ones = block(list(range(13)), [0] * 13, 0, coding)
    yield case("count_above_size", bytes([12]) + more + ones)
    yield case("count_2_34", bytes([12]) + varint(1 << 34) + index[1:] + payload)
    yield case("count_varint_long", bytes([12]) + b"\x83\x80\x80\x80\x80\x00" + index[1:] + payload)
    yield case("length_2_34", bytes([12]) + index[:2] + varint(1 << 34) + payload)
    yield case("length_0", bytes([12]) + index[:2] + varint(0))
    yield case("parameter_42", bytes([12]) + bytes([index[0], 42]) + varint(24) + payload + bytes(24 - len(payload)))
    yield case("parameter_254", bytes([12]) + bytes([index[0], 254]) + index[2:] + payload)
    yield case("planes_beyond", bytes([12]) + bytes([index[0], 40]) + index[2:] + payload)
    yield case("full_count_below_size", bytes([12]) + varint(11) + bytes([255]) + varint(2) + bytes(2))
    yield case("full_length", bytes([12]) + varint(12) + bytes([255]) + varint(3) + bytes(3))
    yield case("chunk_missing", bytes([20]) + varint(0), CHUNK + 1)
    yield case("chunk_too_many", (bytes([20]) + varint(0)) * 2, CHUNK)
    yield case("blocks_missing", bytes([2]) + varint(0, 0))
    yield case("blocks_too_many", bytes([2]) + varint(0, 0, 0, 0))


def planes_cases() -> Iterator[Case]:
    def case(name: str, payload: bytes, n: int, parameter: int, entries: int = 12, phrase: str = DAMAGED) -> Case:
        return of_stream(name, phrase, bytes([20]) + varint(n) + bytes([parameter]) + varint(len(payload)) + payload, entries)

    def one(positions: list[int], parameter: int) -> bytes:
        return b"".join(map(packed, planes(positions, [0] * len(positions), parameter)))

    _, sound = block([1, 5, 9], [0, 1, 0], 2)
    yield case("quotients_missing", sound[:1] + bytes(1), 3, 2)
    yield case("a_quotient_too_few", sound[:1] + packed([1, 1]), 3, 2)
    yield case("a_quotient_too_many", sound[:1] + packed([1, 1, 1, 1]), 3, 2)
    yield case("quotients_of_the_next_block", sound[:1] + packed([0, 0, 0, 0, 0, 0, 0, 1]), 3, 2)
    yield case("spare_byte", sound + bytes(1), 3, 2)
    yield case("spare_word", sound + bytes(9), 3, 2)
    yield case("spare_fields", bytes([sound[0] | 0x80]) + sound[1:], 3, 2)
    yield case("position_at_end", one([1, 5, 12], 2), 3, 2)
    yield case("position_at_end_by_fields", one([1, 5, 12], 8), 3, 8)
    yield case("position_far_beyond", one([1, 5, 4000], 8), 3, 8)
    yield case("positions_all_beyond", one([90, 91, 92], 0), 3, 0)
    yield case("positions_beyond_by_fields", bytes([255] * 12) + bytes([15]), 20, 8, 30)
    yield case("quotients_far_beyond", packed([0] * 5) + packed([0] * 4000 + [1, 1, 1]), 3, 0)
    yield case("quotients_times_divisor_beyond_32_bits", bytes(8) + packed([0] * 2047 + [1, 1, 1]), 3, 2 * 20, CHUNK)
    yield case("tripled_position_at_end", one([1, 5, 12], 1), 3, 1)
    yield case("tripled_position_at_end_by_digit", one([1, 5, 12], 3), 3, 3)
    yield case("tripled_spare_byte", one([1, 5, 9], 1) + bytes(1), 3, 1)
    yield case("tripled_spare_thirds", packed([0] * 3) + packed([0, 0, 0, 1]) + bytes(1) + packed([1, 1, 1]), 3, 1)
    yield case("tripled_spare_which", packed([0] * 3) + packed([1, 0, 0]) + packed([0, 1]) + packed([1, 1, 1]), 3, 1)
    yield case("tripled_which_missing", packed([0] * 3) + packed([1, 0, 0]), 3, 1)
    yield case("tripled_thirds_missing", packed([0] * 3), 3, 1, phrase=MALFORMED)
    yield case("largest_parameter", packed([0] * 63) + packed([1] * 3) + packed([1] * 3), 3, 41, CHUNK)
    yield case("lows_beyond_2_24", packed([0] * 17 * 21), 17, 2 * 20, CHUNK, MALFORMED)


def rice_planes() -> Iterator[Case]:
    def bits(name: str, listed: list[int], n: int, parameter: int) -> Case:
        payload = packed(listed)
        return of_stream(name, DAMAGED, bytes([12]) + varint(n) + bytes([parameter]) + varint(len(payload)) + payload, coding=1)

    sound = planes1([1, 5, 9], [0, 1, 0], 2)
    yield bits("quotients_missing", [0] * 32, 3, 0)
    yield bits("last_quotient_missing", [*sound[:-1], 0], 3, 2)
    yield bits("last_quotient_in_next_block", [0, 0, 0, 1, 1, 0, 0, 0], 3, 0)
    yield bits("spare_byte", [*sound, *[0] * 16], 3, 2)
    yield bits("position_at_end", planes1([1, 5, 12], [0, 0, 0], 2), 3, 2)
    yield bits("position_far_beyond", planes1([1, 5, 4000], [0, 0, 0], 8), 3, 8)
    yield bits("positions_all_beyond", planes1([90, 91, 92], [0, 0, 0], 0), 3, 0)
    yield bits("tripled_quotients_missing", [0] * 40, 3, 5)
    yield bits("tripled_position_at_end", planes1([1, 5, 12], [0, 0, 0], 1), 3, 1)
    yield bits("tripled_spare_byte", [*planes1([1, 5, 9], [0, 1, 0], 1), *[0] * 9], 3, 1)
    yield bits("largest_parameter", [0] * 3 + [1] * 63 + [1] * 6 + [1] * 3, 3, 41)


def small_streams() -> Iterator[Case]:
    def case(name: str, phrase: str, raw: bytes, shape: tuple[int, ...] = (6, 5)) -> Case:
        rows = [Row(ADD, 1, levels=[Levels(0, raw, coding=3)])]
        return f"small_{name}", phrase, plain().but(shapes=[shape], rows=rows).file()

    count, mode, decode = "count of non-zeros", "has the mode", "does not decode to its count"
    sound = bytes.fromhex(SMALL)
    yield case("empty", count, b"")
    yield case("count_cut", count, b"\x80")
    yield case("count_varint_long", count, b"\x80" * 8 + b"\x01" + sound[1:])
    yield case("count_above_entries", count, varint(31) + sound[1:])
    yield case("count_above_bytes", count, varint(256 * 9 + 1) + sound[1:], (1 << 20, 2))
    yield case("count_2_48", count, varint(1 << 48) + sound[1:], (1 << 24, 1 << 24))
    yield case("count_alone", count, varint(11))
    yield case("bytes_after_no_non_zeros", count, varint(0) + b"\0")
    yield case("of_no_entries", count, sound, (0, 5))
    yield case("mode_2", mode, sound[:1] + b"\x02" + sound[2:])
    yield case("mode_255", mode, sound[:1] + b"\xff" + sound[2:])
    yield case("matrix_of_one_dimension", mode, sound, (30,))
    yield case("matrix_of_one_row", mode, sound, (1, 30))
    yield case("matrix_of_one_column", mode, sound, (30, 1))
    yield case("non_zeros_missing", decode, varint(30) + sound[1:])
    yield case("payload_of_ones", decode, sound[:2] + b"\xff" * 8)
    yield case("spare_byte_after_zeros", decode, sound + bytes(9) + b"\x01")
    yield case("flat_spare_byte", decode, varint(2) + b"\0" + bytes(8) + b"\x01")
    yield case("too_many_entries", "tell of 1,048,576 entries", sound, (1 << 10, 1 << 10))
    yield case("far_too_many_entries", "tell of 281,474,976,710,656 entries", sound, (1 << 24, 1 << 24))


def merging() -> Iterator[Case]:
    draft = merged()
    levels = Levels(0, stream(20, {2 * i: 1 for i in range(9)}), scale=b"")
    thirds = [20000, 20000, 25536]
    sound, numbers = palette_of([0.25, 0.5, 0.75]), numbers_of([0, 1, 2] * 3, thirds)

    def palette(name: str, phrase: str, entries: bytes = sound, raw: bytes = numbers, number: int = 0, **pieces: Any) -> Case:
        given = {"rows": [Row(PALETTE, 2, levels=[levels, Numbers(raw, number, entries)])], "shapes": [(20,)], "exact": []}
        return f"palette_{name}", phrase, draft.but(**(given | pieces)).file()

    wrong, ascend, damaged = "has magnitudes torch.", "not finite, above 0 and ascending", "are not well-formed"
    yield palette("of_one", wrong, palette_of([0.5]), b"")
    yield palette("of_none", wrong, palette_of([]), b"")
    yield palette("of_65537", "number of magnitudes is 65537", varint(65537, 0))
    yield palette("zero", ascend, palette_of([0.0, 0.5, 0.75]))
    yield palette("negative", ascend, palette_of([-0.25, 0.5, 0.75]))
    yield palette("nan", ascend, palette_of([0.25, math.nan, 0.75]))
    yield palette("infinity", ascend, palette_of([0.25, 0.5, math.inf]))
    yield palette("twice", ascend, palette_of([0.25, 0.5, 0.5]))
    yield palette("cut", "the table ends early", sound[:-3])
    yield palette("not_told", "palette number is 1; at most 0", b"", number=1)
    yield palette("numbers_missing", damaged, raw=b"")
    yield palette("numbers_too_few", damaged, raw=numbers_of([0, 1, 2], thirds))
    yield palette("numbers_too_many", damaged, raw=numbers_of([0, 1, 2] * 4, thirds))
    yield palette("numbers_cut", damaged, raw=numbers[:-1])
    yield palette("numbers_longer", "bytes longer than their blocks", raw=numbers + b"\0")
    yield palette("frequencies_few", "add up to 65535", raw=varint(20000, 20000, 25535) + numbers[9:])
    yield palette("frequencies_many", "add up to", raw=varint(1 << 20, 20000, 25535) + numbers[9:])
    yield palette("frequency_long", damaged, raw=b"\x80\x80\x80\x01" + numbers[3:])
    yield palette("state_low", damaged, raw=varint(*thirds, 4) + bytes([0, 0x7F, 255, 255]))
    yield palette("state_high", damaged, raw=varint(*thirds, 4) + bytes([0x80, 0, 0, 0]))
    yield palette("state_short", damaged, raw=varint(*thirds, 3) + bytes([1, 0, 0]))
    yield palette("block_beyond", damaged, raw=varint(*thirds, 1000) + bytes([1, 0, 0, 0]))
    yield palette("length_beyond", "length of numbers is 1000", rows=[Row(PALETTE, 2, levels=[levels, Numbers(numbers, 0, sound, 1000)])])
    nothing = Levels(0, stream(20, {}), scale=b"")
    yield palette("numbers_of_nothing", "expected none", rows=[Row(PALETTE, 2, levels=[nothing, Numbers(numbers, 0, sound)])])

    two = recovering()

    def tasks(name: str, phrase: str, entries: bytes, **pieces: Any) -> Case:
        rows = [Row(PALETTE, 1, levels=[levels, Numbers(numbers, 0, entries)])]
        return f"palette_tasks_{name}", phrase, two.but(**({"rows": rows, "shapes": [(20,)]} | pieces)).file()

    scales, masks = "not finite, 0 or more", "masks torch.int64"
    yield tasks("scale_nan", scales, palette_of([0.25, 0.5, 0.75], [1.0, math.nan], [1, 2, 3]))
    yield tasks("scale_negative", scales, palette_of([0.25, 0.5, 0.75], [1.0, -1.0], [1, 2, 3]))
    yield tasks("scale_large", "values of tasks that float32 cannot hold", palette_of([0.25, 0.5, 4.0], [1.0, 3e38], [1, 2, 3]))
    yield tasks("mask_beyond", masks, palette_of([0.25, 0.5, 0.75], [1.0, 1.0], [1, 2, 4]))
    yield tasks("masks_twice", "of which two have one mask", palette_of([0.25, 0.5, 0.5], [1.0, 1.0], [1, 2, 2]))
    yield tasks("masks_unsorted", "masks that are not ascending", palette_of([0.25, 0.5, 0.5], [1.0, 1.0], [1, 3, 2]))
    yield tasks("cut", "the table ends early", palette_of([0.25, 0.5, 0.75], [1.0, 1.0], [1]))
    yield tasks("of_33", "number of tasks is 33", varint(3, 33))
    yield tasks("of_three", "masks of 3 tasks, its facts tell of 2", palette_of([0.25, 0.5, 0.75], [1.0, 1.0, 1.0], [1, 2, 3]))
    add = [*two.rows[:2], Row(ADD, 3, levels=[Levels(0, stream(20, {1: 1}))])]
    yield "palette_tasks_beside_levels", "masks of tasks in some tensors, and none", two.but(rows=add).file()

    def heads(name: str, phrase: str, *tasks: str, role: int = 0, **told: Any) -> Case:
        rows = [Row(SET, 0, "score", varint(role, 2) + text(task)) for task in tasks]
        exact = [(f"{task}:score", "F32", [1], bytes(4)) for task in dict.fromkeys(tasks)]
        return f"heads_{name}", phrase, draft.but(rows=rows, exact=exact, facts=merge_facts(**told)).file()

    order = "not in order of their names"
    yield heads("twice", "exact tensor 'a:score' that the file lacks", "a", "a")
    yield heads("unsorted", order, "b", "a")
    yield heads("task_path", "is a path", "../a")
    yield heads("task_empty", "is not printable", "")
    yield heads("task_of_a_buffer", "is 2; at most 0", "a", role=1)
    yield heads("task_unknown", "heads of the task 'c'", "c")
    plainly = [Row(SET, 0, "score", varint(0, 0)), Row(SET, 0, "score", varint(0, 2) + text("a"))]
    both = [("score", "F32", [1], bytes(4)), ("a:score", "F32", [1], bytes(4))]
    yield "heads_with_and_without_task", order, draft.but(rows=plainly, exact=both).file()
    yield heads("of_a_number", "heads.a is 3", "a", heads={"a": 3})
    yield heads("unknown_field", "heads.a is", "a", heads={"a": {"weights": 1}})
    yield heads("config_with_code", "a config without code", "a", heads={"a": {"config": {"auto_map": {"AutoModel": "x"}}}})
    yield heads("config_with_code_deep", "a config without code", "a", heads={"a": {"config": {"x": {"auto_map": "y"}}}})
    yield heads("architecture", "a class name", "a", heads={"a": {"architecture": "os.system"}})
    yield heads("prefix", "a printable prefix", "a", heads={"a": {"prefix": "\x1b[2J"}})
    yield heads("dropped", "dropped names", "a", heads={"a": {"dropped": ["x\n"]}})
    yield "merge_without_recipe", "merge is {}", draft.but(facts=merge_facts(merge=None)).file()
    yield "recipe_without_merge", "merge is {'merge_method'", plain().but(facts=facts(merge={"merge_method": "ties"})).file()
    yield "merge_scope", "scale is 0.0", draft.but(facts=merge_facts(scope="global")).file()


def merged_adapters() -> Iterator[Case]:
    """Scales of single ranks, and factors that are numbers."""
    draft = adapters()

    def replaced(name: str, phrase: str, tensor: str, dtype: str, shape: Sequence[int], *values: float) -> Case:
        raw = struct.pack(f"<{len(values)}{'e' if dtype == 'F16' else 'f'}", *values)
        exact = [(tensor, dtype, shape, raw) if old[0] == tensor else old for old in draft.exact]
        return f"adapter_{name}", phrase, draft.but(exact=exact).file()

    ranks, wrong, beyond = "expected as many finite float32 numbers", "has factors torch.", "which float32 cannot hold"
    yield replaced("ranks_few", ranks, "a.weight.ranks", "F32", [1], 0.5)
    yield replaced("ranks_of_two_axes", ranks, "a.weight.ranks", "F32", [2, 1], 0.5, 0.5)
    yield replaced("ranks_nan", ranks, "a.weight.ranks", "F32", [2], 0.5, math.nan)
    yield replaced("ranks_in_16_bit", ranks, "a.weight.ranks", "F16", [2], 0.5, 0.5)
    yield replaced("ranks_too_large", "whose sum float32 cannot hold", "a.weight.ranks", "F32", [2], 3e38, 3e38)
    yield replaced("factor_of_one_axis", wrong, "b.weight.A", "F32", [3], *range(3))
    yield replaced("factor_ranks_differ", wrong, "b.weight.B", "F32", [1, 2], 1.0, -2.0)
    yield replaced("factor_empty", wrong, "b.weight.A", "F32", [1, 0])
    yield replaced("factor_in_16_bit", wrong, "b.weight.A", "F16", [1, 3], *range(3))
    yield replaced("factor_nan", beyond, "b.weight.A", "F32", [1, 3], 0.0, math.nan, 1.0)
    yield replaced("factor_infinite", beyond, "b.weight.B", "F32", [2, 1], math.inf, 1.0)
    yield replaced("factor_product", beyond, "b.weight.A", "F32", [1, 3], 3e38, 0.0, 1.0)
    yield replaced("vector_nan", "expected finite numbers in float32", "c.weight.vector", "F32", [1, 3], 0.5, math.nan, 0.0)
    yield replaced("vector_in_16_bit", "expected finite numbers in float32", "c.weight.vector", "F16", [1, 3], 0.5, 0.0, 0.0)
    for tensor in ("a.weight.ranks", "b.weight.A", "b.weight.B", "c.weight.vector"):
        left = [old for old in draft.exact if old[0] != tensor]
        yield f"adapter_without_{tensor}", f"exact tensor '{tensor}' that the file lacks", draft.but(exact=left).file()
    flags = [draft.rows[0], Row(LOW_RANK, 2, fields=varint(8) + text("m.b"))]
    yield "lowrank_flags", "flags is 8", draft.but(rows=flags).file()
    first = [Row(LOW_RANK, 2, fields=varint(4))]
    yield "lowrank_key_of_no_row", "which has none such", draft.but(rows=first, exact=draft.exact[1:3]).file()


def lossless_streams() -> Iterator[Case]:
    draft = lossless()

    def rows(name: str, phrase: str, *listed: Row, **pieces: Any) -> Case:
        return f"lossless_{name}", phrase, draft.but(rows=list(listed), exact=[], **pieces).file()

    def case(name: str, raw: bytes, shape: tuple[int, ...] = (6, 5)) -> Case:
        return rows(name, "counts that do not fit", Row(LOSSLESS, 1, levels=[Bits(2, 0, raw, bytes(16))]), shapes=[shape])

    def told(name: str, phrase: str, number: int = 1, **fields: Any) -> Case:
        sound = {"dtype": 2, "shape": 0, "stream": BITS, "digest": bytes(16)}
        return rows(name, phrase, Row(LOSSLESS, number, "" if number else "a", levels=[Bits(**(sound | fields))]))

    yield case("empty", b"")
    yield case("count_cut", b"\x80")
    yield case("count_varint_long", b"\x80" * 8 + b"\x01" + BITS[1:])
    yield case("count_above_entries", varint(31) + BITS[1:])
    yield case("count_above_bytes", varint(256 * 15 + 1) + BITS[1:], (1 << 10, 2))
    yield case("count_2_48", varint(1 << 48) + BITS[1:], (1 << 24, 1 << 24))
    yield case("count_alone", BITS[:1])
    yield case("plane_cut", BITS[:2])
    yield case("plane_2_40", BITS[:1] + varint(1 << 40) + BITS[2:])
    yield case("code_2_40", BITS[:2] + varint(1 << 40) + BITS[3:])
    yield case("code_cut", BITS[:-1])
    yield case("no_code", varint(12, 0, 0))
    yield case("bands_missing", BITS, (1 << 24, 1 << 24))
    yield rows("spare_byte", "1 bytes left over", Row(LOSSLESS, 1, levels=[Bits(2, 0, BITS + b"\0", bytes(16))]))
    yield rows("of_no_entries", "18 bytes left over", Row(LOSSLESS, 1, levels=[Bits(2, 0, BITS, bytes(16))]), shapes=[(0, 5)])
    yield told("dtype_3", "dtype is 3", dtype=3)
    yield told("coding_2", "lossless coding 2", coding=2)
    yield told("shape_out_of_range", "shape number is 2", shape=2)
    yield told("length_beyond", "stream length is 1000", length=1000)
    yield told("digest_cut", "the table ends early", digest=bytes(15))
    yield told("without_base", "not a tensor of the base", number=0)
    yield rows("twice", "not in order of their names", *[Row(LOSSLESS, 1, levels=[Bits(2, 0, BITS, bytes(16))])] * 2)
    yield "lossless_needs_its_base", "difference to the base", draft.file()
    go = "do not go with"
    yield "lossless_in_compeft", go, draft.but(facts=facts()).file()
    yield "lossless_in_exact", go, draft.but(facts=exact_facts(mask=None)).file()
    yield "lossless_with_levels", go, plain().but(facts=lossless_facts()).file()
    yield "facts_lossless_density", "density is 0.5", draft.but(facts=lossless_facts(density=0.5)).file()
    yield "facts_lossless_scale", "scale is 0.5", draft.but(facts=lossless_facts(scale=0.5)).file()


def too_large() -> Iterator[Case]:
    """Sound files that ask for far more memory, once they are made dense, than any file of their size should get."""
    takes = "the dense task vector takes"
    claims = facts(base=facts()["base"] | {"parameters": 1 << 50})
    empty = (bytes([20]) + varint(0)) * 512
    rows = [Row(ADD, 1, levels=[Levels(0, empty)])]
    yield "dense_2_29", takes, plain().but(facts=claims, shapes=[(1 << 29,)], rows=rows).file()
    yield "dense_beyond_base", takes, plain().but(shapes=[(1 << 17,)], rows=[Row(ADD, 1, levels=[Levels(0, bytes([20, 0]))])]).file()
    wide = (bytes([20]) + varint(0)) * 16
    row = Row(FACTORS, 1, fields=varint(0) + text("a.0") + struct.pack("<d", 1.0), levels=[Levels(0, wide), Levels(1, wide)])
    yield "product_2_48", takes, plain().but(facts=claims, shapes=[(1, 1 << 24), (1 << 24, 1)], rows=[row]).file()
    row = Row(FACTORS, 1, fields=varint(0) + text("a.0") + struct.pack("<d", 1.0), levels=[Levels(0, empty), Levels(1, bytes([20, 0]))])
    yield "factor_2_29", takes, plain().but(facts=claims, shapes=[(1 << 20, 1 << 9), (1, 1 << 20)], rows=[row]).file()
    needs = "difference to the base"
    yield "needs_its_base", needs, kinds().file()
    yield (
        "multiply_needs_its_base",
        needs,
        edges().but(rows=[Row(MULTIPLY, 1, fields=varint(0, 0) + text("x"), levels=[Levels(0, stream(1, {}))])]).file(),
    )


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.iterdir():
        old.unlink()
    phrases = {}
    for name, phrase, file in cases():
        assert name not in phrases, name
        phrases[name] = phrase
        (CORPUS / f"{name}.safetensors").write_bytes(file)
    (CORPUS / "cases.json").write_text(json.dumps(phrases, indent=0, sort_keys=True) + "\n")
    print(f"{len(phrases)} files, {sum(path.stat().st_size for path in CORPUS.iterdir())} bytes")


if __name__ == "__main__":
    main()

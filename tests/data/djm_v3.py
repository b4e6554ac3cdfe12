"""A second reader and writer of the formats of djm's flowd, written from their description alone.

djm_v3.py make-v3 COUNT SEED > FILE       flows with random fields and values
djm_v3.py make-v2 COUNT SEED > FILE       the same flows, as far as version 2 has their fields
djm_v3.py rewrite FILE > FILE             reads version 3, skips what it does not know, writes what it knows
djm_v3.py brief|verbose|csv|values FILE   prints records as djm's flowd-reader does, or as JSON
"""

import ipaddress
import json
import random
import struct
import sys
import time

CRC_BIT = 30
# Bit: name and layout. A pad is x.
V3 = {
    0: ("tag", ">I", ["tag"]),
    1: ("recv_time", ">II", ["recv_sec", "recv_usec"]),
    2: ("pft", ">BBBx", ["tcp_flags", "protocol", "tos"]),
    3: ("agent4", ">4s", ["agent"]),
    4: ("agent6", ">16s", ["agent"]),
    5: ("src4", ">4s", ["src"]),
    6: ("src6", ">16s", ["src"]),
    7: ("dst4", ">4s", ["dst"]),
    8: ("dst6", ">16s", ["dst"]),
    9: ("gateway4", ">4s", ["gateway"]),
    10: ("gateway6", ">16s", ["gateway"]),
    11: ("ports", ">HH", ["src_port", "dst_port"]),
    12: ("packets", ">Q", ["packets"]),
    13: ("octets", ">Q", ["octets"]),
    14: ("if", ">II", ["in_if", "out_if"]),
    15: ("agent_info", ">IIIHxx", ["uptime_ms", "sec", "nsec", "version"]),
    16: ("times", ">II", ["start", "finish"]),
    17: ("as", ">IIBBxx", ["src_as", "dst_as", "src_mask", "dst_mask"]),
    18: ("engine", ">HHII", ["engine_type", "engine_id", "seq", "source"]),
}
V2 = V3 | {
    1: ("recv_time", ">I", ["recv_sec"]),
    14: ("if", ">HH", ["in_if", "out_if"]),
    17: ("as", ">HHBBxx", ["src_as", "dst_as", "src_mask", "dst_mask"]),
    18: ("engine", ">BBxxI", ["engine_type", "engine_id", "seq"]),
}


def crc32(data):
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc


assert crc32(b"123456789") == 0x2DFD2D88


def pack(layouts, fields, flow):
    data = b""
    for bit, (_, layout, names) in layouts.items():
        if fields >> bit & 1:
            data += struct.pack(layout, *(flow[name] for name in names))
    return data


def write_v3(fields, flow):
    data = pack(V3, fields, flow)
    length = len(data) + (4 if fields >> CRC_BIT & 1 else 0)
    data = struct.pack(">BBHI", 3 << 5, length // 4, 0, fields) + data
    return data + (struct.pack(">I", crc32(data)) if fields >> CRC_BIT & 1 else b"")


def write_v2(fields, flow):
    data = struct.pack(">I", fields) + pack(V2, fields, flow)
    return data + (struct.pack(">I", crc32(data)) if fields >> CRC_BIT & 1 else b"")


def read_v3(data):
    """Yields the fields and the values of each record. As djm's reader, it skips what minor version 1 adds."""
    while data:
        version, words, reserved, fields = struct.unpack(">BBHI", data[:8])
        assert version >> 5 == 3 and reserved == 0, (version, reserved)
        length = 8 + 4 * words
        record, data = data[:length], data[length:]
        assert len(record) == length
        known = sum(1 << bit for bit in V3) | 1 << CRC_BIT
        assert version & 31 or not fields & ~known, hex(fields)
        place, flow = 8, {}
        for bit, (_, layout, names) in V3.items():
            if fields >> bit & 1:
                flow |= zip(names, struct.unpack_from(layout, record, place))
                place += struct.calcsize(layout)
        if fields >> CRC_BIT & 1:
            (flow["crc"],) = struct.unpack(">I", record[-4:])
            assert flow["crc"] == crc32(record[:place])
        yield fields & known, flow


def make(count, seed):
    """Yields the fields and the values of each flow, which fit in version 2, too."""
    rng = random.Random(seed)
    for _ in range(count):
        fields = rng.getrandbits(19)
        for bit in (3, 5, 7, 9):
            # One family at most.
            if fields >> bit & 3 == 3:
                fields &= ~(1 << bit + rng.getrandbits(1))
        fields |= rng.getrandbits(1) << CRC_BIT
        if not fields:
            continue
        flow = {}
        for bit, (_, layout, names) in V2.items():
            if fields >> bit & 1:
                size = struct.calcsize(layout)
                bits = rng.choice([8, 8 * size])
                raw = rng.getrandbits(bits).to_bytes(size, "big")
                flow |= zip(names, struct.unpack(layout, raw))
        # What version 2 does not have is 0 in version 3.
        yield fields, {"recv_usec": 0, "source": 0} | flow


def address(raw):
    return str(ipaddress.ip_address(raw))


def iso(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def interval(milliseconds):
    rest, text = milliseconds // 1000, ""
    for seconds, unit in [(31449600, "y"), (604800, "w"), (86400, "d"), (3600, "h"), (60, "m"), (1, "s")]:
        if rest >= seconds or unit == "s":
            text += f"{rest // seconds}{unit}"
            rest %= seconds
    return f"{text}.{milliseconds % 1000:03}"


def text(flow, verbose):
    words = ["FLOW"]

    def add(name, form):
        if name in flow:
            words.append(form(flow))

    add("tag", lambda f: f"tag {f['tag']}")
    add("recv_sec", lambda f: f"recv_time {iso(f['recv_sec'])}.{f['recv_usec']:06}")
    add("protocol", lambda f: f"proto {f['protocol']} tcpflags {f['tcp_flags']:02x} tos {f['tos']:02x}")
    add("agent", lambda f: f"agent [{address(f['agent'])}]")
    for end in ("src", "dst"):
        port = f":{flow[end + '_port']}" if "src_port" in flow else ""
        add(end, lambda f: f"{end} [{address(f[end])}]{port}")
    if verbose:
        add("gateway", lambda f: f"gateway [{address(f['gateway'])}]")
    add("packets", lambda f: f"packets {f['packets']}")
    add("octets", lambda f: f"octets {f['octets']}")
    if verbose:
        add("in_if", lambda f: f"in_if {f['in_if']} out_if {f['out_if']}")
        add("uptime_ms", lambda f: f"sys_uptime_ms {interval(f['uptime_ms'])} time_sec {iso(f['sec'])} "
            f"time_nanosec {f['nsec']} netflow ver {f['version']}")
        add("start", lambda f: f"flow_start {interval(f['start'])} flow_finish {interval(f['finish'])}")
        add("src_as", lambda f: f"src_AS {f['src_as']} src_masklen {f['src_mask']} "
            f"dst_AS {f['dst_as']} dst_masklen {f['dst_mask']}")
        add("seq", lambda f: f"engine_type {f['engine_type']} engine_id {f['engine_id']} "
            f"seq {f['seq']} source {f['source']}")
        add("crc", lambda f: f"crc32 {f['crc']:08x}")
    return " ".join(words)


CSV = {
    "unix_secs": "sec", "unix_nsecs": "nsec", "sysuptime": "uptime_ms", "exaddr": "agent", "dpkts": "packets",
    "doctets": "octets", "first": "start", "last": "finish", "engine_type": "engine_type", "engine_id": "engine_id",
    "srcaddr": "src", "dstaddr": "dst", "nexthop": "gateway", "input": "in_if", "output": "out_if",
    "srcport": "src_port", "dstport": "dst_port", "prot": "protocol", "tos": "tos", "tcp_flags": "tcp_flags",
    "src_mask": "src_mask", "dst_mask": "dst_mask", "src_as": "src_as", "dst_as": "dst_as",
}


def csv(flow):
    def cell(name):
        if name in ("agent", "src", "dst", "gateway"):
            return address(flow[name]) if name in flow else "(null)"
        return str(flow.get(name, 0))

    return ",".join(cell(name) for name in CSV.values())


def main(command, *arguments):
    out = sys.stdout
    if command.startswith("make"):
        if command == "make-v2":
            out.buffer.write(struct.pack(">IIII", 0x012CF047, 2, 1_700_000_000, 0))
        for fields, flow in make(*map(int, arguments)):
            out.buffer.write((write_v2 if command == "make-v2" else write_v3)(fields, flow))
        return
    with open(arguments[0], "rb") as file:
        records = list(read_v3(file.read()))
    if command == "rewrite":
        out.buffer.write(b"".join(write_v3(fields, flow) for fields, flow in records))
        return
    if command == "csv":
        print("#:" + ",".join(CSV))
    if command == "verbose":
        print("LOGFILE " + arguments[0])
    for _, flow in records:
        if command == "csv":
            print(csv(flow))
        elif command == "values":
            print(json.dumps({name: address(v) if isinstance(v, bytes) else v for name, v in flow.items()}))
        else:
            print(text(flow, command == "verbose"))


main(*sys.argv[1:])

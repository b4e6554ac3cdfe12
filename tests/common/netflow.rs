//! Builds NetFlow and IPFIX datagrams, byte by byte.

/// Private enterprise number of reverse elements.
pub const REVERSE: u32 = 29305;
/// Length of a field whose records tell its length.
pub const VARIABLE: u16 = 65535;

/// The fields, element and length, that a router sends of an IPv4 flow.
pub const FIELDS_20: [(u16, u16); 20] = [
    (8, 4),
    (12, 4),
    (15, 4),
    (10, 4),
    (14, 4),
    (2, 4),
    (1, 4),
    (22, 4),
    (21, 4),
    (7, 2),
    (11, 2),
    (6, 1),
    (4, 1),
    (5, 1),
    (16, 4),
    (17, 4),
    (9, 1),
    (13, 1),
    (48, 1),
    (61, 1),
];

/// A datagram of NetFlow v9 or IPFIX.
#[derive(Clone)]
pub struct Message {
    version: u16,
    bytes: Vec<u8>,
    sets: u16,
}

impl Message {
    pub fn v9(uptime_ms: u32, unix_s: u32, sequence: u32, source_id: u32) -> Message {
        let mut bytes = vec![0, 9, 0, 0];
        for number in [uptime_ms, unix_s, sequence, source_id] {
            bytes.extend(number.to_be_bytes());
        }
        Message {
            version: 9,
            bytes,
            sets: 0,
        }
    }

    pub fn ipfix(unix_s: u32, sequence: u32, domain: u32) -> Message {
        let mut bytes = vec![0, 10, 0, 0];
        for number in [unix_s, sequence, domain] {
            bytes.extend(number.to_be_bytes());
        }
        Message {
            version: 10,
            bytes,
            sets: 0,
        }
    }

    /// A set of anything.
    pub fn set(mut self, id: u16, content: &[u8]) -> Message {
        self.sets += 1;
        self.bytes.extend(id.to_be_bytes());
        self.bytes.extend((content.len() as u16 + 4).to_be_bytes());
        self.bytes.extend(content);
        self
    }

    /// A set of one template, of fields with element and length.
    pub fn template(self, id: u16, fields: &[(u16, u16)]) -> Message {
        let fields: Vec<_> = fields.iter().map(|(e, l)| (*e, *l, 0)).collect();
        self.template_with(id, &fields)
    }

    /// A set of one template, of fields with element, length and enterprise.
    pub fn template_with(self, id: u16, fields: &[(u16, u16, u32)]) -> Message {
        let content = template(id, fields);
        let set = if self.version == 9 { 0 } else { 2 };
        self.set(set, &content)
    }

    /// A set of one options template.
    pub fn options_template(
        self,
        id: u16,
        scopes: &[(u16, u16)],
        options: &[(u16, u16)],
    ) -> Message {
        let numbers = if self.version == 9 {
            [4 * scopes.len(), 4 * options.len()]
        } else {
            [scopes.len() + options.len(), scopes.len()]
        };
        let mut content = id.to_be_bytes().to_vec();
        for number in numbers {
            content.extend((number as u16).to_be_bytes());
        }
        for (element, length) in scopes.iter().chain(options) {
            content.extend(element.to_be_bytes());
            content.extend(length.to_be_bytes());
        }
        let set = if self.version == 9 { 1 } else { 3 };
        self.set(set, &content)
    }

    /// The datagram, with its length filled in; in v9 the count, of which tshark believes that it counts sets.
    pub fn done(mut self) -> Vec<u8> {
        let number = match self.version {
            9 => self.sets,
            _ => self.bytes.len() as u16,
        };
        self.bytes[2..4].copy_from_slice(&number.to_be_bytes());
        self.bytes
    }
}

/// A template record.
pub fn template(id: u16, fields: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend((fields.len() as u16).to_be_bytes());
    for (element, length, enterprise) in fields {
        let bit = if *enterprise == 0 { 0 } else { 0x8000 };
        bytes.extend((element | bit).to_be_bytes());
        bytes.extend(length.to_be_bytes());
        if *enterprise != 0 {
            bytes.extend(enterprise.to_be_bytes());
        }
    }
    bytes
}

/// The low `length` bytes of a number.
pub fn number(value: u128, length: usize) -> Vec<u8> {
    value.to_be_bytes()[16 - length..].to_vec()
}

/// A field of variable length, with its length in the short form, or in the long one.
pub fn variable(value: &[u8], long: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    if long {
        bytes.push(255);
        bytes.extend((value.len() as u16).to_be_bytes());
    } else {
        bytes.push(value.len() as u8);
    }
    bytes.extend(value);
    bytes
}

/// A datagram of v1 with records of 48 bytes, as softflowd sends them, in place of 52.
pub fn short_v1(records: u32, uptime_ms: u32, unix_s: u32) -> Vec<u8> {
    let long = old(1, records, 0, uptime_ms, unix_s);
    let (header, long) = long.split_at(16);
    let short = long.chunks(52).flat_map(|record| &record[..48]);
    header.iter().chain(short).copied().collect()
}

/// A datagram of v1, v5 or v7 with records that differ in their ports and counters.
pub fn old(version: u16, records: u32, sequence: u32, uptime_ms: u32, unix_s: u32) -> Vec<u8> {
    let mut bytes = version.to_be_bytes().to_vec();
    bytes.extend((records as u16).to_be_bytes());
    for number in [uptime_ms, unix_s, 500_000_000] {
        bytes.extend(number.to_be_bytes());
    }
    if version != 1 {
        bytes.extend(sequence.to_be_bytes());
        bytes.extend(if version == 5 {
            [1, 2, 0x40, 100]
        } else {
            [0; 4]
        });
    }
    for n in 0..records {
        bytes.extend([192, 0, 2, 1, 198, 51, 100, 2, 203, 0, 113, 3, 0, 7, 0, 8]);
        for number in [10 + n, 1000 + n, uptime_ms - 5000, uptime_ms - 1000] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.extend((40_000 + n as u16).to_be_bytes());
        bytes.extend(443_u16.to_be_bytes());
        match version {
            1 => bytes.extend([0, 0, 6, 0x20, 0x1b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            _ => bytes.extend([0, 0x1b, 6, 0x20, 0xfd, 0xe8, 0xfd, 0xe9, 24, 16, 0, 0]),
        }
        if version == 7 {
            bytes.extend([10, 0, 0, 1]);
        }
        if version == 1 {
            // 52 bytes in all.
            bytes.truncate(16 + 52 * (n as usize + 1));
        }
    }
    bytes
}

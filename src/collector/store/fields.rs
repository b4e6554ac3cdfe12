//! The fields of a stored record: names and bits.

use std::ops::BitOr;

/// A set of fields, as the bits of a stored record's `fields`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields(pub u32);

impl Fields {
    /// The tag of the rule.
    pub const TAG: Fields = Fields(1 << 0);
    /// When the record was received.
    pub const RECV_TIME: Fields = Fields(1 << 1);
    /// TCP flags, protocol, type of service.
    pub const PROTO_FLAGS_TOS: Fields = Fields(1 << 2);
    /// The exporter's address, IPv4.
    pub const AGENT_ADDR4: Fields = Fields(1 << 3);
    /// The exporter's address, IPv6.
    pub const AGENT_ADDR6: Fields = Fields(1 << 4);
    /// The source's address, IPv4.
    pub const SRC_ADDR4: Fields = Fields(1 << 5);
    /// The source's address, IPv6.
    pub const SRC_ADDR6: Fields = Fields(1 << 6);
    /// The destination's address, IPv4.
    pub const DST_ADDR4: Fields = Fields(1 << 7);
    /// The destination's address, IPv6.
    pub const DST_ADDR6: Fields = Fields(1 << 8);
    /// The next hop's address, IPv4.
    pub const GATEWAY_ADDR4: Fields = Fields(1 << 9);
    /// The next hop's address, IPv6.
    pub const GATEWAY_ADDR6: Fields = Fields(1 << 10);
    /// Both ports.
    pub const SRCDST_PORT: Fields = Fields(1 << 11);
    /// Packets.
    pub const PACKETS: Fields = Fields(1 << 12);
    /// Bytes.
    pub const OCTETS: Fields = Fields(1 << 13);
    /// Both interfaces.
    pub const IF_INDICES: Fields = Fields(1 << 14);
    /// The exporter's uptime, clock, and protocol version.
    pub const AGENT_INFO: Fields = Fields(1 << 15);
    /// First and last packet in the exporter's uptime.
    pub const FLOW_TIMES: Fields = Fields(1 << 16);
    /// Autonomous systems and prefix lengths.
    pub const AS_INFO: Fields = Fields(1 << 17);
    /// Engine, sequence number and source id.
    pub const FLOW_ENGINE_INFO: Fields = Fields(1 << 18);
    /// Minor version 1: flow label (4 bytes).
    pub const FLOW_LABEL: Fields = Fields(1 << 19);
    /// Minor version 1: scitag u32, origin u8, 3 bytes 0.
    pub const SCITAG: Fields = Fields(1 << 20);
    /// Minor version 1: first and last packet, UNIX milliseconds, u64 each.
    pub const ABSOLUTE_TIMES: Fields = Fields(1 << 21);
    /// Minor version 1: sampling interval u32.
    pub const SAMPLING: Fields = Fields(1 << 22);
    /// Minor version 1: observation domain u32.
    pub const DOMAIN: Fields = Fields(1 << 23);
    /// Minor version 1: CRC-32 of the fields from bit 19 on, which [`Fields::CRC32`] does not cover.
    pub const EXTENSION_CRC32: Fields = Fields(1 << 24);
    /// CRC-32 of the header and the fields up to bit 18.
    pub const CRC32: Fields = Fields(1 << 30);

    /// No field.
    pub const NONE: Fields = Fields(0);
    /// The fields of minor version 0: those that djm's flowd knows.
    pub const COMPATIBLE: Fields = Fields(0x4007_ffff);
    /// The fields of minor version 1.
    pub const EXTENSION: Fields = Fields(0x01f8_0000);
    /// Every field.
    pub const ALL: Fields = Fields(Self::COMPATIBLE.0 | Self::EXTENSION.0);

    /// Whether all fields of `other` are in this set.
    pub fn contains(self, other: Fields) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any field of `other` is in this set.
    pub fn intersects(self, other: Fields) -> bool {
        self.0 & other.0 != 0
    }

    /// The fields for a name in `store`, in any case: `SRC_ADDR` means both address families, `ALL` every field.
    pub fn from_name(name: &str) -> Option<Fields> {
        let name = name.to_ascii_uppercase();
        NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|&(_, fields)| fields)
    }

    /// Every name that [`Fields::from_name`] knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMES.iter().map(|(name, _)| *name)
    }
}

impl BitOr for Fields {
    type Output = Fields;
    fn bitor(self, other: Fields) -> Fields {
        Fields(self.0 | other.0)
    }
}

const NAMES: &[(&str, Fields)] = &[
    ("ALL", Fields::ALL),
    ("TAG", Fields::TAG),
    ("RECV_TIME", Fields::RECV_TIME),
    ("PROTO_FLAGS_TOS", Fields::PROTO_FLAGS_TOS),
    ("AGENT_ADDR", Fields(3 << 3)),
    ("AGENT_ADDR4", Fields::AGENT_ADDR4),
    ("AGENT_ADDR6", Fields::AGENT_ADDR6),
    ("SRC_ADDR", Fields(3 << 5)),
    ("SRC_ADDR4", Fields::SRC_ADDR4),
    ("SRC_ADDR6", Fields::SRC_ADDR6),
    ("DST_ADDR", Fields(3 << 7)),
    ("DST_ADDR4", Fields::DST_ADDR4),
    ("DST_ADDR6", Fields::DST_ADDR6),
    ("SRCDST_ADDR", Fields(15 << 5)),
    ("GATEWAY_ADDR", Fields(3 << 9)),
    ("GATEWAY_ADDR4", Fields::GATEWAY_ADDR4),
    ("GATEWAY_ADDR6", Fields::GATEWAY_ADDR6),
    ("SRCDST_PORT", Fields::SRCDST_PORT),
    ("PACKETS", Fields::PACKETS),
    ("OCTETS", Fields::OCTETS),
    ("IF_INDICES", Fields::IF_INDICES),
    ("AGENT_INFO", Fields::AGENT_INFO),
    ("FLOW_TIMES", Fields::FLOW_TIMES),
    ("AS_INFO", Fields::AS_INFO),
    ("FLOW_ENGINE_INFO", Fields::FLOW_ENGINE_INFO),
    ("FLOW_LABEL", Fields::FLOW_LABEL),
    ("SCITAG", Fields::SCITAG),
    ("ABSOLUTE_TIMES", Fields::ABSOLUTE_TIMES),
    ("SAMPLING", Fields::SAMPLING),
    ("DOMAIN", Fields::DOMAIN),
    ("CRC32", Fields(Fields::CRC32.0 | Fields::EXTENSION_CRC32.0)),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_for_the_bits_of_the_format() {
        assert_eq!(Fields::from_name("src_addr"), Some(Fields(0x60)));
        assert_eq!(Fields::from_name("SrcDst_Addr"), Some(Fields(0x1e0)));
        assert_eq!(
            Fields::from_name("FLOW_ENGINE_INFO"),
            Some(Fields(0x4_0000))
        );
        assert_eq!(Fields::from_name("nothing"), None);
        let every = Fields::names().filter_map(Fields::from_name);
        assert_eq!(every.fold(Fields::NONE, |all, one| all | one), Fields::ALL);
    }
}

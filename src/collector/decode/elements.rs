//! Information elements: which element of a template fills which part of a flow record.
//!
//! Numbers as in the IANA registry "IPFIX Information Elements", which NetFlow v9's field types are a part of.

/// Private enterprise number of reverse elements (RFC 5103): the other direction of a biflow.
pub const REVERSE: u32 = 29305;

/// Elements of options records.
pub mod option {
    /// ingressInterface, as a scope.
    pub const INGRESS_INTERFACE: u16 = 10;
    /// samplingInterval.
    pub const SAMPLING_INTERVAL: u16 = 34;
    /// samplerId, as NetFlow v9 calls it.
    pub const SAMPLER_ID: u16 = 48;
    /// samplerRandomInterval.
    pub const RANDOM_INTERVAL: u16 = 50;
    /// systemInitTimeMilliseconds.
    pub const SYSTEM_INIT_TIME: u16 = 160;
    /// selectorId.
    pub const SELECTOR_ID: u16 = 302;
    /// samplingPacketInterval: packets in a row that are counted.
    pub const PACKET_INTERVAL: u16 = 305;
    /// samplingPacketSpace: packets in a row that are not.
    pub const PACKET_SPACE: u16 = 306;
    /// samplingSize: packets that are counted of a population.
    pub const SAMPLING_SIZE: u16 = 309;
    /// samplingPopulation.
    pub const SAMPLING_POPULATION: u16 = 310;
    /// samplingProbability, a floating-point number.
    pub const SAMPLING_PROBABILITY: u16 = 311;
}

/// A part of a flow record. One element of a template fills it. The order is that of filling: a later part may depend on
/// an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Bytes.
    Octets,
    /// Packets.
    Packets,
    /// Transport protocol.
    Protocol,
    /// Type of service.
    Tos,
    /// TCP flags.
    TcpFlags,
    /// IPv6 address of the source.
    SourceV6,
    /// IPv4 address of the source.
    SourceV4,
    /// IPv6 address of the destination.
    DestinationV6,
    /// IPv4 address of the destination.
    DestinationV4,
    /// IPv6 address of the next hop.
    NextHopV6,
    /// IPv4 address of the next hop.
    NextHopV4,
    /// Prefix length of an IPv6 source.
    SourceMaskV6,
    /// Prefix length of an IPv4 source.
    SourceMaskV4,
    /// Prefix length of an IPv6 destination.
    DestinationMaskV6,
    /// Prefix length of an IPv4 destination.
    DestinationMaskV4,
    /// UDP port of the source.
    SourceUdpPort,
    /// TCP port of the source.
    SourceTcpPort,
    /// Port of the source, of any protocol.
    SourcePort,
    /// UDP port of the destination.
    DestinationUdpPort,
    /// TCP port of the destination.
    DestinationTcpPort,
    /// Port of the destination, of any protocol.
    DestinationPort,
    /// Type and code of ICMP for IPv4.
    IcmpV4,
    /// Type of ICMP for IPv4.
    IcmpTypeV4,
    /// Code of ICMP for IPv4.
    IcmpCodeV4,
    /// Type and code of ICMP for IPv6.
    IcmpV6,
    /// Type of ICMP for IPv6.
    IcmpTypeV6,
    /// Code of ICMP for IPv6.
    IcmpCodeV6,
    /// Interface of arrival.
    Input,
    /// Interface of departure.
    Output,
    /// Autonomous system of the source.
    SourceAs,
    /// Autonomous system of the destination.
    DestinationAs,
    /// IPv6 flow label.
    FlowLabel,
    /// The sampler that chose the packets.
    Sampler,
    /// The sampling interval itself.
    SamplingInterval,
    /// First packet, absolute.
    Start,
    /// Last packet, absolute.
    End,
    /// First packet, in the exporter's uptime.
    StartUptime,
    /// Last packet, in the exporter's uptime.
    EndUptime,
    /// Time from the first packet to the last.
    Duration,
    /// When the exporter started.
    SystemInit,
}

/// How the bytes of an element are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// An integer of 1 to 8 bytes, big endian; its low bits if the part is shorter.
    Integer,
    /// Exactly four bytes.
    Ipv4,
    /// Exactly sixteen bytes.
    Ipv6,
    /// The DSCP alone, which is the upper six bits of the type of service.
    Dscp,
    /// UNIX seconds, or a duration in seconds.
    Seconds,
    /// UNIX milliseconds, or a duration in milliseconds.
    Milliseconds,
    /// A duration in microseconds.
    Microseconds,
    /// Exactly eight bytes: NTP seconds and their fraction (RFC 7011, 6.1.9 and 6.1.10).
    Ntp,
    /// Microseconds before the export time of the header (RFC 5102, 5.9.10).
    BeforeExport,
}

impl Form {
    /// Whether an element of `length` bytes can be read so.
    pub fn accepts(self, length: usize) -> bool {
        match self {
            Form::Ipv4 => length == 4,
            Form::Ipv6 => length == 16,
            Form::Ntp => length == 8,
            _ => (1..=8).contains(&length),
        }
    }
}

/// The part that an element fills, how it is read, and its rank: of several elements of a template for one part, the one with the lowest
/// rank fills it.
pub fn meaning(element: u16) -> Option<(Part, Form, u8)> {
    use Form::*;
    Some(match element {
        1 => (Part::Octets, Integer, 0),
        85 => (Part::Octets, Integer, 1),
        23 => (Part::Octets, Integer, 2),
        2 => (Part::Packets, Integer, 0),
        86 => (Part::Packets, Integer, 1),
        24 => (Part::Packets, Integer, 2),
        4 => (Part::Protocol, Integer, 0),
        5 => (Part::Tos, Integer, 0),
        195 => (Part::Tos, Dscp, 1),
        6 => (Part::TcpFlags, Integer, 0),
        27 => (Part::SourceV6, Ipv6, 0),
        8 => (Part::SourceV4, Ipv4, 0),
        28 => (Part::DestinationV6, Ipv6, 0),
        12 => (Part::DestinationV4, Ipv4, 0),
        62 => (Part::NextHopV6, Ipv6, 0),
        63 => (Part::NextHopV6, Ipv6, 1),
        15 => (Part::NextHopV4, Ipv4, 0),
        18 => (Part::NextHopV4, Ipv4, 1),
        29 => (Part::SourceMaskV6, Integer, 0),
        9 => (Part::SourceMaskV4, Integer, 0),
        30 => (Part::DestinationMaskV6, Integer, 0),
        13 => (Part::DestinationMaskV4, Integer, 0),
        7 => (Part::SourcePort, Integer, 0),
        180 => (Part::SourceUdpPort, Integer, 0),
        182 => (Part::SourceTcpPort, Integer, 0),
        11 => (Part::DestinationPort, Integer, 0),
        181 => (Part::DestinationUdpPort, Integer, 0),
        183 => (Part::DestinationTcpPort, Integer, 0),
        32 => (Part::IcmpV4, Integer, 0),
        176 => (Part::IcmpTypeV4, Integer, 0),
        177 => (Part::IcmpCodeV4, Integer, 0),
        139 => (Part::IcmpV6, Integer, 0),
        178 => (Part::IcmpTypeV6, Integer, 0),
        179 => (Part::IcmpCodeV6, Integer, 0),
        10 => (Part::Input, Integer, 0),
        252 => (Part::Input, Integer, 1),
        14 => (Part::Output, Integer, 0),
        253 => (Part::Output, Integer, 1),
        16 => (Part::SourceAs, Integer, 0),
        17 => (Part::DestinationAs, Integer, 0),
        31 => (Part::FlowLabel, Integer, 0),
        option::SELECTOR_ID => (Part::Sampler, Integer, 0),
        option::SAMPLER_ID => (Part::Sampler, Integer, 1),
        option::SAMPLING_INTERVAL => (Part::SamplingInterval, Integer, 0),
        option::RANDOM_INTERVAL => (Part::SamplingInterval, Integer, 1),
        152 => (Part::Start, Milliseconds, 0),
        156 => (Part::Start, Ntp, 1),
        154 => (Part::Start, Ntp, 2),
        150 => (Part::Start, Seconds, 3),
        158 => (Part::Start, BeforeExport, 4),
        153 => (Part::End, Milliseconds, 0),
        157 => (Part::End, Ntp, 1),
        155 => (Part::End, Ntp, 2),
        151 => (Part::End, Seconds, 3),
        159 => (Part::End, BeforeExport, 4),
        22 => (Part::StartUptime, Integer, 0),
        21 => (Part::EndUptime, Integer, 0),
        option::SYSTEM_INIT_TIME => (Part::SystemInit, Milliseconds, 0),
        161 => (Part::Duration, Milliseconds, 0),
        162 => (Part::Duration, Microseconds, 1),
        _ => return None,
    })
}

//! Converts a tag to and from a scitag, an IPv6 flow label, and an option of an extension header. No I/O.
//!
//! The label follows draft-cc-v6ops-wlcg-flow-label-marking-03. Of its 20 bits, with bit 19 the highest, bits 17 to
//! 9 are the experiment with its lowest bit first, bits 7 to 2 the activity, and bits 19, 18, 8, 1 and 0 entropy.

use std::hash::Hasher;
use std::net::IpAddr;

use siphasher::sip::SipHasher13;

use crate::flow::{Flow, Tag};

/// The bits of a label that differ between flows with the same tag.
pub const ENTROPY: u32 = 0b1100_0000_0001_0000_0011;
/// The largest experiment that fits in a label.
pub const EXPERIMENT_MAX: u16 = 511;
/// The largest activity that fits in a label.
pub const ACTIVITY_MAX: u16 = 63;

/// `experiment << 6 | activity`, 65 to 32767 for a tag that fits in a label.
pub fn scitag(tag: Tag) -> u32 {
    u32::from(tag.experiment) << 6 | u32::from(tag.activity)
}

/// The inverse of [`scitag`].
pub fn from_scitag(scitag: u16) -> Tag {
    Tag {
        experiment: scitag >> 6,
        activity: scitag & ACTIVITY_MAX,
    }
}

/// Whether packets can carry the tag: the experiment is 1 to 511 and the activity 1 to 63.
pub fn fits(tag: Tag) -> bool {
    (1..=EXPERIMENT_MAX).contains(&tag.experiment) && (1..=ACTIVITY_MAX).contains(&tag.activity)
}

/// The label of a tag without entropy, in host byte order. The tag must fit.
pub fn label(tag: Tag) -> u32 {
    let reversed = u32::from(tag.experiment.reverse_bits() >> 7);
    reversed << 9 | u32::from(tag.activity) << 2
}

/// The tag in a label; the entropy bits are ignored.
pub fn from_label(label: u32) -> Tag {
    let reversed = (label >> 9 & 0x1ff) as u16;
    Tag {
        experiment: (reversed << 7).reverse_bits(),
        activity: (label >> 2) as u16 & ACTIVITY_MAX,
    }
}

/// The entropy bits of a flow. They depend only on the flow and the key, so that a restart or a repeated start does
/// not change the label of an open flow.
pub fn entropy(source_to_destination: &Flow, key: &[u8; 16]) -> u32 {
    let mut hasher = SipHasher13::new_with_key(key);
    for end in [
        source_to_destination.source,
        source_to_destination.destination,
    ] {
        match end.address {
            IpAddr::V4(address) => hasher.write(&address.octets()),
            IpAddr::V6(address) => hasher.write(&address.octets()),
        }
        hasher.write(&end.port.to_be_bytes());
    }
    hasher.write(source_to_destination.protocol.as_str().as_bytes());
    let hash = hasher.finish() as u32;
    (hash & 0b11) | (hash >> 2 & 1) << 8 | (hash >> 3 & 0b11) << 18
}

/// Computes the labels of flows.
#[derive(Clone, Debug)]
pub struct Labeller {
    key: [u8; 16],
}

impl Labeller {
    /// `key` is the secret key for the entropy bits.
    pub fn new(key: [u8; 16]) -> Labeller {
        Labeller { key }
    }

    /// The key for the entropy bits.
    pub fn key(&self) -> &[u8; 16] {
        &self.key
    }

    /// The label of the packets from source to destination. The tag must fit.
    pub fn label(&self, source_to_destination: &Flow, tag: Tag) -> u32 {
        label(tag) | entropy(source_to_destination, &self.key)
    }
}

/// The value of the option, 24 bits: `experiment << 8 | activity`.
pub fn option_value(tag: Tag) -> u32 {
    u32::from(tag.experiment) << 8 | u32::from(tag.activity)
}

/// A Hop-by-Hop or Destination Options header with the option and Pad1, before `next_header`.
pub fn options_header(tag: Tag, next_header: u8) -> [u8; 8] {
    let [_, high, middle, low] = option_value(tag).to_be_bytes();
    [next_header, 0, 0x1e, 3, high, middle, low, 0]
}

/// Where in the IPv6 header a packet carries its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// In the flow label.
    Label,
    /// In a Hop-by-Hop Options header.
    HopByHop,
    /// In a Destination Options header.
    Destination,
    /// In both headers.
    HopByHopDestination,
}

impl Strategy {
    /// All strategies; the index is the number that the eBPF program uses.
    pub const ALL: [Strategy; 4] = [
        Strategy::Label,
        Strategy::HopByHop,
        Strategy::Destination,
        Strategy::HopByHopDestination,
    ];

    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Strategy::Label => "label",
            Strategy::HopByHop => "hopByHop",
            Strategy::Destination => "destination",
            Strategy::HopByHopDestination => "hopByHopDestination",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Protocol;
    use proptest::prelude::*;

    #[test]
    fn labels_match_the_specification() {
        for (experiment, activity, expected) in [
            (2, 9, 65572),
            (2, 19, 65612),
            (3, 3, 196_620),
            (3, 4, 196_624),
            (4, 3, 32780),
            (4, 4, 32784),
            (5, 10, 163_880),
            (5, 14, 163_896),
            (3, 14, 196_664),
            (511, 63, 261_884),
        ] {
            let tag = Tag {
                experiment,
                activity,
            };
            assert_eq!(label(tag), expected);
            assert_eq!(from_label(expected | ENTROPY), tag);
        }
        let tag = Tag {
            experiment: 3,
            activity: 14,
        };
        assert_eq!(scitag(tag), 206);
        assert_eq!(from_scitag(206), tag);
        assert_eq!(options_header(tag, 6), [6, 0, 0x1e, 3, 0, 3, 14, 0]);
    }

    proptest! {
        #[test]
        fn every_tag_that_fits_is_read_back(experiment in 1u16..=511, activity in 1u16..=63, noise in any::<u32>()) {
            let tag = Tag { experiment, activity };
            prop_assert!(fits(tag));
            prop_assert_eq!(label(tag) & ENTROPY, 0);
            prop_assert!(label(tag) < 1 << 20);
            prop_assert_eq!(from_label(label(tag) | noise & ENTROPY), tag);
            prop_assert_eq!(from_scitag(scitag(tag) as u16), tag);
        }

        #[test]
        fn entropy_is_stable_and_changes_only_its_bits(port in 1u16.., key in any::<[u8; 16]>()) {
            let end = |n: u8, port| ([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n].into(), port);
            let flow = Flow::new(Protocol::Tcp, end(1, port), end(2, 443)).unwrap();
            let bits = entropy(&flow, &key);
            prop_assert_eq!(bits & !ENTROPY, 0);
            prop_assert_eq!(bits, entropy(&flow, &key));
        }
    }

    #[test]
    fn entropy_uses_all_of_its_bits() {
        let seen = (1..200u16).fold((0, !0), |(or, and), port| {
            let end = |n: u8, port| ([192, 0, 2, n].into(), port);
            let flow = Flow::new(Protocol::Udp, end(1, port), end(2, 443)).unwrap();
            let bits = entropy(&flow, &[7; 16]);
            (or | bits, and & bits)
        });
        assert_eq!(seen, (ENTROPY, 0));
    }
}

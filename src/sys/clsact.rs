//! The clsact qdisc and the filters on it, over rtnetlink: which are ours, and whether others are there.

use std::io;

use neli::consts::nl::NlmF;
use neli::consts::rtnl::{RtAddrFamily, Rtm, Tca};
use neli::consts::socket::NlFamily;
use neli::nl::NlPayload;
use neli::router::synchronous::NlRouter;
use neli::rtnl::{Tcmsg, TcmsgBuilder};
use neli::utils::Groups;

const GET_QDISC: u16 = 38;
const GET_FILTER: u16 = 46;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)` and the same for egress.
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;

/// A filter on the egress side of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Index of the interface.
    pub interface: u32,
    /// Its handle, unique within a priority.
    pub handle: u32,
    /// Its priority.
    pub priority: u32,
    /// The name of the BPF program, empty for a filter of another kind.
    pub program: String,
}

/// Whether the interface has a clsact qdisc.
pub fn is_there(interface: u32) -> io::Result<bool> {
    let clsact = |qdisc: &Tcmsg| {
        let kind = qdisc.rtattrs().get_attr_handle();
        let kind = kind.get_attr_payload_as_with_len::<String>(Tca::Kind);
        kind.is_ok_and(|kind| kind.trim_end_matches('\0') == "clsact")
    };
    // The kernel dumps the qdiscs of all interfaces whatever it is asked.
    let qdiscs = dump(GET_QDISC, interface, 0)?;
    Ok(qdiscs
        .iter()
        .any(|q| *q.tcm_ifindex() as u32 == interface && clsact(q)))
}

/// The filters on the egress side of an interface.
pub fn egress_filters(interface: u32) -> io::Result<Vec<Filter>> {
    filters(interface, EGRESS)
}

/// Whether any filter, of whomever, is on either side of an interface.
pub fn is_used(interface: u32) -> io::Result<bool> {
    Ok(!filters(interface, EGRESS)?.is_empty() || !filters(interface, INGRESS)?.is_empty())
}

fn filters(interface: u32, parent: u32) -> io::Result<Vec<Filter>> {
    let found = dump(GET_FILTER, interface, parent)?;
    let filter = |message: &Tcmsg| Filter {
        interface,
        handle: *message.tcm_handle(),
        priority: *message.tcm_info() >> 16,
        program: program_name(message).unwrap_or_default(),
    };
    // Each priority also announces itself, with handle 0.
    Ok(found
        .iter()
        .filter(|m| *m.tcm_handle() != 0)
        .map(filter)
        .collect())
}

/// Attributes nested in `TCA_OPTIONS`: length, type, payload, padded to 4 bytes.
fn program_name(message: &Tcmsg) -> Option<String> {
    let options = message
        .rtattrs()
        .iter()
        .find(|a| u16::from(*a.rta_type()) == TCA_OPTIONS)?;
    let mut rest: &[u8] = options.rta_payload().as_ref();
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]);
        let payload = rest.get(4..length)?;
        if kind == TCA_BPF_NAME {
            let text = String::from_utf8_lossy(payload);
            return Some(text.trim_end_matches('\0').to_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn dump(request: u16, interface: u32, parent: u32) -> io::Result<Vec<Tcmsg>> {
    let other = |error: &dyn std::fmt::Display| io::Error::other(format!("rtnetlink: {error}"));
    let (netlink, _) =
        NlRouter::connect(NlFamily::Route, None, Groups::empty()).map_err(|e| other(&e))?;
    let message = TcmsgBuilder::default()
        .tcm_family(RtAddrFamily::Unspecified.into())
        .tcm_ifindex(interface as i32)
        .tcm_handle(0)
        .tcm_parent(parent)
        .tcm_info(0)
        .build()
        .map_err(|e| other(&e))?;
    let answers = netlink
        .send::<_, _, Rtm, Tcmsg>(Rtm::from(request), NlmF::DUMP, NlPayload::Payload(message))
        .map_err(|e| other(&e))?;
    let mut found = Vec::new();
    for answer in answers {
        let answer = answer.map_err(|e| other(&e))?;
        if let Some(message) = answer.get_payload() {
            found.push(message.clone());
        }
    }
    Ok(found)
}

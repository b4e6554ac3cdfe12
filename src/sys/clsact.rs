//! Queries the clsact qdisc of an interface and the filters on it, over rtnetlink.

use std::fmt::Debug;
use std::io;

use neli::consts::nl::NlmF;
use neli::consts::rtnl::{RtAddrFamily, Rtm, Tca};
use neli::consts::socket::NlFamily;
use neli::err::RouterError;
use neli::nl::NlPayload;
use neli::router::synchronous::NlRouter;
use neli::rtnl::{Tcmsg, TcmsgBuilder};
use neli::utils::Groups;

const RTM_GETQDISC: u16 = 38;
const RTM_GETTFILTER: u16 = 46;
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
    /// Its handle, which is unique within a priority.
    pub handle: u32,
    /// Its priority.
    pub priority: u32,
    /// The name of its eBPF program; empty for a filter of another kind.
    pub program: String,
}

/// Whether the interface has a clsact qdisc.
pub fn exists(interface: u32) -> io::Result<bool> {
    let is_clsact = |qdisc: &Tcmsg| {
        let kind = qdisc.rtattrs().get_attr_handle();
        let kind = kind.get_attr_payload_as_with_len::<String>(Tca::Kind);
        kind.is_ok_and(|kind| kind.trim_end_matches('\0') == "clsact")
    };
    // The kernel dumps the qdiscs of all interfaces, whatever interface the request names.
    let qdiscs = dump(RTM_GETQDISC, interface, 0)?;
    Ok(qdiscs
        .iter()
        .any(|q| *q.tcm_ifindex() as u32 == interface && is_clsact(q)))
}

/// The filters on the egress side of an interface.
pub fn egress_filters(interface: u32) -> io::Result<Vec<Filter>> {
    filters(interface, EGRESS)
}

/// Whether any filter, of any program, is on either side of an interface.
pub fn has_filters(interface: u32) -> io::Result<bool> {
    Ok(!filters(interface, EGRESS)?.is_empty() || !filters(interface, INGRESS)?.is_empty())
}

fn filters(interface: u32, parent: u32) -> io::Result<Vec<Filter>> {
    let messages = dump(RTM_GETTFILTER, interface, parent)?;
    let filter = |message: &Tcmsg| Filter {
        interface,
        handle: *message.tcm_handle(),
        priority: *message.tcm_info() >> 16,
        program: program_name(message).unwrap_or_default(),
    };
    // A message with handle 0 describes a priority, not a filter.
    Ok(messages
        .iter()
        .filter(|m| *m.tcm_handle() != 0)
        .map(filter)
        .collect())
}

/// Finds the name among the attributes in `TCA_OPTIONS`, each of which is a length, a type and a payload, padded to 4
/// bytes.
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
    let (netlink, _) =
        NlRouter::connect(NlFamily::Route, None, Groups::empty()).map_err(io_error)?;
    let message = TcmsgBuilder::default()
        .tcm_family(RtAddrFamily::Unspecified.into())
        .tcm_ifindex(interface as i32)
        .tcm_handle(0)
        .tcm_parent(parent)
        .tcm_info(0)
        .build()
        .map_err(|error| io::Error::other(format!("rtnetlink: {error}")))?;
    let answers = netlink
        .send::<_, _, Rtm, Tcmsg>(Rtm::from(request), NlmF::DUMP, NlPayload::Payload(message))
        .map_err(io_error)?;
    let mut messages = Vec::new();
    for answer in answers {
        let answer = answer.map_err(io_error)?;
        if let Some(message) = answer.get_payload() {
            messages.push(message.clone());
        }
    }
    Ok(messages)
}

fn io_error<T: Debug, P: Debug>(error: RouterError<T, P>) -> io::Error {
    let text = match error {
        // The system's text of the error; that of neli is the whole message with the number of the error.
        RouterError::Nlmsgerr(message) => message.to_string(),
        error => error.to_string(),
    };
    io::Error::other(format!("rtnetlink: {text}"))
}

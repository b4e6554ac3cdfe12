//! A map keyed by canonical flows, in shards: one shard at a time can be listed, written or searched, so that no event
//! waits while that is done for a million flows.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::flow::Flow;

/// How many shards there are. Of 1,000,000 flows, about 4,000 are in one.
pub const SHARDS: usize = 256;

/// A map of flows.
pub struct Shards<V> {
    shards: Vec<HashMap<Flow, V>>,
    length: usize,
}

/// The shard of a canonical flow. The hash table in the shard is safe against chosen keys; this choice need not be.
pub fn shard(flow: &Flow) -> usize {
    let last = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    };
    let (source, destination) = (flow.source, flow.destination);
    let ports = source.port ^ destination.port.rotate_left(5);
    let mixed = ports ^ (ports >> 8) ^ u16::from(last(source.address) ^ last(destination.address));
    usize::from(mixed) % SHARDS
}

impl<V> Shards<V> {
    /// An empty map.
    pub fn new() -> Shards<V> {
        Shards {
            shards: (0..SHARDS).map(|_| HashMap::new()).collect(),
            length: 0,
        }
    }

    /// The number of flows.
    pub fn len(&self) -> usize {
        self.length
    }

    /// The value of a flow.
    pub fn get(&self, flow: &Flow) -> Option<&V> {
        self.shards[shard(flow)].get(flow)
    }

    /// The value of a flow, to change it.
    pub fn get_mut(&mut self, flow: &Flow) -> Option<&mut V> {
        self.shards[shard(flow)].get_mut(flow)
    }

    /// Adds a flow, or replaces its value.
    pub fn insert(&mut self, flow: Flow, value: V) {
        let former = self.shards[shard(&flow)].insert(flow, value);
        self.length += usize::from(former.is_none());
    }

    /// Removes a flow.
    pub fn remove(&mut self, flow: &Flow) -> Option<V> {
        let removed = self.shards[shard(flow)].remove(flow)?;
        self.length -= 1;
        Some(removed)
    }

    /// The flows of one shard, in no order. `index` is less than [`SHARDS`].
    pub fn shard(&self, index: usize) -> impl Iterator<Item = (&Flow, &V)> {
        self.shards[index].iter()
    }

    /// All flows, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&Flow, &V)> {
        self.shards.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Protocol;

    fn flow(n: u16) -> Flow {
        let end = |last: u8, port| ([192, 0, 2, last].into(), port);
        Flow::new(Protocol::Tcp, end(1, 1 + n), end(2, 1094)).unwrap()
    }

    #[test]
    fn it_is_a_map() {
        let mut map = Shards::new();
        (0..1000).for_each(|n| map.insert(flow(n), n));
        map.insert(flow(7), 8);
        assert_eq!((map.len(), map.get(&flow(7))), (1000, Some(&8)));
        *map.get_mut(&flow(7)).unwrap() = 7;
        assert_eq!(map.remove(&flow(9)), Some(9));
        assert_eq!(map.remove(&flow(9)), None);
        let mut all: Vec<u16> = map.iter().map(|(_, n)| *n).collect();
        let by_shard = (0..SHARDS).flat_map(|index| map.shard(index));
        let mut by_shard: Vec<u16> = by_shard.map(|(_, n)| *n).collect();
        all.sort_unstable();
        by_shard.sort_unstable();
        assert_eq!(all, by_shard);
        assert_eq!((all.len(), map.len()), (999, 999));
    }

    #[test]
    fn no_shard_has_many_of_the_flows_of_one_server() {
        let mut map = Shards::new();
        (0..60_000).for_each(|n| map.insert(flow(n), ()));
        let largest = (0..SHARDS).map(|index| map.shard(index).count()).max();
        assert!(largest.unwrap() < 4 * 60_000 / SHARDS, "{largest:?}");
    }
}

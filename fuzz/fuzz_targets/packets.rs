//! Datagrams of NetFlow and IPFIX. The input is a sequence of datagrams, each behind its length in two bytes, so that a
//! template and the data for it are found together.
#![no_main]

use std::sync::Arc;

use flowd_rs::collector::decode::Decoder;
use flowd_rs::collector::exporters::{Exporters, Limits};
use libfuzzer_sys::fuzz_target;

const NOW: u32 = 1_790_000_000;

fuzz_target!(|input: &[u8]| {
    let limits = Limits {
        exporter_bytes: 64 << 10,
        total_bytes: 1 << 20,
        ..Limits::default()
    };
    let exporters = Arc::new(Exporters::new(limits));
    let mut decoder = Decoder::new(exporters.clone());
    let mut records = Vec::new();
    let from = "192.0.2.1:2055".parse().unwrap();
    let mut rest = input;
    while let Some((length, after)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes(*length)).min(after.len());
        let (datagram, after) = after.split_at(length);
        rest = after;
        records.clear();
        let decoded = decoder.decode(datagram, from, (NOW, 0), &mut records);
        assert_eq!(decoded.records as usize, records.len());
        assert!(records.len() <= 2 * datagram.len());
        assert_eq!(decoded.problem.is_some(), decoded.rejected.total() > 0);
        for record in &records {
            assert!(record.start_ms <= record.end_ms);
            assert!(record.flow_label.unwrap_or(0) <= 0xf_ffff);
        }
        assert!(exporters.bytes() <= limits.total_bytes);
    }
    // What was learned survives a restart.
    let later = Exporters::new(limits);
    let restored = later.restore(&exporters.save(), NOW.into()).unwrap();
    assert_eq!(restored.damaged, 0);
    assert_eq!(later.templates(), exporters.templates());
});

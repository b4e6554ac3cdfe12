//! The collector's `/metrics`: the accounts, in all and by exporter.

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;

use crate::collector::accounts::{Account, Counts};
use crate::collector::exporters::Exporters;
use crate::collector::record::ExporterKey;
use crate::collector::recorder::Snapshot;
use crate::collector::routes::protocol;
use crate::metrics::exposition::{
    Format, Kind, put_end, put_family, put_gathered, put_label, put_sample,
};

/// Exporters that have series of their own, those with the most records first; the others are in the sums only.
const MAX_EXPORTERS: usize = 1000;

/// The page, of a snapshot.
pub fn page(format: Format, snapshot: &Snapshot, exporters: &Exporters) -> String {
    let mut out = String::new();
    let mut family = |name, kind, help, samples: &[(String, f64)]| {
        put_family(&mut out, format, name, kind, help);
        for (labels, value) in samples {
            put_sample(&mut out, name, labels, *value);
        }
    };
    let total = &snapshot.total;
    let one = |value: u64| [(String::new(), value as f64)];
    family(
        "flowd_build_info",
        Kind::Info,
        "Version of the daemon, in the label version; always 1.",
        &[(labels(&[("version", env!("CARGO_PKG_VERSION"))]), 1.0)],
    );
    family(
        "flowd_collector_datagrams_total",
        Kind::Counter,
        "Datagrams received.",
        &one(total.datagrams),
    );
    family(
        "flowd_collector_received_records_total",
        Kind::Counter,
        "Flow records received: the sum of flowd_collector_records_total.",
        &one(total.received),
    );
    let mut outcomes = vec![
        (labels(&[("outcome", "stored")]), total.stored as f64),
        (labels(&[("outcome", "filtered")]), total.filtered as f64),
    ];
    for (word, _, count) in total.rejections() {
        outcomes.push((labels(&[("outcome", word)]), count as f64));
    }
    family(
        "flowd_collector_records_total",
        Kind::Counter,
        "Flow records by what became of them.",
        &outcomes,
    );
    family(
        "flowd_collector_lost_records_total",
        Kind::Counter,
        "Flow records that never arrived, by the gaps in the exporters' sequence numbers.",
        &one(total.lost),
    );
    family(
        "flowd_collector_kernel_dropped_datagrams_total",
        Kind::Counter,
        "Datagrams dropped by the kernel because a receive buffer was full.",
        &one(snapshot.kernel_dropped),
    );
    family(
        "flowd_collector_forwarded_datagrams_total",
        Kind::Counter,
        "Datagrams sent on to other collectors, by outcome.",
        &[
            (
                labels(&[("outcome", "sent")]),
                snapshot.forwarded.sent as f64,
            ),
            (
                labels(&[("outcome", "failed")]),
                snapshot.forwarded.failed as f64,
            ),
        ],
    );
    let log_socket = snapshot.log_socket.unwrap_or_default();
    family(
        "flowd_collector_log_socket_records_total",
        Kind::Counter,
        "Records sent to the log socket (logSocket), by outcome.",
        &[
            (labels(&[("outcome", "sent")]), log_socket.sent as f64),
            (labels(&[("outcome", "dropped")]), log_socket.dropped as f64),
        ],
    );
    family(
        "flowd_collector_waiting_records",
        Kind::Gauge,
        "Flow records that wait to be written; they are not counted as received yet.",
        &one(snapshot.waiting_records),
    );
    family(
        "flowd_collector_written_bytes_total",
        Kind::Counter,
        "Bytes written to the store.",
        &one(snapshot.written_bytes),
    );
    family(
        "flowd_collector_store_failing",
        Kind::Gauge,
        "1 if the last write to the store failed, else 0.",
        &one(u64::from(snapshot.store_error.is_some())),
    );
    family(
        "flowd_collector_exporters",
        Kind::Gauge,
        "Exporters that are known.",
        &one(snapshot.exporters.len() as u64),
    );
    let templates: usize = exporters
        .templates()
        .iter()
        .map(|known| known.templates)
        .sum();
    family(
        "flowd_collector_templates",
        Kind::Gauge,
        "Templates that are kept.",
        &one(templates as u64),
    );
    let mut shown: Vec<(&ExporterKey, &Account)> = snapshot.exporters.iter().collect();
    shown.sort_unstable_by_key(|(key, account)| (u64::MAX - account.counts.received, **key));
    shown.truncate(MAX_EXPORTERS);
    let mut of_exporter = |name, kind, help, value: &dyn Fn(&Account) -> Option<f64>| {
        let samples: Vec<(String, f64)> = shown
            .iter()
            .filter_map(|(key, account)| Some((exporter_labels(key), value(account)?)))
            .collect();
        family(name, kind, help, &samples);
    };
    let counter = |count: fn(&Counts) -> u64| move |a: &Account| Some(count(&a.counts) as f64);
    of_exporter(
        "flowd_collector_exporter_received_records_total",
        Kind::Counter,
        "Flow records received, by exporter.",
        &counter(|counts| counts.received),
    );
    of_exporter(
        "flowd_collector_exporter_stored_records_total",
        Kind::Counter,
        "Flow records stored, by exporter.",
        &counter(|counts| counts.stored),
    );
    of_exporter(
        "flowd_collector_exporter_rejected_records_total",
        Kind::Counter,
        "Flow records rejected, by exporter.",
        &counter(Counts::rejected_total),
    );
    of_exporter(
        "flowd_collector_exporter_lost_records_total",
        Kind::Counter,
        "Flow records that never arrived, by exporter.",
        &counter(|counts| counts.lost),
    );
    of_exporter(
        "flowd_collector_exporter_clock_offset_seconds",
        Kind::Gauge,
        "The exporter's clock minus that of this host, in seconds.",
        &|account| account.clock_offset_ms.map(|ms| ms as f64 / 1e3),
    );
    for family in ProcessCollector::for_self().collect() {
        put_gathered(&mut out, format, &family);
    }
    put_end(&mut out, format);
    out
}

fn labels(pairs: &[(&str, &str)]) -> String {
    let mut labels = String::new();
    pairs
        .iter()
        .for_each(|(name, value)| put_label(&mut labels, name, value));
    labels
}

fn exporter_labels(key: &ExporterKey) -> String {
    let (address, domain) = (key.address.to_string(), key.domain.to_string());
    labels(&[
        ("exporter", &address),
        ("domain", &domain),
        ("protocol", &protocol(key.version)),
    ])
}

//! The exposition formats: Prometheus' text format 0.0.4 and OpenMetrics 1.0. No I/O.

use std::fmt::Write as _;

use prometheus::proto::{MetricFamily, MetricType};

/// A format of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format, version 0.0.4.
    Text,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The format that a client prefers by its `Accept` header (RFC 9110, section 12.5.1).
    pub fn negotiate(accept: &str) -> Format {
        let quality = |wanted: &[&str]| {
            let quality_of = |range: &str| {
                let mut parts = range.split(';').map(str::trim);
                let name = parts.next().unwrap_or_default();
                let weight = parts.find_map(|p| p.strip_prefix("q="));
                let matches = wanted.iter().any(|w| w.eq_ignore_ascii_case(name));
                matches.then(|| weight.map_or(1.0, |q| q.parse::<f32>().unwrap_or(0.0)))
            };
            accept.split(',').filter_map(quality_of).fold(0.0, f32::max)
        };
        let open_metrics = quality(&["application/openmetrics-text"]);
        match open_metrics > 0.0 && open_metrics >= quality(&["text/plain", "text/*"]) {
            true => Format::OpenMetrics,
            false => Format::Text,
        }
    }

    /// Its `Content-Type`.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::Text => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The type of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never decreases; its name ends in `_total`.
    Counter,
    /// A counter whose name without `_total` is that of another family, which OpenMetrics does not allow.
    Unknown,
    /// May increase and decrease.
    Gauge,
    /// Always 1, with the information in its labels; its name ends in `_info`.
    Info,
    /// Sum and count of observations; names end in `_sum` and `_count`.
    Summary,
    /// The same, and the number of observations up to each bound.
    Histogram,
}

/// Appends the `HELP` and `TYPE` lines of a family.
pub fn put_family(out: &mut String, format: Format, name: &str, kind: Kind, help: &str) {
    let (name, kind) = match (format, kind) {
        (Format::Text, Kind::Info) => (name, "gauge"),
        (Format::OpenMetrics, Kind::Info) => (name.trim_end_matches("_info"), "info"),
        (Format::OpenMetrics, Kind::Counter) => (name.trim_end_matches("_total"), "counter"),
        (_, Kind::Counter) => (name, "counter"),
        (_, Kind::Unknown) => (name, "unknown"),
        (_, Kind::Gauge) => (name, "gauge"),
        (_, Kind::Summary) => (name, "summary"),
        (_, Kind::Histogram) => (name, "histogram"),
    };
    // Writing to a String cannot fail, here and below.
    let _ = write!(out, "# HELP {name} ");
    escape(out, help, format == Format::OpenMetrics);
    let _ = writeln!(out, "\n# TYPE {name} {kind}");
}

/// Appends a sample; `labels` is built by [`put_label`].
pub fn put_sample(out: &mut String, name: &str, labels: &str, value: f64) {
    out.push_str(name);
    if !labels.is_empty() {
        out.push('{');
        out.push_str(labels);
        out.push('}');
    }
    out.push(' ');
    put_number(out, value);
    out.push('\n');
}

/// Appends a label, after a comma unless it is the first.
pub fn put_label(labels: &mut String, name: &str, value: &str) {
    if !labels.is_empty() {
        labels.push(',');
    }
    labels.push_str(name);
    labels.push_str("=\"");
    escape(labels, value, true);
    labels.push('"');
}

/// Appends the end of a page.
pub fn put_end(out: &mut String, format: Format) {
    if format == Format::OpenMetrics {
        out.push_str("# EOF\n");
    }
}

/// Appends a family of the `prometheus` crate.
pub fn put_gathered(out: &mut String, format: Format, family: &MetricFamily) {
    let name = family.name();
    let kind = match family.get_field_type() {
        MetricType::COUNTER => Kind::Counter,
        MetricType::HISTOGRAM => Kind::Histogram,
        _ => Kind::Gauge,
    };
    put_family(out, format, name, kind, family.help());
    for metric in family.get_metric() {
        let mut labels = String::new();
        for label in metric.get_label() {
            put_label(&mut labels, label.name(), label.value());
        }
        match kind {
            Kind::Counter => put_sample(out, name, &labels, metric.get_counter().get_value()),
            Kind::Histogram => {
                let histogram = metric.get_histogram();
                let count = histogram.get_sample_count() as f64;
                let mut bucket = |bound: &str, count| {
                    let mut labels = labels.clone();
                    put_label(&mut labels, "le", bound);
                    put_sample(out, &format!("{name}_bucket"), &labels, count);
                };
                for b in histogram.get_bucket() {
                    bucket(
                        &format!("{:?}", b.upper_bound()),
                        b.cumulative_count() as f64,
                    );
                }
                bucket("+Inf", count);
                let sum = histogram.get_sample_sum();
                put_sample(out, &format!("{name}_sum"), &labels, sum);
                put_sample(out, &format!("{name}_count"), &labels, count);
            }
            _ => put_sample(out, name, &labels, metric.get_gauge().get_value()),
        }
    }
}

fn put_number(out: &mut String, value: f64) {
    // 2^53: an f64 holds every integer up to it exactly.
    const MAX_EXACT_INT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() <= MAX_EXACT_INT {
        out.push_str(itoa::Buffer::new().format(value as i64));
    } else {
        let _ = write!(out, "{value}");
    }
}

fn escape(out: &mut String, text: &str, quotes: bool) {
    if !text.contains(['\\', '\n', '"']) {
        out.push_str(text);
        return;
    }
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if quotes => out.push_str("\\\""),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_format_that_the_client_prefers() {
        for (accept, format) in [
            ("", Format::Text),
            ("*/*", Format::Text),
            ("text/plain", Format::Text),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("application/openmetrics-text;q=0", Format::Text),
            (
                "text/plain;version=0.0.4;q=1,application/openmetrics-text;version=1.0.0;q=0.5",
                Format::Text,
            ),
            // Prometheus 2.42.
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
        ] {
            assert_eq!(Format::negotiate(accept), format, "{accept}");
        }
    }

    #[test]
    fn families_in_both_formats() {
        let page = |format| {
            let mut out = String::new();
            put_family(&mut out, format, "a_total", Kind::Counter, "A \"a\\b\".");
            put_sample(&mut out, "a_total", "x=\"y\"", 1.5);
            put_family(&mut out, format, "b_info", Kind::Info, "B.");
            put_sample(&mut out, "b_info", "", 1.0);
            put_end(&mut out, format);
            out
        };
        assert_eq!(
            page(Format::Text),
            "# HELP a_total A \"a\\\\b\".\n# TYPE a_total counter\na_total{x=\"y\"} 1.5\n# HELP b_info B.\n# TYPE b_info gauge\nb_info 1\n"
        );
        assert_eq!(
            page(Format::OpenMetrics),
            "# HELP a A \\\"a\\\\b\\\".\n# TYPE a counter\na_total{x=\"y\"} 1.5\n# HELP b B.\n# TYPE b info\nb_info 1\n# EOF\n"
        );
    }

    proptest! {
        #[test]
        fn a_label_is_one_line_and_unescapes_to_the_same_value(value in any::<String>()) {
            let mut labels = String::new();
            put_label(&mut labels, "a", &value);
            let inner = labels.strip_prefix("a=\"").and_then(|l| l.strip_suffix('"')).unwrap();
            prop_assert!(!inner.contains('\n'));
            let (mut read, mut chars) = (String::new(), inner.chars());
            while let Some(c) = chars.next() {
                match c {
                    '\\' => match chars.next() {
                        Some('n') => read.push('\n'),
                        Some(c) => read.push(c),
                        None => prop_assert!(false, "a lone backslash"),
                    },
                    '"' => prop_assert!(false, "a bare quote"),
                    c => read.push(c),
                }
            }
            prop_assert_eq!(read, value);
        }

        #[test]
        fn a_number_parses_to_the_same_value(value in any::<f64>()) {
            let mut out = String::new();
            put_number(&mut out, value);
            let read: f64 = out.parse().unwrap();
            prop_assert!(read == value || value.is_nan());
        }
    }
}

//! What the collector would do with a configuration.

use crate::collector::config::CollectorConfig;
use crate::collector::store::Target;

/// What the collector would do with this configuration, one `name: value` per line.
pub fn describe(config: &CollectorConfig) -> String {
    let mut lines: Vec<(&str, String)> = Vec::new();
    for listen in &config.listen {
        let sockets = match config.workers {
            1 => String::new(),
            workers => format!(", {workers} sockets"),
        };
        lines.push((
            "listens on",
            format!("UDP {}{sockets} (listen)", listen.address),
        ));
    }
    for group in &config.multicast_groups {
        let on = group
            .interface
            .as_ref()
            .map_or(String::new(), |name| format!(" on {name}"));
        lines.push(("joins", format!("{}{on}", group.group)));
    }
    lines.push((
        "sources",
        match &config.sources {
            None => "every network".to_owned(),
            Some(networks) => {
                let networks: Vec<String> = networks.iter().map(ToString::to_string).collect();
                networks.join(", ")
            }
        },
    ));
    for forward in &config.forward {
        let address = match forward.spoof_source {
            true => ", from the address of the exporter",
            false => "",
        };
        lines.push(("forwards to", format!("UDP {}{address}", forward.address)));
    }
    lines.push((
        "filter",
        match config.rules.len() {
            0 => "none: every record is stored".to_owned(),
            1 => "1 rule".to_owned(),
            count => format!("{count} rules"),
        },
    ));
    let store = &config.store;
    match &store.target {
        Target::File(file) => lines.push(("stores in", file.display().to_string())),
        Target::Directory(directory) => {
            let size = store
                .rotate_size
                .map_or(String::new(), |size| format!(" or {}", mib(size)));
            let seconds = store.rotate_interval.as_secs();
            lines.push(("stores in", directory.display().to_string()));
            lines.push(("new segment", format!("after {seconds} s{size}")));
            let age = store.keep_age.map(|age| format!("{} s", age.as_secs()));
            let keep: Vec<String> = age.into_iter().chain(store.keep_size.map(mib)).collect();
            lines.push((
                "keeps",
                match keep.is_empty() {
                    true => "every segment (store.keep)".to_owned(),
                    false => format!("at most {}", keep.join(" and ")),
                },
            ));
        }
    }
    if let Some(socket) = &store.log_socket {
        lines.push(("sends to", format!("{} (logSocket)", socket.path.display())));
    }
    if let Some(address) = config.metrics {
        lines.push(("listens on", format!("TCP {address} (metrics)")));
    }
    lines.push((
        "writes in",
        format!("{} (stateDir)", config.state_dir.display()),
    ));
    lines.push(("registry", config.registry.url.clone()));
    if config.forward.iter().any(|forward| forward.spoof_source) {
        lines.push(("needs", "CAP_NET_RAW (forward.spoofSource)".to_owned()));
    }
    let udp = config
        .listen
        .iter()
        .map(|listen| (listen.address.port(), "listen"));
    let tcp = config
        .metrics
        .iter()
        .map(|address| (address.port(), "metrics"));
    for (port, key) in udp.chain(tcp).filter(|(port, _)| *port < 1024) {
        lines.push((
            "needs",
            format!("CAP_NET_BIND_SERVICE for port {port} ({key})"),
        ));
    }
    lines.extend(config.notes.iter().map(|note| ("note", note.clone())));
    let lines = lines.into_iter().filter(|(_, value)| !value.is_empty());
    lines
        .map(|(name, value)| format!("{:<13}{value}\n", format!("{name}:")))
        .collect()
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

//! Tests of both spellings: what is read, what is refused and where, and what is printed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::collector::store::fields::Fields;
use crate::collector::store::{LogSocketSettings, Target};

fn parse(text: &str) -> Result<CollectorConfig, String> {
    CollectorConfig::parse(text, Path::new("f"), &[]).map_err(|e| e.to_string())
}

fn rules(config: &CollectorConfig) -> Vec<String> {
    config.rules.iter().map(ToString::to_string).collect()
}

#[test]
fn an_empty_file_has_every_default() {
    let config = parse("# nothing\n").unwrap();
    assert_eq!(config.listen.len(), 1);
    assert_eq!(config.listen[0].address.to_string(), "[::]:2055");
    assert_eq!(config.workers, 1);
    assert_eq!((&config.sources, &config.metrics), (&None, &None));
    let store = &config.store;
    let directory = Target::Directory("/var/lib/flowd-collector/segments".into());
    assert_eq!(store.target, directory);
    assert_eq!(store.rotate_interval, Duration::from_secs(300));
    assert_eq!(
        (store.rotate_size, store.keep_age, store.keep_size),
        (None, None, None)
    );
    assert_eq!((store.fields, store.compatible), (Fields::ALL, false));
    assert_eq!(
        config.control_socket.path,
        Path::new("/run/flowd-collector/control")
    );
    assert!(!config.control_socket.given);
    assert_eq!(
        config.registry.cache_dir,
        Path::new("/var/lib/flowd-collector")
    );
}

#[test]
fn every_key_is_read() {
    let config = parse(
        r#"
listen: ["192.0.2.1:9995", {address: "::1"}, {address: "[::1]:7", receiveBuffer: 4096}, {port: 8}]
workers: 2
sources: [192.0.2.0/24, "2001:db8::1"]
multicastGroups: ["ff05::1", {group: 239.1.2.3, interface: eth0}]
macros: {web: "port { 80, 443 }"}
filter: |
  discard all
  # A comment.
  accept tag 5 dst any $web \
    proto tcp
store:
  directory: /data
  fields: [src_addr, TAG]
  compatible: true
  rotate: {interval: 1h, size: 512}
  keep: {age: 90d, size: 2TiB}
forward: ["192.0.2.9:2055", {address: "2001:db8::9", port: 9, spoofSource: true}]
logSocket: {path: /s, bufferSize: 4096}
limits: {maxWaiting: 1GiB, templateMemory: 8, templateMemoryPerExporter: 64KiB, templateTimeout: 1d, maxExporters: 5}
metrics: {bindAddress: "::", bindPort: 9100}
pidPath: /p
stateDir: /state
controlSocket: /c
logLevel: debug
registry: {url: ''}
"#,
    )
    .unwrap();
    let listen: Vec<String> = config
        .listen
        .iter()
        .map(|l| l.address.to_string())
        .collect();
    assert_eq!(
        listen,
        ["192.0.2.1:9995", "[::1]:2055", "[::1]:7", "[::]:8"]
    );
    assert_eq!(config.listen[2].receive_buffer, 4096);
    assert_eq!(config.workers, 2);
    let sources = config.sources.as_ref().unwrap();
    assert_eq!(sources[1].to_string(), "2001:db8::1/128");
    assert_eq!(
        config.multicast_groups[1].interface.as_deref(),
        Some("eth0")
    );
    let expected = [
        "discard all",
        "accept tag 5 dst any port { 80, 443 } proto tcp",
    ];
    assert_eq!(rules(&config), expected);
    let store = &config.store;
    assert_eq!(store.target, Target::Directory("/data".into()));
    assert_eq!(store.fields, Fields(0x61));
    assert!(store.compatible);
    assert_eq!(
        (store.rotate_size, store.keep_size),
        (Some(512 << 20), Some(2 << 40))
    );
    assert_eq!(store.rotate_interval, Duration::from_secs(3600));
    assert_eq!(store.keep_age, Some(Duration::from_secs(90 * 86_400)));
    let log_socket = LogSocketSettings {
        path: "/s".into(),
        buffer_size: Some(4096),
    };
    assert_eq!(store.log_socket, Some(log_socket));
    assert_eq!(store.max_waiting, 1 << 30);
    let expected = Limits {
        template_memory: 8 << 20,
        template_memory_per_exporter: 64 << 10,
        template_timeout: Duration::from_secs(86_400),
        max_exporters: 5,
    };
    assert_eq!(config.limits, expected);
    let forward: Vec<_> = config
        .forward
        .iter()
        .map(|f| (f.address.to_string(), f.spoof_source))
        .collect();
    let expected = [
        ("192.0.2.9:2055".to_owned(), false),
        ("[2001:db8::9]:9".to_owned(), true),
    ];
    assert_eq!(forward, expected);
    assert_eq!(config.metrics.unwrap().to_string(), "[::]:9100");
    assert_eq!(
        (config.pid_path, config.state_dir),
        (Some("/p".into()), PathBuf::from("/state"))
    );
    assert!(config.control_socket.given);
    let list = parse(
        "filter: [discard all, 'accept src any port 5']\nlogSocket: /s\nstore: {fields: ALL}\n",
    )
    .unwrap();
    assert_eq!(rules(&list), ["discard all", "accept src any port 5"]);
}

#[test]
fn each_error_has_its_place() {
    for (text, expected) in [
        (
            "listen: []\n",
            "f:1:9: listen: empty, expected at least one ADDRESS:PORT",
        ),
        (
            "listen: ':2055'\n",
            "f:1:9: listen: found the text \":2055\", expected a list, for example [\":2055\"]",
        ),
        (
            "listen:\n  - '::'\n  - x\n",
            "f:3:5: listen: \"x\" is not a valid address with a port, expected for example 192.0.2.1:2055 or [2001:db8::1]:2055",
        ),
        (
            "listen: [{address: '::', prot: 5}]\n",
            "f:1:26: listen[0].prot: unknown key, did you mean `port`?",
        ),
        (
            "listen: [{address: '[::]:5', port: 5}]\n",
            "f:1:10: listen: the port is given twice, in \"[::]:5\" and in port",
        ),
        (
            "listen: [5]\n",
            "f:1:10: listen[0]: found the number 5, expected ADDRESS:PORT, or a mapping (address: …)",
        ),
        (
            "listen: ['[::]:5', '[::]:5']\n",
            "f:1:20: listen: [::]:5 is given twice",
        ),
        (
            "listen: ['[::]:0']\n",
            "f:1:10: listen: port 0 is out of range, expected 1 to 65535",
        ),
        (
            "workers: 0\n",
            "f:1:10: workers: 0 is out of range, expected 1 to 64",
        ),
        (
            "sources: [192.0.2.0/24, 192.0.2.7/24]\n",
            "f:1:25: sources: 192.0.2.7/24 has bits of a host behind its length, expected 192.0.2.0/24 for the network or 192.0.2.7 for the host",
        ),
        (
            "multicastGroups: [192.0.2.1]\n",
            "f:1:19: multicastGroups: \"192.0.2.1\" is not a multicast address, expected for example 239.1.2.3 or ff05::1",
        ),
        (
            "forward: ['192.0.2.1']\n",
            "f:1:11: forward: \"192.0.2.1\" is not a valid address with a port, expected for example 192.0.2.1:2055 or [2001:db8::1]:2055",
        ),
        (
            "store: {fields: [TAG, SRC_ADR]}\n",
            "f:1:23: store.fields: \"SRC_ADR\" is not a known field, did you mean SRC_ADDR?",
        ),
        (
            "store: {fields: CRC32}\n",
            "f:1:17: store.fields: no field to store, expected at least one, or ALL",
        ),
        (
            "store: {compatible: true, fields: [SCITAG]}\n",
            "f:1:36: store.fields: SCITAG is not in the format of djm's flowd, expected compatible: false, or other fields",
        ),
        (
            "store: {directory: /a, logfile: /b}\n",
            "f:1:8: store: set either directory or logfile, not both",
        ),
        (
            "store: {rotate: {size: 5 PB}}\n",
            "f:1:24: store.rotate.size: \"5 PB\" is not a valid size, expected 1KiB to 1024TiB: a number of MiB, or for example 512KiB, 10GiB or 1TiB",
        ),
        (
            "macros: {1a: x}\n",
            "f:1:9: macros: \"1a\" is not a valid name of a macro, expected a letter, then letters, digits and _",
        ),
        (
            "filter: 5\n",
            "f:1:9: filter: found the number 5, expected text or a list",
        ),
        (
            "workers: 1\nfilter: |\n\n  discard all\n  # x\n  accept src any prto tcp\n",
            "f:6:18: filter: unknown clause \"prto\", did you mean proto?",
        ),
        (
            "filter:\n  - discard all\n  - accept all all\n",
            "f:3:16: filter: all is given twice in one rule, expected once",
        ),
        (
            "filter: [\"accept bytes 5\"]\n",
            "f:1:24: filter: found \"5\", expected a comparison (<, <=, =, >=, >)",
        ),
        (
            "filter: >\n  accept\n  bytes 5\n",
            "f:1:9: filter: line 1, column 14: found \"5\", expected a comparison (<, <=, =, >=, >)",
        ),
        (
            "plugins: {api: }\n",
            "f:1:1: plugins: unknown key, expected one of listen, workers, sources, multicastGroups, macros, filter, store, forward, logSocket, limits, metrics, pidPath, stateDir, controlSocket, logLevel, registry",
        ),
        (
            "limits: {maxWaitin: 5}\n",
            "f:1:10: limits.maxWaitin: unknown key, did you mean `maxWaiting`?",
        ),
    ] {
        assert_eq!(parse(text).unwrap_err(), expected, "{text}");
    }
}

/// As a site has it: each directive, macros, continuations, and what djm's flowd does not accept or means otherwise.
const FLOWD_CONF: &str = r#"# flowd.conf
Site = "192.0.2.0/24"
web="port 80"
logfile "/var/log/flowd"
logsock "/var/run/flowd.sock" bufsize 65536
pidfile "/var/run/flowd.pid"
listen on 127.0.0.1:12345
listen on [::]:12345 bufsize 131072
flow source $Site
flow source 2001:db8::/32
join group 239.1.1.1
join group [ff02::1]
forward to 192.0.2.9:2055
store TAG
store recv_time # in any case
store SRCDST_ADDR

# Nothing else is kept.
discard all
accept tag 1 quick agent 192.0.2.1 src $Site $web \
    dst any
accept days weekdays
discard src any
accept after 22:00 before 6:00 proto "ipv6-icmp"
"#;

#[test]
fn flowd_conf_of_djm_is_read_as_it_is() {
    let config = parse(FLOWD_CONF).unwrap();
    let listen: Vec<_> = config
        .listen
        .iter()
        .map(|l| (l.address.to_string(), l.receive_buffer))
        .collect();
    let expected = [
        ("127.0.0.1:12345".to_owned(), 8 << 20),
        ("[::]:12345".to_owned(), 131_072),
    ];
    assert_eq!(listen, expected);
    assert_eq!(config.sources.as_ref().unwrap().len(), 2);
    let groups: Vec<String> = config
        .multicast_groups
        .iter()
        .map(|g| g.group.to_string())
        .collect();
    assert_eq!(groups, ["239.1.1.1", "ff02::1"]);
    assert_eq!(config.forward[0].address.to_string(), "192.0.2.9:2055");
    assert_eq!(config.pid_path, Some("/var/run/flowd.pid".into()));
    let store = &config.store;
    assert_eq!(store.target, Target::File("/var/log/flowd".into()));
    assert_eq!((store.fields, store.compatible), (Fields(0x1e3), true));
    let log_socket = LogSocketSettings {
        path: "/var/run/flowd.sock".into(),
        buffer_size: Some(65536),
    };
    assert_eq!(store.log_socket, Some(log_socket));
    let expected = [
        "discard all",
        "accept tag 1 quick agent 192.0.2.1/32 src 192.0.2.0/24 port 80 dst any",
        "accept days mon,tue,wed,thu,fri",
        "discard src any",
        "accept proto \"ipv6-icmp\" after 22:00 before 06:00",
    ];
    assert_eq!(rules(&config), expected);
    assert_eq!(
        config.notes,
        [
            "line 20: dst any matches every record; in djm's flowd, such a rule never matched",
            "line 23: src any matches every record; in djm's flowd, such a rule never matched",
            "line 24: the time from after to before reaches over midnight",
        ]
    );
    let macros = [("web".to_owned(), "port 443".to_owned())];
    let config = CollectorConfig::parse(FLOWD_CONF, Path::new("f"), &macros).unwrap();
    assert!(rules(&config)[1].contains("port 443"), "{:?}", config.rules);
}

#[test]
fn flow_source_any_accepts_every_source() {
    let config =
        parse("flow source any\nflow source ::1\n# x \\\naccept all\nlogfile a\nlogfile b\n")
            .unwrap();
    assert_eq!(config.sources, None);
    assert_eq!(config.store.target, Target::File("b".into()));
    assert_eq!(
        config.notes,
        [
            "line 1: flow source any accepts every source; djm's flowd rejects everything then",
            "line 6: logfile is set again, which overrides the earlier one",
            "line 3: a comment ends with its line; the backslash at its end does not continue it",
        ]
    );
}

#[test]
fn each_error_of_a_flowd_conf_has_its_place() {
    for (text, expected) in [
        (
            "logfile \"a\"\nlisten 127.0.0.1:5\n",
            "f:2:8: found \"127.0.0.1:5\", expected \"on\": listen on ADDRESS:PORT",
        ),
        (
            "logfile \"a\"\nlisten on 127.0.0.1\nlisten on x\n",
            "f:3:11: listen: \"x\" is not a valid address with a port, expected for example 192.0.2.1:2055 or [2001:db8::1]:2055",
        ),
        (
            "logfile \"a\"\nflow source 192.0.2.1/24\n",
            "f:2:13: 192.0.2.1/24 has bits of a host behind its length, expected 192.0.2.0/24 for the network or 192.0.2.1 for the host",
        ),
        (
            "logfile \"a\"\nstore ALL\nstore SRC_ADR\n",
            "f:3:7: store.fields: \"SRC_ADR\" is not a known field, did you mean SRC_ADDR?",
        ),
        (
            "logfile \"a\"\nlogfil \"b\"\n",
            "f:2:1: unknown directive \"logfil\", did you mean logfile?",
        ),
        (
            "logfile \"a\" \"b\"\n",
            "f:1:13: found \"b\", expected the end of the line",
        ),
        (
            "logfile \"a\"\njoin group 192.0.2.1\n",
            "f:2:12: multicastGroups: \"192.0.2.1\" is not a multicast address, expected for example 239.1.2.3 or ff05::1",
        ),
        (
            "logfile \"a\"\naccept tag 5000000000 all\n",
            "f:2:12: \"5000000000\" is not a valid number, expected 0 to 4294967295",
        ),
        ("accept src $net\n", "f:1:12: macro net is not defined"),
    ] {
        assert_eq!(parse(text).unwrap_err(), expected, "{text}");
    }
}

#[test]
fn files_are_told_apart_by_content() {
    for text in [
        FLOWD_CONF,
        "a = \"b\"\n\tlogfile \"x\"\n",
        "lissten on 1\nlogfile \"x\"\n",
        "accept $all\n",
    ] {
        assert!(flowd_conf::is_flowd_conf(text), "{text}");
        assert!(CollectorConfig::is_collector(text), "{text}");
    }
    for text in [
        "listen: []\n",
        "pidPath: x\nstore:\n",
        "{workers: 1}\n",
        "\"filter\": |\n  accept all\n",
    ] {
        assert!(!flowd_conf::is_flowd_conf(text), "{text}");
        assert!(CollectorConfig::is_collector(text), "{text}");
    }
    let marking = include_str!("../../../conf/flowd.cfg");
    let python = "PLUGIN = 'np_api'\nBACKEND = \"udp_firefly\"\n";
    for text in [
        "",
        "pidPath: x\n",
        "plugins:\n  firefly:\n    listen: 5\n",
        marking,
        python,
        "store\n",
        "accepted all",
    ] {
        assert!(!CollectorConfig::is_collector(text), "{text}");
    }
    assert!(CollectorConfig::is_collector(&uncommented()));
}

/// conf/collector.cfg with every key, except the one that another excludes.
fn uncommented() -> String {
    let example = include_str!("../../../conf/collector.cfg");
    let lines = example.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if !rest.starts_with(' ') || rest.starts_with("  ") => rest,
        _ => line,
    });
    let excluded = ["  logfile:", "    port:"];
    let lines = lines.filter(|line| !excluded.iter().any(|key| line.starts_with(key)));
    lines.map(|line| format!("{line}\n")).collect()
}

#[test]
fn the_example_configuration_is_valid_and_shows_the_defaults() {
    let config = parse(include_str!("../../../conf/collector.cfg")).unwrap();
    assert_eq!(config, parse("").unwrap());
    let every = parse(&uncommented()).unwrap();
    assert_eq!(every.listen, config.listen);
    assert_eq!(
        (every.workers, &every.limits),
        (config.workers, &config.limits)
    );
    assert_eq!(every.store.max_waiting, config.store.max_waiting);
    assert_eq!(every.store.rotate_interval, config.store.rotate_interval);
    assert_eq!(every.control_socket.path, config.control_socket.path);
    assert_eq!(every.registry, config.registry);
    assert_eq!(every.rules.len(), 3);
}

#[test]
fn shown_and_converted_yaml_has_the_same_meaning() {
    for text in [
        "",
        FLOWD_CONF,
        &uncommented(),
        "store: {fields: [TAG, CRC32], logfile: /x}\n",
    ] {
        let config = parse(text).unwrap();
        let shown = config.to_yaml();
        let again = parse(&shown).unwrap();
        let comparable = |config: &CollectorConfig| {
            let mut config = config.clone();
            config.notes.clear();
            config.control_socket.given = true;
            config
        };
        assert_eq!(comparable(&again), comparable(&config), "{shown}");
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("flowd.conf");
    std::fs::write(&path, FLOWD_CONF).unwrap();
    let yaml = CollectorConfig::convert_file(&path, &[]).unwrap();
    let converted = parse(&yaml).unwrap();
    let expected = CollectorConfig {
        notes: Vec::new(),
        ..parse(FLOWD_CONF).unwrap()
    };
    assert_eq!(
        CollectorConfig {
            notes: Vec::new(),
            ..converted
        },
        expected,
        "{yaml}"
    );
    assert!(
        yaml.contains("# line 23: src any matches every record"),
        "{yaml}"
    );
    assert!(
        yaml.contains("# Nothing else is kept.\n  discard all\n"),
        "{yaml}"
    );
    assert!(
        yaml.contains("src $Site $web \\\n      dst any\n"),
        "{yaml}"
    );
    let macros = [("web".to_owned(), "port 443".to_owned())];
    let yaml = CollectorConfig::convert_file(&path, &macros).unwrap();
    assert!(
        yaml.contains("src 192.0.2.0/24 port 443 dst any\n"),
        "{yaml}"
    );
    std::fs::write(&path, "workers: 1\n").unwrap();
    let error = CollectorConfig::convert_file(&path, &[])
        .unwrap_err()
        .to_string();
    assert!(error.ends_with("there is nothing to convert"), "{error}");
}

#[test]
fn the_schema_accepts_the_same_files_as_the_program() {
    let schema = schema();
    let validator = jsonschema::validator_for(&schema).unwrap();
    for text in [
        "{}",
        &uncommented(),
        "listen: ['[::]:5', {port: 6}]\nfilter: [accept all]\nlogSocket: /s\nmetrics:\nstore: {fields: [TAG], keep: {size: 5}}",
        &parse("").unwrap().to_yaml(),
    ] {
        let value: serde_json::Value = serde_yaml::from_str(text).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(&value)
            .map(|e| e.to_string())
            .collect();
        assert_eq!(errors, Vec::<String>::new(), "{text}");
        parse(text).unwrap();
    }
    for text in [
        "listen: [5]",
        "listen: [{x: 1}]",
        "workers: many",
        "filter: 5",
        "stores: {}",
        "logLevel: loud",
    ] {
        let value: serde_json::Value = serde_yaml::from_str(text).unwrap();
        assert!(!validator.is_valid(&value), "{text}");
        assert!(parse(text).is_err(), "{text}");
    }
    assert_eq!(schema["properties"]["workers"]["default"], 1);
}

proptest! {
    #[test]
    fn no_text_causes_a_panic(
        text in ".{0,100}",
        parts in proptest::collection::vec(
            proptest::sample::select(vec![
                "listen", "on", "flow", "source", "any", "join", "group", "logfile", "logsock", "bufsize", "forward",
                "to", "pidfile", "store", "ALL", "accept", "discard", "all", "src", "127.0.0.1:5", "::/0", "239.1.1.1",
                "\"x\"", "\n", "\n", "\n", "\\\n", "#", "$a", "a=", "=", "5", ":", "- ", "filter", ": |\n  ", "{", "}",
                "[", "]", "'", "limits:\n  ", "maxWaiting: ",
            ]),
            0..40,
        ),
    ) {
        for text in [text, parts.join(" "), parts.concat()] {
            let _ = parse(&text);
            let _ = flowd_conf::convert(&text, &[]);
            let _ = CollectorConfig::is_collector(&text);
        }
    }

    #[test]
    fn a_converted_flowd_conf_has_the_same_meaning(
        lines in proptest::collection::vec(
            proptest::sample::select(vec![
                "listen on 127.0.0.1:5", "listen on [::1]:$port bufsize 4096", "flow source ::/0", "flow source any",
                "join group ff02::1", "logfile \"/a b\"", "logsock '/s' bufsize 2048", "pidfile /p", "store TAG",
                "store all", "forward to 192.0.2.1:9", "accept all", "accept tag 5 $what", "\tdiscard dst any\t",
                "accept \\\n  proto tcp # x: y", "# a: comment", "", "what = \"src any\"", "what = src any port $port",
                "port = 80", "port=8080 # and so on", "discard label any experiment 'atlas'",
            ]),
            1..12,
        ),
        end in proptest::sample::select(vec!["\n", "\r\n"]),
    ) {
        let text: String = lines.iter().map(|line| format!("{line}{end}")).collect();
        if let (Ok(config), true) = (parse(&text), flowd_conf::is_flowd_conf(&text)) {
            let yaml = show::print(&flowd_conf::convert(&text, &[]).unwrap());
            let converted = parse(&yaml).map_err(|error| TestCaseError::fail(format!("{error}\n{yaml}")))?;
            let notes = Vec::new();
            prop_assert_eq!(
                CollectorConfig { notes: notes.clone(), ..converted },
                CollectorConfig { notes, ..config },
                "{}", yaml
            );
        }
    }
}

//! The prometheus backend: its page, and a real Prometheus that scrapes it.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Home, PROGRAM, lines};
use common::http::{Client, connect};
use common::net::{HERE6, Hosts, NetNs, THERE6};
use common::{DEADLINE, wait_for};
use serde_json::Value;

/// `options` are those of the prometheus backend.
fn home(options: &str) -> Home {
    Home::with(&format!(
        "backends:\n  prometheus: {{{options}}}\nenrichers: {{period: 100, netlink: {{}}}}\n"
    ))
}

fn listener(hosts: &Hosts, port: u16) -> TcpListener {
    let listener = hosts
        .there
        .enter(|| TcpListener::bind((THERE6, port)).unwrap());
    // Connections wait in the backlog, so that the remote end needs no file descriptor for each.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096).unwrap()).unwrap();
    listener
}

/// A connection, reported as a flow.
struct Transfer {
    near: TcpStream,
    far: TcpStream,
    line: String,
}

impl Transfer {
    fn start(hosts: &Hosts, home: &Home, listener: &TcpListener, tag: &str) -> Transfer {
        let to = listener.local_addr().unwrap();
        let near = hosts.here.enter(|| TcpStream::connect(to).unwrap());
        let far = listener.accept().unwrap().0;
        let port = near.local_addr().unwrap().port();
        let line = format!("tcp {HERE6} {port} {THERE6} {} {tag}\n", to.port());
        home.write(&format!("start {line}"));
        Transfer { near, far, line }
    }

    fn send(&mut self, bytes: usize) {
        self.near.write_all(&vec![7; bytes]).unwrap();
        self.far.read_exact(&mut vec![0; bytes]).unwrap();
    }

    fn ports(&self) -> String {
        let port = |stream: &TcpStream| stream.local_addr().unwrap().port();
        format!("{}:{}", port(&self.near), port(&self.far))
    }
}

/// Names with labels, and values.
type Samples = BTreeMap<String, f64>;

fn scrape(ns: &NetNs, address: &str) -> Samples {
    let answer = Client::tcp(ns, address).get("/metrics");
    assert_eq!(answer.status, 200);
    samples(&answer.body)
}

fn samples(page: &str) -> Samples {
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines.map(sample).collect()
}

fn promtool(page: &str) {
    check(Command::new("promtool").args(["check", "metrics"]), page);
}

/// The reference parser, which is stricter than Prometheus.
fn open_metrics_parser(page: &str) {
    let parse = "import sys\n\
        from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse\n\
        assert len(list(parse(sys.stdin.read()))) > 50";
    // Debian's interpreter, for which python3-prometheus-client is installed.
    check(Command::new("/usr/bin/python3").args(["-c", parse]), page);
}

/// Runs a program that reads a page on standard input; it must succeed and print nothing.
fn check(program: &mut Command, page: &str) {
    let mut checker = program
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program:?}: {error}"));
    let mut input = checker.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(page.as_bytes()).unwrap());
    });
    let output = checker.wait_with_output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && printed.is_empty(), "{printed}");
}

const BY_TAG: &str = "{act=\"Cache\",exp=\"cms\"}";

/// The families listed in flowd's README.
const FLOWD_NAMES: [&str; 38] = [
    "skmem_rmem_alloc",
    "skmem_rcv_buf",
    "skmem_wmem_allow",
    "skmem_snd_buf",
    "skmem_fwd_alloc",
    "skmem_wmem_queued",
    "skmem_opt_mem",
    "skmem_back_log",
    "skmem_sock_drop",
    "rto",
    "rtt",
    "rtt_var",
    "ato",
    "mss",
    "pmtu",
    "rcvmss",
    "advmss",
    "cwnd",
    "bytes_sent_total",
    "bytes_acked_total",
    "bytes_received_total",
    "segs_out_total",
    "segs_in_total",
    "data_segs_out_total",
    "data_segs_in_total",
    "send",
    "lastsnd",
    "lastrcv",
    "lastack",
    "pacing_rate",
    "delivery_rate",
    "delivered",
    "busy",
    "rwnd_limited",
    "rcv_space",
    "rcv_ssthresh",
    "minrtt",
    "snd_wnd",
];

#[test]
#[ignore = "needs root: network namespaces"]
fn flows_have_the_series_of_flowd_and_none_after_their_end() {
    let hosts = Hosts::new();
    let home = home("port: 9000");
    let daemon = home.start(&hosts.here);
    let listener = listener(&hosts, 5000);
    let mut transfer = Transfer::start(&hosts, &home, &listener, "cms Cache");
    transfer.send(100_000);
    let labels = format!(
        "act=\"Cache\",dst=\"{THERE6}\",exp=\"cms\",flow=\"{}\",src=\"{HERE6}\"",
        transfer.ports()
    );
    let sent = format!("flow_tcp_bytes_sent_total{{{labels}}}");
    let page = wait_for("the bytes", || {
        let answer = Client::tcp(&hosts.here, "127.0.0.1:9000").get("/metrics");
        (samples(&answer.body).get(&sent) == Some(&100_000.0)).then_some(answer.body)
    });
    promtool(&page);
    let accept = "Accept: application/openmetrics-text\r\n";
    let mut client = Client::tcp(&hosts.here, "127.0.0.1:9000");
    open_metrics_parser(&client.request("GET", "/metrics", accept, "").body);
    let found = samples(&page);
    for name in FLOWD_NAMES {
        assert!(
            found.contains_key(&format!("flow_tcp_{name}{{{labels}}}")),
            "{name}\n{page}"
        );
    }
    let total = |line: &&str| line.starts_with("# TYPE ") && line.ends_with(" counter");
    let mut counters = page.lines().filter(total);
    assert!(counters.all(|line| line.contains("_total ")), "{page}");

    // The values are those of ss.
    let ss = hosts
        .here
        .command("ss")
        .args(["-tniH", "dst", &format!("[{THERE6}]")])
        .output()
        .unwrap();
    let ss = String::from_utf8(ss.stdout).unwrap();
    let word = |name: &str| {
        let found = ss.split_whitespace().find_map(|w| w.strip_prefix(name));
        found.unwrap_or_else(|| panic!("{name} in {ss}")).to_owned()
    };
    let value = |name: &str| found[&format!("flow_tcp_{name}{{{labels}}}")];
    for (ours, theirs) in [
        ("mss", "mss:"),
        ("pmtu", "pmtu:"),
        ("cwnd", "cwnd:"),
        ("bytes_acked_total", "bytes_acked:"),
        ("segs_out_total", "segs_out:"),
        ("minrtt", "minrtt:"),
        ("snd_wnd", "snd_wnd:"),
        ("rto", "rto:"),
    ] {
        assert_eq!(
            value(ours),
            word(theirs).parse::<f64>().unwrap(),
            "{ours}: {ss}"
        );
    }
    let (rtt, var) = (value("rtt"), value("rtt_var"));
    assert_eq!(word("rtt:"), format!("{rtt}/{var}"));
    let bits = |text: String| text.trim_end_matches("bps").parse::<f64>().unwrap();
    let after = |name: &str| {
        let mut words = ss.split_whitespace().skip_while(|w| *w != name).skip(1);
        bits(words.next().unwrap().to_owned())
    };
    for name in ["send", "delivery_rate", "pacing_rate"] {
        let (ours, theirs) = (value(name), after(name));
        assert!(
            (ours - theirs).abs() <= 1.0,
            "{name}: {ours}, ss has {theirs}"
        );
    }
    let options = page
        .lines()
        .find(|l| l.starts_with("flow_tcp_ca_info{"))
        .unwrap();
    let congestion = ss
        .split_whitespace()
        .find(|w| ["cubic", "bbr", "reno"].contains(w))
        .unwrap();
    let expected = format!("opts=\"ts sack {congestion} wscale:{}\"", word("wscale:"));
    assert!(options.contains(&expected), "{options}: {expected}");

    home.write(&format!("end {}", transfer.line));
    daemon.expect_status("dispatcher_events ended 1");
    let page = Client::tcp(&hosts.here, "127.0.0.1:9000")
        .get("/metrics")
        .body;
    promtool(&page);
    let found = samples(&page);
    assert!(!page.contains("flow_tcp_"), "{page}");
    assert_eq!(found[&format!("flowd_sent_bytes_total{BY_TAG}")], 100_000.0);
    assert_eq!(found[&format!("flowd_flows_open{BY_TAG}")], 0.0);
    assert_eq!(
        found["flowd_flows_ended_total{act=\"Cache\",exp=\"cms\",reason=\"producer\"}"],
        1.0
    );
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn sums_never_decrease_and_count_every_byte_once() {
    let hosts = Hosts::new();
    let home = home("port: 9000");
    let daemon = home.start(&hosts.here);
    let listener = listener(&hosts, 5000);
    let sums = [
        "flowd_sent_bytes_total",
        "flowd_sent_packets_total",
        "flowd_flows_started_total",
        "flowd_received_packets_total",
    ];
    let mut before = [0.0; 4];
    let mut read_sums = || {
        let found = scrape(&hosts.here, "127.0.0.1:9000");
        let now = sums.map(|name| {
            found
                .get(&format!("{name}{BY_TAG}"))
                .copied()
                .unwrap_or(0.0)
        });
        for ((now, before), name) in now.iter().zip(&before).zip(sums) {
            assert!(now >= before, "{name}: {now} after {before}");
        }
        before = now;
        now
    };
    // Successive flows on one connection, and on several.
    let mut total = 0;
    let mut transfer = Transfer::start(&hosts, &home, &listener, "cms Cache");
    for n in 0..12 {
        let bytes = 1000 * (n + 1);
        transfer.send(bytes);
        total += bytes;
        if n % 2 == 0 {
            // Flows last longer than a period, or less.
            std::thread::sleep(Duration::from_millis(150));
        }
        wait_for("the start", || (read_sums()[2] > n as f64).then_some(()));
        home.write(&format!("end {}", transfer.line));
        read_sums();
        if n % 3 == 2 {
            drop(transfer);
            transfer = Transfer::start(&hosts, &home, &listener, "cms Cache");
        } else {
            home.write(&format!("start {}", transfer.line));
        }
        read_sums();
    }
    drop(transfer);
    wait_for("all bytes", || {
        let sent = read_sums()[0];
        assert!(sent <= total as f64, "{sent} of {total}");
        (sent == total as f64).then_some(())
    });
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn the_last_bytes_are_counted_if_the_socket_closes_with_its_flow() {
    let hosts = Hosts::new();
    for options in ["port: 9000", "port: 9000, perFlow: false"] {
        let home = home(options);
        let daemon = home.start(&hosts.here);
        let listener = listener(&hosts, 5000);
        const TRANSFERS: usize = 100;
        for n in 1..=TRANSFERS {
            let mut transfer = Transfer::start(&hosts, &home, &listener, "cms Cache");
            daemon.expect_status(&format!("dispatcher_events started {n}"));
            transfer.send(1000);
            let Transfer { near, far, line } = transfer;
            drop(far);
            home.write(&format!("end {line}"));
            drop(near);
        }
        wait_for("all bytes", || {
            let sent = scrape(&hosts.here, "127.0.0.1:9000");
            let sent = sent.get(&format!("flowd_sent_bytes_total{BY_TAG}"));
            (sent == Some(&(1000.0 * TRANSFERS as f64))).then_some(())
        });
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root: network namespaces"]
fn beyond_max_series_and_without_per_flow_flows_are_summed() {
    let hosts = Hosts::new();
    let listener = listener(&hosts, 5000);
    for (options, shown) in [
        ("port: 9000, perFlow: false", 0),
        ("port: 9000, maxSeries: 125", 2),
    ] {
        let home = home(options);
        let daemon = home.start(&hosts.here);
        let mut transfers: Vec<Transfer> = Vec::new();
        for bytes in 1..=5 {
            let mut transfer = Transfer::start(&hosts, &home, &listener, "cms Cache");
            transfer.send(bytes);
            transfers.push(transfer);
            // The first flows are shown.
            std::thread::sleep(Duration::from_millis(250));
        }
        let hidden: usize = (shown + 1..=5).sum();
        let sum = format!("flow_tcp_bytes_sent_total{BY_TAG}");
        let found = wait_for("the sum", || {
            let found = scrape(&hosts.here, "127.0.0.1:9000");
            (found.get(&sum) == Some(&(hidden as f64))).then_some(found)
        });
        let flows = found.keys().filter(|name| {
            name.starts_with("flow_tcp_bytes_sent_total{") && name.contains("flow=")
        });
        assert_eq!(flows.count(), shown);
        let window = format!("flow_tcp_cwnd{BY_TAG}");
        let sockets = (5 - shown) as f64;
        assert!((10.0 * sockets..13.0 * sockets).contains(&found[&window]));
        assert!(!found.contains_key(&format!("flow_tcp_rtt{BY_TAG}")));
        transfers.truncate(shown + 1);
        wait_for("the ends", || {
            let found = scrape(&hosts.here, "127.0.0.1:9000");
            // Counters never decrease; gauges do.
            assert_eq!(found[&sum], hidden as f64);
            (found.get(&window)? < &13.0).then_some(())
        });
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root: network namespaces"]
fn ten_thousand_flows_on_two_endpoints_at_once() {
    const FLOWS: usize = 10_000;
    let hosts = Hosts::new();
    let home = Home::with(
        "backends:\n  prometheus: {netlinkPort: 8080, skopsPort: 0, port: 9000, maxSeries: 1000000}\nenrichers: {period: 500, netlink: {}}\n",
    );
    let daemon = home.start(&hosts.here);
    let listeners: Vec<TcpListener> = (0..10).map(|n| listener(&hosts, 5000 + n)).collect();
    let mut pipe = home.writer();
    let mut open = Vec::new();
    for n in 0..FLOWS {
        let to = listeners[n % 10].local_addr().unwrap();
        let near = hosts
            .here
            .enter(|| TcpStream::connect_timeout(&to, DEADLINE).unwrap());
        let port = near.local_addr().unwrap().port();
        writeln!(
            pipe,
            "start tcp {HERE6} {port} {THERE6} {} 3 {}",
            to.port(),
            3 + n % 2
        )
        .unwrap();
        open.push(near);
    }
    let count = |page: &str| {
        page.lines()
            .filter(|l| l.starts_with("flow_tcp_rto{"))
            .count()
    };
    let get = |port: u16| {
        Client::tcp(&hosts.here, &format!("127.0.0.1:{port}"))
            .get("/metrics")
            .body
    };
    wait_for("all flows", || (count(&get(9000)) == FLOWS).then_some(()));
    std::thread::scope(|scope| {
        for (port, flavour) in [(9000, false), (8080, true)] {
            scope.spawn(move || {
                let page = get(port);
                assert_eq!(count(&page), FLOWS);
                let flavoured = page.lines().filter(|l| {
                    l.starts_with("flow_tcp_rto{") && l.contains("flavour=\"netlink\"")
                });
                assert_eq!(flavoured.count(), if flavour { FLOWS } else { 0 });
                let found = samples(&page);
                assert_eq!(
                    found.len(),
                    page.lines().filter(|l| !l.starts_with('#')).count(),
                    "a series twice"
                );
                if flavour {
                    promtool(&page);
                }
            });
        }
    });
    // The connections were never accepted, so they are reset: no socket waits for a FIN.
    drop((listeners, open));
    daemon.expect_status(&format!("dispatcher_events ended_socket_closed {FLOWS}"));
    wait_for("no series", || (count(&get(9000)) == 0).then_some(()));
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn slow_and_silent_clients_do_not_delay_others() {
    let hosts = Hosts::new();
    let home = home("port: 9000");
    let daemon = home.start(&hosts.here);
    let listener = listener(&hosts, 5000);
    let transfers: Vec<Transfer> = (0..200)
        .map(|_| Transfer::start(&hosts, &home, &listener, "cms Cache"))
        .collect();
    let silent: Vec<TcpStream> = (0..300)
        .map(|_| connect(&hosts.here, "127.0.0.1:9000"))
        .collect();
    // They send a request and read no answer: most of a page of several MB is never generated.
    let slow: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = connect(&hosts.here, "127.0.0.1:9000");
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                .unwrap();
            stream.peek(&mut [0]).unwrap();
            stream
        })
        .collect();
    let began = Instant::now();
    home.write(&lines("start", 0..1000, "3 3"));
    daemon.expect_status("flows_open 1200");
    let answer = Client::tcp(&hosts.here, "127.0.0.1:9000").get("/metrics");
    assert!(
        answer.status == 200 || answer.error().contains("already in progress"),
        "{answer:?}"
    );
    assert_eq!(
        Client::tcp(&hosts.here, "127.0.0.1:9000")
            .get("/healthz")
            .status,
        200
    );
    drop(slow);
    wait_for("a scrape", || {
        (Client::tcp(&hosts.here, "127.0.0.1:9000")
            .get("/metrics")
            .status
            == 200)
            .then_some(())
    });
    assert!(began.elapsed() < DEADLINE);
    drop((silent, transfers));
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn formats_and_compression_are_negotiated() {
    let hosts = Hosts::new();
    let home = home("port: 9000, bindAddress: '::'");
    let daemon = home.start(&hosts.here);
    home.write("start tcp 2001:db8::1 1 2001:db8::2 2 cms Cache\n");
    daemon.expect_status("flows_open 1");
    let get = |headers: &str| {
        Client::tcp(&hosts.there, &format!("[{HERE6}]:9000"))
            .request("GET", "/metrics", headers, "")
    };
    let text = get("");
    assert!(
        text.headers
            .contains("Content-Type: text/plain; version=0.0.4"),
        "{}",
        text.headers
    );
    assert!(
        text.body
            .contains("# TYPE flowd_sent_bytes_total counter\n")
    );
    let open = get("Accept: application/openmetrics-text; version=1.0.0\r\n");
    assert!(
        open.headers
            .contains("Content-Type: application/openmetrics-text; version=1.0.0")
    );
    assert!(
        open.body.contains("# TYPE flowd_sent_bytes counter\n") && open.body.ends_with("\n# EOF\n")
    );
    let curl = |arguments: &[&str]| {
        let url = "http://127.0.0.1:9000/metrics";
        let output = hosts
            .here
            .command("curl")
            .args(["-sS", url])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success());
        output.stdout
    };
    let compressed = curl(&["-H", "Accept-Encoding: gzip"]);
    assert_eq!(compressed[..2], [0x1f, 0x8b]);
    let names = |page: &[u8]| {
        samples(std::str::from_utf8(page).unwrap())
            .into_keys()
            .collect::<BTreeSet<_>>()
    };
    let plain = curl(&[]);
    assert!(compressed.len() * 2 < plain.len());
    assert_eq!(names(&curl(&["--compressed"])), names(&plain));
    let mut client = Client::tcp(&hosts.here, "127.0.0.1:9000");
    assert_eq!(client.get("/healthz").status, 200);
    assert_eq!(client.get("/other").status, 404);
    assert_eq!(client.post("/metrics", "").status, 405);
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_port_in_use_is_a_clear_error_at_start() {
    let ns = NetNs::new("here");
    ns.ip(&["link", "set", "lo", "up"]);
    let _taken = ns.enter(|| TcpListener::bind("127.0.0.1:8081").unwrap());
    let home = home("bindAddress: 127.0.0.1");
    let output = ns
        .command(PROGRAM)
        .args(["run", "-c"])
        .arg(home.path("flowd.cfg"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    let expected = "flowd-rs: TCP 127.0.0.1:8081 (backends.prometheus.bindAddress, skopsPort): Address already in use (os error 98)";
    assert_eq!(error.lines().last(), Some(expected), "{error}");
}

/// A real Prometheus beside the daemon.
struct Prometheus<'a> {
    ns: &'a NetNs,
    child: std::process::Child,
    _dir: tempfile::TempDir,
}

impl Prometheus<'_> {
    fn start(ns: &NetNs) -> Prometheus<'_> {
        let dir = tempfile::tempdir().unwrap();
        let rules = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/conf/prometheus/flowd-rs.rules.yml"
        );
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{rules}']\nscrape_configs:\n- job_name: flowd-rs\n  static_configs: [{{targets: ['127.0.0.1:9000']}}]\n"
        );
        let path = dir.path().join("prometheus.yml");
        fs::write(&path, config).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let child = ns
            .command("prometheus")
            .arg(format!("--config.file={}", path.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.path().join("data").display()
            ))
            .arg("--web.listen-address=127.0.0.1:9090")
            .stderr(log)
            .spawn()
            .expect("prometheus is installed");
        let prometheus = Prometheus {
            ns,
            child,
            _dir: dir,
        };
        wait_for("Prometheus", || {
            let stream = prometheus
                .ns
                .enter(|| TcpStream::connect("127.0.0.1:9090").ok())?;
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            (Client::new(stream).get("/-/ready").status == 200).then_some(())
        });
        prometheus
    }

    fn get(&self, path: &str) -> Value {
        let answer = Client::tcp(self.ns, "127.0.0.1:9090").get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.json()
    }

    /// The values of a query, in the order of their labels.
    fn query(&self, query: &str) -> Vec<f64> {
        let query: String = form_urlencoded::byte_serialize(query.as_bytes()).collect();
        let answer = self.get(&format!("/api/v1/query?query={query}"));
        let result = answer["data"]["result"].as_array().unwrap().clone();
        result
            .iter()
            .map(|r| r["value"][1].as_str().unwrap().parse().unwrap())
            .collect()
    }

    fn expect(&self, query: &str, is_expected: impl Fn(&[f64]) -> bool) {
        wait_for(query, || is_expected(&self.query(query)).then_some(()));
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every query of the board, as Grafana would send it.
fn board_queries() -> Vec<String> {
    fn find(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(expr)) = map.get("expr") {
                    found.push(expr.clone());
                }
                map.values().for_each(|v| find(v, found));
            }
            Value::Array(list) => list.iter().for_each(|v| find(v, found)),
            _ => {}
        }
    }
    let board = include_str!("../conf/grafana/flowd-rs.json");
    let mut found = Vec::new();
    find(&serde_json::from_str(board).unwrap(), &mut found);
    assert!(found.len() > 30);
    let fill = |query: &String| {
        query
            .replace("$__rate_interval", "15s")
            .replace("$instance", ".*")
            .replace("$experiment", ".*")
    };
    found.iter().map(fill).collect()
}

#[path = "common/prog_run.rs"]
mod prog_run;

#[test]
#[ignore = "needs root: network namespaces"]
fn a_real_prometheus_answers_every_query_of_the_board() {
    let hosts = Hosts::new();
    hosts.here.ip(&["link", "set", "lo", "up"]);
    let bpffs = prog_run::BpfFs::new();
    let home = Home::with(&format!(
        "backends:\n  prometheus: {{port: 9000}}\n  firefly: {{}}\n  marker: {{bpfFsPath: {}, targetInterfaces: [veth0]}}\nenrichers: {{period: 100, netlink: {{}}}}\n",
        bpffs.path().display()
    ));
    let daemon: Daemon<'_> = home.start(&hosts.here);
    let prometheus = Prometheus::start(&hosts.here);
    let listener = listener(&hosts, 5000);
    let mut transfer = Transfer::start(&hosts, &home, &listener, "atlas Data_Challenge");
    let mut short = Transfer::start(&hosts, &home, &listener, "cms Cache");
    short.send(10);
    home.write(&format!("end {}", short.line));
    prometheus.expect("up{job=\"flowd-rs\"}", |values| values == [1.0]);
    let mut keep_sending = || {
        transfer.send(100_000);
        home.write(&(lines("start", 0..1, "3 3") + &lines("end", 0..1, "3 3")));
        std::thread::sleep(Duration::from_millis(20));
    };
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        keep_sending();
    }
    // Queries without a result on a healthy daemon: there are no restarts.
    let quiet = ["changes(process_start_time_seconds"];
    for query in board_queries() {
        let answered = wait_for(&query, || {
            keep_sending();
            let answered = !prometheus.query(&query).is_empty();
            (answered || quiet.iter().any(|q| query.starts_with(q))).then_some(answered)
        });
        assert_eq!(
            answered,
            !quiet.iter().any(|q| query.starts_with(q)),
            "{query}"
        );
    }
    let share = prometheus.query(
        "sum(rate(flowd_marked_packets_total[15s])) / sum(rate(flowd_sent_packets_total[15s]))",
    );
    assert!(
        share.len() == 1 && (0.5..=3.0).contains(&share[0]),
        "{share:?}"
    );

    // The rules are evaluated, and no alert is active.
    let rules = wait_for("rules", || {
        let rules = prometheus.get("/api/v1/rules")["data"]["groups"][0]["rules"]
            .as_array()?
            .clone();
        rules
            .iter()
            .all(|rule| rule["health"] == "ok")
            .then_some(rules)
    });
    assert_eq!(rules.len(), 9);
    for rule in &rules {
        assert_eq!(rule["state"], "inactive", "{rule}");
    }

    let series = format!("flow_tcp_bytes_sent_total{{flow=\"{}\"}}", transfer.ports());
    prometheus.expect(&series, |values| {
        values.len() == 1 && values[0] >= 400_000.0
    });
    home.write(&format!("end {}", transfer.line));
    prometheus.expect(&series, |values| values.is_empty());
    prometheus.expect("flowd_flows_open", |values| {
        values.iter().all(|v| *v == 0.0)
    });
    home.write("start tcp nobody\n");
    prometheus.expect(
        "sum(flowd_plugin_events_total{plugin=\"namedPipe\",outcome=~\"rejected_.*\"})",
        |values| values == [1.0],
    );
    daemon.stop();
    prometheus.expect("up{job=\"flowd-rs\"}", |values| values == [0.0]);
}

#[test]
fn promtool_accepts_the_alert_rules() {
    let rules = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/conf/prometheus/flowd-rs.rules.yml"
    );
    let output = Command::new("promtool")
        .args(["check", "rules", rules])
        .output();
    let Ok(output) = output else {
        // Only `sudo make test` installs the tools for the tests.
        assert!(
            !nix::unistd::geteuid().is_root(),
            "promtool (prometheus) is installed"
        );
        return;
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

//! Fetching the registry, and finding public addresses behind NAT. The tests run the servers themselves.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::{Home, PROGRAM, run, write};
use common::http::Client;
use common::net::{HERE6, Hosts, NetNs, THERE6};
use common::sink::Sink;
use common::{DEADLINE, wait_for};
use nix::sys::signal::Signal;
use stun_types::attribute::XorMappedAddress;
use stun_types::message::{Message, MessageWriteVec};
use stun_types::prelude::*;

/// Answers a request with the given head.
type Answer = Box<dyn Fn(&str, &mut TcpStream) + Send>;

/// A web server in a namespace. The receiver gets the head of each request.
fn web_server(ns: &NetNs, address: &str, answer: Answer) -> (SocketAddr, Receiver<String>) {
    let listener = ns.enter(|| TcpListener::bind(address).unwrap());
    let address = listener.local_addr().unwrap();
    let (sender, heads): (Sender<String>, _) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while !head.ends_with("\r\n\r\n") {
                if reader.read_line(&mut head).unwrap_or(0) == 0 {
                    break;
                }
            }
            answer(&head, &mut stream);
            // Not every test keeps the receiver.
            let _ = sender.send(head);
        }
    });
    (address, heads)
}

fn respond(stream: &mut TcpStream, status: &str, headers: &str, body: &str) {
    let length = body.len();
    let text = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    let _ = stream.write_all(text.as_bytes());
}

fn registry(name: &str) -> String {
    format!(
        r#"{{"version": 1, "experiments": [{{"expName": "{name}", "expId": 77, "activities": [{{"activityName": "Testing \"\\", "activityId": 7}}]}}]}}"#
    )
}

/// A home with `registry.url` and its own `workDir`.
fn home(url: &str) -> Home {
    let home = Home::with("backends:\n  firefly: {}\n");
    let work = home.path("work").display().to_string();
    home.configure(&format!(
        "backends:\n  firefly: {{}}\n  prometheus: {{port: 9000}}\nworkDir: {work}\nregistry: {{url: '{url}'}}\n"
    ));
    home
}

const NEW: &str = "start tcp 2001:db8::1 1 2001:db8::2 2 newexp Testing_\"\\\n";

#[test]
#[ignore = "needs root: network namespaces"]
fn a_new_name_is_known_after_a_fetch_and_after_a_restart_from_the_cache() {
    let hosts = Hosts::new();
    let (at, heads) = web_server(
        &hosts.there,
        &format!("[{THERE6}]:0"),
        Box::new(
            |head, stream| match head.contains("if-none-match: \"v1\"") {
                true => respond(stream, "304 Not Modified", "", ""),
                false => respond(stream, "200 OK", "ETag: \"v1\"\r\n", &registry("newexp")),
            },
        ),
    );
    let home = home(&format!("http://{at}/api.json"));
    let daemon = home.start(&hosts.here);
    heads.recv_timeout(DEADLINE).unwrap();
    daemon.expect_status("registry_updates updated 1");
    home.wait_for_log("registry: 1 experiment fetched from http://");
    home.write(NEW);
    daemon.expect_status("flows_open 1");
    // Labels escape quotes and backslashes.
    let page = wait_for("the sums", || {
        let page = Client::tcp(&hosts.here, "127.0.0.1:9000")
            .get("/metrics")
            .body;
        page.contains("flowd_flows_open").then_some(page)
    });
    let expected = r#"flowd_flows_open{act="Testing \"\\",exp="newexp"} 1"#;
    assert!(page.contains(expected), "{page}");
    daemon.signal(Signal::SIGHUP);
    let head = heads.recv_timeout(DEADLINE).unwrap();
    assert!(head.contains("if-none-match: \"v1\""), "{head}");
    daemon.expect_status("registry_updates unchanged 1");
    daemon.stop();

    // The server's address changes, but the registry is in the cache.
    let (config, url) = (home.path("flowd.cfg"), format!("http://{at}/api.json"));
    fs::write(
        &config,
        fs::read_to_string(&config)
            .unwrap()
            .replace(&url, "http://[2001:db8::9]/"),
    )
    .unwrap();
    let (_, stdout, _) = run(&["registry", "-c", config.to_str().unwrap()]);
    assert!(stdout.contains("atlas"), "cache of another URL: {stdout}");
    fs::write(
        &config,
        fs::read_to_string(&config)
            .unwrap()
            .replace("http://[2001:db8::9]/", &url),
    )
    .unwrap();
    let (code, stdout, _) = run(&["registry", "-c", config.to_str().unwrap(), "lookup", "77"]);
    assert_eq!(
        (code, stdout.lines().nth(1)),
        (0, Some("        77  newexp             7  Testing \"\\"))
    );
    let (code, _, stderr) = run(&[
        "registry",
        "-c",
        config.to_str().unwrap(),
        "lookup",
        "atlas",
    ]);
    assert!(code == 1 && stderr.contains("(cached)"), "{stderr}");
    let daemon = home.start(&hosts.here);
    home.write(&NEW.replace("start", "end"));
    daemon.expect_status("dispatcher_events ended 1");
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn start_up_does_not_wait_for_the_registry_and_an_invalid_one_is_ignored() {
    let hosts = Hosts::new();
    let huge = format!("{{\"experiments\": [{}]}}", "1,".repeat(1 << 20));
    let answers: Vec<(&str, Answer)> = vec![
        (
            "found HTTP status 404, expected 200",
            Box::new(|_, stream| respond(stream, "404 Not Found", "", "gone")),
        ),
        (
            "not a valid registry: ",
            Box::new(|_, stream| respond(stream, "200 OK", "", "<html>")),
        ),
        (
            "is out of range",
            Box::new(|_, stream| {
                respond(stream, "200 OK", "", &registry("x").replace("77", "777"))
            }),
        ),
        (
            "the registry is larger than 1 MiB; using the cached (or built-in) registry",
            Box::new(move |_, stream| respond(stream, "200 OK", "", &huge)),
        ),
        (
            "",
            Box::new(|_, stream| {
                // Never completes the response.
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
                let _ = stream.read(&mut [0]);
            }),
        ),
    ];
    for (expected, answer) in answers {
        let (at, heads) = web_server(&hosts.there, &format!("[{THERE6}]:0"), answer);
        let home = home(&format!("http://{at}/api.json"));
        let began = Instant::now();
        let daemon = home.start(&hosts.here);
        assert!(began.elapsed() < Duration::from_secs(10), "waited");
        home.write("start tcp 2001:db8::1 1 2001:db8::2 2 cms Cache\n");
        daemon.expect_status("flows_open 1");
        if !expected.is_empty() {
            heads.recv_timeout(DEADLINE).unwrap();
            home.wait_for_log(expected);
            daemon.expect_status("registry_updates failed 1");
        }
        home.write(NEW);
        daemon.expect_status("plugin_events namedPipe rejected_experiment 1");
        assert!(!home.path("work/registry.json").exists());
        daemon.stop();
    }
}

/// The server answers "not modified" although this process has not seen the registry that another one has cached.
#[test]
#[ignore = "needs root: network namespaces"]
fn a_registry_fetched_by_another_process_is_used_by_a_reload_and_by_the_configuration() {
    let ns = NetNs::new("here");
    ns.ip(&["link", "set", "lo", "up"]);
    let version = Arc::new(AtomicUsize::new(1));
    let current = Arc::clone(&version);
    let (at, heads) = web_server(
        &ns,
        "127.0.0.1:0",
        Box::new(move |head, stream| {
            let n = current.load(Ordering::Relaxed);
            match head.contains(&format!("if-none-match: \"v{n}\"")) {
                true => respond(stream, "304 Not Modified", "", ""),
                false => {
                    let etag = format!("ETag: \"v{n}\"\r\n");
                    respond(stream, "200 OK", &etag, &registry(&format!("exp{n}")));
                }
            }
        }),
    );
    let home = Home::with("");
    let work = home.path("work").display().to_string();
    let settings =
        format!("workDir: {work}\nregistry: {{url: 'http://{at}/'}}\nbackends: {{dummy: }}\n");
    home.configure(&settings);
    let config = home.path("flowd.cfg");
    let update = || {
        let mut command = ns.command(PROGRAM);
        command.args(["registry", "-c"]).arg(&config).arg("update");
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{stderr}");
    };
    let daemon = home.start(&ns);
    heads.recv_timeout(DEADLINE).unwrap();
    home.wait_for_log("registry: 1 experiment fetched");
    version.store(2, Ordering::Relaxed);
    update();
    daemon.signal(Signal::SIGHUP);
    daemon.expect_status("registry_updates updated 2");
    home.write("start tcp 2001:db8::1 1 2001:db8::2 2 exp2 7\n");
    daemon.expect_status("flows_open 1");
    daemon.stop();

    // The configuration uses a name that only the next registry has.
    version.store(3, Ordering::Relaxed);
    let plugin = format!(
        "  netlink: {{experiment: exp3, activity: 7}}\n  namedPipe: {{pipePath: {}}}\n",
        home.pipe().display()
    );
    home.configure_plugins(&plugin, &settings);
    update();
    home.start(&ns).stop();
}

#[test]
fn the_registry_can_be_a_local_file() {
    let home = Home::with("");
    write(&home.path("registry.json"), &registry("ours"));
    let url = format!("file://{}", home.path("registry.json").display());
    home.configure(&format!(
        "backends: {{dummy: {{}}}}\nregistry: {{url: '{url}'}}\n"
    ));
    let config = home.path("flowd.cfg");
    let (code, stdout, _) = run(&["registry", "-c", config.to_str().unwrap(), "list"]);
    assert!(code == 0 && stdout.contains("77  ours"), "{stdout}");
    let (code, stdout, _) = run(&["registry", "-c", config.to_str().unwrap(), "update"]);
    assert!(
        code == 0 && stdout.contains("fetched 1 experiment\n"),
        "{stdout}"
    );
    let (code, _, stderr) = run(&[
        "registry",
        "-c",
        config.to_str().unwrap(),
        "lookup",
        "atlas",
    ]);
    assert!(
        code == 1 && stderr.contains("\"atlas\" is neither the name of an experiment or activity"),
        "{stderr}"
    );
    write(&home.path("registry.json"), "{}");
    let (code, _, stderr) = run(&["registry", "-c", config.to_str().unwrap(), "update"]);
    assert!(
        code == 1 && stderr.contains("missing field `experiments`"),
        "{stderr}"
    );
}

/// A host with private addresses, a router with NAT, and the hosts outside.
struct Nat {
    inside: NetNs,
    router: NetNs,
    outside: NetNs,
}

const PUBLIC4: &str = "42.0.0.1";
const PUBLIC6: &str = "2a00:1::1";
const SERVER4: &str = "42.0.0.2";
const SERVER6: &str = "2a00:1::2";

impl Nat {
    fn new() -> Nat {
        let (inside, router, outside) = (
            NetNs::new("inside"),
            NetNs::new("router"),
            NetNs::new("outside"),
        );
        for (ns, name) in [(&inside, "in"), (&outside, "out")] {
            router.ip(&[
                "link", "add", name, "type", "veth", "peer", "name", "veth0", "netns", &ns.name,
            ]);
            router.ip(&["link", "set", name, "up"]);
            ns.ip(&["link", "set", "veth0", "up"]);
            ns.ip(&["link", "set", "lo", "up"]);
        }
        for (ns, device, addresses) in [
            (&inside, "veth0", ["10.0.0.2/24", "fd00::2/64"]),
            (&router, "in", ["10.0.0.1/24", "fd00::1/64"]),
            (&router, "out", ["42.0.0.1/24", "2a00:1::1/64"]),
            (&outside, "veth0", ["42.0.0.2/24", "2a00:1::2/64"]),
        ] {
            ns.ip(&["addr", "add", addresses[0], "dev", device]);
            ns.ip(&["addr", "add", addresses[1], "dev", device, "nodad"]);
        }
        inside.ip(&["route", "add", "default", "via", "10.0.0.1"]);
        inside.ip(&["-6", "route", "add", "default", "via", "fd00::1"]);
        let set = |key: &str| {
            let status = router
                .command("sh")
                .args(["-c", &format!("echo 1 > /proc/sys/{key}")])
                .status();
            assert!(status.unwrap().success());
        };
        set("net/ipv4/ip_forward");
        set("net/ipv6/conf/all/forwarding");
        let rules = "table inet nat { chain post { type nat hook postrouting priority 100; oifname \"out\" masquerade; }; }";
        let nft = router
            .command("nft")
            .arg(rules)
            .output()
            .expect("nft (nftables) is installed");
        assert!(
            nft.status.success(),
            "{}",
            String::from_utf8_lossy(&nft.stderr)
        );
        Nat {
            inside,
            router,
            outside,
        }
    }

    /// A STUN server outside.
    fn stun_server(&self, address: &str) {
        let socket = self
            .outside
            .enter(|| UdpSocket::bind((address, 3478)).unwrap());
        thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let request = Message::from_bytes(&buffer[..length]).unwrap();
                let mut answer = Message::builder_success(&request, MessageWriteVec::new());
                let address = XorMappedAddress::new(from, request.transaction_id());
                answer.add_attribute(&address).unwrap();
                let _ = socket.send_to(&answer.finish(), from);
            }
        });
    }

    /// A web server outside that returns the client's address.
    fn echo_server(&self, address: &str) -> SocketAddr {
        let answer = |_: &str, stream: &mut TcpStream| {
            let from = stream.peer_addr().unwrap().ip();
            respond(stream, "200 OK", "", &format!("{from}\n"));
        };
        web_server(&self.outside, address, Box::new(answer)).0
    }
}

#[test]
#[ignore = "needs root: network namespaces"]
fn fireflies_have_the_public_address_of_the_local_end() {
    let nat = Nat::new();
    nat.stun_server(SERVER4);
    nat.stun_server(SERVER6);
    let http4 = nat.echo_server(&format!("{SERVER4}:8000"));
    let http6 = nat.echo_server(&format!("[{SERVER6}]:8000"));
    let (broken, _) = web_server(
        &nat.outside,
        &format!("{SERVER4}:0"),
        Box::new(|_, stream| respond(stream, "200 OK", "", "who knows")),
    );
    let firefly = |stun: &str| {
        format!(
            "backends:\n  firefly: {{sendToCollector: true, collectorAddress: {SERVER4}, stun: {{{stun}}}}}\n"
        )
    };
    let sink = Sink::bind(&nat.outside, &format!("{SERVER4}:10514"));
    for (stun, public4, public6) in [
        (format!("stunServers: ['{SERVER4}', '[{SERVER6}]:3478'], httpServices: []"), PUBLIC4, PUBLIC6),
        (format!("stunServers: [], httpServices: ['http://{broken}/', 'http://{http4}/', 'http://{http6}/']"), PUBLIC4, PUBLIC6),
        ("stunServers: [], httpServices: [], manualMapping: {10.0.0.2: 9.9.9.9, 'fd00::2': '2a00:9::9'}".to_owned(), "9.9.9.9", "2a00:9::9"),
    ] {
        let home = Home::with(&firefly(&stun));
        let daemon = home.start(&nat.inside);
        if !stun.contains("manual") {
            home.wait_for_log(&format!("10.0.0.2 maps to {public4}"));
            home.wait_for_log(&format!("fd00::2 maps to {public6}"));
        }
        // Source or destination, IPv4 or IPv6; other private addresses are not replaced.
        for (line, key, public) in [
            (format!("tcp 10.0.0.2 1 {SERVER4} 2"), "src-ip", public4),
            (format!("tcp {SERVER4} 1 10.0.0.2 2"), "dst-ip", public4),
            (format!("tcp fd00::2 1 {SERVER6} 2"), "src-ip", public6),
            ("tcp 10.0.0.7 1 42.0.0.9 2".to_owned(), "src-ip", "10.0.0.7"),
        ] {
            home.write(&format!("start {line} 2 9\n"));
            // The firefly to the destination may arrive at the same socket; it has the same content.
            let json = sink.firefly().json;
            assert_eq!(json["flow-id"][key], public, "{line}: {json}");
            while sink.datagram(Duration::from_millis(200)).is_some() {}
        }
        daemon.stop();
        let config = home.path("flowd.cfg");
        let output = nat.inside.command(PROGRAM).args(["stun", "sample", "-c"]).arg(config).output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && stdout.contains(&format!("10.0.0.2 -> {public4}")), "{stdout}");
    }
}

#[test]
#[ignore = "needs root: network namespaces"]
fn an_address_added_later_is_looked_up_and_a_failed_lookup_delays_nothing() {
    let nat = Nat::new();
    nat.inside
        .ip(&["addr", "del", "10.0.0.2/24", "dev", "veth0"]);
    nat.inside.ip(&["-6", "addr", "flush", "dev", "veth0"]);
    let home = Home::with(&format!(
        "backends:\n  firefly: {{sendToCollector: true, stun: {{stunServers: [{SERVER4}], httpServices: []}}}}\n"
    ));
    let began = Instant::now();
    let daemon = home.start(&nat.inside);
    assert!(began.elapsed() < Duration::from_secs(10));
    nat.inside
        .ip(&["addr", "add", "10.0.0.2/24", "dev", "veth0"]);
    nat.inside
        .ip(&["route", "add", "default", "via", "10.0.0.1"]);
    home.wait_for_log("no service returned one for this host's private address");
    nat.stun_server(SERVER4);
    // A further address triggers the next lookup.
    nat.inside
        .ip(&["addr", "add", "10.0.0.3/24", "dev", "veth0"]);
    home.wait_for_log(&format!("10.0.0.2 maps to {PUBLIC4}"));
    // The address that was found is kept over reloads, even if no server answers any more.
    let sink = Sink::bind(&nat.outside, &format!("{SERVER4}:10514"));
    let check = |port: u16| {
        home.write(&format!("start tcp 10.0.0.2 {port} {SERVER4} 2 2 9\n"));
        assert_eq!(sink.firefly().json["flow-id"]["src-ip"], PUBLIC4);
    };
    check(1);
    let silence = "table ip silent { chain forward { type filter hook forward priority 0; udp dport 3478 drop; }; }";
    let status = nat.router.command("nft").arg(silence).status();
    assert!(status.unwrap().success());
    for port in 2..5 {
        let config = home.path("flowd.cfg");
        let text = fs::read_to_string(&config).unwrap();
        let text = text.replace(
            "sendToCollector: true",
            &format!("sendToCollector: true, collectorPort: {}", 20_000 + port),
        );
        fs::write(
            &config,
            text.replacen(&format!("collectorPort: {}, ", 19_999 + port), "", 1),
        )
        .unwrap();
        daemon.signal(Signal::SIGHUP);
        daemon.expect_notice("RELOADING=1");
        daemon.expect_notice("READY=1");
        check(port);
    }
    nat.inside
        .ip(&["addr", "add", "10.0.0.4/24", "dev", "veth0"]);
    wait_for("a lookup that fails", || {
        let log = home.log();
        (log.matches("no service returned one").count() > 1).then_some(())
    });
    check(9);
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn fireflies_have_the_source_address_set_in_a_configuration_of_flowd() {
    let hosts = Hosts::new();
    let home = Home::with("");
    let (pipe, config) = (home.path("pipe"), home.path("flowd.cfg"));
    write(
        &config,
        &format!(
            "PLUGIN='np_api'\nBACKEND='udp_firefly'\nFLOW_MAP_API='file:///nowhere'\nNP_API_FILE='{}'\nUDP_FIREFLY_DST='{THERE6}'\nUDP_FIREFLY_IP6_SRC='2a00:9::9'\n",
            pipe.display()
        ),
    );
    let sink = Sink::bind(&hosts.there, &format!("[{THERE6}]:10514"));
    // State and control socket have their default paths, in file systems that only this daemon sees.
    let mounts = "mount -t tmpfs none /var/lib && mount -t tmpfs none /run && exec \"$@\"";
    let mut daemon = hosts.here.command("unshare");
    daemon.args(["--mount", "sh", "-c", mounts, "sh", PROGRAM, "run", "-c"]);
    let log = fs::File::create(home.path("log")).unwrap();
    let mut daemon = daemon.arg(&config).stderr(log).spawn().unwrap();
    home.wait_for_log("is ready");
    home.write(&format!("start tcp {HERE6} 1 {THERE6} 2 cms Cache\n"));
    let json = sink.firefly().json;
    assert_eq!(json["flow-id"]["src-ip"], "2a00:9::9", "{json}");
    assert_eq!(json["flow-id"]["dst-ip"], THERE6);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

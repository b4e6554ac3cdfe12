//! The HTTP API, with good and with hostile clients.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Home, PROGRAM, lines};
use common::http::{Client, connect};
use common::net::{Hosts, NetNs};
use common::sink::Sink;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};

const API: &str = "127.0.0.1:7777";
/// The beginning of a request with a body.
const JSON: &str = "POST /flow HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";

/// A daemon with the API enabled. `options` is the YAML of `plugins.api`, in braces.
fn home(options: &str) -> Home {
    Home::with(&format!("  api: {options}\nbackends:\n  firefly: {{}}\n"))
}

/// A flow event in the JSON of flowd-rs.
fn flow_json(state: &str, port: u16) -> Value {
    json!({
        "state": state, "protocol": "tcp", "src-ip": "2001:db8::1", "src-port": port, "dst-ip": "2001:db8::2",
        "dst-port": 1094, "experiment-id": "ATLAS", "activity-id": "Data Challenge", "application": "mover 1.0",
        "start-time": "2026-01-02T03:04:05Z", "end-time": "2026-01-02T03:04:06.5+00:00", "usage": {"sent": 5, "received": 6},
    })
}

/// A flow event in the JSON of flowd-go.
fn flowd_go_json(state: u8, port: u16) -> Value {
    json!({
        "State": state, "Protocol": 0, "Family": 10, "Src": format!("[2001:db8::1]:{port}"), "Dst": "[2001:db8::2]:1094",
        "Experiment": 2, "Activity": 26, "StartTs": "2026-01-02T03:04:05Z", "EndTs": "2026-01-02T03:04:06.5Z", "Application": "mover 1.0",
    })
}

#[test]
#[ignore = "needs root"]
fn both_json_formats_are_accepted_over_tcp_and_the_unix_socket() {
    let hosts = Hosts::new();
    let home = home("{}");
    let socket = home.path("api/socket");
    let config = format!(
        "  api: {{unixSocket: '{}', unixSocketMode: '0622'}}\nbackends: {{firefly: {{}}}}\n",
        socket.display()
    );
    home.configure(&config);
    let sink = Sink::bind(&hosts.there, "[2001:db8::2]:10514");
    let daemon = home.start(&hosts.here);
    let found = fs::metadata(&socket).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o622);
    for (n, mut client) in [Client::tcp(&hosts.here, API), Client::unix(&socket)]
        .into_iter()
        .enumerate()
    {
        let port = 100 * (1 + n as u16);
        for (m, body) in [
            flow_json("start", port),
            flowd_go_json(2, port + 1),
            json!([flow_json("start", port + 2), flowd_go_json(2, port + 3)]),
        ]
        .iter()
        .enumerate()
        {
            let answer = client.post("/flow", &body.to_string());
            assert_eq!(
                (answer.status, answer.json()),
                (200, json!({"accepted": if m == 2 { 2 } else { 1 }}))
            );
        }
        for _ in 0..4 {
            let start = sink.firefly().json;
            assert_eq!(
                start["flow-lifecycle"]["start-time"],
                "2026-01-02T03:04:05.000000+00:00"
            );
            assert_eq!(
                start["context"],
                json!({"experiment-id": 2, "activity-id": 26, "application": "mover 1.0"})
            );
        }

        // The open flows, as a list and one by one.
        let listing = client.get("/flows").json();
        assert_eq!(listing["flows"].as_array().unwrap().len(), 4);
        let one = client
            .get(&format!("/flows/tcp,2001:db8::1,{port},2001:db8::2,1094"))
            .json();
        assert_eq!(
            (&one["experiment"], &one["activity"], &one["origin"]),
            (&json!("atlas"), &json!("Data Challenge"), &json!("api"))
        );
        assert!(one["age"].as_f64().unwrap() > 1e6, "{one}");
        assert!(
            listing["flows"]
                .as_array()
                .unwrap()
                .iter()
                .any(|flow| flow["id"] == one["id"])
        );
        let none = |query: &str, client: &mut Client| {
            client.get(&format!("/flows?{query}")).json() == json!({"flows": []})
        };
        assert!(none("experiment=cms", &mut client) && none("address=192.0.2.0/24", &mut client));
        assert!(!none("experiment=atlas&address=2001:db8::2", &mut client));

        for port in port..port + 4 {
            let body = if port % 2 == 0 {
                flow_json("end", port)
            } else {
                flowd_go_json(3, port)
            };
            assert_eq!(client.post("/flow", &body.to_string()).status, 200);
            let end = sink.firefly().json;
            assert_eq!(
                end["flow-lifecycle"]["end-time"],
                "2026-01-02T03:04:06.500000+00:00"
            );
            let usage = if port % 2 == 0 {
                json!({"sent": 5, "received": 6})
            } else {
                Value::Null
            };
            assert_eq!(end["usage"], usage);
        }
        assert!(none("", &mut client));
    }
    daemon.expect_status("plugin_events api accepted 16");
    daemon.stop();
    assert!(!socket.exists());
}

#[test]
#[ignore = "needs root"]
fn the_dummy_flow_of_flowd_go_and_the_other_routes_work() {
    let ns = NetNs::new("api");
    let home = home("{dummyRoutes: true}");
    let daemon = home.start(&ns);
    let mut client = Client::tcp(&ns, API);
    let routes = client.get("/").json();
    let listed = routes["routes"].as_array().unwrap();
    assert!(
        listed
            .iter()
            .any(|r| r["method"] == "POST" && r["path"] == "/flow"),
        "{routes}"
    );
    assert_eq!(client.get("/dummy/start").status, 200);
    let flow = client.get("/flows/tcp,::1,2345,::1,5777").json();
    assert_eq!(
        (&flow["experiment-id"], &flow["activity-id"]),
        (&json!(1), &json!(2))
    );
    assert_eq!(client.get("/dummy/end").status, 200);
    assert_eq!(client.get("/flows/tcp,::1,2345,::1,5777").status, 404);
    let registry = client.get("/registry").json();
    assert_eq!(registry["experiments"][1]["expName"], "atlas");
    assert_eq!(client.get("/healthz").json(), json!({"status": "ok"}));
    assert_eq!(client.get("/openapi.json").json()["openapi"], "3.1.0");
    assert_eq!(
        client.get("/status").json()["plugins"][1]["events"]["accepted"],
        2
    );
    // Two requests in one write. The response to the first, HEAD, has no body.
    client
        .raw(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(client.headers().contains("Content-Length: 16"));
    assert_eq!(client.answer().status, 200);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn errors_name_the_field_and_the_reason() {
    let ns = NetNs::new("api");
    let home = home("{dummyRoutes: true}");
    let daemon = home.start(&ns);
    let mut client = Client::tcp(&ns, API);
    let mut bad = flow_json("start", 1);
    bad["dst-port"] = json!(65536);
    for (method, path, body, status, error) in [
        (
            "POST",
            "/flow",
            bad.to_string(),
            400,
            "dst-port is 65536, expected a number of 1 to 65535",
        ),
        (
            "POST",
            "/flow",
            json!([flow_json("start", 1), bad]).to_string(),
            400,
            "[1] dst-port is 65536, expected a number of 1 to 65535",
        ),
        (
            "POST",
            "/flow",
            "{".to_owned(),
            400,
            "the body is not valid JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            "POST",
            "/flow",
            String::new(),
            400,
            "the body is not valid JSON: EOF while parsing a value at line 1 column 0",
        ),
        ("GET", "/flow", String::new(), 405, "expected POST"),
        ("DELETE", "/flows", String::new(), 405, "expected GET, HEAD"),
        (
            "POST",
            "/dummy/start",
            String::new(),
            405,
            "expected GET, HEAD",
        ),
        (
            "GET",
            "/flow/",
            String::new(),
            404,
            "no such route: GET / lists them",
        ),
        (
            "GET",
            "/flows/x",
            String::new(),
            404,
            "no such flow: an id is protocol,source,port,destination,port as in GET /flows",
        ),
        (
            "GET",
            "/flows?experiment=no",
            String::new(),
            400,
            "experiment: \"no\" is neither an id of 0 to 65535 nor a name of the registry",
        ),
    ] {
        let answer = client.request(method, path, "", &body);
        assert_eq!(
            (answer.status, answer.error().as_str()),
            (status, error),
            "{method} {path}"
        );
        assert_eq!(answer.headers.contains("Allow: "), status == 405);
    }
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("rubbish\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/3.0\r\n\r\n".to_owned(), 505),
        (
            format!(
                "GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
                "x".repeat(20_000)
            ),
            431,
        ),
        (format!("{JSON}Content-Length: 1048577\r\n\r\n"), 413),
        (format!("{JSON}Transfer-Encoding: gzip\r\n\r\n"), 501),
        // Trailers without an end.
        (
            format!("{JSON}Transfer-Encoding: chunked\r\n\r\n0\r\n") + &"a: b\r\n".repeat(2000),
            431,
        ),
    ] {
        let mut client = Client::tcp(&ns, API);
        client.raw(request.as_bytes());
        let answer = client.answer();
        assert_eq!(answer.status, status, "{request:.40}");
        assert!(answer.headers.contains("Connection: close") && client.try_answer().is_none());
    }
    let chunked = format!("{JSON}Transfer-Encoding: chunked\r\n\r\n");
    let body = flow_json("start", 1).to_string();
    client.raw(
        format!(
            "{chunked}5\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n",
            &body[..5],
            body.len() - 5,
            &body[5..]
        )
        .as_bytes(),
    );
    assert_eq!(client.answer().json(), json!({"accepted": 1}));
    daemon.expect_status("plugin_events api rejected_request 4");
    daemon.expect_status("plugin_events api accepted 1");
    daemon.expect_status("flows_open 1");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn requests_without_the_token_are_refused() {
    let ns = NetNs::new("api");
    let home = home("{}");
    let file = home.path("token");
    fs::write(&file, "s3cret-token\n").unwrap();
    for token in [
        "token: s3cret-token".to_owned(),
        format!("tokenFile: '{}'", file.display()),
    ] {
        home.configure(&format!(
            "  api: {{bindAddress: 0.0.0.0, {token}}}\nbackends: {{firefly: {{}}}}\n"
        ));
        let daemon = home.start(&ns);
        let body = flow_json("start", 1).to_string();
        for headers in [
            "",
            "Authorization: Bearer wrong\r\n",
            "Authorization: Bearer s3cret-tokenx\r\n",
            "Authorization: Basic s3cret-token\r\n",
        ] {
            for (method, path) in [
                ("GET", "/flows"),
                ("POST", "/flow"),
                ("GET", "/nothing"),
                ("GET", "/dummy/start"),
            ] {
                // The body does not follow: the answer does not wait for it.
                let mut client = Client::tcp(&ns, API);
                let length = format!("{headers}Content-Length: 1000000\r\n");
                let answer = client.request(method, path, &length, "");
                assert_eq!(answer.status, 401, "{headers}{path}");
                assert!(answer.headers.contains("WWW-Authenticate: Bearer"));
                assert!(answer.headers.contains("Connection: close"));
                assert!(client.try_answer().is_none());
            }
        }
        let mut client = Client::tcp(&ns, API);
        assert_eq!(client.get("/healthz").status, 200);
        let good = "authorization: bearer s3cret-token\r\n";
        assert_eq!(client.request("POST", "/flow", good, &body).status, 200);
        assert_eq!(
            client.request("GET", "/flows", good, "").json()["flows"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
        daemon.expect_status("plugin_events api rejected_token 16");
        client.request("POST", "/flow", good, &flow_json("end", 1).to_string());
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn a_web_page_of_another_site_can_neither_report_flows_nor_read_them() {
    let ns = NetNs::new("api");
    let home = home("{}");
    let socket = home.path("socket");
    home.configure(&format!(
        "  api: {{unixSocket: '{}'}}\nbackends: {{firefly: {{}}}}\n",
        socket.display()
    ));
    let daemon = home.start(&ns);
    let body = flow_json("start", 1).to_string();
    for (method, path, headers, status) in [
        // What a form or a script may send to any address without asking first.
        ("POST", "/flow", "Content-Type: text/plain\r\n", 415),
        (
            "POST",
            "/flow",
            "Content-Type: application/x-www-form-urlencoded\r\n",
            415,
        ),
        ("POST", "/flow", "Origin: http://example.com\r\n", 403),
        ("POST", "/flow", "Origin: null\r\n", 403),
        ("GET", "/flows", "Origin: https://example.com\r\n", 403),
        // A name that its owner resolves to 127.0.0.1.
        ("GET", "/flows", "Host: example.com:7777\r\n", 421),
        (
            "POST",
            "/flow",
            "Host: example.com:7777\r\nOrigin: http://example.com:7777\r\n",
            421,
        ),
        // An image.
        ("GET", "/dummy/start", "", 404),
    ] {
        let answer = Client::tcp(&ns, API).request(method, path, headers, &body);
        assert_eq!(answer.status, status, "{method} {path} {headers}");
    }
    assert_eq!(
        Client::tcp(&ns, API)
            .request("GET", "/healthz", "Host: example.com\r\n", "")
            .status,
        200
    );
    daemon.expect_status("plugin_events api rejected_origin 5");
    daemon.expect_status("plugin_events api rejected_request 2");
    let mut local = Client::unix(&socket);
    assert_eq!(local.get("/flows").json(), json!({"flows": []}));
    let host = "Host: example.com\r\n";
    assert_eq!(local.request("POST", "/flow", host, &body).status, 200);
    let hostname = nix::unistd::gethostname().unwrap();
    for host in [
        "127.0.0.1:7777",
        "localhost:7777",
        hostname.to_str().unwrap(),
    ] {
        let own = format!("Host: {host}\r\nOrigin: http://{host}\r\n");
        let answer = Client::tcp(&ns, API).request("POST", "/flow", &own, &body);
        assert_eq!(answer.status, 200, "{own}{}", answer.body);
    }
    daemon.stop();
}

#[test]
fn bad_settings_of_the_api_are_configuration_errors() {
    for (options, expected) in [
        (
            "{bindAddress: 0.0.0.0}",
            "plugins.api.bindAddress: 0.0.0.0 is not a loopback address: set token or tokenFile",
        ),
        (
            "{bindAddress: '2001:db8::1'}",
            "plugins.api.bindAddress: 2001:db8::1 is not a loopback address",
        ),
        (
            "{bindAddress: localhost}",
            "plugins.api.bindAddress: \"localhost\" is not a valid address",
        ),
        (
            "{bindPort: 65536}",
            "plugins.api.bindPort: 65536 is out of range",
        ),
        (
            "{bindPort: 0}",
            "plugins.api.bindPort: 0 disables TCP, but unixSocket is not set: set one of them",
        ),
        (
            "{token: ''}",
            "plugins.api.token: expected printable ASCII characters without spaces",
        ),
        (
            "{token: a, tokenFile: b}",
            "plugins.api: set either token or tokenFile, not both",
        ),
        (
            "{unixSocket: x, unixSocketMode: 999}",
            "plugins.api.unixSocketMode: \"999\" is not a valid file mode",
        ),
    ] {
        let home = home(options);
        let config = home.path("flowd.cfg");
        let (code, _, error) =
            common::daemon::run(&["config", "check", "-c", config.to_str().unwrap()]);
        assert_eq!(code, 2);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
#[ignore = "needs root"]
fn a_port_or_a_socket_in_use_is_an_error_before_the_daemon_is_ready() {
    let ns = NetNs::new("api");
    let (first, second) = (home("{}"), home("{}"));
    let daemon = first.start(&ns);
    let start = |home: &Home| {
        let mut command = ns.command(PROGRAM);
        let output = command
            .args(["run", "-c"])
            .arg(home.path("flowd.cfg"))
            .output()
            .unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, error) = start(&second);
    assert_eq!(code, 1);
    assert!(
        error.contains(
            "TCP 127.0.0.1:7777 (plugins.api.bindAddress, bindPort): Address already in use"
        ),
        "{error}"
    );
    let socket = first.path("control.sock");
    second.configure("backends: {firefly: {}}\n");
    let text = fs::read_to_string(second.path("flowd.cfg")).unwrap();
    let own = second.path("control.sock").display().to_string();
    fs::write(
        second.path("flowd.cfg"),
        text.replace(&own, socket.to_str().unwrap()),
    )
    .unwrap();
    let (code, error) = start(&second);
    assert_eq!(code, 1);
    assert!(
        error.contains("control.sock (controlSocket): another process is listening on it"),
        "{error}"
    );
    daemon.kill();
    // The daemon replaces a socket left by a killed one.
    let daemon = first.start(&ns);
    assert_eq!(Client::unix(&socket).get("/healthz").status, 200);
    daemon.stop();
}

/// Times two good requests, which must not wait for other clients.
fn prompt(ns: &NetNs) -> Duration {
    let began = Instant::now();
    let mut client = Client::tcp(ns, API);
    assert_eq!(client.get("/flows").status, 200);
    assert_eq!(
        client
            .post("/flow", &flow_json("start", 1).to_string())
            .status,
        200
    );
    began.elapsed()
}

/// Resident memory in KiB.
fn resident(daemon: &Daemon<'_>) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs root"]
fn silent_slow_and_greedy_clients_do_not_delay_others() {
    // Less than the timeouts of the bad clients.
    const PROMPT: Duration = Duration::from_secs(5);
    let ns = NetNs::new("api");
    let home = home("{}");
    let daemon = home.start(&ns);
    prompt(&ns);
    let before = resident(&daemon);

    // 500 clients that send nothing.
    let idle: Vec<_> = (0..500).map(|_| connect(&ns, API)).collect();
    assert!(prompt(&ns) < PROMPT);
    // Clients that send a header or a body byte by byte.
    let mut slow: Vec<_> = (0..50).map(|_| connect(&ns, API)).collect();
    for (n, stream) in slow.iter_mut().enumerate() {
        if n % 2 == 0 {
            let _ = stream.write_all(format!("{JSON}Content-Length: 1000\r\n\r\n").as_bytes());
        }
    }
    for _ in 0..5 {
        for stream in &mut slow {
            let _ = stream.write_all(b"G");
        }
        assert!(prompt(&ns) < PROMPT);
    }
    // A body of 1 GiB, with Content-Length or in chunks.
    for head in ["Content-Length: 1073741824", "Transfer-Encoding: chunked"] {
        let mut client = connect(&ns, API);
        let block = vec![b'x'; 1 << 20];
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut client = &client;
                client
                    .write_all(format!("{JSON}{head}\r\n\r\n").as_bytes())
                    .unwrap();
                for _ in 0..1024 {
                    let size = if head.starts_with('T') {
                        "100000\r\n"
                    } else {
                        ""
                    };
                    let mut send = |bytes: &[u8]| client.write_all(bytes).is_ok();
                    if !send(size.as_bytes())
                        || !send(&block)
                        || (!size.is_empty() && !send(b"\r\n"))
                    {
                        return;
                    }
                }
            });
            assert!(prompt(&ns) < PROMPT);
            sender.join().unwrap();
        });
        let mut answer = String::new();
        let _ = client.read_to_string(&mut answer);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 413 "),
            "{answer}"
        );
    }
    // Many large bodies that are never completed.
    let large: Vec<_> = (0..200)
        .map(|_| {
            let mut stream = connect(&ns, API);
            stream
                .set_write_timeout(Some(Duration::from_secs(1)))
                .unwrap();
            let _ = stream.write_all(format!("{JSON}Content-Length: 1000000\r\n\r\n").as_bytes());
            let _ = stream.write_all(&vec![b' '; 900_000]);
            stream
        })
        .collect();
    assert!(prompt(&ns) < PROMPT);
    let after = resident(&daemon);
    drop((idle, slow, large));
    assert!(
        after < before + (40 << 10),
        "{before} KiB grew to {after} KiB"
    );
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_long_listing_is_complete_and_slow_readers_delay_only_themselves() {
    const FLOWS: usize = 20_000;
    let hosts = Hosts::new();
    let home = home("{}");
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..FLOWS, "2 9"));
    daemon.expect_status(&format!("flows_open {FLOWS}"));
    let mut slow: Vec<_> = (0..20).map(|_| connect(&hosts.here, API)).collect();
    for stream in &mut slow {
        // A small receive buffer, so that the daemon produces only a small part of the listing.
        setsockopt(&*stream, sockopt::RcvBuf, &4096).unwrap();
        stream
            .write_all(b"GET /flows HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
    }
    let mut client = Client::tcp(&hosts.here, API);
    assert_eq!(client.get("/healthz").status, 200);
    // No listing waits for another.
    let listing = client.get("/flows").json();
    drop(slow);
    let ids: std::collections::HashSet<&str> = listing["flows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), FLOWS);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn the_api_matches_its_openapi_document() {
    // `make test` installs it from PyPI.
    let program = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/target/schemathesis/bin/schemathesis"
    );
    let ns = NetNs::new("api");
    let home = home("{}");
    let daemon = home.start(&ns);
    Client::tcp(&ns, API).get("/healthz");
    let output = ns
        .command(program)
        .args([
            "run",
            "http://127.0.0.1:7777/openapi.json",
            "--max-examples",
            "50",
            "--no-color",
            "--seed",
            "1",
        ])
        .current_dir(home.dir.path())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn each_client_has_a_share_of_its_own() {
    let hosts = Hosts::new();
    let home = home("{}");
    let socket = home.path("api.sock");
    home.configure(&format!(
        "  api: {{unixSocket: '{}'}}\nflows: {{maxPerSource: 2}}\nbackends: {{firefly: {{}}}}\n",
        socket.display()
    ));
    let daemon = home.start(&hosts.here);
    let mut clients = [Client::tcp(&hosts.here, API), Client::unix(&socket)];
    for (n, client) in clients.iter_mut().enumerate() {
        let starts: Vec<Value> = (1..=3)
            .map(|port| flow_json("start", 10 * (1 + n as u16) + port))
            .collect();
        let answer = client.post("/flow", &Value::from(starts).to_string());
        assert_eq!(answer.status, 200);
        daemon.expect_status(&format!("dispatcher_events refused_source_share {}", n + 1));
        daemon.expect_status(&format!("flows_open {}", 2 * (n + 1)));
    }
    home.wait_for_log("of api from 127.0.0.1 are open");
    daemon.stop();
}

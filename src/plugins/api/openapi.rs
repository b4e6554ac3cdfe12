//! `GET /openapi.json`: the API as OpenAPI 3.1 describes it. No I/O.

use serde_json::{Map, Value, json};

use crate::registry::{Experiment, Registry};

const OCTET: &str = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
const PORT: &str =
    "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])";
/// Neither the unspecified address nor an IPv4-mapped one.
const IPV6: &str = "(::1|[1-9a-fA-F][0-9a-fA-F]{0,3}(:[0-9a-fA-F]{1,4}){7}|[1-9a-fA-F][0-9a-fA-F]{0,3}(:[0-9a-fA-F]{1,4}){0,5}::[0-9a-fA-F]{1,4})";

/// The document. Names of experiments and activities are those of the registry.
pub fn document(registry: &Registry) -> Value {
    let flow = json!({"$ref": "#/components/schemas/Flow"});
    let open = json!({"$ref": "#/components/schemas/OpenFlow"});
    let body = json!({"anyOf": [
        {"$ref": "#/components/schemas/FlowEvent"},
        {"type": "array", "items": {"$ref": "#/components/schemas/FlowEvent"}},
    ]});
    let accepted = json!({
        "type": "object", "required": ["accepted"],
        "properties": {"accepted": {"type": "integer", "minimum": 0, "description": "Flow events that were taken."}},
    });
    let listing = json!({"type": "object", "required": ["flows"], "properties": {"flows": {"type": "array", "items": open}}});
    let object = json!({"type": "object"});
    let dummy = |what: &str| json!({"get": operation(what, &[("200", "The event was taken.", &accepted), DISPATCHER])});
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "flowd-rs", "version": env!("CARGO_PKG_VERSION"), "license": {"name": "Apache-2.0"},
            "description": "Flow events in, and a view of the open flows. An error is an object with a member error. \
                Where a token is set, every request but GET /healthz bears it.",
        },
        "security": [{}, {"token": []}],
        "paths": {
            "/": {"get": operation("The routes.", &[("200", "The routes.", &object)])},
            "/flow": {"post": {
                "summary": "A flow event, or an array of them: all are taken, or none.",
                "requestBody": {"required": true, "content": {"application/json": {"schema": body}}},
                "responses": responses(&[
                    ("200", "All events were taken.", &accepted),
                    ("400", "A field is wrong: which, and what was expected.", &flow_error()),
                    ("413", "The body is over 1 MiB.", &flow_error()),
                    DISPATCHER,
                ]),
            }},
            "/flows": {"get": {
                "summary": "The open flows, in no order.",
                "parameters": [
                    {"name": "experiment", "in": "query", "description": "Only flows of this experiment, by id or name.", "schema": {"anyOf": [
                        {"type": "integer", "minimum": 0, "maximum": 65535},
                        {"enum": registry.experiments().iter().map(|e| e.name.as_str()).collect::<Vec<_>>()},
                    ]}},
                    {"name": "address", "in": "query", "description": "Only flows with an end at this address; a prefix does as well.", "schema": {"anyOf": [
                        {"type": "string", "pattern": format!("^{OCTET}(\\.{OCTET}){{3}}$")},
                        {"type": "string", "pattern": format!("^{IPV6}$")},
                    ]}},
                ],
                "responses": responses(&[
                    ("200", "The open flows.", &listing),
                    ("400", "A parameter is wrong.", &flow_error()),
                    DISPATCHER,
                ]),
            }},
            "/flows/{id}": {"get": {
                "summary": "One open flow.",
                "parameters": [{"name": "id", "in": "path", "required": true, "schema": {"type": "string"},
                    "description": "Protocol, source, port, destination, port by commas, as in GET /flows."}],
                "responses": responses(&[
                    ("200", "The flow.", &open),
                    ("404", "It is not open.", &flow_error()),
                    DISPATCHER,
                ]),
            }},
            "/registry": {"get": operation("The SciTags registry in use.", &[("200", "As it is published.", &object)])},
            "/status": {"get": operation("The daemon's counters.", &[("200", "Uptime, plugins, backends, queues, last warnings.", &object)])},
            "/healthz": {"get": operation("Whether the daemon works.", &[("200", "It does.", &object), DISPATCHER])},
            "/dummy/start": dummy("Starts the flow tcp [::1]:2345 > [::1]:5777 with the tag 1/2."),
            "/dummy/end": dummy("Ends that flow."),
            "/openapi.json": {"get": operation("This document.", &[("200", "This document.", &object)])},
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
                "Flow": flow_schema(),
                "FlowEvent": {"anyOf": events(registry)},
                "OpenFlow": {"allOf": [flow, open_schema()]},
            },
        },
    })
}

type Described<'a> = (&'a str, &'a str, &'a Value);

static NULL: Value = Value::Null;
/// When the dispatcher has too much to do, or ends.
const DISPATCHER: Described<'static> = ("503", "The daemon is busy or stopping.", &NULL);

fn flow_error() -> Value {
    json!({"$ref": "#/components/schemas/Error"})
}

fn operation(summary: &str, described: &[Described<'_>]) -> Value {
    json!({"summary": summary, "responses": responses(described)})
}

fn responses(described: &[Described<'_>]) -> Value {
    let error = flow_error();
    let unauthorized = (
        "401",
        "A token is set, and the request has not got it.",
        &error,
    );
    let response = |&(status, description, schema): &Described<'_>| {
        let schema = if schema.is_null() { &error } else { schema };
        let content = json!({"application/json": {"schema": schema}});
        (
            status.to_owned(),
            json!({"description": description, "content": content}),
        )
    };
    let all = described.iter().chain([&unauthorized]).map(response);
    Value::Object(all.collect::<Map<_, _>>())
}

/// A flow as it is shown.
fn flow_schema() -> Value {
    let port = json!({"type": "integer", "minimum": 0, "maximum": 65535});
    json!({
        "type": "object",
        "required": ["protocol", "src-ip", "src-port", "dst-ip", "dst-port"],
        "properties": {
            "protocol": {"enum": ["tcp", "udp"]},
            "src-ip": {"type": "string"}, "src-port": port, "dst-ip": {"type": "string"}, "dst-port": port,
        },
    })
}

fn open_schema() -> Value {
    let id = json!({"type": "integer", "minimum": 0, "maximum": 65535});
    json!({
        "type": "object",
        "required": ["id", "state", "experiment-id", "activity-id", "experiment", "activity", "start-time", "age", "origin", "application", "label"],
        "properties": {
            "id": {"type": "string"},
            "state": {"enum": ["start", "ongoing"], "description": "ongoing once there was news of the flow."},
            "experiment-id": id, "activity-id": id,
            "experiment": {"type": "string", "description": "Name, or the id where it has none."},
            "activity": {"type": "string", "description": "Name, or the id where it has none."},
            "start-time": {"type": "string", "format": "date-time"},
            "age": {"type": "number", "minimum": 0, "description": "Seconds since start-time."},
            "origin": {"type": "string", "description": "The plugin that the flow came in by."},
            "application": {"type": ["string", "null"]},
            "label": {"type": ["integer", "null"], "description": "IPv6 flow label of the packets that leave this host, if they are marked so."},
        },
    })
}

/// Every spelling of an event: by address family, and by ids or the names of each experiment.
fn events(registry: &Registry) -> Vec<Value> {
    let ipv4 = json!({"type": "string", "format": "ipv4", "not": {"const": "0.0.0.0"}});
    let ipv6 = json!({"type": "string", "pattern": format!("^{IPV6}$")});
    let id = json!({"type": "integer", "minimum": 0, "maximum": 65535});
    let mut spellings = Vec::new();
    for address in [ipv4, ipv6] {
        spellings.push(event(&address, &id, &id));
        for experiment in registry.experiments() {
            let (experiment, activity) = names(experiment, &id);
            spellings.push(event(&address, &experiment, &activity));
        }
    }
    for end in [
        format!("^{OCTET}(\\.{OCTET}){{2}}\\.[1-9]:{PORT}$"),
        format!("^\\[{IPV6}\\]:{PORT}$"),
    ] {
        spellings.push(go_event(&json!({"type": "string", "pattern": end}), &id));
    }
    spellings
}

/// An experiment by name or id, with its activities by name or any by id.
fn names(experiment: &Experiment, id: &Value) -> (Value, Value) {
    let activities: Vec<&str> = experiment
        .activities
        .iter()
        .map(|a| a.name.as_str())
        .collect();
    (
        json!({"enum": [experiment.name, experiment.id]}),
        json!({"anyOf": [{"enum": activities}, id]}),
    )
}

fn event(address: &Value, experiment: &Value, activity: &Value) -> Value {
    let port = json!({"type": "integer", "minimum": 1, "maximum": 65535});
    let time = json!({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]});
    let bytes = json!({"type": ["integer", "null"], "minimum": 0, "maximum": u64::MAX});
    json!({
        "type": "object", "additionalProperties": false,
        "required": ["state", "protocol", "src-ip", "src-port", "dst-ip", "dst-port", "experiment-id", "activity-id"],
        "properties": {
            "state": {"enum": ["start", "ongoing", "end"]},
            "protocol": {"enum": ["tcp", "udp"]},
            "src-ip": address, "src-port": port, "dst-ip": address, "dst-port": port,
            "experiment-id": experiment, "activity-id": activity,
            "start-time": time, "end-time": time,
            "application": {"type": ["string", "null"], "description": "Sent with the flow's fireflies, up to 128 bytes of it."},
            "usage": {"type": ["object", "null"], "properties": {"received": bytes, "sent": bytes}},
        },
    })
}

fn go_event(end: &Value, id: &Value) -> Value {
    let time = json!({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]});
    json!({
        "type": "object", "description": "flowd-go's spelling.",
        "required": ["State", "Protocol", "Src", "Dst", "Experiment", "Activity"],
        "properties": {
            "State": {"enum": [2, 3, 4], "description": "2 start, 3 end, 4 ongoing"},
            "Protocol": {"enum": [0, 1], "description": "0 tcp, 1 udp"},
            "Family": {"enum": [2, 10]},
            "Src": end, "Dst": end, "Experiment": id, "Activity": id,
            "StartTs": time, "EndTs": time, "Application": {"type": ["string", "null"]},
        },
    })
}
